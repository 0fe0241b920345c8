"""What can the GPU do: its memory, the link to the host both ways, launches, copies beside products?

CUDA's own events time it, so no launch of ours is in the figures but where launches are what is asked for. Everything
here but the calls in `agents.Cuda` runs on a CPU too, as if that were a GPU: that is how it is tested. There "host to
device" is a copy in memory and its figures say nothing about any GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from simmem.errors import MachineError
from simmem.runtime.probe import matmul
from simmem.runtime.probe.agents import Agent, Cuda, torch_threads
from simmem.runtime.probe.base import Case, NotHereError, Run, Setting
from simmem.spec.measurement import Condition

__all__ = ["BOTH_WAYS", "DEVICE_TO_HOST", "HOST_TO_DEVICE", "LAUNCH", "OVERLAP", "agent_cases", "cases"]

HOST_TO_DEVICE, DEVICE_TO_HOST, BOTH_WAYS = "host-to-device", "device-to-host", "both-ways"
LAUNCH, OVERLAP = "launch", "overlap"

SIZES = tuple(4096 << k for k in range(19))
"""4 KiB to 1 GiB."""
_WAITED_BYTES = 1 << 22
_STREAM_BYTES = 1 << 30
_OVERLAP_BYTES = 1 << 26
_LAUNCHES = (1, 10, 100)
_SAMPLE_S = 1e-3
_MAX_CALLS = 64
_MAX_GPU_BYTES = 1 << 34


def cases(setting: Setting) -> list[Case]:
    """Everything there is to measure on the first CUDA GPU; nothing where the setting's device is the CPU.

    Raises MachineError where a GPU is asked for and there is none.
    """
    if setting.device != "cuda":
        return []
    import torch

    try:
        agent = Cuda()
    except NotHereError as why:
        raise MachineError(str(why)) from None
    free, _ = torch.cuda.mem_get_info()
    cache = int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or setting.cache_bytes
    return agent_cases(setting, agent, cache_bytes=cache, memory_bytes=min(free // 2, _MAX_GPU_BYTES))


def agent_cases(setting: Setting, agent: Agent, *, cache_bytes: int, memory_bytes: int) -> list[Case]:
    """The same of any agent with so large a cache and so much memory; the host's share is `setting.memory_bytes`."""
    buffers = _Buffers(agent, host_bytes=setting.memory_bytes // 4, device_bytes=memory_bytes // 8)
    sizes = [n for n in (SIZES[::4] if setting.quick else SIZES) if n <= min(buffers.host_bytes, buffers.device_bytes)]
    found = [_stream(probe, buffers, agent, cache_bytes) for probe in ("memory-read", "memory-copy")]
    for pinned in (True, False):
        for probe in (HOST_TO_DEVICE, DEVICE_TO_HOST):
            found += [_transfer(probe, buffers, agent, size, pinned=pinned) for size in sizes]
            found += [_transfer(probe, buffers, agent, size, pinned=pinned, waited=True) for size in sizes
                      if size <= _WAITED_BYTES]
    found += [_both_ways(buffers, agent, size) for size in sizes if 2 * size <= min(buffers.host_bytes, SIZES[-1])]
    found += [_launch(agent, n, how) for n in _LAUNCHES for how in ("stream", "graph")]
    found.append(_launch(agent, 1, "waited"))
    pool = matmul.Pool(cache_bytes, memory_bytes // 2, device=agent.device, seed=setting.seed)
    for batch in (1, 512):
        found += _overlap(pool, buffers, agent, batch)
    return found + matmul.gpu_cases(replace(setting, memory_bytes=memory_bytes // 2), agent, cache_bytes)


class _Buffers:
    """Bytes on either side of the link, made when first asked for."""

    def __init__(self, agent: Agent, *, host_bytes: int, device_bytes: int) -> None:
        self.host_bytes, self.device_bytes = host_bytes, device_bytes
        self._agent = agent
        self._made: dict[str, Any] = {}

    def host(self, *, pinned: bool) -> Any:
        name = "pinned" if pinned else "pageable"
        if name not in self._made:
            self._made[name] = self._agent.host_buffer(min(self.host_bytes, SIZES[-1]), pinned=pinned)
        return self._made[name]

    def device(self, which: int = 0) -> Any:
        import torch

        if which not in (0, 1):
            raise ValueError("there are two")
        name = f"device {which}"
        if name not in self._made:
            n = min(self.device_bytes, _STREAM_BYTES)
            self._made[name] = torch.randint(0, 127, (n,), dtype=torch.uint8, device=self._agent.device)
        return self._made[name]


def _case(probe: str, conditions: dict[str, Condition], agent: Agent, work: Callable[[], Callable[[], float]], *,
          n_bytes: float = 0.0, requests: float = 1.0, priority: int = 1) -> Case:
    """`work` prepares and returns what gives the seconds of one sample."""
    @contextmanager
    def prepared() -> Iterator[Run]:
        with torch_threads(1):
            yield work()
            agent.wait()

    def setup() -> AbstractContextManager[Run]:
        return prepared()

    return Case(probe, {"agent": agent.name, **conditions}, setup, bytes=n_bytes, requests=requests, priority=priority)


def _repeated(agent: Agent, step: Callable[[int], Any], known_calls: list[int]) -> Callable[[], float]:
    """Seconds of one of as many steps as last a millisecond; a step is told its number."""
    if not known_calls:
        step(0)
        known_calls.append(int(min(max(_SAMPLE_S / max(agent.time(lambda: step(0)), 1e-9), 1), _MAX_CALLS)))
    calls = known_calls[0]

    def work() -> None:
        for i in range(calls):
            step(i)

    return lambda: agent.time(work) / calls


def _stream(probe: str, buffers: _Buffers, agent: Agent, cache_bytes: int) -> Case:
    """The memory of the agent, read (a sum of fp32) or copied."""
    size = min(buffers.device_bytes, _STREAM_BYTES) // 4 * 4
    known: list[int] = []

    def work() -> Callable[[], float]:
        import torch

        source, target = (buffers.device(k)[:size].view(torch.int32) for k in (0, 1))
        if probe == "memory-copy":
            return _repeated(agent, lambda _: target.copy_(source), known)
        numbers = source.view(torch.float32)
        return _repeated(agent, lambda _: numbers.amax(), known)

    level = "dram" if size >= matmul.ROTATION * cache_bytes else "cache"
    return _case(probe, {"level": level, "threads": 1, "size_bytes": size}, agent, work,
                 n_bytes=size * (2.0 if probe == "memory-copy" else 1.0), priority=0)


def _transfer(probe: str, buffers: _Buffers, agent: Agent, size: int, *, pinned: bool, waited: bool = False) -> Case:
    """One copy over the link; `waited` by a host that does nothing else, else one of several in a row."""
    known: list[int] = []

    def work() -> Callable[[], float]:
        copy = _copier(probe, buffers, size, pinned=pinned)
        if not waited:
            return _repeated(agent, copy, known)
        at = 0

        def run() -> float:
            nonlocal at
            at += 1
            begin = time.perf_counter()
            copy(at)
            agent.wait()
            return time.perf_counter() - begin

        return run

    return _case(probe, {"size_bytes": size, "pinned": pinned, "waited": waited}, agent, work, n_bytes=float(size))


def _copier(probe: str, buffers: _Buffers, size: int, *, pinned: bool) -> Callable[[int], Any]:
    """What copies the k-th piece of so many bytes."""
    host, device = buffers.host(pinned=pinned), buffers.device()
    pieces = max(min(len(host), len(device)) // size, 1)

    def copy(k: int) -> None:
        begin = k % pieces * size
        there, here = device[begin:begin + size], host[begin:begin + size]
        if probe == HOST_TO_DEVICE:
            there.copy_(here, non_blocking=pinned)
        else:
            here.copy_(there, non_blocking=pinned)

    return copy


def _both_ways(buffers: _Buffers, agent: Agent, size: int) -> Case:
    """A copy each way at the same time, pinned, over different bytes."""
    def work() -> Callable[[], float]:
        host = buffers.host(pinned=True)
        there, here = buffers.device(0)[:size], host[:size]
        back, from_there = host[-size:], buffers.device(1)[:size]

        def run() -> float:
            return agent.time_both(lambda: there.copy_(here, non_blocking=True),
                                   lambda: back.copy_(from_there, non_blocking=True))

        return run

    return _case(BOTH_WAYS, {"size_bytes": size, "pinned": True}, agent, work, n_bytes=2.0 * size, requests=2.0)


def _launch(agent: Agent, kernels: int, how: str) -> Case:
    """Kernels that do nothing to speak of: one by one, as one graph, or one that the host waits for."""
    def work() -> Callable[[], float]:
        import torch

        tiny = torch.zeros(1, device=agent.device)

        def step() -> None:
            tiny.add_(1.0)

        if how == "graph":
            launch = agent.graph([step] * kernels)
            return lambda: agent.time(launch)
        if how == "waited":
            def run() -> float:
                begin = time.perf_counter()
                step()
                agent.wait()
                return time.perf_counter() - begin
            return run

        def every() -> None:
            for _ in range(kernels):
                step()

        return lambda: agent.time(every)

    return _case(LAUNCH, {"launch": how, "kernels": kernels}, agent, work, requests=float(kernels), priority=0)


def _overlap(pool: matmul.Pool, buffers: _Buffers, agent: Agent, batch: int) -> list[Case]:
    """A copy to the agent, products that take about as long, and both at once."""
    size, shape = min(_OVERLAP_BYTES, buffers.host_bytes, buffers.device_bytes), pool.square()
    known: list[int] = []

    def parts() -> tuple[Callable[[], Any], Callable[[], Any]]:
        import torch

        copier = _copier(HOST_TO_DEVICE, buffers, size, pinned=True)
        x = pool.activations(batch, shape.cols, "bf16")
        out = pool.results(batch, shape.rows, "bf16")
        weights = pool.weights(shape, "bf16")

        def product() -> None:
            torch.mm(x, weights.next(), out=out)

        if not known:
            for _ in range(2):
                copy_s, product_s = agent.time(lambda: copier(0)), agent.time(product)
            known.append(int(min(max(copy_s / product_s, 1), 1000)))

        def products() -> None:
            for _ in range(known[0]):
                product()

        return lambda: copier(0), products

    def work(what: str) -> Callable[[], float]:
        copy, products = parts()
        if what == "both":
            return lambda: agent.time_both(copy, products)
        return lambda: agent.time(copy if what == "copy" else products)

    said: dict[str, Condition] = {"size_bytes": size, **shape._asdict(), "batch": batch, "dtype": "bf16"}
    return [_case(OVERLAP, {"what": what, **said}, agent, partial(work, what),
                  n_bytes=0.0 if what == "product" else float(size)) for what in ("copy", "product", "both")]
