"""Does `tier-percent` place by an exact linear programme, keep the contract, and agree with a loop over GPU batches?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from numpy.typing import NDArray

from simmem.cost.roofline import durations
from simmem.errors import SpecError
from simmem.planner.candidate import Candidate, blocks, contention_of
from simmem.planner.predict import column_of, placement_gap, predict
from simmem.planner.question import ask
from simmem.planner.ranking import choose, objective_value, search
from simmem.policy.base import Block, policy_named, why_not_plan
from simmem.policy.check import check_policy
from simmem.policy.context import Context
from simmem.policy.families._tier_bound import least_rows
from simmem.policy.families._tier_bytes import layout
from simmem.policy.families._tier_schedule import tier_schedule
from simmem.policy.families.tier_percent import PERCENTS, _writes
from simmem.policy.placement_lp import maximise
from simmem.schedule import Phase
from simmem.sim.analytic import analytic
from simmem.sim.events import events
from simmem.spec.device import load_device
from simmem.spec.model import load_model
from simmem.spec.workload import Draft, Workload
from tests.strategies import devices, models, seeds

Array = NDArray[np.float64]
TIER = policy_named("tier-percent")
FLEXGEN: list[tuple[str, int, dict[str, Any]]] = [
    ("opt-6.7b", 512, {"weights_percent": (100, 0), "kv_percent": (100, 0), "activations_percent": (100, 0),
                       "gpu_batch": 2, "n_gpu_batches": 1, "cpu_attention": False}),
    ("opt-30b", 512, {"weights_percent": (20, 80), "kv_percent": (0, 100), "activations_percent": (0, 100),
                      "gpu_batch": 48, "n_gpu_batches": 3, "cpu_attention": True}),
    ("opt-175b", 256, {"weights_percent": (0, 50), "kv_percent": (0, 0), "activations_percent": (0, 100),
                       "gpu_batch": 64, "n_gpu_batches": 8, "cpu_attention": True})]


def context_of(model: str = "opt-125m", batch: int = 1, weights: str = "fp16", engine: str = "",
               device: str = "flexgen-t4") -> Context:
    spec = load_device(device)
    return Context(spec.with_engine(engine) if engine else spec, load_model(model),
                   Workload(64, 16, batch, weights, weights), None,
                   {k: m.budget_bytes for k, m in spec.memory.items()})


@pytest.mark.parametrize(("model", "batch", "weights", "engine"), [
    ("opt-125m", 1, "fp16", ""), ("opt-125m", 6, "int4", "flexgen"), ("mixtral-8x7b", 4, "int4", ""),
    ("deepseek-v2-lite", 4, "fp16", "flexgen")])
def test_it_keeps_the_contract_with_storage_to_write_to(model: str, batch: int, weights: str, engine: str) -> None:
    everywhere = {"weights_percent": (100.0, 0.0), "kv_percent": (100.0, 0.0), "activations_percent": (100.0, 0.0)}
    check_policy(TIER, context_of(model, batch, weights, engine), seed=batch, same=[
        ({**everywhere, "cpu_attention": True}, {**everywhere, "cpu_attention": False})])


def test_the_simplex_method_finds_what_scipy_finds() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(7)
    feasible = 0
    for _ in range(300):
        m, n = int(rng.integers(2, 16)), int(rng.integers(2, 9))
        # Bounded by the last row; some right-hand sides are negative, some rows repeat.
        rows = np.vstack([rng.normal(size=(m, n)) * rng.choice([0.0, 1.0, 1e3], (m, 1)), np.ones((1, n))])
        rows[rng.integers(m)] = rows[0]
        limits = np.append(rng.normal(0.3, 1.0, m) * np.abs(rows[:m]).max(axis=1), 4.0)
        gain = rng.normal(size=n)
        theirs = optimize.linprog(-gain, A_ub=rows, b_ub=limits, method="highs")
        ours = maximise(gain, rows, limits)
        assert (ours is None) == (theirs.status == 2)
        if ours is not None:
            feasible += 1
            scale = np.maximum(np.abs(rows).max(axis=1), 1.0)
            assert ours.min() >= -1e-9
            assert ((rows @ ours - limits) / scale).max() <= 1e-6
            assert gain @ ours == pytest.approx(-theirs.fun, rel=1e-6, abs=1e-6)
    assert feasible > 100


def step_seconds(context: Context, knobs: dict[str, Any]) -> float:
    (block,) = blocks(TIER, context, {"agent": "gpu", "weights_split": "fractions", **knobs})
    schedule = TIER.decode(context, block, np.zeros(1, dtype=np.int64))
    return float(analytic(schedule, durations(schedule, context.device)).token_s[0])


def looped_seconds(context: Context, block: Block) -> float:
    """A decode step by FlexGen's loop: per layer and GPU batch, with two buffers for weights and for states; with each
    GPU batch comes its part of the next layer's weights.

    From bytes and rates alone: no kernels, no latencies, activations on the GPU.
    """
    device, at, model = context.device, layout(context, block), context.model
    n, layers = int(at.n_batches[0]), model.architecture.n_layers
    gpu, cpu = device.agent["gpu"], device.agent["cpu"]
    flash, h2d = device.link["flash"].rate.value, device.link["h2d"].rate.value
    weights, kv = context.layers.stored_bytes[0], context.decode_kv_bytes / layers / n
    params = (model.mixer.matrix_params + model.group("ffn").matrix_params) / layers
    near, helps = float(at.kv.gpu[0]), bool(at.cpu_attention[0])
    compute = max(2.0 * params * context.workload.batch / n / gpu.flop_per_s["fp16"].value / gpu.flop_share.value,
                  weights / gpu.rate.value / gpu.rate_share.value)
    attend = (near if helps else 1.0) * kv / gpu.rate.value / gpu.rate_share.value
    far = (1.0 - near) * kv / cpu.rate.value / cpu.rate_share.value if helps else 0.0
    read = {"weights": at.weights.storage[0] * weights / flash, "state": at.kv.storage[0] * kv / flash}
    copy = {"weights": at.weights.away[0] * weights / h2d, "state": 0.0 if helps else (1.0 - near) * kv / h2d}
    free = {"flash": 0.0, "h2d": 0.0}
    used: dict[str, list[float]] = {"weights": [], "state": []}
    there: dict[str, list[float]] = {"weights": [], "state": []}

    def fetch(what: str) -> None:
        parts = n if what == "weights" else 1
        stage = len(there[what]) // parts
        begin = used[what][stage - 2] if stage > 1 else 0.0
        for link, took in (("flash", read[what] / parts), ("h2d", copy[what] / parts)):
            if took:
                begin = free[link] = max(begin, free[link]) + took
        there[what].append(begin)

    now, ends = 0.0, []
    for _ in range(n):
        fetch("weights")
    fetch("state")
    for _ in range(3):
        for _ in range(layers):
            arrived = there["weights"][-1]
            for _ in range(n):
                here = max(arrived, there["state"][-1])
                fetch("weights")
                fetch("state")
                now = max(now, here) + compute + max(attend, far)
                used["state"].append(now)
            used["weights"].append(now)
        ends.append(now)
    return ends[-1] - ends[-2]


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize(("weights", "kv", "cpu"), [
    ((0, 100), (0, 100), True), ((0, 100), (0, 100), False), ((50, 0), (0, 100), True), ((0, 50), (0, 0), True),
    ((20, 80), (50, 50), False), ((100, 0), (100, 0), False)])
def test_adding_up_gpu_batches_is_off_by_no_more_than_one_of_them(n: int, weights: tuple[int, int],
                                                                   kv: tuple[int, int], cpu: bool) -> None:
    context = context_of("opt-6.7b", 32)
    knobs = {"weights_percent": weights, "kv_percent": kv, "activations_percent": (100, 0), "gpu_batch": 32 // n,
             "n_gpu_batches": n, "cpu_attention": cpu}
    (block,) = blocks(TIER, context, {"agent": "gpu", "weights_split": "fractions", **knobs})
    looped = looped_seconds(context, block)
    # The head, its weights, kernels and latencies are in the schedule only; then there is the filling of the pipeline.
    beside = context.head_bytes / context.device.link["flash"].rate.value + 0.03 * looped
    fill = looped / n / context.model.architecture.n_layers
    assert looped * (1 - 0.001) - fill <= step_seconds(context, knobs) <= looped + fill + beside


def gap_of(best: Candidate, objective: str) -> float:
    """How far the simulated time of a plan is above what no shares on the tiers beat."""
    rows = np.zeros(1, np.int64)
    report = best.policy.report(best.context, best.block, rows)
    gap = placement_gap(best, predict(best, rows), report, objective)
    assert gap is not None
    return gap


@pytest.mark.parametrize(("device", "model", "batch", "weights", "gpu_batch", "kv", "engine"), [
    ("flexgen-t4", "opt-1.3b", 64, (0, 70), 8, "fp16", None),
    ("rtx3060-pc", "opt-6.7b", 32, (0, 47.487), 8, "fp16", None),
    ("rtx4090-pc", "opt-6.7b", 32, (0, 70), 8, "fp16", None), ("rtx4090-pc", "opt-1.3b", 64, (0, 47), 8, "int8", None),
    ("flexgen-t4", "opt-6.7b", 64, (100, 0), 64, "int4", "flexgen")])
def test_rows_stay_below_the_mean_of_late_steps(device: str, model: str, batch: int, weights: tuple[float, float],
                                                gpu_batch: int, kv: str, engine: str | None) -> None:
    """Where copies go ahead of reads, and where the GPU unpacks beside the CPU."""
    machine = load_device(device)
    machine = machine.with_engine(engine) if engine else machine
    context = Context(machine, load_model(model), Workload(512, 16, batch, "fp16", kv), None,
                      dict.fromkeys(machine.memory, 1e15))
    block = Block({"agent": "gpu", "weights_split": "fractions"}, {
        "weights_percent": np.array([weights]), "kv_percent": np.array([(30, 70)]),
        "activations_percent": np.array([(100, 0)]), "gpu_batch": np.array([gpu_batch]),
        "n_gpu_batches": np.array([batch // gpu_batch]), "cpu_attention": np.array([True])})
    at = layout(context, block)
    late = tier_schedule(context, at, Phase.DECODE, 8)
    ends = events(late.column(0), column_of(durations(late, machine), 0), contention_of(context)).token_end_s
    least = float(np.max(least_rows(context, at, Phase.DECODE)))
    assert least <= float(ends[-1] - ends[-5]) / 4 * (1 + 1e-9)


@given(st.data(), st.sampled_from(["fp16", "int4"]), st.sampled_from(["fp16", "int8", "int4"]), st.integers(1, 12),
       st.integers(1, 6), st.integers(0, 8))
def test_no_shares_beat_the_linear_programme(data: st.DataObject, weights: str, kv: str, batch: int, new_tokens: int,
                                             drafted: int) -> None:
    """The rows at a placement are below its simulated time, and the programme's optimum below whatever fits."""
    device = data.draw(devices(two_sided=True), label="device")
    draft = Draft(data.draw(models(), label="draft"), drafted, 0.7) if drafted else None
    workload = Workload(16, new_tokens + 1, batch, weights, kv, draft=draft)
    context = Context(device, data.draw(models(), label="model"), workload, None,
                      {k: m.budget_bytes for k, m in device.memory.items()})
    if why_not_plan(TIER, context) is not None:
        reject()
    rng = data.draw(seeds(), label="shares")
    gpu = TIER.knobs(context)[0].values[0]
    ways = [(n, helps) for n in range(1, batch + 1) if batch % n == 0
            for helps in ((False, True) if context.host_agent else (False,))]
    kinds = {name: [_three(rng, spills) for _ in ways] for name, spills in zip(
        PERCENTS, (True, _writes(context), _writes(context)), strict=True)}
    block = Block({"agent": gpu, "weights_split": "fractions"}, {
        **{name: np.array(shares) for name, shares in kinds.items()},
        "gpu_batch": np.array([batch // n for n, _ in ways]), "n_gpu_batches": np.array([n for n, _ in ways]),
        "cpu_attention": np.array([helps for _, helps in ways])})
    at = layout(context, block)
    took = {}
    for phase, schedule in ((Phase.PREFILL, TIER.prefill(context, block)),
                            (Phase.DECODE, TIER.decode(context, block, np.zeros(1, np.int64)))):
        how = durations(schedule, device)
        ends = [events(schedule.column(i), column_of(how, i), contention_of(context)).token_end_s
                for i in range(schedule.n_candidates)]
        took[phase] = np.array([end[-1] - (end[-2] if phase is Phase.DECODE else 0.0) for end in ends])
        least = np.max(least_rows(context, at, phase), axis=0)
        assert (least <= took[phase] * (1 + 1e-9)).all(), (phase, least / took[phase])
    fits = np.all([used <= context.budget_bytes[tier] for tier, used in TIER.footprint(context, block).items()], axis=0)
    for i in np.flatnonzero(fits).tolist():
        bound = TIER.report(context, block.only(np.array([i])), np.zeros(1, np.int64))["least_s"]
        token_s = took[Phase.DECODE][i] / workload.tokens_per_step
        assert bound["step"] <= token_s * (1 + 1e-6)
        assert bound["total"] <= (took[Phase.PREFILL][i] + new_tokens * token_s) * (1 + 1e-6)


def _three(rng: np.random.Generator, spills: bool) -> tuple[float, float]:
    """Shares of GPU and host that leave some to storage, or none."""
    gpu, host, rest = rng.dirichlet(np.ones(3)) * rng.choice([0.0, 1.0], 3, p=[0.3, 0.7]) + 1e-12
    rest = rest if spills else 0.0
    return 100.0 * gpu / (gpu + host + rest), 100.0 * host / (gpu + host + rest)


@pytest.mark.parametrize(("model", "prompt", "knobs"), FLEXGEN)
@pytest.mark.parametrize("engine", ["flexgen", None])
def test_the_free_search_is_never_worse_than_flexgens_policy(model: str, prompt: int, knobs: dict[str, Any],
                                                              engine: str | None) -> None:
    seconds = []
    for held in (knobs, None):
        question = ask("flexgen-t4", model, prompt=prompt, new_tokens=32,
                       batch=knobs["gpu_batch"] * knobs["n_gpu_batches"], weights="fp16", policy="tier-percent",
                       knobs=held, engine=engine, objective="throughput")
        best, _ = choose(search(question, "fp16").ranked, "throughput")
        value = objective_value(best, "throughput")
        assert value is not None
        seconds.append(value[0])
        if held is None:
            assert gap_of(best, "throughput") <= 0.01
    assert seconds[1] <= seconds[0] * (1 + 1e-9)


@pytest.mark.parametrize(("device", "model", "batch"), [
    ("rtx4090-pc", "llama-2-70b", 1), ("flexgen-t4", "opt-30b", 1), ("h100-sxm", "mixtral-8x7b", 16)])
def test_the_best_shares_still_fit_when_they_are_added_up_again(device: str, model: str, batch: int) -> None:
    question = ask(device, model, batch=batch, weights="fp16", policy="tier-percent")
    best, _ = choose(search(question, "fp16").ranked, "latency")
    assert gap_of(best, "latency") <= 0.02


def test_whole_matrices_are_placed_as_flexgen_places_them() -> None:
    """20 % of OPT's layers on the GPU: of attention the output projection, of the FFN nothing."""
    context = context_of("opt-30b", 144)
    (block,) = blocks(TIER, context, {**FLEXGEN[1][2], "weights_split": "matrices"})
    at = layout(context, block)
    share = context.layers.mixer_bytes / context.layers.stored_bytes[0]
    assert at.weights.gpu[0] == pytest.approx(share / 4)
    assert at.weights.host[0] == pytest.approx(1 - share / 4)
    assert at.head.host[0] == 1.0


@pytest.mark.parametrize(("device", "knobs", "key", "says"), [
    ("flexgen-t4", {"weights_percent": (60, 60)}, "weights_percent", "at most 100"),
    ("flexgen-t4", {"weights_percent": "60"}, "weights_percent", "2 numbers"),
    ("flexgen-t4", {"kv_percent": (-1, 50)}, "kv_percent", "from 0 to 100"),
    ("flexgen-t4", {"gpu_batch": 5}, "gpu_batch", "batch of 12"),
    ("flexgen-t4", {"gpu_batch": 6, "n_gpu_batches": 3}, "gpu_batch", "batch of 12"),
    ("flexgen-t4", {"cpu_attention": "perhaps"}, "cpu_attention", "true or false"),
    ("rtx4090-pc", {"kv_percent": (0, 50)}, "kv_percent", "no link to write")])
def test_knobs_that_make_no_sense_are_refused_in_one_line(device: str, knobs: dict[str, Any], key: str,
                                                          says: str) -> None:
    with pytest.raises(SpecError, match=says) as refused:
        list(blocks(TIER, context_of(batch=12, device=device), knobs))
    assert refused.value.key == key
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("context", [context_of(device="m1-max"), context_of("mamba-2.8b")], ids=["unified", "no keys"])
def test_it_does_not_apply_where_there_is_nothing_to_place(context: Context) -> None:
    assert TIER.knobs(context) == ()
