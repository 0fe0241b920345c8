"""Does a trace hold exactly the units that a forward pass needs, in every family that can be captured?"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmem.errors import MachineError, SpecError, UnknownNameError
from simmem.runtime import models
from simmem.runtime.capture import capture_from, fit_thresholds
from simmem.runtime.experts import RouterHooks
from simmem.runtime.families import find_attention
from simmem.runtime.hooks import FfnHooks
from simmem.runtime.passes import Recorder, forced_pass
from tests.runtime.tiny import (
    DENSE,
    MIXTURES,
    N_EXPERTS,
    N_LAYERS,
    N_UNITS,
    POSITIONS,
    PROSE,
    SMALL,
    VOCAB,
    each,
    make,
    save,
)
from tests.runtime.tiny import layers_of as decoder_layers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ids(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(3, VOCAB, n)


def bits(active: Any, n_units: int) -> np.ndarray[Any, Any]:
    return np.unpackbits(active, axis=-1, count=n_units, bitorder="little").astype(bool)


class RowsOnly(torch.nn.Module):  # type: ignore[name-defined,misc]
    """A projection to the units of which only the rows in the trace are multiplied; the rest is not a number."""

    def __init__(self, inner: Any, mask: Any) -> None:
        super().__init__()
        self.inner, self.mask = inner, mask

    def forward(self, x: Any) -> Any:
        out = torch.full((*x.shape[:-1], self.inner.out_features), float("nan"))
        rows, flat = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
        for token, active in enumerate(self.mask):
            chosen = np.flatnonzero(np.tile(active, self.inner.out_features // active.size))  # gate and up fused
            bias = 0.0 if self.inner.bias is None else self.inner.bias[chosen]
            rows[token, chosen] = self.inner.weight[chosen] @ flat[token] + bias
        return out


class ColumnsOnly(RowsOnly):
    """The projection back, of which only the columns in the trace are multiplied."""

    def forward(self, x: Any) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        rows = [self.inner.weight[:, np.flatnonzero(active)] @ flat[token, np.flatnonzero(active)]
                for token, active in enumerate(self.mask)]
        out = torch.stack(rows) if self.inner.bias is None else torch.stack(rows) + self.inner.bias
        return out.view(*x.shape[:-1], -1)


def logits(network: Any, text: Any) -> Any:
    with torch.inference_mode():
        return network(input_ids=torch.from_numpy(np.atleast_2d(text)), use_cache=False).logits


def only_the_trace(model: models.LoadedModel, family: str, masks: Any) -> Any:
    """The network with every FFN replaced by one that touches nothing but `masks` (layers, tokens, units)."""
    network = copy.deepcopy(model.network)
    ups, down = DENSE[family][2]
    alike = models.LoadedModel(model.name, network, None, ())
    for layer, mask in zip(decoder_layers(alike), masks, strict=True):
        for path, kind in [(up, RowsOnly) for up in ups] + [(down, ColumnsOnly)]:
            layer.set_submodule(path, kind(layer.get_submodule(path), mask))
    return network


def masks_of(model: models.LoadedModel, text: Any, criterion: str, **how: Any) -> tuple[Any, Any]:
    """Masks (layers, tokens, units) and logits of the masked dense network."""
    recorder = Recorder(N_LAYERS, N_UNITS,
                        lambda record: FfnHooks(model, criterion, on_mask=record.keep_mask, **how))
    record = forced_pass(model, recorder, text[None], context=0)
    with FfnHooks(model, criterion, **how):
        masked = logits(model.network, text)
    return bits(record.active[0], N_UNITS).swapaxes(0, 1), masked


@each(DENSE)
def test_computing_only_the_units_of_the_trace_gives_the_masked_logits(family: str) -> None:
    model, text = make(family), ids(40, seed=1)
    thresholds = fit_thresholds(model, ids(200), criterion="wina", sparsity=0.6, window=POSITIONS)
    masks, masked = masks_of(model, text, "wina", thresholds=thresholds)
    assert 0.2 < masks.mean() < 0.6
    found = logits(only_the_trace(model, family, masks), text)
    torch.testing.assert_close(found, masked, rtol=1e-3, atol=1e-3)
    assert float((logits(model.network, text) - masked).abs().max()) > 0.01, "masking must matter"


@pytest.mark.parametrize(("family", "activation"), [("opt", None), ("persimmon", None), ("llama", "relu")])
def test_zeros_behind_a_relu_cost_nothing(family: str, activation: str | None) -> None:
    model = make(family, **({"hidden_act": activation} if activation else {}))
    text = ids(40, seed=1)
    masks, masked = masks_of(model, text, "relu-zero", thresholds=np.zeros(N_LAYERS, np.float32))
    assert 0.2 < masks.mean() < 0.8
    dense = logits(model.network, text)
    torch.testing.assert_close(masked, dense, rtol=0, atol=0)
    torch.testing.assert_close(logits(only_the_trace(model, family, masks), text), dense, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("asked", "differs"), [({"sparsity": 0.6}, True), ({"criterion": "top-k"}, True),
                                                ({"unit": "kv-block", "page_tokens": 8, "mass": 0.5}, True)])
def test_masks_that_are_only_observed_are_the_dense_networks(asked: dict[str, Any], differs: bool) -> None:
    model = make("llama")
    observed = capture_from(model, PROSE, observe=True, **SMALL | asked)
    applied = capture_from(model, PROSE, **SMALL | asked)
    assert observed.header.captured is not None and not observed.header.captured.applied
    assert applied.header.captured is not None and applied.header.captured.applied
    assert observed.header.quality == applied.header.quality, "perplexity is of the network without its inactive units"
    np.testing.assert_array_equal(observed.active[:, 0], applied.active[:, 0])  # nothing was left out before
    assert (observed.header.digest != applied.header.digest) == differs


def test_top_k_keeps_as_many_units_of_every_token() -> None:
    model, text = make("llama"), ids(40, seed=1)
    masks, masked = masks_of(model, text, "top-k", top_k=17)
    assert (masks.sum(axis=2) == 17).all()
    torch.testing.assert_close(logits(only_the_trace(model, "llama", masks), text), masked, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "criterion", "rows", "predictor"), [
    # An ungated ReLU is known once the up projection is read: only down columns are left. A gated one, or a gate,
    # leaves up and down. What needs h to be known saves nothing but down columns, unless an oracle knew it before.
    ("opt", "relu-zero", 1, "gate"), ("opt", "wina", 2, "oracle"), ("opt", "magnitude/known", 1, "gate"),
    ("llama", "gate", 2, "gate"), ("llama", "top-k", 3, "oracle"), ("llama", "wina/known", 1, "gate"),
    ("llama", "gate/neuron", 3, "oracle"), ("phi3", "gate", 2, "gate")])
def test_a_unit_is_what_an_engine_could_have_left_unread(family: str, criterion: str, rows: int,
                                                         predictor: str) -> None:
    model = make(family)
    name, _, skip = criterion.partition("/")
    trace = capture_from(model, PROSE, criterion=name, skip=skip or None, **SMALL)
    header = trace.header
    assert header.unit_bytes == rows * model.d_model * 2
    assert header.predictor == predictor
    read_whole = (3 if model.gated else 2) - rows
    share = read_whole * N_LAYERS * N_UNITS * model.d_model / sum(p.numel() for p in model.network.parameters())
    assert header.predictor_params_share == pytest.approx(share if predictor == "gate" else 0.0)
    assert header.quality is not None
    assert (header.quality.perplexity_ratio == 1.0) == (name == "relu-zero")


class ExpertsOfTheTrace(torch.nn.Module):  # type: ignore[name-defined,misc]
    """Experts that are called one by one, and only those that the trace names."""

    def __init__(self, inner: Any, mask: Any) -> None:
        super().__init__()
        self.inner, self.mask = inner, mask

    def forward(self, hidden: Any, chosen: Any, weights: Any) -> Any:
        out = torch.zeros_like(hidden)
        for token, active in enumerate(self.mask):
            for expert in np.flatnonzero(active):
                weight = weights[token][chosen[token] == int(expert)]
                assert weight.numel() == 1, "the trace names an expert that the router did not choose"
                one = torch.tensor([[int(expert)]])
                out[token] += self.inner(hidden[token:token + 1], one, weight[None])[0]
        return out


@each(MIXTURES)
def test_computing_only_the_experts_of_the_trace_gives_the_same_logits(family: str) -> None:
    model, text = make(family), ids(30, seed=2)
    found: dict[int, Any] = {}
    routed: dict[int, tuple[Any, Any]] = {}
    with RouterHooks(model, on_mask=found.__setitem__,
                     on_routing=lambda layer, scores, weights: routed.__setitem__(layer, (scores, weights))):
        dense = logits(model.network, text)
    network = copy.deepcopy(model.network)
    first = N_LAYERS - len(model.experts)
    for index, block in enumerate(models.find_experts(network, family)):
        assert block.layer == first + index
        mask, (scores, weights) = found[index], routed[index]
        assert (mask.sum(axis=1) == 2).all()
        assert scores.shape == (30, N_EXPERTS) and weights.shape == (30, 2)
        parent = block.ffn_modules[0]
        parent.experts = ExpertsOfTheTrace(block.experts, mask)
    torch.testing.assert_close(logits(network, text), dense, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(model.network, text), dense, rtol=0, atol=0)  # hooks are gone


@each(MIXTURES)
def test_a_mixture_is_captured_with_its_routing(family: str) -> None:
    model = make(family)
    trace = capture_from(model, PROSE, **SMALL)
    header = trace.header
    assert (header.unit, header.predictor, header.n_units) == ("expert", "none", N_EXPERTS)
    assert header.unit_bytes == 3 * model.network.config.hidden_size * 12 * 2
    assert header.n_layers == len(model.experts)
    assert header.captured is not None
    assert header.captured.layers == ((1,) if family.startswith("deepseek") else ())
    assert (trace.active_counts == 2).all()
    if family in ("mixtral", "olmoe", "gpt-oss"):  # plain top k: the chosen have the highest logits
        scores, mask = trace.extras["router_logits"].astype(float), bits(trace.active, N_EXPERTS)
        assert (np.where(mask, scores, np.inf).min(-1) >= np.where(mask, -np.inf, scores).max(-1)).all()
    if family in ("mixtral", "gpt-oss"):  # a softmax over the chosen
        np.testing.assert_allclose(trace.extras["router_weights"].astype(float).sum(-1), 1.0, atol=2e-3)
    assert header.statistics["prefill"]["tokens"] == 24
    assert trace.extras["prefill"].shape == (1, header.n_layers, 1)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3-moe"])
def test_decoded_text_touches_what_the_same_text_touches_when_given(family: str) -> None:
    model = make(family)
    decoded = capture_from(model, PROSE, decode=True, temperature=0.8, seed=3, **SMALL)
    again = capture_from(model, PROSE, decode=True, temperature=0.8, seed=3, **SMALL)
    other = capture_from(model, PROSE, decode=True, temperature=0.8, seed=4, **SMALL)
    assert decoded.header.digest == again.header.digest != other.header.digest
    assert decoded.header.captured is not None and decoded.header.captured.mode == "decoded"
    written = decoded.extras["tokens"]
    assert np.unique(written).size > 3
    prose = tokens_of(PROSE.content)
    third = prose.size // 3
    given = np.concatenate((prose[third:third + 24], written))
    thresholds = np.array(decoded.header.captured.thresholds, np.float32)
    hooks = (lambda record: RouterHooks(model, on_mask=record.keep_mask)) if model.experts else (
        lambda record: FfnHooks(model, "wina", thresholds=thresholds, on_mask=record.keep_mask))
    forced = forced_pass(model, Recorder(decoded.header.n_layers, decoded.header.n_units, hooks), given[None],
                         context=24)
    assert iou(forced.active[0], decoded.active) >= 0.9999


def tokens_of(content: str) -> Any:
    return np.array([byte % VOCAB for byte in content.encode()])


def iou(a: Any, b: Any) -> float:
    return float(np.bitwise_count(a & b).sum() / np.bitwise_count(a | b).sum())


def test_sequences_side_by_side_are_each_its_own_stretch() -> None:
    model = make("llama")
    together = capture_from(model, PROSE, batch=2, **SMALL)
    header = together.header
    assert header.n_tokens == 80 and header.captured is not None and header.captured.sequences == 2
    thresholds = np.array(header.captured.thresholds, np.float32)
    recorder = Recorder(N_LAYERS, N_UNITS, lambda record: FfnHooks(model, "wina", thresholds=thresholds,
                                                                   on_mask=record.keep_mask))
    prose = tokens_of(PROSE.content)
    third = prose.size // 3
    for sequence in range(2):
        stretch = prose[third + 64 * sequence:third + 64 * (sequence + 1)]
        alone = forced_pass(model, recorder, stretch[None], context=24)
        assert iou(alone.active[0], together.active[40 * sequence:40 * (sequence + 1)]) >= 0.9999
        prompt = np.bitwise_or.reduce(forced_pass(model, recorder, stretch[None], context=0).active[0, :24], axis=0)
        np.testing.assert_array_equal(together.extras["prefill"][sequence], prompt)
    assert together.batched(2).header.n_tokens == 40


def test_bf16_runs_and_is_near() -> None:
    exact = capture_from(make("llama"), PROSE, **SMALL)
    model = make("llama")
    model.network.to(torch.bfloat16)
    rounded = capture_from(model, PROSE, **SMALL)
    assert rounded.header.captured is not None and rounded.header.captured.dtype == "bfloat16"
    assert 0.8 < iou(exact.active, rounded.active) < 1.0


def test_what_has_no_units_of_a_known_kind_is_refused_in_one_line() -> None:
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(SpecError, match=r"has no FFN units in layers 0, 1; known are .*Mixtral") as caught:
        models.find_blocks(mamba, "mamba")
    assert "\n" not in str(caught.value)
    with pytest.raises(SpecError, match="has no attention in layers 0, 1"):
        find_attention(mamba, "mamba")
    for family, asked, says in [("llama", {"criterion": "relu-zero"}, "needs a ReLU in every layer, found SiLU"),
                                ("opt", {"criterion": "gate"}, "needs a gated FFN"),
                                ("llama", {"unit": "expert"}, "no mixtures of experts"),
                                ("mixtral", {"unit": "ffn-neuron"}, "unit is the expert"),
                                ("mixtral", {"sparsity": 0.5}, "does not go with the unit expert"),
                                ("llama", {"mass": 0.9}, "does not go with the unit ffn-neuron"),
                                ("llama", {"seed": 3}, "goes with --decode"),
                                ("llama", {"decode": True, "tokens": 10**12}, "holds at most .* of each sequence"),
                                ("mixtral", {"decode": True, "tokens": 10**8}, "holds at most .* of each sequence"),
                                ("llama", {"unit": "kv-block", "batch": 2}, "expected 1"),
                                ("deepseek-v2", {"unit": "kv-block", "page_tokens": 8}, "compressed"),
                                ("falcon", {"unit": "kv-block", "page_tokens": 8}, "whose weights cannot be seen"),
                                ("opt", {"criterion": "relu-zero", "sparsity": 0.5}, "relu-zero leaves out")]:
        with pytest.raises(SpecError, match=says) as caught:
            capture_from(make(family), PROSE, **SMALL | asked)
        assert "\n" not in str(caught.value)


def test_a_hub_id_is_taken_from_the_cache_and_never_fetched_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                    ) -> None:
    pytest.importorskip("tokenizers")
    cached = tmp_path / "models--some-one--tiny"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc", encoding="utf-8")
    save(make("opt"), cached / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = models.load_network("some-one/tiny", dtype="bf16")
    assert (found.name, found.dtype, found.n_units) == ("tiny", "bfloat16", N_UNITS)
    with pytest.raises(MachineError, match="not in the local Hugging Face cache, and nothing is downloaded without"):
        models.load_network("some-one/other")
    with pytest.raises(UnknownNameError, match="precision to run at named 'fp8'"):
        models.load_network("some-one/tiny", dtype="fp8")
    with pytest.raises(SpecError, match="expected cpu, cuda or cuda:N"):
        models.load_network("some-one/tiny", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(MachineError, match="no such device here"):
            models.load_network("some-one/tiny", device="cuda:3")


def test_thresholds_do_not_depend_on_how_many_layers_fit_into_memory() -> None:
    model, text = make("llama"), ids(150)
    whole = fit_thresholds(model, text, criterion="wina", sparsity=0.7, window=POSITIONS)
    single = fit_thresholds(model, text, criterion="wina", sparsity=0.7, window=POSITIONS, max_bytes=1)
    np.testing.assert_array_equal(whole, single)


