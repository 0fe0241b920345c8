"""What is a device? Memory tiers and compute agents, joined by links, every figure sourced.

Bandwidth belongs to an (agent, memory) pair, never to a memory: the CPU of an Apple or AMD
unified-memory chip cannot draw what its GPU can. `Memory.rate` is what all agents together can
draw; it bounds the sum and is what the event engine shares out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from simmem.errors import SpecError, UnknownNameError
from simmem.spec import library
from simmem.spec.base import (
    Bytes,
    BytesPerSecond,
    Count,
    Exponent,
    Figure,
    FlopPerSecond,
    Frozen,
    JoulePerByte,
    JoulePerFlop,
    Kind,
    NormExponent,
    Ratio,
    Seconds,
    Watt,
    load_toml,
    validate,
    weakest,
)
from simmem.spec.costmodel import FittedCost, load_cost_model
from simmem.spec.precision import COMPUTE_FALLBACK

if TYPE_CHECKING:
    import networkx

__all__ = ["Agent", "Bus", "Device", "Engine", "Interference", "Link", "Memory", "PerParam", "load_device"]


Launch = Literal["stream", "graph"]
KernelKey = Annotated[str, Field(pattern=r"^(attention|ffn|head)-(fp32|bf16|fp16)$")]
"""Phase and the precision it is computed in."""


class PerParam(Figure):
    """Bytes for each parameter. [B]"""

    dimension = "ratio"


class Memory(Frozen):
    """A tier: flash, DRAM or the memory of a GPU."""

    kind: Literal["storage", "host", "unified", "device"]
    capacity: Bytes
    reserved: Bytes | None = None
    """What a process cannot have of it: the system, other programs, per-process limits. [B]"""
    rate: BytesPerSecond | None = None
    """What all agents and links together can draw. [B/s]"""
    energy_per_byte: JoulePerByte | None = None

    @property
    def budget_bytes(self) -> float:
        """What one process may hold when the user names no budget. [B]"""
        return self.capacity.value - (self.reserved.value if self.reserved else 0.0)


class Agent(Frozen):
    """A unit that computes out of one memory."""

    memory: str
    flop_per_s: dict[Literal["fp32", "fp16", "bf16", "int8"], FlopPerSecond] = Field(min_length=1)
    flop_share: Ratio
    """Share of the peak that large matrix products reach."""
    rate: BytesPerSecond
    """Bandwidth of this (agent, memory) pair. [B/s]"""
    rate_share: Ratio
    """Share of `rate` that weight-streaming kernels reach (1 where `rate` was measured with them)."""
    op_overhead: Seconds
    """Constant per kernel: launch, synchronisation of threads, tails. [s]"""
    step_overhead: Seconds | None = None
    """Constant per decode step: sampling, the framework's loop. [s]"""
    graph_overhead: Seconds | None = None
    """Constant per kernel of a recorded graph, which the host launches once; `op_overhead` where absent. [s]"""
    kernel_overhead: dict[KernelKey, Seconds] = Field(default_factory=dict, max_length=16)
    """Constant per kernel of a phase at a precision ("attention-bf16") where measured, else `op_overhead`. [s]"""
    wake_time: Seconds | None = None
    """What the first op behind a wait for storage takes longer: threads and caches that went cold. [s]"""
    energy_per_flop: JoulePerFlop | None = None
    compute_precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Set by an engine that widens weights before use: the multiply reads this many bytes."""
    processors: Count | None = None
    """Units that each work on one tile of a product (streaming multiprocessors)."""
    cache: Bytes | None = None
    """Last-level cache, which all of them share. [B]"""
    cache_rate: BytesPerSecond | None = None
    """Bandwidth of what the cache holds. [B/s]"""
    attention_rate: BytesPerSecond | None = None
    """Stored keys and values that its attention goes through; `rate` · `rate_share` where absent. [B/s]"""
    dequantise_bytes: PerParam | None = None
    """Memory traffic of unpacking a quantised parameter before the multiply, the packed one apart; 0: fused. [B]"""
    launch: Launch | None = None
    """How the engine launches the kernels of a decode step; one by one where absent."""
    h2d_overlaps_cpu: bool | None = None
    """Of an agent in host memory: whether the engine copies to the GPU while it computes. True where absent."""

    def computes_as(self, weights: str) -> Literal["fp32", "fp16", "bf16", "int8"] | None:
        """In which precision it multiplies weights of another; None where it has no rate for any that would do."""
        return next((p for p in COMPUTE_FALLBACK[weights] if p in self.flop_per_s), None)


class Link(Frozen):
    """A path between two memories; `storage` links have a request size × depth surface."""

    kind: Literal["storage", "copy"]
    source: str
    target: str
    rate: BytesPerSecond
    """Sequential or large-copy rate: the cap whatever the request size. [B/s]"""
    latency: Seconds
    """Time of one small request with nothing else in flight. [s]"""
    request_time: Seconds | None = None
    """storage: time per request that saturation leaves, whatever the depth (a of t = a + s/B). [s]"""
    request_rate: BytesPerSecond | None = None
    """storage: transfer rate inside a request at saturation (B of t = a + s/B). [B/s]"""
    single_rate: BytesPerSecond | None = None
    """storage: transfer rate inside a request with nothing else in flight; `rate` where absent. [B/s]"""
    cached_rate: BytesPerSecond | None = None
    """storage: of reads that the system's page cache holds, all readers together; unknown where absent. [B/s]"""
    block: Bytes | None = None
    """storage: reads round up to this. [B]"""
    best_depth: Count | None = None
    """storage: beyond this many threads, more threads lose throughput."""
    overload_exponent: Exponent | None = None
    """storage: request time grows as (depth / best_depth) to this power past `best_depth`."""
    saturation_exponent: NormExponent | None = None
    """storage: how sharply throughput bends from latency to saturation; at least 1 (service times scatter), 2 where
    absent, more where they do not."""
    batch_time: Seconds | None = None
    """storage: what a batch of reads takes beside them: handed in, and waited for by one that slept. [s]"""
    reader_time: Seconds | None = None
    """storage: waking one reader for a batch, beside what is read. [s]"""
    sustained_rate: BytesPerSecond | None = None
    energy_per_byte: JoulePerByte | None = None
    bus: str | None = None
    """What it shares with other links, such as the other direction of the same lanes: one of `Device.bus`."""

    @model_validator(mode="after")
    def _storage_is_complete(self) -> Link:
        if self.kind == "storage":
            for name in ("request_time", "request_rate", "block"):
                if getattr(self, name) is None:
                    raise ValueError(f"a storage link needs {name}")
        return self


