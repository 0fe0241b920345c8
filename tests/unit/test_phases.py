"""Is what runs say of a phase learnt, judged on other plans, and applied as promised? Rows of a known truth."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from simmem.cost.check import check_cost_model
from simmem.cost.phasefit import Learnt, PhaseKind, PhaseTook, RunPhases, composed, learn_phases
from simmem.cost.phases import phase_key, phase_of
from simmem.cost.roofline import durations
from simmem.errors import CalibrationError
from simmem.planner.bound import agent_bound, lower_bound
from simmem.planner.candidate import Candidate, blocks, capacity_cut
from simmem.planner.predict import interval_factors
from simmem.planner.question import ask
from simmem.policy.base import policy_named
from simmem.schedule import DemandClass, OpKind, Products, ScheduleBuilder
from simmem.sim.analytic import analytic
from simmem.sim.events import events
from simmem.sim.timeline import Timeline
from simmem.spec.costmodel import FittedCost, PhaseFactor, PhaseName
from simmem.spec.device import Device, Engine, load_device
from simmem.validation.runs import phase_seconds, with_storage_of
from tests.strategies import column_of

FFN: PhaseKind = ("FFN", "fp32", "cpu")
HEAD: PhaseKind = ("head", "fp32", "cpu")
READS: PhaseKind = ("flash", "", "")
POLICIES = ("stream", "flash-window")


def rows(n_cells: int, n_rows: int = 4, *, seed: int = 0, policies: tuple[str, ...] = POLICIES, ffn: float = 1.6,
         scatter: float = 0.02) -> list[RunPhases]:
    """FFN so many times as slow as predicted, the head off by nothing but noise, reads that only emulation slowed."""
    rng = np.random.default_rng(seed)
    found = []
    for cell in range(n_cells):
        for row in range(n_rows):
            predicted = rng.lognormal(math.log(0.02), 0.4, 3)
            measured = predicted * [ffn, 1.0, 3.0] * rng.lognormal(0.0, [scatter, 0.15, 0.02])
            found.append(RunPhases(f"{cell}{row} row", f"cell {cell}", policies[row % len(policies)], tuple(
                PhaseTook(kind, float(p), float(m)) for kind, p, m in zip((FFN, HEAD, None), predicted, measured,
                                                                          strict=True))))
    return found


def verdicts(found: Learnt) -> dict[PhaseKind, Any]:
    return {(v.phase, v.dtype, v.agent): v for v in found.verdicts}


# ---------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("n_cells", "by"), [(5, "cell"), (3, "cell"), (2, "policy"), (1, "policy")])
def test_what_is_slower_everywhere_is_learnt_and_noise_is_not(n_cells: int, by: str, seed: int) -> None:
    found = learn_phases(rows(n_cells, 6, seed=seed))
    assert (found.held_out_by, len(found.groups)) == (by, n_cells if by == "cell" else 2)
    ffn, head = (verdicts(found)[kind] for kind in (FFN, HEAD))
    assert ffn.kept and ffn.learnt == pytest.approx(1.6, rel=0.02)
    assert ffn.error_before == pytest.approx(1 - 1 / 1.6, abs=0.02) and ffn.error_after < 0.06
    assert ffn.range_90[0] < 1.6 < ffn.range_90[1] and ffn.range_90[1] / ffn.range_90[0] < 1.25
    assert not head.kept
    (factor,) = found.factors
    assert (factor.phase, factor.factor, len(factor.spent)) == ("FFN", ffn.learnt, n_cells * 6)
    assert found.total.after < found.total.before and len(found.verdicts) == 2, "what no kind is given to is not learnt"


def test_the_range_is_what_held_out_rows_showed() -> None:
    many = rows(8, 40, seed=3, scatter=0.1)
    found = learn_phases(many)
    low, high = found.factors[0].low, found.factors[0].high
    assert math.log(high / low) / 2 == pytest.approx(1.645 * 0.1, rel=0.15)
    fresh = [p.measured_s / p.predicted_s for r in rows(8, 40, seed=4, scatter=0.1) for p in r.phases if p.kind == FFN]
    assert np.mean([(low <= ratio <= high) for ratio in fresh]) == pytest.approx(0.9, abs=0.04)


def test_a_small_phase_weighs_little() -> None:
    sound = rows(4)
    tiny = [replace(r, name=f"{r.name} tiny", phases=(PhaseTook(FFN, 1e-6, 9e-6), PhaseTook(None, 0.05, 0.05)))
            for r in sound for _ in range(3)]
    assert learn_phases([*sound, *tiny]).factors[0].factor == pytest.approx(1.6, rel=0.03)


def test_what_only_one_group_shows_is_not_kept() -> None:
    """Reads of a drive in one cell alone; and a phase that is slower in one cell and faster in the others."""
    some = rows(4)
    some = [replace(r, phases=(*r.phases, PhaseTook(READS, 0.01, 0.02))) if r.cell == "cell 0" else r for r in some]
    found = verdicts(learn_phases(some))
    assert not found[READS].kept and found[READS].error_after is None and "no other plans" in found[READS].why
    mixed = [replace(r, phases=(PhaseTook(HEAD, 0.01, 0.03 if r.cell == "cell 0" else 0.0099),)) for r in some]
    assert not learn_phases(mixed).factors


def test_without_other_plans_nothing_is_kept_and_that_is_said() -> None:
    with pytest.raises(CalibrationError, match=r"nothing is kept.*one cell and one policy"):
        learn_phases(rows(1, policies=("stream",)))
    with pytest.raises(CalibrationError, match="no row to learn from"):
        learn_phases([])
    nothing = [replace(r, phases=(PhaseTook(FFN, 0.0, 0.01), PhaseTook(HEAD, 0.01, 0.0))) for r in rows(3)]
    with pytest.raises(CalibrationError, match="no row has a phase"):
        learn_phases(nothing)
    wild = [replace(r, phases=(PhaseTook(FFN, 1e-9, 1e3),)) for r in rows(3)]
    (verdict,) = learn_phases(wild).verdicts
    assert not verdict.kept and "prediction is wrong" in verdict.why


def test_a_factor_that_rows_were_predicted_with_is_multiplied() -> None:
    first = learn_phases(rows(4)).factors
    second = learn_phases([replace(r, name=f"{r.name} later") for r in rows(4, seed=1, ffn=1.25)]).factors
    (both,) = composed(first, second)
    assert both.factor == pytest.approx(2.0, rel=0.03)
    assert both.low < both.factor < both.high and len(set(both.spent)) == 32
    other = first[0].model_copy(update={"dtype": "bf16"})
    assert composed(first, [other]) == (first[0], other)
    with pytest.raises(CalibrationError, match="wrong, not in need"):
        composed([first[0].model_copy(update={"factor": 60.0})], second)


# ---------------------------------------------------------------------------------------------------------- applying


def factor(phase: PhaseName, times: float, *, dtype: str = "fp32", agent: str = "cpu") -> PhaseFactor:
    return PhaseFactor(phase=phase, dtype=dtype, agent=agent, factor=times, low=times / 1.2, high=times * 1.5, rows=9,
                       groups=3, error_before=0.4, error_after=0.1, spent=("0123 made up",))


def corrected(*factors: PhaseFactor) -> Device:
    return load_device("cloud-vm").model_copy(update={"cost_model": FittedCost(
        name="cloud-vm", date="2026-01-01", groups=(), phases=factors)})


def seconds(device: Device, what: DemandClass, factors: dict[str, Any] | None = None) -> float:
    builder = ScheduleBuilder(1, ["stream"])
    amounts = {"link.flash": 1e6, "memory.dram": 1e6} if what.link else {"memory.dram": 6e7 * (what.name != "step")}
    builder.end_token(builder.op(builder.demand(what, requests=3.0, bytes=amounts, depth=1.0), "stream"))
    return float(durations(builder.build(), device, factors).occupancy_s[0, 0])


def product(name: str = "ffn", *, batch: float = 1.0, dtype: str = "fp32") -> DemandClass:
    return DemandClass(name, OpKind.COMPUTE, agent="cpu", precision=dtype, products=Products(batch, 1000.0, 3.0))


READ = DemandClass("weights.flash", OpKind.IO, link="flash")


def test_a_factor_reaches_its_phase_and_no_other() -> None:
    plain = load_device("cloud-vm")
    device = corrected(factor("FFN", 1.6), factor("flash", 2.0, dtype="", agent=""), factor("upkeep", 3.0, dtype=""))
    upkeep = DemandClass("upkeep", OpKind.MEMORY, agent="cpu", precision="bf16", products=Products(1.0, 8192.0, 1.0))
    for what, times in ((product(), 1.6), (READ, 2.0), (upkeep, 3.0), (product("head"), 1.0),
                        (product("attention"), 1.0), (product(dtype="fp16"), 1.0), (product(batch=12.0), 1.0),
                        (DemandClass("step", OpKind.SYNC, agent="cpu"), 1.0)):
        assert seconds(device, what) == pytest.approx(times * seconds(plain, what), rel=1e-12), what
    drive = next(k for k in load_device("pi5-nvme").link.values() if k.kind == "storage")
    other = with_storage_of(device, load_device("pi5-nvme"))
    assert other.link["flash"].rate == drive.rate
    assert seconds(other, READ) == seconds(with_storage_of(plain, load_device("pi5-nvme")), READ), "not this drive's"
    assert seconds(other, product()) == seconds(device, product())


def test_a_draw_reaches_the_ends_of_the_range() -> None:
    known = factor("FFN", 1.6)
    device = corrected(known)
    for drawn, times in ((math.e, 1.5), (1 / math.e, 1 / 1.2), (1.0, 1.0)):
        assert seconds(device, product(), {phase_key(known): np.array([drawn])}) == pytest.approx(
            times * seconds(device, product()))


def test_what_runs_showed_widens_the_interval() -> None:
    context = ask("cloud-vm", "opt-125m", dram="8 GB", weights="fp32", prompt=32, new_tokens=16).context("fp32")
    policy = policy_named("resident")
    block = next(blocks(policy, context, {}, defaults=True))
    sure = factor("FFN", 1.6).model_copy(update={"low": 1.6, "high": 1.6})
    ends = {}
    for name, one in (("sure", sure), ("unsure", sure.model_copy(update={"low": 0.8, "high": 3.2}))):
        candidate = Candidate(replace(context, device=corrected(one)), policy, block.only(np.array([0])))
        ends[name] = interval_factors(candidate, np.zeros(1, np.int64))
    wide = {name: high / low for name, (low, high) in ends.items()}
    assert wide["unsure"] > 1.1 * wide["sure"]


def test_another_stack_on_an_agent_drops_what_runs_said_of_it() -> None:
    device = corrected(factor("FFN", 1.6), factor("flash", 2.0, dtype="", agent=""))
    assert device.cost_model is not None and device.with_engine("unknown").cost_model == device.cost_model
    known = device.model_copy(update={"engine": {"other": Engine(
        agent="cpu", rate_share=device.agent["cpu"].rate_share, source="made up for this test")}})
    left = known.with_engine("other").cost_model
    assert left is not None and [p.phase for p in left.phases] == ["flash"]


def test_nothing_gets_faster_than_the_roofline() -> None:
    device = corrected(factor("FFN", 1 / 32), factor("flash", 1 / 32, dtype="", agent=""))
    assert seconds(device, product()) == pytest.approx(6e7 / device.agent["cpu"].rate.value)
    assert seconds(device, READ) == pytest.approx(1e6 / device.link["flash"].rate.value)
    plain = load_device("cloud-vm")
    assert seconds(device, product()) < seconds(plain, product()) and seconds(device, READ) < seconds(plain, READ)


@pytest.mark.parametrize("times", [0.3, 1.7])
def test_a_corrected_device_behaves_like_physics_and_both_engines_agree(times: float) -> None:
    names: tuple[PhaseName, ...] = ("predictor", "attention", "FFN", "head")
    device = corrected(*(factor(name, times) for name in names), factor("upkeep", times, dtype=""),
                       factor("flash", times, dtype="", agent=""))
    check_cost_model(durations, device)
    context = replace(ask("cloud-vm", "opt-6.7b", dram="8 GB", weights="fp32", prompt=32, new_tokens=16,
                          trace="opt-published").context("fp32"), device=device)
    for name in POLICIES:
        policy = policy_named(name)
        block = next(blocks(policy, context, {}, defaults=True))
        schedule = policy.decode(context, block, np.zeros(1, dtype=np.int64))
        took, before = durations(schedule, device), durations(schedule, load_device("cloud-vm"))
        assert not np.allclose(took.occupancy_s, before.occupancy_s)
        together = analytic(schedule, took).token_s
        least = together[capacity_cut(policy, context, block).fits].min()
        assert max(lower_bound(context).token_latency_s, agent_bound(context, "cpu").token_latency_s) <= least
        for i in (0, schedule.n_candidates - 1):
            assert events(schedule.column(i), column_of(took, i)).token_s == pytest.approx(together[i], rel=1e-12)


@pytest.mark.parametrize("what", [
    *(DemandClass("x", kind, agent="cpu") for kind in OpKind),
    *(product(name) for name in ("ffn", "head", "attention")),
    DemandClass("head weights.flash", OpKind.IO, link="flash")], ids=lambda w: f"{w.name} {w.kind}")
def test_phases_are_those_that_runs_are_split_into(what: DemandClass) -> None:
    builder = ScheduleBuilder(1, ["stream"])
    builder.end_token(builder.op(builder.demand(what, requests=1.0), "stream"))
    free = np.array([1.0])
    found = phase_seconds([Timeline(builder.build(), np.zeros(1), free, free, "by hand")])
    assert {name for name, s in found.items() if s > 0} == {phase_of(what)}
