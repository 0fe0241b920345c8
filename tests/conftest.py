"""How many random examples does each law see, and are they the same ones every time?

simmem-local  few, the same on every run: a failure is yours, not chance's
simmem-ci     more, the same on every run: a change lands or not by what it changed
thorough      many, other ones on every run, for `make test-all` and before a release: this one finds new failures,
              and prints the line that reproduces them

Chosen by the environment (`CI` is set on most build machines), or with `--hypothesis-profile`.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Commands run inside this process: bound to one core by the first of them, it would bind all that it starts.
os.environ.setdefault("OMP_PROC_BIND", "false")
# Several test processes share the cores (pytest-xdist): threads of all of them would wait for each other, spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline: the machines that run this are shared. The first example pays for lazy imports.
_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

settings.register_profile("simmem-local", _COMMON, max_examples=25, derandomize=True, database=None)
settings.register_profile("simmem-ci", _COMMON, max_examples=100, derandomize=True, database=None, print_blob=True)
settings.register_profile("thorough", _COMMON, max_examples=500, derandomize=False, print_blob=True)
settings.load_profile("simmem-ci" if os.environ.get("CI") else "simmem-local")