class Bus(Frozen):
    """What several links draw on together."""

    rate: BytesPerSecond
    """All of them at once, both directions. [B/s]"""


class Interference(Frozen):
    """Measured: while `aggressor` uses `memory`, `victim` keeps this share of its speed."""

    victim: str
    aggressor: str
    memory: str
    share: Ratio


class Engine(Frozen):
    """What a named software stack achieves on one agent, where that is known (anchors)."""

    agent: str
    rate_share: Ratio | None = None
    flop_share: Ratio | None = None
    op_overhead: Seconds | None = None
    step_overhead: Seconds | None = None
    compute_precision: Literal["fp32", "fp16", "bf16"] | None = None
    attention_rate: BytesPerSecond | None = None
    dequantise_bytes: PerParam | None = None
    launch: Launch | None = None
    h2d_overlaps_cpu: bool | None = None
    source: str = Field(min_length=4)


_ENGINE_SETS = tuple(name for name in Engine.model_fields if name in Agent.model_fields)


class Device(Frozen):
    """A machine: the graph of its memories and agents, with sourced figures."""

    schema_: Literal["simmem.device/1"] = Field(alias="schema")
    name: str
    title: str
    aliases: tuple[str, ...] = ()
    memory: dict[str, Memory]
    agent: dict[str, Agent]
    link: dict[str, Link]
    bus: dict[str, Bus] = Field(default_factory=dict)
    interference: tuple[Interference, ...] = ()
    idle: Watt | None = None
    engine: dict[str, Engine] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    compare_with: str | None = None
    """Another account of the same machine, by name or path; its sheet shows the two side by side."""
    cost_model: FittedCost | None = None
    """In the file: the name of a fitted cost model, relative to it."""

    @model_validator(mode="after")
    def _graph_is_whole(self) -> Device:
        for name, agent in self.agent.items():
            if agent.memory not in self.memory:
                raise ValueError(f"agent.{name}.memory is {agent.memory!r}, which is no memory of this device")
        for name, link in self.link.items():
            for end in (link.source, link.target):
                if end not in self.memory:
                    raise ValueError(f"link.{name} joins {end!r}, which is no memory of this device")
            if link.bus is not None and link.bus not in self.bus:
                raise ValueError(f"link.{name}.bus is {link.bus!r}, which is no bus of this device")
        storage = [n for n, m in self.memory.items() if m.kind == "storage"]
        if len(storage) != 1:
            raise ValueError(f"a device has exactly one storage tier, found {len(storage)}")
        for name, agent in self.agent.items():
            if self._path(storage[0], agent.memory) is None:
                raise ValueError(f"agent.{name} computes out of {agent.memory!r}, which storage cannot reach")
        for name, memory in self.memory.items():
            if memory.reserved and memory.reserved.value >= memory.capacity.value:
                raise ValueError(f"memory.{name} reserves all of its capacity")
        for engine in self.engine.values():
            if engine.agent not in self.agent:
                raise ValueError(f"an engine names the agent {engine.agent!r}, which this device has not")
        return self

    @property
    def is_unified(self) -> bool:
        """True where every agent computes out of the memory that storage is read into."""
        return all(a.memory == self.host for a in self.agent.values())

    @property
    def storage(self) -> str:
        """Name of the storage tier."""
        return next(n for n, m in self.memory.items() if m.kind == "storage")

    @property
    def host(self) -> str:
        """Name of the memory that storage is read into."""
        return next(k.target for k in self.link.values() if k.source == self.storage)

    def path(self, source: str, target: str) -> tuple[str, ...]:
        """Names of the links from one memory to another, in order; empty when they are the same."""
        found = self._path(source, target)
        if found is None:
            raise SpecError(f"device {self.name} has no path from {source} to {target}")
        return found

    def _path(self, source: str, target: str) -> tuple[str, ...] | None:
        # Device graphs have two or three memories: breadth first over the links is the whole job,
        # and importing networkx for it would cost a fifth of a `simmem plan`; graph() is for the rest.
        frontier: list[tuple[str, tuple[str, ...]]] = [(source, ())]
        seen = {source}
        for here, links in frontier:
            if here == target:
                return links
            for name, link in self.link.items():
                if link.source == here and link.target not in seen:
                    seen.add(link.target)
                    frontier.append((link.target, (*links, name)))
        return None

    def graph(self) -> networkx.DiGraph:
        """The device as a networkx graph: memories and agents are nodes, links and pairs are edges."""
        import networkx

        graph = networkx.DiGraph(name=self.name)
        for name, memory in self.memory.items():
            graph.add_node(name, what="memory", kind=memory.kind, capacity_bytes=memory.capacity.value)
        for name, agent in self.agent.items():
            graph.add_node(name, what="agent")
            graph.add_edge(agent.memory, name, what="pair", rate_bytes_per_s=agent.rate.value)
        for name, link in self.link.items():
            graph.add_edge(link.source, link.target, what="link", name=name, rate_bytes_per_s=link.rate.value)
        return graph

    def capacity_figures(self, resource: str) -> Mapping[str, Figure]:
        """Figures of which the largest is what a resource (`link.x`, `bus.x`, `memory.x`) delivers, by key. [B/s]"""
        what, name = resource.split(".", 1)
        if what == "link":
            return {f"link.{name}.rate": self.link[name].rate}
        if what == "bus":
            return {f"bus.{name}.rate": self.bus[name].rate}
        own = self.memory[name].rate
        if own is not None:
            return {f"memory.{name}.rate": own}
        return ({f"agent.{k}.rate": a.rate for k, a in self.agent.items() if a.memory == name}
                | {f"link.{k}.rate": x.rate for k, x in self.link.items() if name in (x.source, x.target)})

    def capacity_bytes_per_s(self, resource: str) -> float:
        """What a resource delivers to all its users together. [B/s]"""
        return max(figure.value for figure in self.capacity_figures(resource).values())

    def figures(self) -> dict[str, Figure]:
        """Every figure of the device by its key path, e.g. "link.flash.rate"."""
        found: dict[str, Figure] = {}
        for name, memory in self.memory.items():
            _collect(f"memory.{name}", memory, found)
        for name, agent in self.agent.items():
            _collect(f"agent.{name}", agent, found)
            for precision, figure in agent.flop_per_s.items():
                found[f"agent.{name}.flop_per_s.{precision}"] = figure
            for kernel, overhead in agent.kernel_overhead.items():
                found[f"agent.{name}.kernel_overhead.{kernel}"] = overhead
        for name, link in self.link.items():
            _collect(f"link.{name}", link, found)
        for name, bus in self.bus.items():
            _collect(f"bus.{name}", bus, found)
        for rule in self.interference:
            found[f"interference.{rule.victim}.{rule.aggressor}"] = rule.share
        if self.idle:
            found["idle"] = self.idle
        return found

    @property
    def weakest_kind(self) -> Kind:
        """The least well known kind among all figures."""
        return weakest([f.kind for f in self.figures().values()])

    def check_engine(self, name: str) -> None:
        """Raise where nothing is known of the software stack `name` on this device."""
        known = sorted({key.split("/")[0] for key in self.engine})
        if not known:
            raise SpecError(f"found {name!r}, but of {self.name} no software stack is known", key="--engine")
        if name not in known:
            raise UnknownNameError("engine", name, known, key="--engine")

    def with_engine(self, name: str) -> Device:
        """This device as the software stack `name` drives it; unchanged where nothing is known of it."""
        changed = dict(self.agent)
        for key, engine in self.engine.items():
            if key.split("/")[0] != name:
                continue
            update = {k: v for k in _ENGINE_SETS if (v := getattr(engine, k)) is not None}
            # Kernels of another stack: what was measured of each phase is not about it.
            changed[engine.agent] = changed[engine.agent].model_copy(update={**update, "kernel_overhead": {}})
        model = self.cost_model
        kept = tuple(g for g in model.groups if changed.get(g.agent) is self.agent.get(g.agent)) if model else ()
        phases = tuple(p for p in model.phases if changed.get(p.agent) is self.agent.get(p.agent)) if model else ()
        return self.model_copy(update={"agent": changed, "cost_model": model and (
            model.model_copy(update={"groups": kept, "phases": phases}) if kept or phases else None)})


