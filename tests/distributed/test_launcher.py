"""DeepSpeed's launcher without its faults."""

import sys

import pytest
from support import ROOT, free_port, run_command

from extensions.distributed import launcher

SCRIPTS = {
    "an error that the rank has printed": (
        "import sys; print('error: no', file=sys.stderr); sys.exit(2)",
        2,
        "error: no",
    ),
    "a killed rank": ("import os; os.kill(os.getpid(), 9)", 247, "error: a rank was killed by SIGKILL"),
    "a killed per-node launcher": (  # DeepSpeed 0.19.6 exits with status 0
        "import os; os.kill(os.getppid(), 9)",
        247,
        "error: DeepSpeed's per-node launcher, the parent of the ranks, was killed by SIGKILL",
    ),
}
LAUNCHER = [sys.executable, "-c", "from extensions.distributed.launcher import main; main()"]


@pytest.mark.slow
@pytest.mark.parametrize("case", SCRIPTS)
@pytest.mark.parametrize("options", [[], ["--quiet"]])
def test_only_the_error_is_printed(tmp_path, monkeypatch, case, options):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    source, status, error = SCRIPTS[case]
    (tmp_path / "rank.sh").write_text(source)
    port = ["--num_accelerators", "1", "--master_port", str(free_port())]
    result = run_command([*LAUNCHER, *options, *port, str(tmp_path / "rank.sh")])
    assert (result.returncode, result.stdout) == (status, "")
    assert [line[: len(error)] for line in result.stderr.splitlines()] == [error]


@pytest.mark.slow
def test_deepspeeds_messages_are_printed_where_they_are_asked_for(tmp_path):
    result = run_command(
        [*LAUNCHER, "--log_level", "info", "--master_port", str(free_port()), str(tmp_path / "none.sh")]
    )
    assert result.returncode == 2 and "sigkill_handler" in result.stdout


def test_scripts_of_another_checkout_are_known(tmp_path):
    """A second checkout may use the environment of the first, whose `deepspeed` then gives both a free port."""
    script = tmp_path / "launch" / "ppo.sh"
    assert not launcher._is_own(str(script)), "another program"
    rendezvous = tmp_path / "extensions" / "distributed" / "rendezvous.py"
    rendezvous.parent.mkdir(parents=True)
    rendezvous.touch()
    assert launcher._is_own(str(script)) and launcher._is_own(str(ROOT / "launch" / "sft.sh"))
    assert not launcher._is_own(str(tmp_path / "ppo.sh")) and not launcher._is_own("/ppo.sh")
