"""How is a kernel of the CPU timed, so that a core taken away by another process is noticed?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from simmem.runtime.probe.agents import Undisturbed, torch_threads
from simmem.runtime.probe.base import MIN_SAMPLE_S, Run

__all__ = ["watched"]

_MAX_CALLS = 100_000


def watched(threads: int, prepare: Callable[[], Callable[[], object]], *, sample_s: float = MIN_SAMPLE_S
            ) -> tuple[Callable[[], AbstractContextManager[Run]], Callable[[float], str | None]]:
    """`setup` and `refuse` of a `Case`, whose samples are as many calls as last `sample_s`.

    prepare : makes what is called, at every visit.
    """
    watch = Undisturbed()
    calls: list[int] = []

    @contextmanager
    def setup() -> Iterator[Run]:
        with torch_threads(threads):
            step = prepare()
            if not calls:
                step()
                took = watch.time(step, 1)
                if took < sample_s:  # else one call it is, and more of them would only cost time
                    took = min(took, watch.time(step, 1), watch.time(step, 1))
                calls.append(int(min(max(sample_s / took, 1), _MAX_CALLS)))
                watch.samples = watch.disturbed = 0
            yield lambda: watch.time(step, calls[0])

    return setup, watch.refuse