def _collect(prefix: str, part: Frozen, found: dict[str, Figure]) -> None:
    for field in type(part).model_fields:
        value = getattr(part, field)
        if isinstance(value, Figure):
            found[f"{prefix}.{field}"] = value


def load_device(name: str, *, relative_to: Path | None = None) -> Device:
    """A built-in device by name or alias, or the device in a TOML file."""
    path = library.resolve("device", name, relative_to=relative_to)
    data = load_toml(path)
    named = data.get("cost_model")
    if isinstance(named, str):
        data["cost_model"] = _cost_model(path, named)
    device = validate(Device, data, file=str(path))
    model = device.cost_model
    for agent in (*(g.agent for g in model.groups), *(p.agent for p in model.phases if p.agent)) if model else ():
        if agent not in device.agent:
            raise SpecError(f"holds a cost model of the agent {agent!r}, which this device has not",
                            file=str(path), key="cost_model")
    return device


def _cost_model(device_file: Path, named: str) -> FittedCost:
    """The fitted cost model beside a device file: a plain name, so that a file from others cannot point elsewhere."""
    if Path(named).name != named or not named.endswith(".json"):
        raise SpecError(f"found {named!r}, expected the name of a .json file in the same folder",
                        file=str(device_file), key="cost_model")
    beside = device_file.parent / named
    if not beside.exists():
        raise SpecError(f"there is no {named!r} beside it", file=str(device_file), key="cost_model")
    return load_cost_model(beside)
