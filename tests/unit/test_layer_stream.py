"""Does layer-stream meet `stream` with nothing resident and `resident` with everything?"""

from __future__ import annotations

import numpy as np
import pytest

from simmem.cost.roofline import durations
from simmem.policy.base import Block, Policy, policy_named
from simmem.policy.check import check_policy
from simmem.policy.context import Context
from simmem.sim.analytic import analytic
from simmem.spec.device import load_device
from simmem.spec.model import load_model
from simmem.spec.workload import Workload

POLICY, STREAM = policy_named("layer-stream"), policy_named("stream")
ONE = np.zeros(1, np.int64)


def context_of(model: str) -> Context:
    device = load_device("a6000")
    return Context(device, load_model(model), Workload(16, 16), None,
                   {name: memory.budget_bytes for name, memory in device.memory.items()})


def seconds(policy: Policy, context: Context, block: Block) -> tuple[list[float], list[float]]:
    decode, prefill = policy.decode(context, block, ONE), policy.prefill(context, block)
    return (analytic(decode, durations(decode, context.device)).token_s.tolist(),
            analytic(prefill, durations(prefill, context.device)).makespan_s.tolist())


@pytest.mark.parametrize("model", ["opt-125m", "mixtral-8x7b", "deepseek-v2-lite"])
@pytest.mark.parametrize("source", ["host", "storage"])
@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_its_ends_are_stream_and_resident(model: str, source: str, buffers: int) -> None:
    context = context_of(model)
    layers = context.model.architecture.n_layers
    mine = Block({"agent": "gpu", "source_tier": source, "buffers": buffers},
                 {"resident_layers": np.arange(layers + 2)})
    best = context.storage_link[1].best_depth
    assert best is not None
    theirs = Block({"agent": "gpu", "source_tier": source, "prefetch_layers": buffers - 1},
                   {"resident_ratio": np.array([0.0, 1.0]), "reader_threads": np.full(2, best.value)})
    step, prompt = seconds(POLICY, context, mine)
    other_step, other_prompt = seconds(STREAM, context, theirs)
    assert (step[0], step[-1]) == pytest.approx(other_step, rel=1e-12)
    assert (prompt[0], prompt[-1]) == pytest.approx(other_prompt, rel=1e-12)
    for tier, used in STREAM.footprint(context, theirs).items():
        assert POLICY.footprint(context, mine)[tier][[0, -1]] == pytest.approx(used, rel=1e-12)
    assert (np.diff(step) <= 1e-12).all(), "a layer more on the GPU is never slower"
    assert step[-1] == pytest.approx(seconds(policy_named("resident"), context, Block({"agent": "gpu"}, {}))[0][0],
                                     rel=1e-12)


def test_whole_layers_cross_the_link_and_buffers_hide_them() -> None:
    context = context_of("opt-6.7b")
    moved, took = [], []
    for buffers in (1, 2):
        block = Block({"agent": "gpu", "source_tier": "host", "buffers": buffers}, {"resident_layers": np.array([10])})
        moved.append(POLICY.decode(context, block, ONE).timed_bytes["link.h2d"][0])
        took.append(seconds(POLICY, context, block)[0][0])
    layers = context.layers
    expected = 22 * layers.stored_bytes[0] + context.head_bytes
    assert moved == pytest.approx([expected, expected])
    copying = expected / context.device.link["h2d"].rate.value
    assert took[1] == pytest.approx(copying, rel=0.05) and took[1] < took[0]


def test_it_keeps_the_contract() -> None:
    for model in ("opt-125m", "moe-8x3m"):
        context = context_of(model)
        last = context.model.architecture.n_layers + 1
        check_policy(POLICY, context, same=[
            ({"resident_layers": last, "buffers": 1, "source_tier": "host"},
             {"resident_layers": last, "buffers": 3, "source_tier": "storage"})])


def test_it_does_not_apply_where_all_share_one_memory() -> None:
    device = load_device("m1-max")
    context = Context(device, load_model("opt-125m"), Workload(16, 16), None,
                      {name: memory.budget_bytes for name, memory in device.memory.items()})
    assert POLICY.knobs(context) == ()
