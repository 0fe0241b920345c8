"""Does everything that `plan --objective throughput` says speak of tokens a second, and name rivals that compete?"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from simmem.planner.api import plan
from simmem.planner.document import Baseline, Plan
from simmem.planner.explain import reasons
from simmem.spec.device import load_device
from tests.cli.running import Simmem

ASKED = ("--device", "rtx4090-pc", "--model", "opt-1.3b", "--weights", "fp16")
TIGHT = ("--device", "rtx3060-pc", "--model", "opt-6.7b", "--weights", "fp16", "--batch", "8", "--prompt", "64",
         "--new-tokens", "16", "--objective", "throughput")


@cache
def answered(**asked: Any) -> Plan:
    return plan("rtx4090-pc", "opt-1.3b", weights="fp16", batch=4, **asked)


def said(found: Plan, **changed: Any) -> list[str]:
    return reasons(found.model_copy(update=changed), load_device(found.device), [])


def test_reasons_and_tables_speak_of_tokens_a_second(simmem: Simmem) -> None:
    document = simmem("plan", *TIGHT, "--json").document
    why = " ".join(document["why"])
    predicted = document["predicted"]
    assert f"brings {predicted['tokens_per_s']:.3g} tokens/s, prompt included, with 8 sequences at once" in why
    assert "more tokens/s, the most of any figure" in why
    assert "would bring" in why and "can decode more than" in why
    for word in (" takes ", " saves ", "would take", "faster than", "as fast"):
        assert word not in why.replace("the prompt takes", ""), word
    for baseline in document["baselines"]:
        assert baseline["tokens_per_s"] > 0
    changes = [s["tokens_per_s_change"] for s in document["sensitivity"]]
    assert [abs(c) for c in changes] == sorted((abs(c) for c in changes), reverse=True)
    text = simmem("plan", *TIGHT).out
    assert f"{predicted['tokens_per_s']:.3g} tokens/s, prompt included" in " ".join(text.split())
    depends, compared = text.index("What it depends on"), text.index("Compared with")
    for start, end in ((depends, compared), (compared, text.index("Less memory"))):
        assert "tokens/s" in text[start:end] and "latency" not in text[start:end] and "fast" not in text[start:end]


def test_other_objectives_speak_of_time_as_before(simmem: Simmem) -> None:
    document = simmem("plan", *ASKED, "--json").document
    assert "a token" in " ".join(document["why"]) and "tokens/s" not in " ".join(document["why"])
    assert {s["tokens_per_s_change"] for s in document["sensitivity"]} == {None}


def test_a_tokens_a_second_change_is_that_of_the_whole_answer() -> None:
    """10 % of a rate that every part of the answer is spent on; none beyond what it could bring."""
    found = answered(objective="throughput")
    by_figure = {s.figure: s for s in found.sensitivity}
    rate = by_figure["agent.gpu.rate"]
    assert rate.tokens_per_s_change is not None
    first, step, n = found.predicted.first_token_s, found.predicted.token_latency_s, found.workload.new_tokens
    decode = (n - 1) * step / (first + (n - 1) * step)
    assert 1 / (1 + rate.token_latency_change * decode) - 1 <= rate.tokens_per_s_change * (1 + 1e-9) <= 0.1
    arithmetic = by_figure["agent.gpu.flop_per_s.fp16"]  # it only matters to the prompt
    assert arithmetic.token_latency_change == 0 and 0 < (arithmetic.tokens_per_s_change or 0) < 0.01


# --- rivals -------------------------------------------------------------------------------------------------------


def test_a_tie_is_called_one_and_what_was_set_aside_is_no_rival() -> None:
    for objective, unit in (("latency", " ms"), ("throughput", "tokens/s")):
        found = answered(objective=objective)
        aside = {b.policy for b in found.baselines if b.set_aside}
        assert aside == {"hot-cold", "flash-window"}  # everything fits, so nothing has to be left out
        line = next(w for w in found.why if w.startswith("resident at fp16"))
        assert "a tie with layer-split, layer-stream, tier-percent and stream; stream, nothing resident" in line
        assert unit in line and not any(name in line for name in aside)


@pytest.mark.parametrize(("rivals", "expected"), [
    ([("stream", 2.0, False), ("hot-cold", 0.5, True)], ", against 2 × for stream"),
    ([("stream", 1.0, False), ("layer-split", 3.0, False)], ", a tie with stream; layer-split takes 3 ×"),
    ([("hot-cold", 0.5, True)], ""), ([("stream", 0.5, False)], ", against 0.5 × for stream")])
def test_the_rival_by_hand(rivals: list[tuple[str, float, bool]], expected: str) -> None:
    found = answered()
    seconds = found.predicted.token_latency_s
    baselines = [Baseline(policy=name, token_latency_s=factor * seconds, speedup=factor, set_aside=aside)
                 for name, factor, aside in rivals]
    line = next(w for w in said(found, baselines=baselines) if w.startswith("resident at fp16"))
    _, _, rest = line.partition(" a token" if found.workload.batch == 1 else " a step")
    for factor in (0.5, 2.0, 3.0):
        expected = expected.replace(f"{factor:g} ×", f"{1000 * factor * seconds:.3g} ms")
    assert rest == expected


def test_asked_by_name_dropping_work_competes_only_with_its_like() -> None:
    """`--policy` is no reason to call what leaves neurons out a rival of what does not."""
    for policy, rivals in (("stream", set()), ("hot-cold", {"flash-window"})):
        found = plan("rtx4090-pc", "opt-1.3b", weights="fp16", policy=policy)
        dropping = {b.policy for b in found.baselines if not b.set_aside} & {"hot-cold", "flash-window"}
        assert dropping == rivals
    alone = plan("rtx4090-pc", "opt-1.3b", weights="fp16", policy="resident")
    assert {b.policy for b in alone.baselines if b.set_aside} == {"hot-cold", "flash-window"}


def test_a_plan_of_before_has_no_such_fields_and_is_read(simmem: Simmem) -> None:
    document = json.loads(answered(objective="throughput").to_json())
    for baseline in document["baselines"]:
        del baseline["tokens_per_s"], baseline["set_aside"]
    for one in document["sensitivity"]:
        del one["tokens_per_s_change"]
    assert Plan.model_validate(document).baselines[0].tokens_per_s is None


# --- how many sequences, which precision ---------------------------------------------------------------------------


def test_the_number_of_sequences_is_explained(simmem: Simmem) -> None:
    document = simmem("plan", "--device", "m1-max", "--model", "opt-125m", "--weights", "fp16", "--objective",
                      "throughput", "--json").document
    why = next(w for w in document["why"] if "sequences at once are the fewest" in w)
    assert why.startswith(f"{document['workload']['batch']} sequences at once are the fewest within 3 % of the most")
    help_text = simmem("plan", "--help").out
    assert "fewest within 3 %" in " ".join(help_text.replace("│", " ").split())


def test_mixed_precision_is_called_by_all_its_names(simmem: Simmem) -> None:
    label = "bf16 (attention int4, experts int2)"
    asked = ("plan", "--device", "rtx4090-pc", "--model", "mixtral-8x7b", "--weights", "attention=int4,experts=int2")
    document = simmem(*asked, "--json").document
    assert document["workload"]["weights"] == "bf16"
    assert document["why"][0].startswith(f"{label} fits in vram")
    assert document["why"][1].startswith(f"{document['policy']['name']} at {label} takes ")
    assert f"{label} weights: " in " ".join(simmem(*asked).out.split())
    small = simmem(*asked, "--dram", "1GB", "--vram", "1GB", "--policy", "resident", "--json")
    assert small.code == 3 and label in small.document["message"]


def test_a_knob_in_bytes_takes_a_unit(simmem: Simmem) -> None:
    asked = ("plan", "--device", "powerinfer-pc-high", "--model", "opt-30b", "--weights", "fp16", "--policy",
             "hot-cold")
    for given in ("10GB", "10 GB", "10000000000", "1e10"):
        ended = simmem(*asked, "--set", f"gpu_weight_bytes={given}", "--json")
        assert ended.document["policy"]["knobs"]["gpu_weight_bytes"] == 1e10
