"""Is what is on record of a measured machine still true of the code: does its cost model know shapes it never saw?"""

from __future__ import annotations

from simmem.cost.holdout import family
from simmem.spec import library
from simmem.spec.costmodel import load_cost_model
from simmem.spec.device import load_device
from simmem.spec.measurement import load_measurements
from simmem.validation.costs import judge_model

RECORD = library.data_folder() / "validate" / "measured" / "epyc-2core-vm"


def test_the_first_run_predicts_the_shapes_that_only_the_second_measured() -> None:
    first, second = (load_measurements(RECORD / f"{name}.measurements.json") for name in ("epyc-2core-vm", "second"))
    seen = {family(p) for p in first.points}
    new = tuple(p for p in second.points if family(p) not in seen)
    judged = judge_model(load_cost_model(RECORD / "epyc-2core-vm.cost.json"), second.model_copy(update={"points": new}))
    everything = judged.all_products
    assert everything.shapes >= 200
    assert everything.median <= 0.07
    assert everything.p90 <= 0.15
    assert 0.85 <= everything.coverage <= 0.95
    assert everything.median < everything.roofline_median / 5


def test_the_recorded_device_plans() -> None:
    device = load_device(str(RECORD / "epyc-2core-vm.toml"))
    assert device.cost_model is not None
    assert all(figure.source.startswith("simmem calibrate") for figure in device.figures().values())
