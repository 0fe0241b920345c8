"""What does it cost to do nothing: to call a kernel, to hand work to another thread, to choose a token?

These constants belong to the software, not to the hardware: torch's calls from Python, Python's queues and threads.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from simmem.runtime.cores import run_anywhere
from simmem.runtime.probe.base import ALWAYS, Case, Run, Setting
from simmem.runtime.probe.watched import watched
from simmem.spec.measurement import Condition

__all__ = ["BARRIER", "CHOICE", "HAND_OFF", "OP", "cases"]

OP, BARRIER, HAND_OFF, CHOICE = "op-call", "op-parallel", "hand-off", "token-choice"

_TINY = 16
_PARALLEL_ELEMENTS = 1 << 16
"""Twice the elements from which torch shares an elementwise kernel out among threads."""
_VOCABULARY = 32_000


def cases(setting: Setting) -> list[Case]:
    """A product too small to take time, a kernel that all threads share, a token chosen, a queue there and back."""
    said: dict[str, Condition] = {"agent": "cpu", "through": "queue"}
    found = [Case(HAND_OFF, said, _there_and_back, requests=1.0, calls=None, priority=ALWAYS),
             _case(OP, setting.threads, _tiny_product, op="mm", rows=_TINY, cols=_TINY),
             _case(CHOICE, setting.threads, _choice, vocabulary=_VOCABULARY)]
    return found + [_case(BARRIER, n, _shared_kernel, op="add", elements=_PARALLEL_ELEMENTS)
                    for n in sorted({1, setting.threads})]


def _case(probe: str, threads: int, prepare: Callable[[], Callable[[], object]], **said: Condition) -> Case:
    setup, refuse = watched(threads, prepare)
    return Case(probe, {"agent": "cpu", **said, "threads": threads}, setup, requests=1.0, priority=ALWAYS,
                refuse=refuse)


def _tiny_product() -> Callable[[], object]:
    import torch

    x, w, out = torch.rand(1, _TINY), torch.rand(_TINY, _TINY), torch.empty(1, _TINY)
    return lambda: torch.mm(x, w, out=out)


def _shared_kernel() -> Callable[[], object]:
    import torch

    x, out = torch.rand(_PARALLEL_ELEMENTS), torch.empty(_PARALLEL_ELEMENTS)
    return lambda: torch.add(x, x, out=out)


def _choice() -> Callable[[], object]:
    import torch

    logits = torch.rand(_VOCABULARY)
    return lambda: int(logits.argmax())


@contextmanager
def _there_and_back() -> Iterator[Run]:
    """A queue to another thread, and one back: what a reader's hand-off costs both ways."""
    there: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    back: queue.SimpleQueue[int] = queue.SimpleQueue()

    def answer() -> None:
        run_anywhere()
        while (got := there.get()) is not None:
            back.put(got)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()

    def run() -> None:
        there.put(1)
        back.get()

    try:
        yield run
    finally:
        there.put(None)
        thread.join()
