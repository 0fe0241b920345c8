"""Parts of a layer on one agent or on two: do they add up to the whole, and does the planner look at both agents?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from numpy.typing import NDArray

from simmem.cost.roofline import durations
from simmem.errors import SpecError
from simmem.planner import ranking
from simmem.planner.bound import agents_bound, lower_bound
from simmem.planner.candidate import blocks, contention_of
from simmem.planner.question import ask
from simmem.planner.ranking import search
from simmem.policy import base
from simmem.policy.base import Block, Knob
from simmem.policy.context import Context
from simmem.policy.families.resident import Resident
from simmem.policy.ops import Ops
from simmem.schedule import Durations, Phase, Schedule
from simmem.sim.analytic import analytic
from simmem.sim.events import events
from simmem.spec.device import Bus, load_device
from simmem.spec.model import load_model
from simmem.spec.workload import Workload
from tests.unit.test_roofline import fig


def context_of(device: str = "rtx4090-pc", model: str = "opt-30b", **workload: Any) -> Context:
    found = load_device(device)
    return Context(found, load_model(model), Workload(**workload), None,
                   {k: m.budget_bytes for k, m in found.memory.items()})


def total(ops: Ops, demands: list[tuple[int, str]], n: int = 1) -> NDArray[np.float64]:
    """flop, bytes in all memories, and kernels of some classes, (3, n_columns)."""
    last = [ops.op(what) for what in demands][-1]
    s = ops.build(last)
    k = sorted({what[0] for what in demands})
    memories = sum((v[k].sum(axis=0) for name, v in s.bytes.items() if name.startswith("memory.")), np.zeros(n))
    return np.array([s.flop[k].sum(axis=0), memories, s.requests[k].sum(axis=0)])


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("model", ["opt-6.7b", "llama-3.1-8b", "deepseek-v2-lite", "mamba-2.8b"])
def test_attention_in_parts_is_attention(model: str, phase: Phase) -> None:
    context = context_of(model=model, batch=3)
    whole, parts, two = (Ops(context, 1, phase=phase) for _ in range(3))
    given = whole.n_tokens, whole.context_flop, whole.context_bytes
    expected = total(whole, [whole.mixer("gpu", *given)])
    found = total(parts, [parts.projections("gpu", parts.n_tokens, part="before"), parts.attention("gpu", *given),
                          parts.projections("gpu", parts.n_tokens, part="after")])
    assert found == pytest.approx(expected, rel=1e-12)
    assert total(two, [two.projections("gpu", two.n_tokens), two.attention("gpu", *given)]) == pytest.approx(
        expected, rel=1e-12)


@pytest.mark.parametrize("model", ["opt-30b", "mixtral-8x7b", "deepseek-v2-lite"])
def test_an_ffn_on_two_agents_is_one_ffn_and_a_share_of_nothing_is_no_op(model: str) -> None:
    context = context_of(model=model, batch=2)
    share = np.array([0.0, 0.3, 1.0])
    for kind in context.layers.names:
        whole, both = Ops(context, 3), Ops(context, 3, agents=("gpu", "cpu"))
        expected = total(whole, [whole.feed("gpu", kind, whole.n_tokens)], 3)
        near = both.feed("gpu", kind, both.n_tokens, share)
        far = both.feed("cpu", kind, both.n_tokens, 1.0 - share, norms=False)
        found = total(both, [near, far], 3)
        assert found[0] == pytest.approx(expected[0])
        norms = both.read_bytes("gpu", "norms", 0.0, both.norm_params)
        assert found[1] == pytest.approx(expected[1] - norms * (share == 0))
        assert (both.builder.build().present[[near[0], far[0]]] == [[False, True, True], [True, True, False]]).all()


def two_agents(context: Context, share: NDArray[np.float64], n_rows: int = 1) -> Schedule:
    """A decode step with `share` of every FFN on the GPU and the rest on the CPU beside it."""
    share = np.repeat(share, n_rows)
    ops, rest = Ops(context, len(share), agents=("gpu", "cpu")), 1.0 - share
    attend = ops.mixer("gpu", ops.n_tokens, ops.context_flop, ops.context_bytes)
    near, far = ops.feed("gpu", "plain", ops.n_tokens, share), ops.feed("cpu", "plain", ops.n_tokens, rest, norms=False)
    sent = np.where(rest > 0, ops.n_tokens, 0.0)
    out, back = ops.hidden("x", "vram", "dram", sent), ops.hidden("y", "dram", "vram", sent)
    join, head = ops.join("gpu", ops.n_tokens, rest), ops.head("gpu")
    last = None
    for layer in range(context.model.architecture.n_layers):
        attended = ops.op(attend, deps=[last], layer=layer)
        cold = ops.op(far, deps=ops.chain(out, deps=[attended], layer=layer), layer=layer)
        hot = ops.op(near, deps=[attended], layer=layer)
        last = ops.op(join, deps=[hot, *ops.chain(back, deps=[cold], layer=layer)], layer=layer)
    return ops.build(ops.op(head, deps=[last]))


def test_two_agents_take_as_long_as_the_slower_with_its_copies() -> None:
    context = context_of()
    s = two_agents(context, np.array([0.9, 1.0]))
    took = durations(s, context.device)
    by = {c.name + "@" + str(c.agent): k for k, c in enumerate(s.classes)}
    both = took.occupancy_s + took.latency_s
    copies = sum(both[k] for name, k in by.items() if name.startswith(("x.", "y.")))
    slower = np.maximum(both[by["ffn@gpu"]], both[by["ffn@cpu"]] + copies)
    layers = context.model.architecture.n_layers
    expected = layers * (both[by["attention@gpu"]] + slower + both[by["join@gpu"]]) + both[by["head@gpu"]]
    assert analytic(s, took).token_s == pytest.approx(expected)
    assert analytic(s, took).token_s[1] < analytic(s, took).token_s[0]
    assert (analytic(s, took).token_s >= agents_bound(context, ("gpu", "cpu")).token_latency_s).all()


def test_an_agent_that_the_device_has_not_is_named() -> None:
    with pytest.raises(SpecError, match="no agent 'npu'"):
        Ops(context_of(), 1, agents=("npu",))


def test_two_directions_of_one_bus_slow_each_other_in_the_event_engine() -> None:
    device = load_device("rtx4090-pc")
    link = {k: v.model_copy(update={"bus": "pcie"}) if k in ("h2d", "d2h") else v for k, v in device.link.items()}
    bus = {"pcie": Bus.model_validate({"rate": fig("26.6 GB/s")})}
    context = context_of()
    seconds = {}
    for name, each in (("own", device), ("shared", device.model_copy(update={"link": link, "bus": bus}))):
        there = replace(context, device=each)
        ops = Ops(there, 1)
        ops.op(ops.move("there", 1e9, ("h2d",))[0])
        s = ops.build(ops.op(ops.move("back", 1e9, ("d2h",))[0]))
        took = durations(s, each)
        seconds[name] = events(s, Durations(took.occupancy_s, took.latency_s), contention_of(there))
    assert seconds["shared"].end_s.max() == pytest.approx(2e9 / 26.6e9, rel=0.01)
    assert seconds["own"].end_s.max() < 0.6 * seconds["shared"].end_s.max()


# ------------------------------------------------------------------------------------------- pairs, and the planner


class BothSides(Resident):
    """Keeps the rest of the FFN in host memory; a pair says how much of it is on the GPU and on the CPU."""

    name = "both-sides"

    def knobs(self, context: Context) -> tuple[Knob, ...]:
        pairs = tuple((float(p), 100.0 - p) for p in (0, 50, 95))
        return (Knob("agent", "structural", ("gpu",), "who computes"),
                Knob("weights_percent", "demand", pairs, "on the GPU, on the CPU", low=0, high=100),
                Knob("copies", "demand", (1, 2), "neutral"))

    def agents(self, context: Context, block: Block) -> tuple[str, ...]:
        return "gpu", "cpu"

    def footprint(self, context: Context, block: Block) -> dict[str, NDArray[np.float64]]:
        return {"vram": np.full(block.n_candidates, 1e9), "dram": np.full(block.n_candidates, 1e9)}

    def decode(self, context: Context, block: Block, rows: NDArray[np.int64]) -> Schedule:
        return two_agents(context, block.columns["weights_percent"][:, 0] / 100.0, len(rows))


def test_a_pair_is_parsed_searched_and_told() -> None:
    policy = BothSides()
    knob = policy.knobs(context_of())[1]
    for given in ((20.0, 80.0), [20, 80], "20,80", "(20.0, 80.0)", "[20, 80]"):
        assert knob.parse(given) == (20.0, 80.0)
    for wrong in ("20", "20,80,0", "20,many", "20,nan", (20, 101), None, ""):
        with pytest.raises(SpecError, match="expected") as caught:
            knob.parse(wrong)
        assert caught.value.key == "weights_percent"
    block, = blocks(policy, context_of(), {})
    assert block.n_candidates == 6
    assert block.columns["weights_percent"].shape == (6, 2)
    assert [block.knobs(i)["weights_percent"] for i in (0, 5)] == [(0.0, 100.0), (95.0, 5.0)]
    assert block.only(np.array([3])).knobs(0) == {"agent": "gpu", "weights_percent": (50.0, 50.0), "copies": 2}


def test_a_policy_on_two_agents_is_not_cut_by_the_bound_of_one() -> None:
    """Side by side they may be faster than the GPU alone can be: the bound that cuts is that of both."""
    with patch.dict(base._REGISTRY, {"both-sides": BothSides()}), patch.object(
            ranking, "agents_bound", side_effect=agents_bound) as bound:
        question = ask("rtx4090-pc", "opt-30b", weights="fp16", policy="both-sides")
        found = search(question, "fp16")
    assert {c.knobs["weights_percent"] for c in found.ranked} == {(0.0, 100.0), (50.0, 50.0), (95.0, 5.0)}
    assert [call.args[1] for call in bound.call_args_list] == [("gpu", "cpu")]
    context = question.context("fp16")
    one, both = (agents_bound(context, names, any_token=True).token_latency_s for names in (("gpu",), ("gpu", "cpu")))
    assert both < one
    assert both <= lower_bound(context).token_latency_s  # of any token, of the mean one
