"""Which tokens does each pass over the network run, and what of it is kept?

A run is cut into passes that know nothing of each other: each begins with the `context` tokens before the
first token that it records. So a pass can be repeated alone and gives the same bits, memory holds one pass,
and a run that was stopped goes on behind its last finished one. The prompt of a pass and the tokens after it
are recorded apart: of the prompt the union, which is what a prefill has to read; of every later token what a
decode step has to read.

Teacher-forced, a pass is one causal pass over given text, which touches what a decode of the same text
touches, many times faster. Decoded, the network writes the text itself, token by token behind its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.runtime.models import LoadedModel

if TYPE_CHECKING:
    import torch

__all__ = ["Chooser", "Ids", "PassRecord", "Passes", "Recorder", "chooser", "decode_pass", "forced_pass", "run_dense",
           "windows"]

Ids = NDArray[np.int64]
Chooser = Callable[["torch.Tensor"], Ids]
"""Turns logits of shape (sequences, vocabulary) into the next token of each sequence."""


@dataclass(frozen=True)
class Passes:
    """How `tokens` of each sequence are spread over passes of at most `step`, each behind `context` tokens."""

    tokens: int
    context: int
    step: int
    window: int
    """Tokens that one pass may run at most, and windows of text that is only read."""

    @property
    def count(self) -> int:
        return -(-self.tokens // self.step)

    def span(self, index: int) -> tuple[int, int]:
        """First recorded token of a pass, and how many it records."""
        first = index * self.step
        return first, min(self.step, self.tokens - first)


class PassRecord:
    """Collects what hooks report in one pass, by sequence, token and layer."""

    def __init__(self, n_layers: int, n_units: int, *, batch: int, context: int, first: int, n: int) -> None:
        width = -(-n_units // 8)
        self.batch, self.context, self.first, self.n, self.n_units = batch, context, first, n, n_units
        self.active = np.zeros((batch, n, n_layers, width), np.uint8)
        self.prefill = np.zeros((batch, n_layers, width), np.uint8)
        self.extras: dict[str, NDArray[Any]] = {}
        self._seen: dict[tuple[str, int], int] = {}

    def keep_mask(self, layer: int, mask: NDArray[np.bool_]) -> None:
        """Take a bool mask of shape (sequences · tokens, n_units) of the next tokens in this layer."""
        packed = np.packbits(mask, axis=1, bitorder="little").reshape(self.batch, -1, self.active.shape[-1])
        prompt, rows, at = self._split("active", layer, packed)
        if prompt.shape[1]:
            self.prefill[:, layer] |= np.bitwise_or.reduce(prompt, axis=1)
        self.active[:, at:at + rows.shape[1], layer] = rows

    def keep_rows(self, name: str, layer: int, values: NDArray[Any]) -> None:
        """Take `values` of shape (sequences · tokens, k) of the next tokens in this layer; a prompt's are dropped."""
        if name not in self.extras:
            self.extras[name] = np.zeros((*self.active.shape[:3], values.shape[1]), values.dtype)
        _, rows, at = self._split(name, layer, values.reshape(self.batch, -1, values.shape[1]))
        self.extras[name][:, at:at + rows.shape[1], layer] = rows

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything recorded, each of shape (sequences, …)."""
        prompts = {"prefill": self.prefill[:, None]} if self.context else {}
        return {"active": self.active, **prompts, **self.extras}

    def _split(self, name: str, layer: int, rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], int]:
        """The part of these rows that belongs to the prompt, the rest, and where the rest goes."""
        start = self._seen.get((name, layer), 0)
        self._seen[name, layer] = start + rows.shape[1]
        cut = max(self.context - start, 0)
        return rows[:, :cut], rows[:, cut:], max(start - self.context, 0)


@dataclass(frozen=True)
class Recorder:
    """What of the network is recorded: the shape of its masks, and the hooks that report to a record."""

    n_layers: int
    n_units: int
    hooks: Callable[[PassRecord], AbstractContextManager[Any]]

    def record(self, *, batch: int, context: int, first: int, n: int) -> PassRecord:
        return PassRecord(self.n_layers, self.n_units, batch=batch, context=context, first=first, n=n)


def forced_pass(model: LoadedModel, recorder: Recorder, ids: Ids, *, context: int, first: int = 0) -> PassRecord:
    """One causal pass over `ids` of shape (sequences, context + n); records the last n tokens of each."""
    record = recorder.record(batch=ids.shape[0], context=context, first=first, n=ids.shape[1] - context)
    with recorder.hooks(record):
        run_dense(model, ids)
    return record


def decode_pass(model: LoadedModel, recorder: Recorder, prompt: Ids, n: int, choose: Chooser, *,
                first: int = 0) -> tuple[PassRecord, Ids]:
    """A prefill of `prompt` (sequences, context), then n decode steps with a KV cache; the steps' tokens beside.

    Raises SpecError where the logits are not finite.
    """
    import torch

    record = recorder.record(batch=prompt.shape[0], context=prompt.shape[1], first=first, n=n)
    written = np.empty((prompt.shape[0], n), np.int64)
    with torch.inference_mode(), recorder.hooks(record):
        out = model.network(input_ids=_inputs(model, prompt), use_cache=True)
        for step in range(n):
            logits = out.logits[:, -1].float()
            if not bool(torch.isfinite(logits).all()):
                raise SpecError("yields NaN or infinite logits", file=model.name)
            written[:, step] = choose(logits)
            out = model.network(input_ids=_inputs(model, written[:, step:step + 1]), use_cache=True,
                                past_key_values=out.past_key_values)
    return record, written


def chooser(temperature: float, seed: int, index: int) -> Chooser:
    """How pass `index` of a decoded run picks tokens: the likeliest at temperature 0, else one drawn at it.

    Draws are by the Gumbel-max trick from a generator of this pass alone, so that a pass can be repeated.
    """
    rng = np.random.default_rng([seed, index])

    def choose(logits: torch.Tensor) -> Ids:
        values = logits.double().cpu().numpy()
        if temperature > 0.0:
            values = values / temperature + rng.gumbel(size=values.shape)
        return np.asarray(values.argmax(axis=-1), np.int64)

    return choose


def run_dense(model: LoadedModel, ids: Ids) -> None:
    """One causal pass over the decoder, ids of shape (tokens,) or (sequences, tokens), without its output head."""
    import torch

    with torch.inference_mode():
        last: torch.Tensor = model.network.base_model(input_ids=_inputs(model, np.atleast_2d(ids)), use_cache=False)[0]
        if not bool(torch.isfinite(last).all()):
            raise SpecError("yields NaN or infinite activations", file=model.name)


def windows(ids: Ids, window: int) -> Iterator[Ids]:
    """A text cut into windows without overlap."""
    for start in range(0, ids.size, window):
        yield ids[start:start + window]


def _inputs(model: LoadedModel, ids: Ids) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(ids)).to(model.device)
