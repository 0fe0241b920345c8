"""Is a layer split what lies between all on the CPU and all on the GPU, and does it say when it cannot be?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from simmem.cost.roofline import durations
from simmem.errors import SpecError
from simmem.planner.api import answer
from simmem.planner.candidate import contention_of
from simmem.planner.question import ask
from simmem.policy.base import Block, policy_named
from simmem.policy.check import check_policy
from simmem.policy.context import Context
from simmem.policy.families.layer_split import LayerSplit
from simmem.report.emit.engines import emission
from simmem.schedule import Schedule
from simmem.sim.analytic import analytic
from simmem.sim.events import events
from tests.strategies import column_of

ROWS = np.zeros(1, np.int64)
SPLIT = LayerSplit()


def context_of(model: str, device: str = "powerinfer-pc-high", **asked: Any) -> Context:
    question = ask(device, model, **{"weights": "fp16", **asked})
    return question.context(question.precisions[0])


def block_of(*gpu_layers: int) -> Block:
    return Block({"agent": "gpu"}, {"gpu_layers": np.array(gpu_layers)})


def seconds(context: Context, schedule: Schedule) -> list[float]:
    return [float(s) for s in analytic(schedule, durations(schedule, context.device)).token_s]


@pytest.mark.parametrize("model", ["opt-1.3b", "llama-2-7b", "mixtral-8x7b", "deepseek-v2-lite", "mamba-2.8b"])
def test_none_and_all_layers_are_the_resident_plans(model: str) -> None:
    context = context_of(model, batch=2)
    most = context.model.architecture.n_layers + 1
    for phase in ("decode", "prefill"):
        def run(policy: Any, block: Block, phase: str = phase) -> list[float]:
            made = policy.decode(context, block, ROWS) if phase == "decode" else policy.prefill(context, block)
            return seconds(context, made)

        ends = run(SPLIT, block_of(0, most))
        one = [run(policy_named("resident"), Block({"agent": agent}, {}))[0] for agent in ("cpu", "gpu")]
        assert ends == pytest.approx(one, rel=1e-12)


@pytest.mark.parametrize("model", ["opt-30b", "mixtral-8x7b"])
def test_a_token_is_the_turns_of_both_and_what_crosses(model: str) -> None:
    """They take turns, so a token takes at least either's work; every weight is multiplied once, wherever it lies."""
    context = context_of(model)
    layers = context.model.architecture.n_layers
    block = block_of(*range(layers + 2))
    schedule = SPLIT.decode(context, block, ROWS)
    took = durations(schedule, context.device)
    uses = np.bincount(schedule.op_class, minlength=len(schedule.classes))
    computing = np.array([uses[k] * (c.agent is not None) for k, c in enumerate(schedule.classes)])
    token_s = analytic(schedule, took).token_s
    crossing = token_s - computing @ took.occupancy_s
    assert (crossing >= -1e-12).all() and crossing[[0, layers + 1]] == pytest.approx([0, 0], abs=1e-12)
    assert crossing[1:-1].max() < 2e-4  # one vector a direction
    for i in (0, 5, layers + 1):
        assert token_s[i] <= events(schedule.column(i), column_of(took, i), contention_of(context)).token_s * (1 + 1e-9)
    moved = schedule.timed_bytes
    multiplied, hidden = moved["memory.vram"] + moved["memory.dram"], 2 * (moved["link.h2d"] + moved["link.d2h"])
    np.testing.assert_allclose(multiplied - hidden, multiplied[0], rtol=1e-12)
    held = SPLIT.footprint(context, block)
    assert (np.diff(held["vram"][1:layers]) > 0).all() and (np.diff(held["dram"][:layers]) < 0).all()


def test_it_keeps_the_contract_and_says_where_it_does_not_apply() -> None:
    check_policy(SPLIT, context_of("mixtral-8x7b", weights="int4"))
    unified = context_of("opt-1.3b", "m1-max")
    assert SPLIT.knobs(unified) == ()
    assert "one memory" in str(SPLIT.why_not(unified))
    for wrong, said in (("99", "from 0 to 25"), ("1.5", "whole number"), ("many", "a number")):
        with pytest.raises(SpecError, match=said):
            answer(ask("powerinfer-pc-high", "opt-1.3b", policy="layer-split", knobs={"gpu_layers": wrong}))


@pytest.mark.parametrize(("given", "flags"), [
    (20, ["--n-gpu-layers", "20", "--load-mode", "none"]), (0, ["--device", "none", "--n-gpu-layers", "0"])])
def test_llama_cpp_has_a_flag_for_it(given: int, flags: list[str]) -> None:
    question = ask("rtx4090-pc", "llama-2-7b", weights="fp16", policy="layer-split", knobs={"gpu_layers": given})
    emit = emission(answer(question, brief=True), question, "llama.cpp").emit
    assert emit is not None and emit.realises == "exact" and emit.arguments is not None
    assert emit.arguments[3: 3 + len(flags)] == flags
    other = emission(answer(question, brief=True), question, "accelerate").emit
    assert other is not None and other.realises == "no" and "copied to the GPU" in other.cannot[0]
