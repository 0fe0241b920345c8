"""Are tensor groups at precisions of their own stored, read and computed as such, and are wrong ones refused?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from simmem.errors import SpecError
from simmem.planner.question import ask
from simmem.planner.ranking import search
from simmem.policy.base import Block, policy_named
from simmem.spec.workload import mixed_precisions, mixed_text

MIXED = {"attention": "int4", "experts": "int2"}


def test_groups_keep_their_own_precision_and_the_others_the_models() -> None:
    question = ask("a6000", "mixtral-8x7b", weights=MIXED)
    context, model = question.context(question.precisions[0]), question.model
    assert question.precisions == ("bf16",)
    for group in model.groups():
        own = MIXED.get(group.name, "bf16")
        assert context.group_precision(group.name) == own
        assert context.group_bytes[group.name] == group.bytes_at(own)
    # 2 and 4 bits with half a bit of scales and zeros
    assert context.group_bytes["experts"] == pytest.approx(model.group("experts").matrix_params * 2.5 / 8)
    assert context.group_bytes["attention"] == pytest.approx(model.group("attention").matrix_params * 4.5 / 8)
    decode = policy_named("resident").decode(context, Block({"agent": "gpu"}, {}), np.zeros(1, np.int64))
    computed = {c.name: c.precision for c in decode.classes if c.agent}
    assert computed == {"attention": "int4", "ffn": "int2", "head": "bf16"}


def test_a_text_says_the_same_as_a_table() -> None:
    assert mixed_precisions("attention=int4,experts=int2") == mixed_precisions(MIXED)
    assert mixed_text(dict(mixed_precisions(MIXED))) == "attention=int4,experts=int2"
    assert ask("a6000", "mixtral-8x7b", weights="attention=int4,experts=int2").workload \
        == ask("a6000", "mixtral-8x7b", weights=MIXED).workload


@pytest.mark.parametrize(("weights", "message"), [
    ({"atention": "int4"}, "no tensor group of mixtral-8x7b named 'atention'; did you mean attention?"),
    ({"ffn": "int4"}, "no tensor group of mixtral-8x7b named 'ffn'"),
    ({"experts": "int5"}, "found 'int5', expected one of fp32"),
    ({"experts": "file"}, "found 'file', expected one of fp32"),
    ("experts=int2,experts=int4", "is named twice"),
    ("experts:int2=", "expected pairs such as attention=int4"),
    ("=int2", "expected pairs such as attention=int4"),
])
def test_wrong_ones_are_refused_in_one_line(weights: Any, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        ask("a6000", "mixtral-8x7b", weights=weights)
    assert message in str(caught.value) and "--weights" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("knob", "value"), [
    ("experts_per_layer", 9), ("experts_per_layer", 1.5), ("cache_policy", "belady"), ("prefetch", "2"),
    ("cpu_experts", "maybe"), ("expert_per_layer", 2)])
def test_wrong_knobs_are_refused_in_one_line(knob: str, value: object) -> None:
    question = ask("a6000", "mixtral-8x7b", policy="expert-cache", knobs={knob: value})
    with pytest.raises(SpecError) as caught:
        search(question, question.precisions[0])
    assert knob in str(caught.value) and "\n" not in str(caught.value)
