"""How does the processor compute beside a unit with a memory of its own, and what goes between the two memories?

The caller launches on the unit and hands the processor's part to a thread; what the two exchange is copied on streams
of their own, one in each direction, out of and into pinned memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from simmem.runtime.cores import run_anywhere
from simmem.runtime.execute.measured import Clock, Key

if TYPE_CHECKING:
    import torch

__all__ = ["Beside", "Lane"]


class Lane:
    """Copies in one direction between the memories.

    Parameters
    ----------
    device : the unit with a memory of its own.
    behind : a copy waits for what the calling thread launched on the device before it; else for nothing.
    """

    def __init__(self, device: torch.device, clock: Clock, *, behind: bool) -> None:
        self._device, self._clock, self._behind = device, clock, behind
        self._stream: Any = None
        if device.type == "cuda":
            import torch

            self._stream = torch.cuda.Stream(device)

    def copy(self, key: Key, source: torch.Tensor, into: torch.Tensor) -> Callable[[], None]:
        """Copy, timed as `key`; what is returned, when it is called, returns once the bytes are there."""
        if self._stream is None:
            began = time.perf_counter()
            into.copy_(source)
            self._clock.times[key] = (began, time.perf_counter())
            return _nothing
        import torch

        if self._behind:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
            self._stream.wait_event(ready)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            first.record()
            into.copy_(source, non_blocking=True)
            last.record()
        self._clock.note(key, (first, last))

        def arrived() -> None:
            last.synchronize()

        return arrived

    def join(self) -> None:
        """What is launched on the device next waits for all copies so far."""
        if self._stream is not None:
            import torch

            torch.cuda.current_stream(self._device).wait_stream(self._stream)


def _nothing() -> None:
    """On the processor a copy is done when it returns."""


class Beside:
    """The thread that computes on the processor, in the order of handing in; a context manager that ends it.

    threads : that it multiplies with.
    """

    def __init__(self, threads: int) -> None:
        def begin() -> None:
            import torch

            run_anywhere()  # whoever started it may keep to one core
            torch.set_num_threads(threads)

        self._failed: BaseException | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="simmem-beside", initializer=begin)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)  # what was handed in and not begun is nobody's any more

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Do it once all that was handed in before is done; its `result()` raises what went wrong."""
        return self._pool.submit(self._do, work)

    def _do(self, work: Callable[[], None]) -> None:
        import torch

        if self._failed is not None:  # what comes behind a failure has no input: it fails alike
            raise self._failed
        try:
            with torch.inference_mode():
                work()
        except BaseException as error:
            self._failed = error
            raise
