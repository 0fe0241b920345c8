"""Threads that compute keep a core each; threads that read do not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, threading
from simmem.runtime import cores
cores.keep_cores()
import torch
torch.set_num_threads(2)
torch.mm(torch.rand(512, 512), torch.rand(512, 512))

def affinities():
    return {int(t): os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")}

bound = [cpus for cpus in affinities().values() if len(cpus) == 1]
seen = []
def read():
    cores.run_anywhere()
    seen.append(os.sched_getaffinity(0))
thread = threading.Thread(target=read)
thread.start()
thread.join()
print(len(set(map(tuple, bound))), cores.keeps_a_core(), seen[0] == cores._EVERYWHERE)
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
                    reason="threads are bound to cores on Linux, where there are two")
def test_threads_that_compute_keep_a_core_each_and_others_are_free() -> None:
    pytest.importorskip("torch")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True,
                           env=environment)
    assert found.stdout.split() == ["2", "True", "True"]
