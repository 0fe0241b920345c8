"""Do the published figures of engines that offload experts come out, with one constant spent on each engine?"""

from __future__ import annotations

from simmem.validation.reference import reproduce


def test_mixtral_offloading_on_four_gpus() -> None:
    found = reproduce(["mixtral-offloading"])
    assert not found.failed
    assert (found.summary.n, [r.expect for r in found.rows].count("anchor")) == (11, 1)
    assert found.summary.mape is not None and found.summary.max is not None
    assert found.summary.mape <= 0.12 and found.summary.max <= 0.30
    predicted = {r.id: r.predicted for r in found.rows if r.predicted is not None}
    for gpu in ("a100", "3080m", "3060", "t4"):
        speeds = [predicted[f"mixtral-offloading-{gpu}-2bit-{what}"] for what in ("full", "no-preload", "no-lru")]
        assert speeds == sorted(speeds, reverse=True), gpu


def test_moe_infinity_on_mixtral() -> None:
    found = reproduce(["moe-infinity"])
    assert not found.failed and found.summary.n == 1


def test_anchors_give_back_what_was_taken_from_them() -> None:
    anchors = [r for r in reproduce(["mixtral-offloading", "moe-infinity"]).rows if r.expect == "anchor"]
    assert len(anchors) == 2
    assert all(r.error is not None and abs(r.error) < 1e-3 for r in anchors)
