"""How long does a command take from the shell, the interpreter included, and how much memory does a plan hold?

Whole processes, in turns with a bare `python -c "import numpy"`, which shows how noisy the machine is and
what no Python program on numpy can be faster than. `plan` with everything fixed names the policy, the
precision and every knob of the plan that the search had found, so that nothing is left to search.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

SIMMEM = [str(Path(sys.executable).with_name("simmem"))]
PLAN = ["plan", "--device", "iphone15", "--model", "opt-6.7b"]
ROUNDS = 11
# A process of its own starts the child: the peak that a child reports is not below that of the process it came from.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


class Runs:
    """A command as a whole process, and the processor seconds it took: a busy machine leaves those almost alone."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.cpu_s: list[float] = []

    def __call__(self) -> None:
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, self.command
        self.cpu_s.append(used.ru_utime + used.ru_stime)

    def note(self) -> str:
        return f"processor {median(self.cpu_s):.2f} s; "


bare = Runs([sys.executable, "-c", "import numpy"])


def cold(figures, what: str, target: str, arguments: list[str]) -> None:
    run = Runs([*SIMMEM, *arguments])
    figures.timed(f"simmem {what}, cold", target, run, beside=bare, beside_name="import numpy", rounds=ROUNDS,
                  note=run.note)


@pytest.fixture(scope="module")
def fixed_plan() -> list[str]:
    """The default plan's answer, spelled out."""
    found = json.loads(subprocess.run([*SIMMEM, *PLAN, "--json"], check=True, capture_output=True, text=True).stdout)
    knobs = [f"--set={k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in found["policy"]["knobs"].items()]
    return [*PLAN, "--weights", found["workload"]["weights"], "--policy", found["policy"]["name"], *knobs]


@pytest.mark.parametrize("command", ["--help", "devices", "models", "traces", "policies"])
@pytest.mark.benchmark(group="cold start")
def test_lists(figures, command):
    cold(figures, command, "<= 0.3 s", [command])


@pytest.mark.benchmark(group="cold start")
def test_plan_with_everything_fixed(figures, fixed_plan):
    cold(figures, "plan, policy and knobs fixed", "<= 0.8 s", fixed_plan)


@pytest.mark.benchmark(group="cold start")
def test_default_plan(figures):
    cold(figures, "plan, default: full search", "<= 2 s", PLAN)


def test_peak_memory_of_the_default_plan(figures):
    command = [sys.executable, "-S", "-c", PEAK, *SIMMEM, *PLAN]
    peak_bytes = int(figures.benchmark.pedantic(
        lambda: subprocess.run(command, check=True, capture_output=True, text=True).stdout, rounds=1))
    figures.benchmark.extra_info["peak_bytes"] = peak_bytes
    figures.line("simmem plan, default: peak memory", "<= 1 GB", f"{peak_bytes / 1e6:.0f} MB")
