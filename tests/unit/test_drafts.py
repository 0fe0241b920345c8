"""How many tokens does a step with a draft yield, what does it take, where does it pay, and what is refused?"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from simmem.errors import SimmemError
from simmem.planner.api import answer, plan
from simmem.planner.bound import agent_bound
from simmem.planner.candidate import Candidate, blocks
from simmem.planner.document import Plan
from simmem.planner.predict import token_seconds
from simmem.planner.question import DRAFT_LENGTHS, ask
from simmem.planner.ranking import objective_value, search
from simmem.planner.rates import most_tokens_per_s
from simmem.policy.base import policy_named
from simmem.policy.drafting import drafted
from simmem.spec.device import Agent, load_device
from simmem.spec.model import load_model
from simmem.spec.workload import Draft

SMALL = load_model("opt-125m")
QUESTION: dict[str, Any] = {"device": "rtx4090-pc", "model": "opt-6.7b", "weights": "fp16", "vram": "6 GB",
                            "policy": "layer-stream", "draft": "opt-125m"}


def test_a_step_yields_what_leviathan_says() -> None:
    for length, acceptance in itertools.product(range(9), (0.0, 0.1, 0.5, 0.8, 0.999)):
        expected = (1 - acceptance ** (length + 1)) / (1 - acceptance)
        assert Draft(SMALL, length, acceptance).tokens_per_step == pytest.approx(expected, rel=1e-12)
    assert [Draft(SMALL, length, 1.0).tokens_per_step for length in range(4)] == [1.0, 2.0, 3.0, 4.0]
    found = np.array([[Draft(SMALL, length, a).tokens_per_step for a in np.linspace(0, 1, 11)] for length in range(9)])
    assert (np.diff(found, axis=1)[1:] > 0).all()
    assert (np.diff(found, axis=0) >= 0).all()
    assert (found >= 1).all()


def step_s(agent: Agent, d: int, layers: int, vocab: int, positions: float, tokens: int) -> float:
    """A step of an OPT model at fp16 for `tokens` of one sequence, counted by hand. [s]"""
    peak = agent.flop_per_s["fp16"].value * agent.flop_share.value
    rate = agent.rate.value * agent.rate_share.value
    each = agent.op_overhead.value

    def op(flop: float, params: float, kernels: int, states: float = 0.0) -> float:
        return max(flop / peak, (2.0 * params + states) / rate) + kernels * each

    norm = 2 * d
    attention = op(tokens * (2 * 4 * d * d + 4 * d * positions), 4 * d * d + 4 * d + norm, 8, 2 * 2 * d * positions)
    ffn = op(tokens * 2 * 8 * d * d, 8 * d * d + 4 * d + d + norm, 5)
    return layers * (attention + ffn) + op(tokens * 2 * d * vocab, d * vocab + norm, 3)


def test_a_step_counted_by_hand() -> None:
    """Resident OPT-1.3B (24 layers of 2048) verifies three tokens that OPT-125M (12 of 768) drafts."""
    gpu = load_device("rtx4090-pc").agent["gpu"]
    assert gpu.step_overhead is None
    found = plan("rtx4090-pc", "opt-1.3b", weights="fp16", policy="resident", draft="opt-125m", acceptance=0.7,
                 knobs={"draft_length": 3, "agent": "gpu"}, prompt=100, new_tokens=200)
    target = step_s(gpu, 2048, 24, 50272, 200.0, tokens=4)
    draft = 3 * step_s(gpu, 768, 12, 50272, 200.0, tokens=1)
    tokens = 1 + 0.7 + 0.7**2 + 0.7**3
    p = found.predicted
    assert found.workload.tokens_per_step == pytest.approx(tokens, rel=1e-12)
    assert p.token_latency_s == pytest.approx((target + draft) / tokens, rel=1e-9)
    assert p.breakdown_s["draft"] == pytest.approx(draft / tokens, rel=1e-9)
    assert p.decode_tokens_per_s == pytest.approx(tokens / (target + draft), rel=1e-9)
    lived = {r.tensors: r.bytes for r in found.residency if r.tier == "vram"}
    assert lived["draft model"] == SMALL.bytes_at("fp16")
    assert lived["draft model's keys and values"] == 12 * 2 * 768 * 300 * 2
    assert sum(lived.values()) == pytest.approx(found.memory["vram"].used_bytes)


def test_the_bound_counted_by_hand() -> None:
    """The same case: matrices and context of the target once, all of the draft three times, over the tokens."""
    context = ask("rtx4090-pc", "opt-1.3b", weights="fp16", prompt=100, new_tokens=200, draft="opt-125m",
                  acceptance=0.7, draft_length=3).context("fp16")
    context, gpu, d = replace(context, replayed=None), context.agent("gpu"), 768  # no neuron is left out
    target = 2.0 * (24 * 12 * 2048**2 + 2048 * 50272) + 24 * 4 * 2048 * 200
    draft = 2.0 * (12 * (12 * d * d + 13 * d) + d * 50272 + 2 * d) + 12 * 4 * d * 200
    expected = (target + 3 * draft) / (gpu.rate.value * gpu.rate_share.value) / (1 + 0.7 + 0.7**2 + 0.7**3)
    assert gpu.attention_rate is None
    assert agent_bound(context, "gpu").token_latency_s == pytest.approx(expected, rel=1e-9)


def speed_up(length: int, acceptance: float = 1.0, **question: Any) -> float:
    """How much sooner a token comes with a draft, all knobs held."""
    found = []
    for n in (0, length):
        asked = ask(**{**QUESTION, **question}, acceptance=acceptance, draft_length=n)
        context = asked.context("fp16")
        policy = drafted(policy_named(asked.policy_names[0]), context)
        (block,) = blocks(policy, context, asked.fixed)
        found.append(token_seconds(Candidate(context, policy, block), np.zeros(1, np.int64)))
    return found[0] / found[1]


def test_a_stream_of_weights_is_shared_by_all_that_is_accepted() -> None:
    streamed = {"agent": "gpu", "source_tier": "storage", "buffers": 1, "resident_layers": 0}
    gained = [speed_up(length, model="opt-66b", knobs=streamed) for length in (1, 3, 7)]
    assert gained == pytest.approx([2.0, 4.0, 8.0], rel=0.01)
    assert max(gained) < 8.0


def test_what_waits_for_memory_gains_more_than_what_computes() -> None:
    offloaded = speed_up(4, 0.8, knobs={"agent": "gpu", "source_tier": "host", "buffers": 2, "resident_layers": 4})
    resident = {"policy": "resident", "vram": None, "model": "opt-1.3b", "knobs": {"agent": "gpu"}, "prompt": 16,
                "new_tokens": 16}
    alone, many = speed_up(4, 0.8, **resident), speed_up(4, 0.8, **resident, batch=512)
    assert offloaded > alone > many
    assert offloaded > 3.0
    assert many < 1.0


def test_the_best_length_is_searched_and_said() -> None:
    found = plan(**QUESTION, acceptance=0.8)
    held = [plan(**QUESTION, acceptance=0.8, knobs={"draft_length": n}).predicted.token_latency_s
            for n in DRAFT_LENGTHS]
    assert found.workload.draft_length == DRAFT_LENGTHS[int(np.argmin(held))] > 2
    assert found.predicted.token_latency_s == min(held)
    (said,) = [why for why in found.why if "drafts for a step" in why]
    assert all(f" {n}: " in said for n in DRAFT_LENGTHS)
    (felt,) = [s for s in found.sensitivity if s.figure == "acceptance"]
    more = ask(**QUESTION, acceptance=0.88, draft_length=found.workload.draft_length).workload
    assert felt.change == pytest.approx(0.1)
    assert felt.token_latency_change == pytest.approx(found.workload.tokens_per_step / more.tokens_per_step - 1)
    without = plan(**{**QUESTION, "draft": None})
    assert held[0] == without.predicted.token_latency_s > 2 * min(held)


def test_what_a_step_yields_counts_once_in_tokens_a_second() -> None:
    asked = {**QUESTION, "objective": "throughput", "batch": 4}
    found, held = plan(**asked, acceptance=0.8, knobs={"draft_length": 3}), {"acceptance": 0.8, "draft_length": 3}
    p, n = found.predicted, found.workload.new_tokens
    tokens = 1 + 0.8 + 0.8**2 + 0.8**3
    assert found.workload.tokens_per_step == pytest.approx(tokens, rel=1e-12)
    assert p.tokens_per_s == pytest.approx(4 * n / (p.first_token_s + (n - 1) * p.token_latency_s), rel=1e-12)
    (felt,) = [s for s in found.sensitivity if s.figure == "acceptance"]
    later = (n - 1) * p.token_latency_s * tokens / (1 + 0.88 + 0.88**2 + 0.88**3)
    assert felt.tokens_per_s_change == pytest.approx(4 * n / (p.first_token_s + later) / p.tokens_per_s - 1, rel=1e-6)
    question = ask(**asked, **held)
    (candidates,) = [search(question, precision).ranked for precision in question.precisions]
    best = min(value[0] for c in candidates if (value := objective_value(c, "throughput")))
    assert most_tokens_per_s(question) == pytest.approx(1 / best, rel=1e-9)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_draft_that_does_not_help_is_left_out(objective: str) -> None:
    def bare(found: Plan) -> dict[str, Any]:
        return found.model_dump(exclude={"workload", "why"})

    asked = {**QUESTION, "model": "opt-1.3b", "vram": "2 GB", "policy": "resident", "objective": objective}
    found = plan(**asked, acceptance=0.0)
    assert (found.workload.draft, found.workload.draft_length) == ("opt-125m", 0)
    assert any(why.endswith("opt-125m does not help here") for why in found.why)
    assert bare(found) == bare(plan(**{**asked, "draft": None}))


def test_experts_and_neurons_are_the_union_over_what_is_verified() -> None:
    def question(length: int, batch: int, **more: Any) -> Any:
        return ask("rtx4090-pc", draft="tinyllama-1.1b", acceptance=0.5, draft_length=length, batch=batch, **more)

    for more in ({"model": "mixtral-8x7b", "weights": "int4", "policy": "expert-cache"},
                 {"model": "relullama-7b", "weights": "fp16", "policy": "hot-cold"}):
        drafting, batched = (question(*n, **more).context(more["weights"]) for n in ((3, 1), (0, 4)))
        assert drafting.workload.step_tokens == batched.workload.step_tokens == 4
        if drafting.replayed is not None:
            assert (drafting.table.active_units == batched.table.active_units).all()
        policy, rows = policy_named(more["policy"]), np.zeros(1, np.int64)
        (block, *_) = blocks(policy, batched, {})
        one, many = (policy.decode(c, block.only(np.zeros(1, np.int64)), rows) for c in (drafting, batched))
        ffn = [[s.bytes["memory.vram"][k].sum() for k, what in enumerate(s.classes) if what.name == "ffn"]
               for s in (one, many)]
        assert ffn[0] == ffn[1]


@pytest.mark.parametrize(("changed", "said"), [
    ({"acceptance": None}, "--acceptance: found none for opt-125m, expected"),
    ({"acceptance": 1.2}, "--acceptance: found 1.2, expected"),
    ({"acceptance": float("nan")}, "--acceptance: found nan, expected"),
    ({"draft": None}, "--acceptance: found 0.8 without a draft model, expected --draft"),
    ({"draft": None, "acceptance": None, "knobs": {"draft_length": 4}}, "draft_length: found 4 without a draft model"),
    ({"knobs": {"draft_length": 1.5}}, "draft_length: found 1.5, expected a whole number"),
    ({"knobs": {"draft_length": 65}}, "draft_length: found 65, expected a value from 0 to 64"),
    ({"draft": "smollm2-135m"}, "--draft: smollm2-135m has a vocabulary of 49152 tokens, expected the 50272 of"),
    ({"draft": "mamba-2.8b"}, "--draft: mamba-2.8b keeps a state"),
    ({"draft": "opt-126m"}, "no model named 'opt-126m'"),
    ({"model": "llama-2-7b", "draft": "tinyllama-1.1b", "prompt": 2000, "new_tokens": 100},
     "--draft: a context of 2100 tokens is past the 2048 that tinyllama-1.1b has positions for"),
    ({"vram": "1 GB", "policy": "resident", "knobs": {"agent": "gpu", "draft_length": 2}}, "more bytes of vram")])
def test_what_cannot_be_drafted_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(SimmemError) as refused:
        plan(**{**QUESTION, "acceptance": 0.8, **changed})
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_draft_takes_its_room_from_the_policy() -> None:
    """What fits by a hair alone does not fit beside a draft, and the front still adds up."""
    alone = answer(ask("rtx4090-pc", "opt-1.3b", weights="fp16", policy="resident", knobs={"agent": "gpu"}), brief=True)
    used = alone.memory["vram"].used_bytes
    for length, fits in ((0, True), (1, False)):
        asked = ask("rtx4090-pc", "opt-1.3b", weights="fp16", policy="resident", knobs={"agent": "gpu"},
                    vram=used + 1e6, draft="opt-125m", acceptance=0.9, draft_length=length)
        if fits:
            answer(asked, brief=True)
            continue
        with pytest.raises(SimmemError, match="more bytes of vram"):
            answer(asked, brief=True)
