"""Does `simmem replay` answer for every policy, scope and level, and refuse in one line what it cannot?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from simmem.trace import Trace, TraceHeader, digest_of, save_trace
from simmem.trace.caches import POLICIES
from tests.cli.running import Simmem
from tests.cli.test_commands import document, flat, well_set


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    """48 tokens of 3 layers of 70 units, some of them used far more often than others."""
    rng = np.random.default_rng(11)
    bits = rng.random((48, 3, 70)) < 0.9 * rng.random((3, 70)) ** 3
    active = np.packbits(bits, axis=2, bitorder="little")
    header = TraceHeader(
        name="skewed", kind="captured", model="nobody-knows", n_tokens=48, n_layers=3, n_units=70, unit_bytes=5000.0,
        criterion="gate", threshold="above 0", records="active", predictor="gate", text="none",
        digest=digest_of(active))
    save_trace(Trace(header, active), tmp_path / "skewed.safetensors")
    return tmp_path / "skewed.safetensors"


@pytest.mark.parametrize("everywhere", [False, True])
def test_every_policy_stands_beside_the_optimum(simmem: Simmem, trace_file: Path, everywhere: bool) -> None:
    found = document(simmem("replay", trace_file, "--json", *["--global"] * everywhere), "simmem.replay/1")
    curves = {curve["policy"]: curve for curve in found["curves"]}
    assert tuple(curves) == POLICIES
    assert (found["levels"], found["batch"]) == (None, 1)
    best = curves.pop("belady")
    assert best["regret"] == [0.0] * 10
    for policy, curve in curves.items():
        assert curve["scope"] == ("global" if everywhere and policy != "window" else "layer")
        assert all(regret is None or regret >= 0 for regret in curve["regret"])
        if policy != "window":
            assert curve["sizes_bytes"] == best["sizes_bytes"]
            for read, least, regret in zip(curve["bytes_per_token"], best["bytes_per_token"], curve["regret"],
                                           strict=True):
                assert (regret is None) == (read > 0 == least)
                assert regret is None or read == pytest.approx(least * (1 + regret))
    assert best["sizes_bytes"][-1] == 70 * 5000 * (3 if everywhere else 1)
    assert curves["window"]["regret"][0] == 0  # no cache either way


def test_a_few_units_have_each_size_once(simmem: Simmem, tmp_path: Path) -> None:
    log, out = tmp_path / "log.jsonl", tmp_path / "t.safetensors"
    log.write_text("".join(json.dumps({"token": t, "layer": 0, "expert": [t % 8]}) + "\n" for t in range(40)))
    assert simmem("import", log, "--out", out, "--n-layers", "1", "--n-experts", "8", "--unit-bytes", "1MB",
                  "--weights", "int4").code == 0
    curve, = simmem("replay", out, "--policy", "lru", "--json").document["curves"]
    assert curve["parameter"] == list(range(1, 9))


def test_levels_add_up(simmem: Simmem, trace_file: Path) -> None:
    arguments = ("replay", trace_file, "--page-cache", "400kB", "--prefetch", "0.8:0.5", "--batch", 2)
    found = document(simmem(*arguments, "--json"), "simmem.replay/1")
    levels = found["levels"]
    assert levels["page_cache"] == {"size_bytes": 400e3, "page_bytes": 4096, "slot_bytes": 8192, "units": 48}
    assert levels["prefetch"] == {"recall": 0.8, "precision": 0.5}
    assert found["batch"] == 2
    for curve, level in zip(found["curves"], levels["curves"], strict=True):
        for i in range(len(curve["sizes_bytes"])):
            demand, ahead, wasted = (level[f"{name}_bytes_per_token"][i] for name in ("demand", "ahead", "wasted"))
            assert demand + ahead - wasted == pytest.approx(curve["bytes_per_token"][i])
            units = (demand + ahead) / 5000 * (1 - level["page_cache_hit_ratio"][i])
            assert level["storage_bytes_per_token"][i] == pytest.approx(units * 8192, abs=1e-6)
            assert level["dram_bytes"][i] == pytest.approx(curve["peak_bytes"][i] * 3 + 400e3)
            assert 0 <= level["held_twice_bytes"][i] <= 48 * 8192
    text = flat(well_set(simmem(*arguments)))
    for said in ("2 sequences at once", "lru, above the page cache", "recall 80.0 %, precision 50.0 %", "held twice"):
        assert said in text


def test_the_tables_say_which_policy_reads_least(simmem: Simmem, trace_file: Path) -> None:
    text = flat(well_set(simmem("replay", trace_file)))
    for said in ("Hits, a cache for each layer", "lru lfu slru pin-hot belady", "Regret", "Reads least:",
                 "Hits in the cold start", "Sliding window", "pin-hot pins what the cold part used most often"):
        assert said in text
    alone = flat(well_set(simmem("replay", trace_file, "--policy", "belady", "--size", "50kB")))
    assert "Reads least" not in alone
    same = flat(well_set(simmem("replay", trace_file, "--policy", "lru", "--policy", "lfu", "--size", "1B")))
    assert "All of them read the same" in same


@pytest.mark.parametrize(("arguments", "key", "says"), [
    (("--page-cache", "100"), "--page-cache", "no unit"),
    (("--page-cache", "-1GB"), "--page-cache", "-1GB"),
    (("--prefetch", "often"), "--prefetch", "RECALL:PRECISION"),
    (("--prefetch", "0.9:0"), "--prefetch", "above 0"),
    (("--batch", "0"), "--batch", "at least 1"),
    (("--batch", "9"), None, "too few for batch 9"),
    (("--policy", "belad"), "--policy", "belady"),
    (("--policy", "window", "--size", "1MB"), "--size", "lru"),
])
def test_what_it_refuses(simmem: Simmem, trace_file: Path, arguments: tuple[str, ...], key: str | None, says: str
                         ) -> None:
    ended = simmem("replay", trace_file, *arguments, "--json")
    assert ended.code == 2
    assert says in ended.document["message"]
    assert ended.document["key"] == key or key is None
    assert says in simmem("replay", trace_file, *arguments).err.strip()
    assert "\n" not in simmem("replay", trace_file, *arguments).err.strip()
