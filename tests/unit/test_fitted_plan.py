"""What does a plan make of a device that names a cost model fitted to its own measurements?"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simmem
from simmem.cost.roofline import durations, error_key
from simmem.errors import SpecError
from simmem.planner.candidate import blocks
from simmem.planner.question import ask
from simmem.policy.base import Block, policy_named
from simmem.policy.context import Context
from simmem.schedule import DemandClass, OpKind, Products, Schedule, ScheduleBuilder
from simmem.sim.analytic import analytic
from simmem.sim.events import events
from simmem.spec.costmodel import FittedCost
from simmem.spec.device import Device, Engine, load_device
from simmem.spec.library import resolve
from tests.strategies import column_of

ASKED: dict[str, Any] = {"dram": "8 GB", "weights": "bf16", "prompt": 32, "new_tokens": 16}
WIDE = {"rows": [1, 1e6], "cols": [1, 1e6], "batch": [1, 4096]}


def group(kind: str, *, quantile: float = 2.0, extent: dict[str, Any] | None = None, slow: float = 1.0,
          dtype: str = "bf16") -> dict[str, Any]:
    errors = {"median": 0.05, "p90": 0.1}
    terms = [{"feature": "weights", "coefficient": slow / 10e9}, {"feature": "rows", "coefficient": slow * 100e-9}]
    if kind == "gemm":
        terms.append({"feature": "tiles", "coefficient": slow / 50e9, "tile": [8, 1]})
    return {"kind": kind, "dtype": dtype, "agent": "cpu", "level": "dram", "threads": 2, "bytes_per_param": 2.0,
            "bytes_per_s": 40e9, "flop_per_s": None if kind == "upkeep" else 1e12, "terms": terms, "overlap": 1.0,
            "residual": None, "range": extent or WIDE, "n_points": 50, "n_shapes": 25, "roofline": errors,
            "physical": errors, "chosen": errors,
            "interval": {"quantile": quantile, "intercept": math.log(0.05), "slopes": {}, "bounds": [0.01, 1.0],
                         "n": 50}}


def write(folder: Path, *groups: dict[str, Any], names: str | None = "model.json") -> str:
    """A device file beside its cost model."""
    text = resolve("device", "cloud-vm").read_text()
    if names is not None:
        text = text.replace('title = ', f'cost_model = "{names}"\ntitle = ', 1)
    (folder / "vm.toml").write_text(text)
    (folder / "model.json").write_text(json.dumps(
        {"schema": "simmem.cost/1", "name": "vm", "date": "2026-01-01", "groups": groups}))
    return str(folder / "vm.toml")


BOTH = (group("gemv"), group("gemm"))


def one(what: DemandClass, **demand: Any) -> Schedule:
    builder = ScheduleBuilder(1, ["stream"])
    builder.end_token(builder.op(builder.demand(what, **demand), "stream"))
    return builder.build()


def seconds(device: Device, what: DemandClass, factors: dict[str, Any] | None = None, **demand: Any) -> float:
    return float(durations(one(what, **demand), device, factors).occupancy_s[0, 0])


def product(batch: float, *, dtype: str = "bf16") -> DemandClass:
    return DemandClass("ffn", OpKind.COMPUTE, agent="cpu", precision=dtype, products=Products(batch, 1000.0, 3.0))


# ------------------------------------------------------------------------------------------------------------- costs


def test_seconds_of_a_class_by_hand(tmp_path: Path) -> None:
    device = load_device(write(tmp_path, *BOTH))
    moved = {"memory.dram": 60e6}  # three products of 10,000 rows of 1000 parameters in 2 bytes
    gemv = seconds(device, product(1), flop=60e6, requests=7.0, bytes=moved)
    assert gemv == pytest.approx(60e6 / 10e9 + 30_000 * 100e-9)
    gemm = seconds(device, product(12), flop=12 * 60e6, requests=7.0, bytes=moved)
    assert gemm == pytest.approx(gemv + 2 * 30e6 * 16 / 50e9)
    # Without its products a class is a square matrix for each kernel: 10⁷ parameters each are 3162 rows.
    unknown = DemandClass("ffn", OpKind.COMPUTE, agent="cpu", precision="bf16")
    assert seconds(device, unknown, flop=60e6, requests=3.0, bytes=moved) == pytest.approx(
        60e6 / 10e9 + 3 * 1e7**0.5 * 100e-9)


def test_what_was_not_fitted_and_what_is_no_product_stays_as_it_was(tmp_path: Path) -> None:
    device, plain = load_device(write(tmp_path, *BOTH)), load_device("cloud-vm")
    moved = {"memory.dram": 60e6}
    for what in (product(1, dtype="fp32"), DemandClass("step", OpKind.SYNC, agent="cpu"),
                 DemandClass("upkeep", OpKind.MEMORY, agent="cpu", precision="bf16"),
                 DemandClass("read", OpKind.IO, link=next(iter(device.link)))):
        demand: dict[str, Any] = {"requests": 3.0, "bytes": moved}
        assert seconds(device, what, **demand) == seconds(plain, what, **demand)


def test_a_draw_and_a_faster_part_reach_the_terms(tmp_path: Path) -> None:
    device = load_device(write(tmp_path, *BOTH))
    demand: dict[str, Any] = {"flop": 60e6, "requests": 7.0, "bytes": {"memory.dram": 60e6}}
    assert device.cost_model is not None
    drawn = {error_key(device.cost_model.groups[0]): math.e}  # the 95 % quantile of a draw
    assert seconds(device, product(1), drawn, **demand) == pytest.approx(
        seconds(device, product(1), **demand) * math.exp(0.1))
    faster = seconds(device, product(1), {"agent.cpu.rate": 2.0, "agent.cpu.op_overhead": 3.0}, **demand)
    assert faster == pytest.approx(60e6 / 20e9 + 3 * 30_000 * 100e-9)


@pytest.mark.parametrize("slow", [1e-6, 1.0])
def test_nothing_beats_the_roofline(slow: float, tmp_path: Path) -> None:
    device = load_device(write(tmp_path, group("gemv", slow=slow), group("gemm", slow=slow)))
    agent = device.agent["cpu"]
    context = ask(str(tmp_path / "vm.toml"), "opt-6.7b", **ASKED, trace="opt-published").context("bf16")
    for name in ("flash-window", "stream"):
        policy = policy_named(name)
        block = _a_block(context, name)
        for schedule in (policy.decode(context, block, np.zeros(1, dtype=np.int64)), policy.prefill(context, block)):
            took = durations(schedule, device)
            for k, what in enumerate(schedule.classes):
                if what.kind is not OpKind.COMPUTE:
                    continue
                least = np.maximum(
                    schedule.bytes["memory.dram"][k] / agent.rate.value,
                    schedule.flop[k] / agent.flop_per_s["fp32"].value)
                assert (took.occupancy_s[k] >= least * (1 - 1e-12)).all()
                assert (least > 0).any()


def _a_block(context: Context, name: str) -> Block:
    return next(blocks(policy_named(name), context, {}, defaults=True))


# ------------------------------------------------------------------------------------------------------------- plans


def test_a_plan_names_its_cost_model_and_carries_its_error(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("sure", "unsure", "narrow")}
    for folder in folders.values():
        folder.mkdir()
    narrow = {"rows": [64, 256], "cols": [64, 256], "batch": [1, 64]}
    asked = ASKED | {"policy": "stream"}
    plans = {name: simmem.plan(write(folders[name], *groups), "opt-6.7b", **asked) for name, groups in (
        ("sure", (group("gemv", quantile=0.0), group("gemm", quantile=0.0))),
        ("unsure", (group("gemv", quantile=12.0), group("gemm", quantile=12.0))),
        ("narrow", (group("gemv", extent=narrow), group("gemm", extent=narrow))))}
    plain = simmem.plan("cloud-vm", "opt-6.7b", **asked)
    assert (plain.evidence.cost_model, plain.evidence.extrapolating) == ("roofline", False)
    for plan in plans.values():
        assert plan.evidence.cost_model == "fitted: gemm bf16, gemv bf16"
        assert any("fitted to 100 measurements" in why for why in plan.why)
    assert plans["sure"].predicted.token_latency_s == plans["unsure"].predicted.token_latency_s
    low, high = (plans[n].predicted.token_latency_interval_s for n in ("sure", "unsure"))
    assert high[0] < low[0] < low[1] < high[1]
    assert [plans[n].evidence.extrapolating for n in plans] == [False, False, True]
    assert any("EXTRAPOLATING" in why for why in plans["narrow"].why)
    assert not any("EXTRAPOLATING" in why for why in plans["sure"].why)


def test_both_engines_agree_on_fitted_times(tmp_path: Path) -> None:
    path = write(tmp_path, *BOTH, group("upkeep"))
    context = ask(path, "opt-6.7b", **ASKED, trace="opt-published").context("bf16")
    for name in ("flash-window", "stream"):
        policy = policy_named(name)
        schedule = policy.decode(context, _a_block(context, name).only(np.arange(2)), np.arange(1))
        took = durations(schedule, context.device)
        assert (took.occupancy_s != durations(schedule, load_device("cloud-vm")).occupancy_s).any()
        found = analytic(schedule, took)
        for i in range(schedule.n_candidates):
            run = events(schedule.column(i), column_of(took, i))
            assert run.token_s == pytest.approx(found.token_s[i], rel=1e-12, abs=0)


def test_a_plan_with_a_fitted_model_needs_no_package_that_fits(tmp_path: Path) -> None:
    path = write(tmp_path, *BOTH)
    code = ("import sys, simmem\n"
            f"simmem.plan({path!r}, 'opt-125m', weights='bf16', policy='resident')\n"
            "print([m for m in ('scipy', 'sklearn', 'torch') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("names", "says"), [
    ("absent.json", "no 'absent.json' beside it"), ("../model.json", "in the same folder"),
    ("/etc/model.json", "in the same folder"), ("model.toml", "name of a .json file")])
def test_a_device_names_a_model_beside_it(names: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=says):
        load_device(write(tmp_path, *BOTH, names=names))


def test_a_model_of_another_agent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="agent 'gpu', which this device has not"):
        load_device(write(tmp_path, group("gemv") | {"agent": "gpu"}))


def test_another_stack_on_the_agent_drops_what_was_fitted_to_it(tmp_path: Path) -> None:
    device = load_device(write(tmp_path, *BOTH))
    assert isinstance(device.cost_model, FittedCost)
    known = device.model_copy(update={"engine": {"other": Engine(
        agent="cpu", rate_share=device.agent["cpu"].rate_share, source="made up for this test")}})
    assert known.with_engine("other").cost_model is None
    assert known.with_engine("unknown").cost_model == device.cost_model
