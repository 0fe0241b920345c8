"""Does expert-cache fetch what the routing asks for, no more and no less, and does it meet `resident` at its end?"""

from __future__ import annotations

from dataclasses import replace
from math import comb

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
from simmem.policy.layer_kinds import touched_experts
from simmem.sim.analytic import analytic
from simmem.sim.events import events
from simmem.spec.device import load_device
from simmem.spec.model import load_model
from simmem.spec.workload import Workload
from simmem.trace import open_trace
from simmem.trace.caches import Policy
from simmem.trace.drawn import uniform_routing
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


def rows_of(context: Context) -> NDArray[np.int64]:
    """Tokens that stand for all."""
    return np.asarray(POLICY.rows(context, 64))


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


# ---------------------------------------------------------------------------------------------- drawn routing


@pytest.mark.parametrize(("n_experts", "per_token", "batch"), [
    (8, 2, 1), (64, 6, 3), (16, 16, 2), (128, 1, 1), (7, 2, 9)])
def test_drawn_routing_has_no_favourites(n_experts: int, per_token: int, batch: int) -> None:
    """As many as a token chooses, each as likely as any other, in each layer apart; caches are full after a quarter."""
    def draw() -> Trace:
        return uniform_routing("some", 6, n_experts, per_token, batch=batch, draws=1 << 14, unit_bytes=1.0)

    trace = draw()
    np.testing.assert_array_equal(trace.active, draw().active)
    bits = np.unpackbits(trace.active, axis=2, count=n_experts, bitorder="little")
    assert (bits[: len(bits) // 4].sum(axis=0) > 0).all()
    steady = bits[len(bits) // 4:]
    counts = steady.sum(axis=2)
    assert counts.max() <= min(per_token * batch, n_experts) and counts.min() >= per_token
    expected = touched_experts(n_experts, per_token, batch)
    assert counts.mean() == pytest.approx(expected, rel=0.02)
    share = expected / n_experts
    error = np.sqrt(share * (1 - share) / len(steady)) + 1e-12
    assert (np.abs(steady.mean(axis=0) - share) < 5 * error).all()
    if share < 1:  # no layer knows of another, no token of the one before
        centred = steady - share
        for one, other in ((centred[:, :-1], centred[:, 1:]), (centred[:-1], centred[1:])):
            assert abs((one * other).mean() / (share * (1 - share))) < 5 / np.sqrt(one[..., 0].size)


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru", "pin-hot"])
@pytest.mark.parametrize(("model", "batch", "held"), [
    ("mixtral-8x7b", 1, [0, 1, 4, 7, 8]), ("mixtral-8x7b", 3, [2, 7]), ("deepseek-v2-lite", 1, [16, 48, 63])])
def test_without_a_trace_held_experts_are_hit_as_often_as_any(policy: str, model: str, batch: int, held: list[int]
                                                              ) -> None:
    """k of n experts hit k times in n whatever is evicted; of what is missed a share `RECALL` comes early. Over all
    tokens within what chance allows (5 standard errors), over those that stand for all within half a point."""
    context = context_of("a6000", model, batch=batch)
    x, n_tokens = context.model.architecture.experts, context.routed.trace.header.n_tokens
    assert x is not None
    for size in held:
        use = usage(context, block_of([size], policy=policy, prefetch="next-layer"), np.arange(n_tokens // 4, n_tokens))
        missed, share = use.early + use.late, 1 - size / x.count
        by_layer = missed.sum(axis=1) / use.used.sum(axis=1)  # layers are drawn apart, tokens may share a cache
        error = 5 * by_layer.std() / np.sqrt(len(by_layer)) + 1e-12
        assert abs(by_layer.mean() - share) < error
        assert use.early[1:].sum() == pytest.approx(RECALL * missed[1:].sum(), abs=5 * np.sqrt(missed.sum() / 4) + 1e-9)
        asked = (use.early + use.wasted)[1:].sum()  # as many as are used, of which those held are not fetched
        if batch == 1:
            assert asked == pytest.approx(share * use.used[1:].sum(), abs=5 * np.sqrt(asked) + 1e-9)
        assert not use.early[0].any() and not use.wasted[0].any()
        if policy == "lru":
            few = usage(context, block_of([size]), rows_of(context))
            assert few.late.sum() / few.used.sum() == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("cpu", [False, True])
def test_a_step_waits_for_what_each_layer_misses(cpu: bool) -> None:
    """The mean step is that of layers that miss 0, 1 or 2 experts as often as two drawn of eight do: what each number
    of them adds is solved from single tokens, how often it comes is arithmetic. The mean number of misses would be
    faster: the slower of two ways is taken layer by layer."""
    context = replace(context_of("rtx4090-pc", "mixtral-8x7b"), workload=Workload(128, 256, 1, "int4"))
    n_tokens, rows = context.routed.trace.header.n_tokens, rows_of(context)
    for held in (4, 6, 7):
        block = block_of([held], cpu=cpu)
        every = np.arange(n_tokens // 4, n_tokens)
        late = usage(context, block, every).late
        counts = np.stack([np.ones(len(every)), (late == 1).sum(axis=0), (late == 2).sum(axis=0)], axis=1)
        schedule = POLICY.decode(context, block, every)
        seconds = analytic(schedule, durations(schedule, context.device)).token_s
        each, *_ = np.linalg.lstsq(counts, seconds, rcond=None)
        np.testing.assert_allclose(counts @ each, seconds, rtol=1e-9)
        ways = [comb(held, 2 - m) * comb(8 - held, m) / comb(8, 2) for m in (1, 2)]
        expected = each[0] + 32 * (ways[0] * each[1] + ways[1] * each[2])
        schedule = POLICY.decode(context, block, rows)
        tokens = analytic(schedule, durations(schedule, context.device)).token_s
        assert tokens.mean() == pytest.approx(expected, rel=0.015)
        assert tokens.std() == pytest.approx(seconds.std(), rel=0.3)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(contexts(other=True), st.sampled_from(["none", "next-layer"]))
def test_more_cached_experts_are_never_slower(context: Context, prefetch: str) -> None:
    """Token by token, as an LRU cache holds what a smaller one does."""
    x = context.model.architecture.experts
    if x is None or not POLICY.knobs(context):
        return
    context = replace(context, budget_bytes=dict.fromkeys(context.budget_bytes, 1e15))
    agent = str(POLICY.knobs(context)[0].values[0])
    least = min(x.per_token * context.workload.batch, x.count)  # smaller ones do not even hold what one step uses
    held = list(range(least, x.count + 1))
    rows = POLICY.rows(context, 4)
    schedule = POLICY.decode(context, block_of(held, agent=agent, prefetch=prefetch), rows)
    took = analytic(schedule, durations(schedule, context.device)).token_s.reshape(len(held), -1)
    assert (np.diff(took, axis=0) <= 1e-9 * took[1:]).all()


def test_asking_early_helps_where_there_is_time_to_fetch() -> None:
    """An engine that computes a layer for as long as a copy takes hides it; where a layer takes a tenth of a copy, a
    copy in vain costs more than is hidden."""
    slow = Context(load_device("t4-cloud").with_engine("mixtral-offloading"), load_model("mixtral-8x7b"),
                   Workload(128, 128, 1, "fp16", "fp16", (("attention", "int4"), ("experts", "int2"))), None,
                   context_of("t4-cloud", "mixtral-8x7b").budget_bytes)
    fast = replace(context_of("rtx4090-pc", "mixtral-8x7b"), workload=Workload(128, 256, 1, "int4"))
    for context, held, helps in ((slow, 4, True), (fast, 7, False)):
        rows, found = rows_of(context), []
        for prefetch in ("none", "next-layer"):
            schedule = POLICY.decode(context, block_of([held], prefetch=prefetch), rows)
            found.append(float(analytic(schedule, durations(schedule, context.device)).token_s.mean()))
        assert (found[1] < found[0]) == helps


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
    ours, others = POLICY.decode(context, mine, rows_of(context)), resident.decode(context, theirs, ONE)
    seconds = [float(analytic(s, durations(s, context.device)).token_s.mean()) for s in (ours, others)]
    exactly = 1e-12 if batch == 1 else 0.01  # `resident` reads what several sequences use in the mean
    assert seconds[0] == pytest.approx(seconds[1], rel=exactly)
    tier = context.memory_of(agent)
    assert POLICY.footprint(context, mine)[tier] == pytest.approx(resident.footprint(context, theirs)[tier], rel=1e-12)
    assert ours.timed_bytes[f"memory.{tier}"].mean() == pytest.approx(others.timed_bytes[f"memory.{tier}"][0],
                                                                      rel=exactly)


def test_only_chosen_experts_are_fetched_where_stream_reads_all() -> None:
    context = context_of("a6000", "mixtral-8x7b")
    experts = context.group_bytes["experts"]
    chosen = POLICY.decode(context, block_of([0]), rows_of(context)).timed_bytes["link.h2d"]
    np.testing.assert_allclose(chosen, experts / 4, rtol=1e-12)  # 2 of 8
    stream = policy_named("stream")
    everything = Block({"agent": "gpu", "source_tier": "host", "prefetch_layers": 0},
                       {"resident_ratio": np.zeros(1), "reader_threads": np.full(1, 32)})
    assert stream.decode(context, everything, ONE).timed_bytes["link.h2d"] > experts


def test_every_layer_fetches_what_it_misses_and_what_is_asked_for_before_it() -> None:
    """Layer by layer and token by token: the demands of all layers are made at once."""
    context, block = context_of("a6000", "mixtral-8x7b"), block_of([1, 4], prefetch="next-layer")
    rows, each = rows_of(context), context.group_bytes["experts"] / 256
    use, schedule = usage(context, block, rows), POLICY.decode(context, block, rows)
    moved = schedule.bytes["link.h2d"][schedule.op_class]
    names = np.array([what.name for what in schedule.classes])[schedule.op_class]
    for name, units, early in (("missed experts", use.late, 0), ("experts asked for early", use.early + use.wasted, 1)):
        mine, found = np.flatnonzero(names == f"{name}.h2d"), np.zeros_like(units)
        np.add.at(found, schedule.op_layer[mine] + early, moved[mine])
        np.testing.assert_allclose(found, units * each, rtol=1e-12)
        assert units.any()


def test_what_host_memory_lacks_comes_from_storage() -> None:
    """A third of the experts fit into host memory: of what the GPU misses, uniform routing finds so many there."""
    context = context_of("a6000", "mixtral-8x7b")
    each = context.group_bytes["experts"] / 256
    context = replace(context, budget_bytes={**context.budget_bytes, "dram": 3 * 32 * each + 4.5 * each})
    moved = POLICY.decode(context, block_of([1]), rows_of(context)).timed_bytes
    missed = 32 * 2 * 7 / 8 * each
    assert moved["link.h2d"].mean() == pytest.approx(missed, rel=0.02)
    # 3 in host memory, of which 1 is cached above as a rule.
    assert moved["link.flash"].mean() == pytest.approx(missed * (1 - 2 / 7), rel=0.02)


def test_the_cpu_computes_missed_experts_only_where_that_is_faster() -> None:
    """Beside 77 GB/s of host memory the link of 25 GB/s is slow; a link ten times as fast is not."""
    context = context_of("a6000", "mixtral-8x7b")
    moved = POLICY.decode(context, block_of([4], cpu=True), rows_of(context)).timed_bytes
    experts = context.group_bytes["experts"]
    assert (moved["link.h2d"] == moved["link.d2h"]).all() and moved["link.h2d"].max() < 1e6  # hidden vectors
    assert moved["memory.dram"].mean() == pytest.approx(experts / 8 + 2 * moved["link.h2d"].mean(), rel=0.02)
    h2d = context.device.link["h2d"]
    fast = h2d.model_copy(update={"rate": h2d.rate.model_copy(update={"value": 10 * h2d.rate.value, "range": None})})
    faster = replace(context, device=context.device.model_copy(update={"link": {**context.device.link, "h2d": fast}}))
    moved = POLICY.decode(faster, block_of([4], cpu=True), rows_of(context)).timed_bytes
    assert moved["link.h2d"].mean() == pytest.approx(experts / 8, rel=0.02)


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


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
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
