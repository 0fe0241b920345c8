"""Does another program's routing log become a trace that every command reads, and a table that others read?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from simmem.trace.routing import misses_by_layer
from simmem.trace.store import load_trace_file
from tests.cli.running import Simmem

MODEL = """
schema = "simmem.model/1"
name = "toy-moe"
title = "Toy"
family = "toy"
source = "made up for a test"
native_precision = "bf16"

[architecture]
d_model = 64
n_layers = 3
n_heads = 2
n_kv_heads = 2
d_head = 32
d_ff = 96
vocab = 100
max_positions = 512
gated = true
activation = "silu"
norm = "rmsnorm"
experts = { count = 8, per_token = 2, d_expert = 48, first_layer = 1 }
"""
MAPPING = ("--columns", "token=token_idx,layer=layer_idx", "--columns", "expert=selected_ids")
SIZES = ("--n-layers", 2, "--n-experts", 8, "--unit-bytes", "18432 B", "--weights", "bf16")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """80 tokens of a model whose layers 1 and 2 choose 2 of 8 experts, the first experts more often."""
    rng, path = np.random.default_rng(3), tmp_path / "routing.jsonl"
    likely = np.arange(8, 0, -1) / 36
    path.write_text("".join(json.dumps({
        "layer_idx": layer, "token_idx": token, "gate_weights": [0.7, 0.3],
        "selected_ids": rng.choice(8, 2, replace=False, p=likely).tolist()}) + "\n"
        for token in range(80) for layer in (1, 2)))
    (tmp_path / "toy-moe.toml").write_text(MODEL)
    return path


def test_a_log_becomes_a_trace_that_can_be_replayed(simmem: Simmem, log: Path, tmp_path: Path) -> None:
    out = tmp_path / "routing.safetensors"
    ended = simmem("import", log, "--out", out, *MAPPING, "--model", tmp_path / "toy-moe.toml", "--json",
                   "--text-note", "a prompt of mine")
    assert ended.code == 0, ended.err
    header = ended.document
    assert header["schema"] == "simmem.trace/1"
    assert (header["unit"], header["kind"], header["model"], header["text"]) == (
        "expert", "captured", "toy-moe", "a prompt of mine")
    assert header["unit_bytes"] == 3 * 64 * 48 * 2
    assert header["imported"]["layer_ids"] == [1, 2]
    records = [json.loads(line) for line in log.read_text().splitlines()]
    bits = np.unpackbits(load_trace_file(out).active, axis=2, count=8, bitorder="little")
    assert all(set(np.flatnonzero(bits[r["token_idx"], r["layer_idx"] - 1])) == set(r["selected_ids"]) for r in records)
    text = simmem("import", log, "--out", out, *MAPPING, *SIZES).out
    assert "experts of 18.43 kB at bf16" in text
    assert "the router says it" in text
    shown = simmem("traces", out)
    assert shown.code == 0 and "routing.jsonl" in shown.out and "token = token_idx" in shown.out
    assert simmem("traces", out, "--json").document["statistics"]["active_share"] == pytest.approx(0.25)
    # a cache of all 8 experts misses only what was never used before
    first_used = {(r["layer_idx"], e): r["token_idx"] for r in reversed(records) for e in r["selected_ids"]}
    found = simmem("replay", out, "--policy", "lru", "--size", "147456 B", "--json").document
    (curve,) = found["curves"]
    cold_tokens, late = found["cold"]["tokens"], sum(t >= found["cold"]["tokens"] for t in first_used.values())
    assert curve["hit_ratio"] == pytest.approx([1 - late / ((80 - cold_tokens) * 4)])
    assert found["cold"]["first_uses"] == len(first_used) - late
    assert simmem("replay", out).code == 0


def test_expert_cache_plans_with_routing(simmem: Simmem, log: Path, tmp_path: Path) -> None:
    out = tmp_path / "routing.safetensors"
    assert simmem("import", log, "--out", out, *MAPPING, *SIZES).code == 0
    asked = ("--device", "a6000", "--model", tmp_path / "toy-moe.toml", "--trace", out, "--weights", "bf16")
    plan = simmem("plan", *asked, "--policy", "expert-cache", "--set", "experts_per_layer=3", "--json").document
    trace = load_trace_file(out)
    missed = misses_by_layer(trace, plan["policy"]["knobs"]["cache_policy"], np.array([3]), cold_tokens=20).missed
    timed = slice(80 // 4, None)  # every token but those that pin-hot learns from
    hits = 1 - missed[timed].sum() / trace.active_counts[timed].sum()
    assert plan["predicted"]["cache"]["experts"]["hit_ratio"] == pytest.approx(hits)
    ended = simmem("plan", "--device", "m1-max", "--model", "opt-125m", "--trace", out)
    assert ended.code == 2 and "2 layers of 8 experts, opt-125m has none" in ended.err, ended.err


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_table_imports_again(simmem: Simmem, log: Path, tmp_path: Path, suffix: str) -> None:
    first, table, again = tmp_path / "a.safetensors", tmp_path / f"a{suffix}", tmp_path / "b.safetensors"
    assert simmem("import", log, "--out", first, *MAPPING, *SIZES).code == 0
    ended = simmem("export", first, "--out", table)
    assert ended.code == 0 and "2 layers of 8 experts" in ended.out
    back = simmem("import", table, "--out", again, *SIZES, "--json").document
    assert back["digest"] == simmem("export", first, "--out", table, "--json").document["digest"]


@pytest.mark.parametrize(("arguments", "key", "words"), [
    ((), "line 1", "fields layer_idx, token_idx, gate_weights, selected_ids, expected one named 'expert'; --columns"),
    ((*MAPPING, "--n-layers", "3"), None, "holds the layers 1 to 2: 2, but --n-layers has 3"),
    ((*MAPPING, "--unit", "kv-block"), "--unit", "expected expert or ffn-neuron"),
    ((*MAPPING, "--weights", "fp7"), "--weights", "expected one of fp32"),
    ((*MAPPING, "--n-experts", "0"), "--n-experts", "found 0, expected 1 to"),
    ((*MAPPING, "--unit-bytes", "18432"), "--unit-bytes", "no unit"),
    ((*MAPPING, "--model", "opt-125m"), "--unit-bytes", "known from the model"),
    ((*MAPPING, "--text-note", "a\x1b[2J"), None, "can be printed"),
    ((*MAPPING, "--out", "{tmp}/t.npz"), "--out", "expected .safetensors"),
])
def test_bad_input_is_one_line(simmem: Simmem, log: Path, tmp_path: Path, arguments: tuple[str, ...], key: str | None,
                               words: str) -> None:
    given = [a.format(tmp=tmp_path) for a in arguments]
    ended = simmem("import", log, "--out", tmp_path / "t.safetensors", *SIZES, *given, "--json")
    assert ended.code == 2
    assert words in ended.document["message"] and len(ended.err.splitlines()) == 1
    assert ended.document["key"] == key
    assert sorted(p.name for p in tmp_path.iterdir()) == ["routing.jsonl", "toy-moe.toml"]


def test_what_a_log_is_of_is_never_guessed(simmem: Simmem, log: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.safetensors"
    for given, words in (((), "--model, or --unit-bytes, --n-experts and --n-layers"),
                         (SIZES[:6], "at which precision"), (("--model", "opt-125m"), "has no experts")):
        ended = simmem("import", log, "--out", out, *MAPPING, *given)
        assert ended.code == 2 and words in ended.err
