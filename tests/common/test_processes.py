"""Processes by identity, and what the kernel counts of those killed for lack of memory."""

import os
import subprocess
import sys

import pytest

from extensions.common.processes import is_here, is_running, killed_for, start_of, this_process

CGROUP, MACHINE = "/sys/fs/cgroup/memory.events", "/proc/vmstat"


def test_a_pid_that_was_given_again_is_another_process():
    own = this_process()
    assert is_here(own) and is_running(own)
    assert not is_running(own | {"start": own["start"] - 1})
    assert not is_here(own | {"machine": "another boot"})


def test_a_zombie_has_ended():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_of(child.pid) is None
    child.wait()
    assert start_of(child.pid) is None


@pytest.mark.parametrize(
    "before, now, out_of_memory, words",
    [
        (
            {CGROUP: 1, MACHINE: 5},
            {CGROUP: 2, MACHINE: 6},
            True,
            f"of this run's cgroup; oom_kill in {CGROUP}: 1 before, 2",
        ),
        (
            {CGROUP: 1, MACHINE: 5},
            {CGROUP: 1, MACHINE: 6},
            True,
            "possibly out of memory: the kernel's OOM killer has killed a process on this machine, and dmesg",
        ),
        ({CGROUP: 1, MACHINE: 5}, {CGROUP: 1, MACHINE: 5}, False, "has recorded no out-of-memory kill"),
        ({}, {}, False, "counts no out-of-memory kills: see dmesg"),
        ({CGROUP: 1}, {"/other/memory.events": 9}, False, "counts no out-of-memory kills: see dmesg"),
    ],
)
def test_lack_of_memory_is_named_only_where_the_kernel_counted_it(before, now, out_of_memory, words):
    found, sentence = killed_for(before, now)
    assert found is out_of_memory and words in sentence and ("out of memory: " in sentence) is out_of_memory
