"""How is work put on an agent, CPU or GPU, and timed there?

One interface for both, so that every line of a GPU probe but the calls into CUDA itself is run by tests that have no
GPU. What CUDA does with streams, events and graphs, the CPU does with a second thread, the clock and a loop.
"""

from __future__ import annotations

import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from simmem.runtime.cores import run_anywhere
from simmem.runtime.probe.base import NotHereError

__all__ = ["Agent", "Cpu", "Cuda", "Undisturbed", "fp32_products", "torch_threads"]

Work = Callable[[], Any]


class Agent(ABC):
    """Where kernels run: what they are launched on and what clock times them."""

    name: str
    device: str
    """As torch calls it."""

    @abstractmethod
    def time(self, work: Work) -> float:
        """Seconds from the first to the last of what `work` puts on the agent's main queue. [s]"""

    @abstractmethod
    def time_both(self, one: Work, other: Work) -> float:
        """Seconds from the start of both, each on a queue of its own, to the end of the later one. [s]"""

    @abstractmethod
    def graph(self, steps: Sequence[Work]) -> Work:
        """What launches all steps at once, in order. They are alike: the first is run once before, to be warm."""

    @abstractmethod
    def wait(self) -> None:
        """Until everything that was put on the agent is done."""

    @abstractmethod
    def host_buffer(self, n_bytes: int, *, pinned: bool) -> Any:
        """Random bytes in the host's memory, (n_bytes,) uint8; `pinned` for the copy engine."""


class Cpu(Agent):
    """The host's cores. Its one queue is the calling thread.

    name : "gpu" where it stands in for one in a test.
    """

    device = "cpu"

    def __init__(self, name: str = "cpu") -> None:
        self.name = name

    def time(self, work: Work) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    def time_both(self, one: Work, other: Work) -> float:
        import torch

        mode = torch.is_inference_mode_enabled()

        def there() -> None:
            with torch.inference_mode(mode):  # each thread has its own
                other()

        with ThreadPoolExecutor(1, initializer=run_anywhere) as queue:
            queue.submit(int).result()  # the thread exists
            begin = time.perf_counter()
            second = queue.submit(there)
            one()
            second.result()
            return time.perf_counter() - begin

    def graph(self, steps: Sequence[Work]) -> Work:
        steps[0]()

        def launch() -> None:
            for step in steps:
                step()

        return launch

    def wait(self) -> None:
        """Everything is done when its call returns."""

    def host_buffer(self, n_bytes: int, *, pinned: bool) -> Any:
        import torch

        return torch.randint(0, 255, (n_bytes,), dtype=torch.uint8)


class Cuda(Agent):
    """The first CUDA GPU. Raises NotHereError where there is none."""

    name, device = "gpu", "cuda"

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise NotHereError("no CUDA GPU, or a torch that was built without CUDA")
        self._queues = [torch.cuda.Stream() for _ in range(2)]
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, work: Work) -> float:
        self._begin.record()
        work()
        self._end.record()
        return self._elapsed_s()

    def time_both(self, one: Work, other: Work) -> float:
        import torch

        main = torch.cuda.current_stream()
        self._begin.record()
        for queue, work in zip(self._queues, (one, other), strict=True):
            queue.wait_event(self._begin)
            with torch.cuda.stream(queue):
                work()
        for queue in self._queues:
            main.wait_stream(queue)
        self._end.record()
        return self._elapsed_s()

    def graph(self, steps: Sequence[Work]) -> Work:
        import torch

        # Not torch.cuda.graph: that collects garbage and empties torch's cache each time, at tens of milliseconds.
        queue = self._queues[0]
        queue.wait_stream(torch.cuda.current_stream())
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.stream(queue):
            steps[0]()  # library handles and workspaces exist before the capture
            queue.synchronize()
            captured.capture_begin()
            try:
                for step in steps:
                    step()
            finally:
                captured.capture_end()
        self.wait()

        def launch() -> None:
            captured.replay()

        return launch

    def wait(self) -> None:
        import torch

        torch.cuda.synchronize()

    def host_buffer(self, n_bytes: int, *, pinned: bool) -> Any:
        import torch

        random = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8)
        return random.pin_memory() if pinned else random

    def _elapsed_s(self) -> float:
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3  # torch says milliseconds


class Undisturbed:
    """Times what the host's cores do and prefers samples during which no thread of this process was put off its core.

    Threads of one product wait for each other, so where another process takes a core for one time slice, a product of
    20 µs takes 8 ms. That is a property of the hour and not of the machine: such a sample is taken again, a few times,
    and where most are like that the point says so.
    """

    def __init__(self, tries: int = 4) -> None:
        self._tries = tries
        self.samples = self.disturbed = 0

    def time(self, work: Work, calls: int) -> float:
        """Seconds of one of so many calls. [s]"""
        best = (0, 0.0)
        for attempt in range(self._tries):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            begin = time.perf_counter()
            for _ in range(calls):
                work()
            seconds = time.perf_counter() - begin
            switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
            best = min(best, (switches, seconds)) if attempt else (switches, seconds)
            if not switches:
                break
        self.samples += 1
        self.disturbed += best[0] > 0
        return best[1] / calls

    def refuse(self, median_s: float) -> str | None:
        """Why no figure may rest on the samples: others had the cores."""
        if 2 * self.disturbed <= self.samples:
            return None
        return f"another process took the cores in {self.disturbed} of {self.samples} samples"


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Let torch's kernels use `n` threads meanwhile, without gradients."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def fp32_products(*, tf32: bool) -> Iterator[None]:
    """Let fp32 products of a GPU round their operands to tf32 meanwhile, or not."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
