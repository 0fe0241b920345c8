"""Does `--max-quality-loss` keep what it promises, also of what nobody measured?"""

from __future__ import annotations

import pytest

from simmem.spec import load_model
from simmem.trace import open_trace, sparsest_trace_within
from tests.cli.running import Simmem

ASK = ("plan", "--device", "iphone15", "--model", "smollm2-135m", "--max-quality-loss")


@pytest.mark.parametrize("allowed", [0.0, 0.05, 0.2])
def test_no_plan_is_known_to_lose_more(simmem: Simmem, allowed: float) -> None:
    plan = simmem(*ASK, allowed, "--json").document
    assert plan["quality"]["perplexity_ratio"] <= 1 + allowed
    for other in [*plan["alternatives"], *plan["pareto"]]:
        assert other["quality"]["perplexity_ratio"] <= 1 + allowed
    assert plan["workload"]["weights"] == "bf16", "what int8 and int4 cost was not measured"


@pytest.mark.parametrize(("allowed", "trace"), [(0.05, "smollm2-135m-wina-50"), (0.2, "smollm2-135m-wina-70")])
def test_the_sparsest_trace_that_keeps_to_it_is_planned_with(simmem: Simmem, allowed: float, trace: str) -> None:
    plan = simmem(*ASK, allowed, "--policy", "flash-window", "--json").document
    assert plan["trace"]["name"] == trace
    model = load_model("smollm2-135m")
    opened = open_trace(trace, model)
    assert opened is not None and opened.header.quality is not None
    assert plan["quality"]["perplexity_ratio"] == opened.header.quality.perplexity_ratio
    assert sparsest_trace_within(model, 1.0 + allowed) == trace


def test_where_nothing_keeps_to_it(simmem: Simmem) -> None:
    ended = simmem(*ASK, "0.01", "--policy", "flash-window", "--weights", "bf16")
    assert ended.code == 3
    assert "flash-window at bf16" in ended.err and "perplexity × 1.021" in ended.err


def test_a_plan_that_leaves_units_out_quotes_the_curve_of_its_trace(simmem: Simmem) -> None:
    opened = open_trace("smollm2-135m-wina-70", load_model("smollm2-135m"))
    assert opened is not None and opened.header.quality is not None
    dense = opened.header.quality.dense_perplexity
    points = [(100 * p.sparsity, p.perplexity / dense) for p in opened.header.quality.levels]
    asked = ("plan", "--device", "iphone15", "--model", "smollm2-135m", "--trace", "smollm2-135m-wina-70",
             "--weights", "bf16", "--json", "--policy")
    quoted = [why for why in simmem(*asked, "flash-window").document["why"] if "units left out" in why]
    assert len(quoted) == 1
    assert quoted[0].endswith(": " + ", ".join(f"{share:.0f} % × {ratio:.3f}" for share, ratio in points))
    assert not [why for why in simmem(*asked, "resident").document["why"] if "units left out" in why]
    printed = [line.split() for line in simmem("traces", "smollm2-135m-wina-70").out.splitlines()]
    for (share, ratio), level in zip(points, (30, 50, 70, 80, 90), strict=True):
        row = next(words for words in printed if words[:2] == [str(level), "%"])
        assert row[2:4] == [f"{share:.1f}", "%"] and float(row[-1]) == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("wrong", ["nan", "-0.1", "inf", "11", "much"])
def test_a_bound_that_is_none(simmem: Simmem, wrong: str) -> None:
    ended = simmem(*ASK[:-1], f"--max-quality-loss={wrong}")
    assert (ended.code, ended.out) == (2, "")
    assert len(ended.err.splitlines()) == 1 and "--max-quality-loss" in ended.err
