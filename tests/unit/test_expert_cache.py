"""Does expert-cache fetch what the routing asks for, no more and no less, and does it meet `resident` at its end?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from simmem.cost.roofline import durations
from simmem.planner.candidate import contention_of
from simmem.policy.base import Block, policy_named
from simmem.policy.check import check_policy
from simmem.policy.context import Context, Replayed
from simmem.policy.families._experts import RECALL, usage
from simmem.policy.families.expert_cache import ExpertCache
from simmem.sim.analytic import analytic
from simmem.sim.events import events
from simmem.spec.device import load_device
from simmem.spec.model import load_model
from simmem.spec.workload import Workload
from simmem.trace import open_trace
from simmem.trace.caches import Policy
from simmem.trace.predictors import judge
from simmem.trace.replay import cache_curve
from simmem.trace.routing import asked_a_layer_early, misses_by_layer
from simmem.trace.trace import Predictor, Trace, TraceHeader, digest_of
from tests.strategies import column_of, contexts, policy_blocks, seeds

POLICY = ExpertCache()
ONE = np.zeros(1, np.int64)
Array = NDArray[np.float64]


def context_of(device: str, model: str, *, batch: int = 1, routing: Trace | None = None, room: float = 1.0) -> Context:
    found, spec = load_device(device), load_model(model)
    budget = {name: memory.budget_bytes if memory.kind == "storage" else room * memory.budget_bytes
              for name, memory in found.memory.items()}
    return Context(found, spec, Workload(16, 16, batch), None, budget, Replayed(routing) if routing else None)


def block_of(held: list[int], *, agent: str = "gpu", policy: str = "lru", prefetch: str = "none", cpu: bool = False
             ) -> Block:
    return Block({"agent": agent, "cache_policy": policy, "prefetch": prefetch, "cpu_experts": cpu},
                 {"experts_per_layer": np.array(held)})


def routed(context: Context, seed: int, *, predicted: bool) -> Context:
    """The context with a trace of random routing, and of what a gate asked for a layer early."""
    rng, model = np.random.default_rng(seed), context.model
    x, layers, n = model.architecture.experts, model.architecture.n_expert_layers, int(rng.integers(4, 20))
    assert x is not None
    bits = np.zeros((2, n, layers, x.count), np.bool_)
    for which, token, layer in np.ndindex(2, n, layers):
        for _ in range(context.workload.batch):
            bits[which, token, layer, rng.choice(x.count, x.per_token, replace=False)] = True
    used, asked = np.packbits(bits, axis=3, bitorder="little")
    header = TraceHeader(name="random", kind="captured", model=model.name, n_tokens=n, n_layers=layers,
                         n_units=x.count, unit="expert", unit_bytes=1.0, criterion="top k", threshold="none",
                         records="active", predictor="none", text="none", digest=digest_of(used))
    if not predicted:
        return replace(context, routing=Replayed(Trace(header, used)))
    found = judge(used, asked, n_units=x.count, unit_bytes=1.0)
    gate = Predictor.model_validate({"name": "next-layer", "asks": "as many", "layers_ahead": 1, "unit_bytes": 1.0,
                                     "held": True, **found._asdict()})
    return replace(context, routing=Replayed(Trace.with_extras(
        header.model_copy(update={"predictors": (gate,)}), used, {"asked": asked[None]})))


# ---------------------------------------------------------------------------------------------- the counts


def by_hand(trace: Trace, capacity: int, asked: NDArray[np.uint8], below: int) -> list[NDArray[np.int64]]:
    """LRU caches, one a layer, unit by unit: missed, ahead, wasted, late below, early below, each (T, L)."""
    h = trace.header
    needed, early = (np.unpackbits(bits, axis=2, count=h.n_units, bitorder="little") for bits in (trace.active, asked))
    found = [np.zeros((h.n_tokens, h.n_layers), np.int64) for _ in range(5)]
    for layer in range(h.n_layers):
        held: list[int] = []  # least recently used first
        host: list[int] = []

        def use(cache: list[int], size: int, units: list[int]) -> list[int]:
            missed = [u for u in units if u not in cache]
            hits = [u for u in units if u in cache]
            kept = missed[: max(size - len(hits), 0)]
            rest = [u for u in cache if u not in units]
            rest = rest[max(len(rest) + len(hits) + len(kept) - size, 0):]
            cache[:] = [*rest, *sorted([*hits, *kept])]
            return missed

        for token in range(h.n_tokens):
            units = np.flatnonzero(needed[token, layer]).tolist()
            guess = np.flatnonzero(early[token, layer]).tolist() if layer else []
            guess = [u for u in guess if u not in held]
            missed = use(held, capacity, units)
            stored = use(host, below, sorted({*missed, *guess}))
            for table, amount in zip(found, (
                    len(missed), len([u for u in missed if u in guess]), len([u for u in guess if u not in missed]),
                    len([u for u in stored if u not in guess]), len([u for u in stored if u in guess])), strict=True):
                table[token, layer] = amount
    return found


@settings(max_examples=25)
@given(seeds(), st.integers(0, 8), st.integers(0, 8))
def test_misses_of_each_layer_are_those_of_caches_replayed_by_hand(rng: np.random.Generator, size: int, below: int
                                                                 ) -> None:
    context = routed(context_of("a6000", "moe-8x3m", batch=int(rng.integers(1, 3))), int(rng.integers(1 << 30)),
                     predicted=True)
    assert context.routing is not None
    trace = context.routing.trace
    asked = asked_a_layer_early(trace)
    assert asked is not None
    counted = misses_by_layer(trace, "lru", np.array([size]), cold_tokens=0, asked=asked, below_units=below)
    tables = (counted.missed, counted.ahead, counted.wasted, counted.late_below, counted.early_below)
    for table, expected in zip(tables, by_hand(trace, size, asked, below), strict=True):
        np.testing.assert_array_equal(table[:, 0], expected)


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru", "pin-hot"])
def test_they_add_up_to_the_replay_of_captured_routing(policy: Policy) -> None:
    trace = open_trace("moe-8x3m-router", load_model("moe-8x3m"), n_tokens=200)
    assert trace is not None
    sizes = np.arange(9)
    curve = cache_curve(trace, policy, sizes)
    counted = misses_by_layer(trace, policy, sizes, cold_tokens=50)
    np.testing.assert_array_equal(counted.missed[50:].sum(axis=(0, 2)), curve.misses)


def test_without_a_trace_routing_is_uniform() -> None:
    """An expert in use is held with the probability held / all; of the others a share `RECALL` comes early."""
    context = context_of("a6000", "mixtral-8x7b")
    use = usage(context, block_of([0, 2, 8], prefetch="next-layer"), ONE)
    missed = 2 * (1 - np.array([0, 2, 8]) / 8)
    np.testing.assert_allclose(use.early[1:] + use.late[1:], np.tile(missed, (31, 1)))
    np.testing.assert_allclose(use.early[1], RECALL * missed)
    np.testing.assert_allclose(use.wasted[1], (1 - RECALL) * missed)
    assert not use.early[0].any() and not use.wasted[0].any()


# -------------------------------------------------------------------------------------------- the schedules


@pytest.mark.parametrize(("device", "agent", "model", "batch"), [
    ("rtx4090-pc", "gpu", "mixtral-8x7b", 1), ("a6000", "gpu", "deepseek-v2-lite", 3),
    ("m1-max", "cpu", "moe-8x3m", 1)])
def test_all_experts_cached_is_resident(device: str, agent: str, model: str, batch: int) -> None:
    context = context_of(device, model, batch=batch)
    count = context.model.architecture.experts
    assert count is not None
    mine, theirs = block_of([count.count], agent=agent, prefetch="next-layer"), Block({"agent": agent}, {})
    resident = policy_named("resident")
    ours, others = POLICY.decode(context, mine, ONE), resident.decode(context, theirs, ONE)
    seconds = [float(analytic(s, durations(s, context.device)).token_s[0]) for s in (ours, others)]
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-12)
    tier = context.memory_of(agent)
    assert POLICY.footprint(context, mine)[tier] == pytest.approx(resident.footprint(context, theirs)[tier], rel=1e-12)
    assert ours.timed_bytes[f"memory.{tier}"] == pytest.approx(others.timed_bytes[f"memory.{tier}"], rel=1e-12)


def test_only_chosen_experts_are_fetched_where_stream_reads_all() -> None:
    context = context_of("a6000", "mixtral-8x7b")
    experts = context.group_bytes["experts"]
    chosen = POLICY.decode(context, block_of([0]), ONE).timed_bytes["link.h2d"]
    assert chosen == pytest.approx(experts / 4, rel=1e-12)  # 2 of 8
    stream = policy_named("stream")
    everything = Block({"agent": "gpu", "source_tier": "host", "prefetch_layers": 0},
                       {"resident_ratio": np.zeros(1), "reader_threads": np.full(1, 32)})
    assert stream.decode(context, everything, ONE).timed_bytes["link.h2d"] > experts


def test_what_host_memory_lacks_comes_from_storage() -> None:
    """A third of the experts fit into host memory: of what the GPU misses, uniform routing finds so many there."""
    context = context_of("a6000", "mixtral-8x7b")
    each = context.group_bytes["experts"] / 256
    context = replace(context, budget_bytes={**context.budget_bytes, "dram": 3 * 32 * each + 4.5 * each})
    moved = POLICY.decode(context, block_of([1]), ONE).timed_bytes
    missed = 32 * 2 * 7 / 8 * each
    assert moved["link.h2d"] == pytest.approx(missed)
    assert moved["link.flash"] == pytest.approx(missed * (1 - 2 / 7))  # 3 in host memory, of which 1 is cached above


def test_the_cpu_computes_missed_experts_only_where_that_is_faster() -> None:
    """Beside 77 GB/s of host memory the link of 25 GB/s is slow; a link ten times as fast is not."""
    context = context_of("a6000", "mixtral-8x7b")
    moved = POLICY.decode(context, block_of([4], cpu=True), ONE).timed_bytes
    experts = context.group_bytes["experts"]
    assert moved["link.h2d"][0] == moved["link.d2h"][0] < 1e6  # hidden vectors
    assert moved["memory.dram"][0] == pytest.approx(experts / 8 + 2 * moved["link.h2d"][0])
    h2d = context.device.link["h2d"]
    fast = h2d.model_copy(update={"rate": h2d.rate.model_copy(update={"value": 10 * h2d.rate.value, "range": None})})
    faster = replace(context, device=context.device.model_copy(update={"link": {**context.device.link, "h2d": fast}}))
    assert POLICY.decode(faster, block_of([4], cpu=True), ONE).timed_bytes["link.h2d"] == pytest.approx(experts / 8)


def test_unpacking_is_priced_where_an_engine_does_it() -> None:
    """Four bytes a parameter for the experts in use, attention and nothing that is not quantised."""
    device = load_device("t4-cloud")
    workload = Workload(16, 16, 1, "fp16", "fp16", (("attention", "int4"), ("experts", "int2")))
    contexts_ = [Context(d, load_model("mixtral-8x7b"), workload, None,
                         {k: m.budget_bytes for k, m in d.memory.items()})
                 for d in (device, device.with_engine("mixtral-offloading"))]
    plain, engine = (POLICY.decode(c, block_of([4]), ONE).timed_bytes["memory.vram"] for c in contexts_)
    model = contexts_[0].model
    params = 64 * model.expert_params + model.group("attention").matrix_params
    assert engine - plain == pytest.approx(4.0 * params)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(contexts(other=True), seeds(), st.sampled_from([None, False, True]), st.data())
def test_it_keeps_the_contract_and_the_engines_agree(context: Context, rng: np.random.Generator, trace: bool | None,
                                                     data: st.DataObject) -> None:
    if context.model.architecture.experts is None:
        return
    if trace is not None:
        context = routed(context, int(rng.integers(1 << 30)), predicted=trace)
    check_policy(POLICY, context)
    schedule = POLICY.decode(context, data.draw(policy_blocks(POLICY, context, 2)), POLICY.rows(context, 2))
    took = durations(schedule, context.device)
    bound = analytic(schedule, took).token_s
    for i in range(schedule.n_candidates):
        shared = events(schedule.column(i), column_of(took, i), contention_of(context)).token_s
        assert shared >= bound[i] * (1 - 1e-9)
