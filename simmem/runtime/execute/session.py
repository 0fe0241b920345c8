"""Run a plan, as often as asked: a weight file, a store, memory, threads, and what was measured.

Everything that was opened, started or written is gone when the session ends, however it ends.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from simmem.errors import MachineError, SpecError
from simmem.policy.layers import STREAM_CHUNK_BYTES
from simmem.runtime.cores import keeps_a_core
from simmem.runtime.execute.emulated import EmulatedStore
from simmem.runtime.execute.engine import Counted, Engine
from simmem.runtime.execute.hot_engine import HotEngine, TwoDecoders
from simmem.runtime.execute.hot_memory import HotMemory, check_hot_memory
from simmem.runtime.execute.kernels import NORM_EPSILON, Decoder, Rotary, rotary_tables
from simmem.runtime.execute.layout import Layout
from simmem.runtime.execute.measured import timeline_of
from simmem.runtime.execute.memory import Memory, memory_bytes
from simmem.runtime.execute.staging import check_memory
from simmem.runtime.execute.task import HotTask, Task
from simmem.runtime.execute.weights import RandomWeights, Source, WeightFile, random_weights, weight_file
from simmem.runtime.models import machine_failures, require
from simmem.runtime.reader import Reader, Store
from simmem.sim.timeline import Timeline

if TYPE_CHECKING:
    import torch

__all__ = ["How", "Run", "Session", "has_cuda", "open_session"]

Storage = Literal["real", "emulated"]

IMAGE_BYTES = 1 << 30
"""What stands for a larger file of random weights when its device is emulated. [B]"""
FIRST_TOKEN = 2


@dataclass(frozen=True)
class How:
    """Where and with what a plan is run."""

    storage: Storage = "real"
    device: str = "cpu"
    """Where torch computes: cpu, cuda or cuda:N."""
    file: Path | None = None
    """Where the weight file is kept; None: in `scratch`, and gone afterwards."""
    scratch: Path | None = None
    threads: int | None = None
    """Of the processor for a product; None: as many as torch takes."""
    check: bool = False
    """Compare a checksum of every block that is read."""
    source: Source | None = None
    """Whose weights; None: random ones."""
    say: Callable[[str], None] = field(default=lambda _: None)


@dataclass(frozen=True)
class Run:
    """What one pass over the tokens of a task brought."""

    timelines: tuple[Timeline, ...]
    """One for each measured token, times as the simulator gives them."""
    counted: Counted
    """Of the measured tokens."""

    @property
    def token_s(self) -> NDArray[np.float64]:
        """Seconds of every measured token. [s]"""
        return np.array([t.token_s for t in self.timelines])


@dataclass
class Session:
    """A task that is ready to run."""

    task: Task
    how: How
    store: Store
    memory: Memory | HotMemory
    device: torch.device
    weights: WeightFile | None
    driven_s: float = 0.0
    """Spent on running tokens so far. [s]"""

    def run(self, between: Callable[[], None] | None = None) -> Run:
        """Run all tokens once, from the same state every time, over a context of the plan's mean length.

        between : called behind every token; what it takes is not counted. Not for plans that read ahead of a token.

        Raises
        ------
        MachineError
            Reading failed, or the weight file changed underneath.
        """
        task, n = self.task, self.task.lead + self.task.n_tokens
        a, workload = task.layout.architecture, task.candidate.context.workload
        seen = max(round(workload.mean_decode_context), 1)
        decoder = self.decoder(seen, rotary=None if a.learned_position_rows else rotary_tables(seen, a.d_head))
        decoder.fill_context()
        engine = self.drive(decoder, n, position=seen - 1, between=between)
        name = f"{self.how.storage} storage, torch on {self.device}"
        beside = task.host if isinstance(task, HotTask) else None
        lines = [timeline_of(task.column(number), engine.clock.times, number, name, beside=beside)
                 for number in range(task.lead, n)]
        return Run(tuple(lines), engine.counted.of(slice(task.lead, n)))

    def conditions(self) -> dict[str, bool | int | float | str]:
        """What the figures of this session hold for; of emulated storage also what serving it cost."""
        import torch

        found: dict[str, bool | int | float | str] = {
            "torch": torch.__version__, "compute": str(self.device), "threads": torch.get_num_threads(),
            "bound": keeps_a_core(),
            "checked": self.how.check}
        if self.device.type == "cuda":
            found["gpu"] = torch.cuda.get_device_name(self.device)
        if isinstance(self.store, EmulatedStore) and self.store.copy_bytes_per_s:
            found["emulation_copy_bytes_per_s"] = self.store.copy_bytes_per_s
            found["emulation_cpu_share"] = self.store.busy_s / max(self.driven_s, 1e-9)
            found["emulation_late_reads"] = self.store.late
        return found

    def decoder(self, context: int, *, rotary: Rotary | None, epsilon: float = NORM_EPSILON, position_offset: int = 0
                ) -> Decoder | TwoDecoders:
        """A decoder for a context of so many tokens."""
        task = self.task
        if isinstance(task, HotTask):
            return TwoDecoders(task, self.device, context, rotary=rotary, epsilon=epsilon,
                               position_offset=position_offset)
        return Decoder(task.layout.architecture, task.layout.precision, self.device, context, rotary=rotary,
                       epsilon=epsilon, position_offset=position_offset)

    def drive(self, decoder: Decoder | TwoDecoders, n: int, *, ids: NDArray[np.int64] | None = None,
              position: int | None = None, exact: bool = False, after: Callable[[int], None] = lambda _: None,
              between: Callable[[], None] | None = None) -> Engine | HotEngine:
        """Run n tokens; returns the engine with its counts and times.

        Parameters
        ----------
        ids : the tokens; None: each the likeliest after the one before.
        position : of every token; None: 0, 1, 2 and so on.
        after : called with the number of every token that is done.
        between : called behind every token, on no token's time.
        """
        import torch

        task = self.task
        units = [task.active(number) if task.by_neuron else [] for number in range(n)]
        with torch.inference_mode(), machine_failures("running the plan"):
            token_id = FIRST_TOKEN if ids is None else int(ids[0])
            with self._engine(decoder, units, token_id, exact=exact) as engine:
                engine.clock.begin()
                self.driven_s -= time.perf_counter()
                for number in range(n):
                    following = None if ids is None else int(ids[min(number + 1, n - 1)])
                    at = number if position is None else position
                    chosen = engine.token(number, token_id, at) if isinstance(engine, HotEngine) else \
                        engine.token(number, token_id, at, units[number], following)
                    with engine.clock.step(number, len(task.layout.layers)):
                        token_id = int(chosen) if following is None else following
                    after(number)
                    if between is not None:
                        with engine.clock.pause(number):
                            between()
                engine.clock.settle()
                self.driven_s += time.perf_counter()
            if self.weights is not None:
                self.weights.check_unchanged()
        return engine

    def _engine(self, decoder: Decoder | TwoDecoders, units: list[list[NDArray[np.int64]]], token_id: int, *,
                exact: bool) -> Engine | HotEngine:
        """What runs tokens that use these units, the first of them `token_id`; caches are filled."""
        if isinstance(self.memory, HotMemory):
            assert isinstance(decoder, TwoDecoders)
            return HotEngine(self.memory.task, self.memory, decoder, units)  # only active neurons: exact as it is
        assert isinstance(decoder, Decoder)
        if self.task.by_neuron:
            self.memory.start_caches(0, self.task.past())
        self.memory.read_row(token_id)
        return Engine(self.task, self.store, self.memory, decoder, n_tokens=len(units), exact=exact)


@contextlib.contextmanager
def open_session(task: Task, how: How) -> Iterator[Session]:
    """Everything a task needs, made ready.

    Raises
    ------
    SpecError
        The plan asks for something that cannot be run here.
    MachineError
        No room, no such device, storage that fails, or memory too slow to emulate it.
    """
    require("torch")
    import torch

    device = _device(how.device)
    precision = task.layout.precision
    if precision == "fp16" and (device.type == "cpu" or isinstance(task, HotTask)):
        raise SpecError("is not multiplied by processors at a rate worth measuring: torch takes 50 times as long as "
                        "for bf16; plan with bf16 or fp32 weights", key="workload.weights")
    apart = task.memory != task.candidate.context.device.host
    if device.type == "cuda" and not apart:
        raise SpecError(f"found {how.device}, but the plan computes out of {task.memory}, the host's memory",
                        key="--device")
    if isinstance(task, HotTask):
        check_hot_memory(task, device)
    else:
        check_memory(memory_bytes(task, apart=apart), task.memory, device)
    source = how.source or RandomWeights(precision)
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack, machine_failures("running the plan"):
        if how.threads is not None:
            torch.set_num_threads(how.threads)
            stack.callback(torch.set_num_threads, threads)
        weights: WeightFile | None = None
        store: Store
        if how.storage == "emulated":
            link = task.candidate.context.storage_link[1]
            slots = task.layout.units
            store = stack.enter_context(EmulatedStore(
                link, task.depth, _image(task.layout, source),
                slots.slot_bytes if slots else min(int(STREAM_CHUNK_BYTES), task.layout.head.n_bytes),
                timed=not isinstance(task, HotTask)))  # those hold all they use before the first token
        else:
            weights = stack.enter_context(weight_file(task.layout, source, file=how.file, scratch=how.scratch,
                                                      check=how.check, say=how.say))
            store = stack.enter_context(Reader(weights.fd, weights.name, task.depth))
        check = weights.check if weights is not None and how.check else None
        memory = HotMemory(task, store, device, check=check) if isinstance(task, HotTask) else \
            Memory(task, store, device, apart=apart, check=check)
        yield Session(task, how, store, memory, device, weights)


def has_cuda() -> bool:
    """Is there a GPU that torch computes on?"""
    require("torch")
    import torch

    return bool(torch.cuda.is_available())


def _device(name: str) -> torch.device:
    import torch

    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(f"no such device here ({torch.cuda.device_count()} CUDA devices)", key="--device")
    return device


def _image(layout: Layout, source: Source) -> NDArray[np.uint8]:
    """What the emulated device holds: all of a network, or a part of what is random anyway."""
    if isinstance(source, RandomWeights):
        n_bytes = min(layout.n_bytes, IMAGE_BYTES // layout.block_bytes * layout.block_bytes)
        check_memory(n_bytes, "dram")
        return random_weights(n_bytes, layout.precision, source.seed)
    check_memory(layout.n_bytes, "dram")
    image = np.zeros(layout.n_bytes, np.uint8)
    for offset, data in source.contents(layout):
        image[offset : offset + len(data)] = data
    return image
