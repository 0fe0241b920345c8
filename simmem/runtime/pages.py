"""Which pages of keys and values hold nearly all of a token's attention? Attention that counts, and leaves out.

A page is the keys and values of consecutive tokens, of all heads of a layer. A token's mass on a page is the
mean over heads of the attention weights there. A page is active when it belongs to the fewest, heaviest
first, that hold the share asked for, or is the page the token itself is written to. The others are then
masked, so the network runs exactly as an engine that reads the active pages alone.

The model's own eager attention does the arithmetic, twice: for the weights, then for the output without what
they leave out. So caps, sinks and windows hold, and a pass takes several times as long.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.runtime.families import find_attention
from simmem.runtime.models import LoadedModel
from simmem.runtime.passes import run_dense

if TYPE_CHECKING:
    import torch

__all__ = ["MASS_LEVELS", "PageHooks", "page_values"]

MASS_LEVELS = (0.90, 0.95, 0.99)
"""Shares of the attention mass for which the needed pages are counted."""

_NAME = "simmem_pages"


class PageHooks:
    """While entered, every attention of `model` reports its pages and reads the active ones alone.

    Parameters
    ----------
    model : whose network is run by the caller, one sequence at a time, each pass from its first token on.
    page_tokens : tokens of a page.
    mass : share of the attention mass that the active pages hold, in (0, 1].
    apply : mask the other pages; False reports them and leaves the network dense.
    on_mask : called with (layer, bool mask of shape (tokens, pages of the tokens so far)).
    on_counts : called with (layer, uint16 of shape (tokens, 1 + levels)): pages that the token may look at, and those
        it needs for each of `MASS_LEVELS`.

    Raises
    ------
    SpecError
        The model has layers without attention, compresses keys and values, or has an attention that cannot be replaced.
    """

    def __init__(self, model: LoadedModel, *, page_tokens: int, mass: float, apply: bool = True,
                 on_mask: Callable[[int, NDArray[np.bool_]], None] | None = None,
                 on_counts: Callable[[int, NDArray[np.uint16]], None] | None = None) -> None:
        modules = find_attention(model.network, model.name)
        if getattr(model.network.config.get_text_config(), "kv_lora_rank", None):
            raise SpecError("keeps keys and values compressed, not in pages by head", file=model.name, key="--unit")
        if any(not hasattr(sys.modules[type(m).__module__], "eager_attention_forward") for m in modules):
            raise SpecError(f"has an attention of its own ({type(modules[0]).__name__}) whose weights cannot be seen",
                            file=model.name, key="--unit")
        self._model, self._page, self._mass, self._apply = model, page_tokens, mass, apply
        self._on_mask, self._on_counts = on_mask, on_counts
        self._layer_of = {id(module): layer for layer, module in enumerate(modules)}
        self._seen = [0] * len(modules)
        self._before: str | None = None
        self.values_per_token = 0
        """Numbers that keys and values hold for a token in one layer, known once the network has run."""

    def __enter__(self) -> Self:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register(_NAME, self._attend)
        AttentionMaskInterface.register(_NAME, eager_mask)
        self._before = self._model.network.config._attn_implementation
        self._model.network.set_attn_implementation(_NAME)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._model.network.set_attn_implementation(self._before)

    def _attend(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                attention_mask: torch.Tensor | None, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        eager = sys.modules[type(module).__module__].eager_attention_forward
        dense: tuple[torch.Tensor, torch.Tensor] = eager(module, query, key, value, attention_mask, **how)
        weights = dense[1]
        layer, n, n_keys = self._layer_of[id(module)], query.shape[2], key.shape[2]
        self.values_per_token = key.shape[1] * (key.shape[3] + value.shape[3])
        if n_keys == n:  # a pass begins
            self._seen[layer] = 0
        start = self._seen[layer]
        self._seen[layer] = start + n
        offset = start + n - n_keys  # a sliding cache has dropped what is before
        first_page, lead = divmod(offset, self._page)
        n_pages = -(-(start + n) // self._page) - first_page
        visible = torch.ones((1, n, n_keys), dtype=torch.bool, device=query.device) if attention_mask is None else (
            attention_mask[:, 0] > torch.finfo(attention_mask.dtype).min / 2).expand(1, n, n_keys)
        mass = self._by_page(weights.float().mean(dim=1), lead, n_pages)
        may_see = self._by_page(visible.float(), lead, n_pages) > 0
        own = (torch.arange(start, start + n, device=query.device) // self._page - first_page)[None, :, None]
        keep = _heaviest(mass, self._mass).scatter_(-1, own, True) & may_see
        if self._on_counts is not None:
            needed = [(_heaviest(mass, level).scatter_(-1, own, True) & may_see).sum(-1) for level in MASS_LEVELS]
            counts = torch.stack([may_see.sum(-1), *needed], dim=-1)
            self._on_counts(layer, counts[0].to(torch.int32).cpu().numpy().astype(np.uint16))
        if self._on_mask is not None:
            mask = np.zeros((n, first_page + n_pages), np.bool_)
            mask[:, first_page:] = keep[0].cpu().numpy()
            self._on_mask(layer, mask)
        if not self._apply:
            return dense
        by_key = keep.repeat_interleave(self._page, dim=-1)[..., lead:lead + n_keys] & visible
        lowest = torch.finfo(query.dtype).min
        left = torch.zeros((1, 1, n, n_keys), dtype=query.dtype, device=query.device) if attention_mask is None else (
            attention_mask)
        output: tuple[torch.Tensor, torch.Tensor] = eager(module, query, key, value,
                                                          left.masked_fill(~by_key[:, None], lowest), **how)
        return output

    def _by_page(self, values: torch.Tensor, lead: int, n_pages: int) -> torch.Tensor:
        """Sums over pages of values by key, (1, n, n_keys) to (1, n, n_pages)."""
        import torch

        spare = n_pages * self._page - lead - values.shape[-1]
        padded = torch.nn.functional.pad(values, (lead, spare))
        return padded.view(*values.shape[:2], n_pages, self._page).sum(dim=-1)


def page_values(model: LoadedModel) -> int:
    """Numbers that a token's keys and values take in one layer, as the running network makes them.

    Raises
    ------
    SpecError
        As `PageHooks`, or the network does not use the attention it was given.
    """
    with PageHooks(model, page_tokens=1, mass=1.0) as hooks:
        run_dense(model, np.zeros(2, np.int64))
    if not hooks.values_per_token:
        raise SpecError("does not let its attention be replaced, so its weights cannot be seen", file=model.name,
                        key="--unit")
    return hooks.values_per_token


def _heaviest(mass: torch.Tensor, share: float) -> torch.Tensor:
    """The fewest entries along the last axis that hold `share` of its sum, as a mask."""
    import torch

    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    keep = (before < share * mass.sum(dim=-1, keepdim=True)) & (ordered > 0)
    return torch.zeros_like(keep).scatter_(-1, order, keep)
