"""Are the pages of a trace those that hold the attention, and do the others really count for nothing then?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmem.errors import SpecError
from simmem.runtime.capture import capture_from
from simmem.runtime.models import LoadedModel
from simmem.runtime.pages import MASS_LEVELS, PageHooks, page_values
from simmem.runtime.passes import run_dense
from simmem.trace.store import load_trace_file, save_trace
from tests.runtime.tiny import DENSE, MIXTURES, N_LAYERS, PROSE, SMALL, VOCAB, each, make

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PAGE, N = 4, 30
PAGED = (DENSE.keys() | MIXTURES.keys()) - {"falcon", "deepseek-v2", "deepseek-v3"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(3, VOCAB, N)


def logits(model: LoadedModel, ids: Any) -> Any:
    with torch.inference_mode():
        return model.network(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits


def weights_of(model: LoadedModel, ids: Any) -> list[np.ndarray[Any, Any]]:
    """Attention weights (heads, tokens, keys) of every layer, as transformers itself hands them out."""
    before = model.network.config._attn_implementation
    model.network.set_attn_implementation("eager")
    with torch.inference_mode():
        found = model.network(input_ids=torch.from_numpy(ids)[None], output_attentions=True, use_cache=False).attentions
    model.network.set_attn_implementation(before)
    return [layer[0].double().numpy() for layer in found]


class Seen:
    def __init__(self) -> None:
        self.masks: dict[int, Any] = {}
        self.counts: dict[int, Any] = {}

    def hooks(self, model: LoadedModel, mass: float) -> PageHooks:
        return PageHooks(model, page_tokens=PAGE, mass=mass, on_mask=self.masks.__setitem__,
                         on_counts=self.counts.__setitem__)


@each(PAGED)
def test_pages_are_the_fewest_that_hold_the_mass(family: str) -> None:
    model, ids, seen = make(family), text(), Seen()
    with seen.hooks(model, 0.9):
        run_dense(model, ids)
    mass = weights_of(model, ids)[0].mean(axis=0)  # the first layer: later ones see what it left out
    for token in range(N):
        by_page = np.array([mass[token, first:first + PAGE].sum() for first in range(0, N, PAGE)])
        heaviest = np.argsort(-by_page, kind="stable")
        needed = set(heaviest[:np.searchsorted(np.cumsum(by_page[heaviest]), 0.9 * by_page.sum()) + 1])
        assert set(np.flatnonzero(seen.masks[0][token])) == needed | {token // PAGE}
    in_sight, *levels = seen.counts[0].T
    windowed = getattr(model.network.config, "sliding_window", None)
    reach = np.minimum(np.arange(N) + 1, windowed) if windowed and family in ("mistral", "gemma3", "gpt-oss") else (
        np.arange(N) + 1)
    np.testing.assert_array_equal(in_sight, np.arange(N) // PAGE - (np.arange(N) + 1 - reach) // PAGE + 1)
    assert (np.diff([level.sum() for level in levels]) >= 0).all()
    np.testing.assert_array_equal(levels[MASS_LEVELS.index(0.9)], seen.masks[0].sum(axis=1))


@each(PAGED)
def test_reading_only_the_pages_of_the_trace_gives_the_masked_logits(family: str) -> None:
    model, ids, seen = make(family), text(1), Seen()
    with seen.hooks(model, 0.8):
        masked = logits(model, ids)
    dense = logits(model, ids)
    torch.testing.assert_close(logits(model, ids), dense, rtol=0, atol=0)
    layers = iter(range(N_LAYERS))
    module = sys.modules[type(model.network).__module__]
    real = module.eager_attention_forward  # type: ignore[attr-defined]

    def gathered(owner: Any, query: Any, key: Any, value: Any, mask: Any, **how: Any) -> Any:
        """Attention token by token, over nothing but the keys and values of the pages in the trace."""
        pages, rows = seen.masks[next(layers)], []
        for token in range(N):
            held = np.flatnonzero(np.repeat(pages[token], PAGE)[:N])
            one = real(owner, query[:, :, token:token + 1], key[:, :, held], value[:, :, held],
                       mask[:, :, token:token + 1][..., held], **how)
            rows.append(one[0])
        return torch.cat(rows, dim=1), None

    before = model.network.config._attn_implementation
    model.network.set_attn_implementation("eager")
    module.eager_attention_forward = gathered  # type: ignore[attr-defined]
    try:
        found = logits(model, ids)
    finally:
        module.eager_attention_forward = real  # type: ignore[attr-defined]
        model.network.set_attn_implementation(before)
    torch.testing.assert_close(found, masked, rtol=1e-3, atol=1e-3)
    assert float((dense - masked).abs().max()) > 1e-3, "masking must matter"


def test_decoding_with_a_cache_sees_the_same_pages() -> None:
    for family in ("llama", "mistral"):  # mistral's cache forgets what is behind its window
        model, ids = make(family), text(2)
        whole, steps = Seen(), Seen()
        with whole.hooks(model, 0.9):
            run_dense(model, ids)
        rows: list[Any] = []
        with steps.hooks(model, 0.9), torch.inference_mode():
            cache = model.network(input_ids=torch.from_numpy(ids[:20])[None], use_cache=True).past_key_values
            for token in ids[20:]:
                cache = model.network(input_ids=torch.tensor([[int(token)]]), past_key_values=cache,
                                      use_cache=True).past_key_values
                rows.append(np.pad(steps.masks[1][0], (0, -(-N // PAGE) - steps.masks[1].shape[1])))
        np.testing.assert_array_equal(np.stack(rows), whole.masks[1][20:])


def test_a_page_trace_says_what_it_holds(tmp_path: Path) -> None:
    model = make("llama")
    trace = capture_from(model, PROSE, unit="kv-block", page_tokens=8, mass=0.9, **SMALL | {"tokens": 80})
    header = trace.header
    assert (header.unit, header.criterion, header.predictor) == ("kv-block", "attention-mass", "oracle")
    assert header.n_units == 13  # 24 + 80 tokens
    assert header.unit_bytes == 8 * 2 * 2 * 4 * 2  # tokens, keys and values, KV heads, their width, fp16
    assert page_values(model) == 16
    assert header.quality is not None and header.quality.perplexity_ratio != 1.0
    needed = header.statistics["pages_needed"]
    assert 0 < needed["share_for_90_percent"] <= needed["share_for_95_percent"] <= needed["share_for_99_percent"] <= 1
    active = np.unpackbits(trace.active, axis=2, count=13, bitorder="little")
    own = (24 + np.arange(80)) // 8
    assert active[np.arange(80), :, own].all(), "the page a token is written to is read"
    assert not any(active[token, :, page + 1:].any() for token, page in enumerate(own)), "none is read before its time"
    starts = 40 // 8  # the second pass begins at the 41st token and knows nothing before
    assert not active[40:, :, :starts].any()
    save_trace(trace, tmp_path / "t.safetensors")
    np.testing.assert_array_equal(load_trace_file(tmp_path / "t.safetensors").active, trace.active)
    for asked, says in [({"page_tokens": 7}, "a multiple of the 7 tokens"), ({"page_tokens": 48}, "multiple"),
                        ({"mass": 0.0}, "a share above 0"), ({"mass": float("nan")}, "a share above 0"),
                        ({"sparsity": 0.5}, "does not go with the unit kv-block")]:
        with pytest.raises(SpecError, match=says):
            capture_from(model, PROSE, unit="kv-block", **SMALL | {"page_tokens": 8} | asked)
