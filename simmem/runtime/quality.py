"""What does leaving units out cost? Perplexity of one text, dense and at several levels of a criterion.

Each level is a run of its own over the text, which is what takes the time; the thresholds of all of them come
out of one pass over the calibration text (`simmem.runtime.thresholds`). A level that is measured is noted at
once, so that a capture that is stopped does not measure it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.runtime.hooks import FfnHooks
from simmem.runtime.measure import perplexity
from simmem.runtime.models import LoadedModel
from simmem.runtime.pages import PageHooks
from simmem.runtime.passes import Ids
from simmem.runtime.request import Request
from simmem.runtime.stream import Partial
from simmem.runtime.text import SourceText, TokenParts
from simmem.runtime.thresholds import Progress
from simmem.trace.trace import Quality, QualityPoint

__all__ = ["LeftOut", "measure_quality", "sparse_hooks", "sparse_perplexity"]


class LeftOut:
    """Adds up which share of its units a token leaves out, mean over the tokens and layers that hooks report."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0
        self._in_sight: NDArray[np.float64] | None = None

    @property
    def share(self) -> float:
        return self._sum / max(self._count, 1)

    def keep_counts(self, _layer: int, counts: NDArray[np.uint16]) -> None:
        """Take how many pages each token may look at, ahead of the mask of the same tokens."""
        self._in_sight = counts[:, 0].astype(np.float64)

    def keep_mask(self, _layer: int, mask: NDArray[np.bool_]) -> None:
        """Take a bool mask of shape (tokens, units) of the units in use."""
        units = mask.shape[1] if self._in_sight is None else self._in_sight
        self._sum += float((1.0 - mask.sum(axis=1) / units).sum())
        self._count += mask.shape[0]


def sparse_hooks(model: LoadedModel, request: Request, thresholds: NDArray[np.float32] | None,
                 left_out: LeftOut | None = None) -> AbstractContextManager[Any] | None:
    """Hooks under which the network leaves out what the trace does not record; None where that changes nothing."""
    if request.unit == "expert" or request.criterion == "relu-zero":
        return None
    on_mask = left_out.keep_mask if left_out else None
    if request.unit == "kv-block":
        return PageHooks(model, page_tokens=request.page_tokens or 1, mass=request.mass or 1.0, on_mask=on_mask,
                         on_counts=left_out.keep_counts if left_out else None)
    return FfnHooks(model, str(request.criterion), thresholds=thresholds, top_k=request.top_k(model), on_mask=on_mask)


def sparse_perplexity(model: LoadedModel, ids: Ids, request: Request, thresholds: NDArray[np.float32] | None, *,
                      window: int) -> tuple[float, float]:
    """Perplexity of a text for the network that runs without its inactive units, and the share that those are of the
    units (of the pages in sight), mean over tokens and layers. The request is one that leaves something out."""
    left_out = LeftOut()
    hooks = sparse_hooks(model, request, thresholds, left_out)
    assert hooks is not None
    with hooks:
        return perplexity(model, ids, window=window)[0], left_out.share


def measure_quality(model: LoadedModel, text: SourceText, parts: TokenParts, request: Request,
                    thresholds: Mapping[float, NDArray[np.float32]], kept: Partial, say: Progress) -> Quality:
    """Dense perplexity of the evaluation text, and that at each of the request's levels.

    thresholds : those of every level, where there are any.
    """
    window, levels = request.passes(model).window, request.measured_levels

    dense = kept.noted("quality-dense")
    if dense is None:
        say("measuring perplexity", 0.0)
        value, tokens = perplexity(model, parts.evaluation, window=window)
        dense = {"perplexity": value, "tokens": tokens}
        kept.note("quality-dense", dense)
    points: list[QualityPoint] = []
    for index, level in enumerate(levels):
        name = f"quality-{index}"
        found = kept.noted(name)
        if found is None:
            say("measuring perplexity", (1 + index) / (1 + len(levels)))
            value, share = sparse_perplexity(model, parts.evaluation, request.at(level), thresholds.get(level),
                                             window=window)
            found = {"perplexity": value, "sparsity": share}
            kept.note(name, found)
        points.append(QualityPoint(level=level, sparsity=found["sparsity"], perplexity=found["perplexity"]))
    own = next((point.perplexity for point in points if point.level == request.level), dense["perplexity"])
    return Quality(text=f"{text.title}, last third", tokens=dense["tokens"], dense_perplexity=dense["perplexity"],
                   sparse_perplexity=own, levels=tuple(points))
