"""Does `simmem plan --draft` write what `simulate` finds again, and do the other commands say what they cannot do?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import Simmem

OPTIONS = ("--device", "m1-max", "--model", "opt-1.3b", "--weights", "fp16", "--dram", "2.2 GB", "--draft", "opt-125m",
           "--acceptance", "0.8", "--policy", "stream")


def test_a_plan_with_a_draft_is_simulated_again_and_not_run(simmem: Simmem, tmp_path: Path) -> None:
    written = tmp_path / "plan.json"
    ended = simmem("plan", *OPTIONS, "--set", "draft_length=4", "--emit", "llama.cpp", "--out", written, "--json")
    found = ended.document
    assert ended.code == 0
    assert {k: found["workload"][k] for k in ("draft", "acceptance", "draft_length")} == {
        "draft": "opt-125m", "acceptance": 0.8, "draft_length": 4}
    assert found["emit"]["realises"] != "exact"
    again = simmem("simulate", written, "--tokens", 64, "--json").document
    for key in ("token_latency_s", "breakdown_s", "busy_s"):
        assert again[key] == pytest.approx(found["predicted"][key], rel=1e-12)
    refused = simmem("run", written, "--json")
    assert (refused.code, refused.document["key"]) == (2, "workload.draft_length")
    assert "cannot be run" in refused.document["message"]


def test_a_plan_with_a_draft_reads_on_a_terminal(simmem: Simmem) -> None:
    ended = simmem("plan", *OPTIONS)
    text = " ".join(ended.out.split())
    assert ended.code == 0
    assert "drafted by opt-125m for each step" in text
    assert "time of a token by tokens that opt-125m drafts for a step, at an acceptance of 80.0 %: 0: " in text
    assert "drafting tokens" in text
    assert "draft model's keys and values" in text
