"""A copy of the files that setup needs, with stub interpreters instead of installs."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT

# Programs that the scripts may call. `cc`, `c++`, the interpreters, nvidia-smi and df are added by each test as stubs.
TOOLS = ["bash", "env", "awk", "cat", "chmod", "cksum", "cp", "dirname", "grep", "head", "mkdir", "rm", "tail"]

PYTHON_STUB = """#!/usr/bin/env bash
case "$*" in
*version_info*) echo "${STUB_VERSION:-3.11}" ;;
*ensurepip*) [ -z "${STUB_NO_VENV:-}" ] ;;
*Python.h*) [ -z "${STUB_NO_HEADERS:-}" ] ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$STUB_VENV_PYTHON" "$3/bin/python" && chmod +x "$3/bin/python" ;;
*) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""

VENV_PYTHON_STUB = """#!/usr/bin/env bash
echo "$*" >>"$STUB_CALLS"
case "$*" in
"-m pip install "*) if [ -n "${STUB_PIP_SAYS:-}" ]; then echo "$STUB_PIP_SAYS"; exit 1; fi ;;
"-m pip "* | -) ;;
*) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""


def write_stub(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Tree:
    """A copy of the files that setup needs, in a path with a space, and a PATH of stubs."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "my project"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        self.bin.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copytree(ROOT / "requirements", self.root / "requirements")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.fail(f"{tool} is not on PATH"))
        for compiler in ("cc", "c++"):
            write_stub(self.bin / compiler, "#!/usr/bin/env bash\n")
        write_stub(self.bin / "python3.11", PYTHON_STUB)
        write_stub(folder / "venv_python", VENV_PYTHON_STUB)
        self.free_gb(100)
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "STUB_CALLS": str(self.calls_file),
            "STUB_VENV_PYTHON": str(folder / "venv_python"),
        }

    def free_gb(self, number: int) -> None:
        write_stub(self.bin / "df", f"#!/usr/bin/env bash\necho Header\necho dev 0 0 {number * 1048576} 0% /\n")

    def setup(self, **env: str) -> subprocess.CompletedProcess[str]:
        script = 'set -euo pipefail; source "$0/launch/setup.sh"; echo "first on PATH: ${PATH%%:*}"'
        return run([str(self.bin / "bash"), "-c", script, str(self.root)], env=self.env | env)

    def pip_installs(self) -> list[str]:
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [call for call in calls if call.startswith("-m pip install ")]


def run(command: list[str], **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)
