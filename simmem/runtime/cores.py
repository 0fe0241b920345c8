"""Which cores may the threads of a run use? Those that compute keep one each, those that read go where there is room.

Threads that wake up together behind a read may wake up on one core, and it takes the system some milliseconds to part
them: on two cores an attention of 34 MB behind a read of 40 ms took 6.1 ms, and 4.1 where each had its own core
(3.0 behind no read). OpenMP binds the threads that compute, where it is told before torch is loaded; whatever thread
the bound one starts would be bound with it, so it has to free itself.
"""

from __future__ import annotations

import os

__all__ = ["keep_cores", "keeps_a_core", "run_anywhere"]

_BINDING = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
_EVERYWHERE = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
"""What the process may use: asked before torch is loaded, which binds the thread that loads it."""


def keep_cores() -> None:
    """Have OpenMP keep each of its threads on a core of its own, unless the environment says something already.

    Without effect where torch is loaded, or OpenMP binds no threads (macOS).
    """
    for name, value in _BINDING.items():
        os.environ.setdefault(name, value)


def run_anywhere() -> None:
    """Let the calling thread run on every core that the process may use."""
    if _EVERYWHERE is not None:
        os.sched_setaffinity(0, _EVERYWHERE)


def keeps_a_core() -> bool:
    """Is the calling thread bound to fewer cores than the process may use?"""
    return _EVERYWHERE is not None and os.sched_getaffinity(0) != _EVERYWHERE
