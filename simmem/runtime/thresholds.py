"""Above which score is a unit active, so that a given share of a layer's scores is not?

Fitted on the dense model, each layer by itself, exactly: the threshold is one of the scores. A layer's scores
are held whole, so layers are fitted in groups that fit into memory, with a pass over the text for each group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.runtime.hooks import FfnHooks
from simmem.runtime.models import LoadedModel
from simmem.runtime.passes import Ids, run_dense, windows

__all__ = ["MAX_SCORES_BYTES", "Progress", "fit_threshold", "fit_thresholds"]

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done."""

MAX_SCORES_BYTES = 1 << 30
"""Scores held at a time. [B]"""


def fit_threshold(scores: NDArray[np.float32], sparsity: float) -> float:
    """The score that the share `sparsity` of `scores` does not exceed; reorders `scores`.

    A unit is active when its score is greater, so exactly round(sparsity·n) are not, ties aside. Where
    more than that share are zero already (ReLU), the threshold is zero and only zeros are left out.
    """
    rank = min(max(round(sparsity * scores.size), 1), scores.size) - 1
    scores.partition(rank)
    return float(scores[rank])


def fit_thresholds(model: LoadedModel, ids: Ids, *, criterion: str, sparsity: float, window: int,
                   progress: Progress | None = None, max_bytes: int = MAX_SCORES_BYTES) -> NDArray[np.float32]:
    """One threshold per layer, shape (n_layers,), fitted on the dense model's scores for `ids`.

    Holds one float32 per (token, layer, unit) of a group of layers: all of SmolLM2-135M's are one group of 0.57 GB
    for 3072 tokens.

    Raises
    ------
    SpecError
        A layer's scores are not finite.
    """
    n_layers = len(model.blocks)
    thresholds = np.empty(n_layers, dtype=np.float32)
    at_once = max(1, max_bytes // max(4 * ids.size * model.n_units, 1))
    for first in range(0, n_layers, at_once):
        group = range(first, min(first + at_once, n_layers))
        for layer, values in zip(group, _scores(model, ids, criterion, group, window, progress), strict=True):
            if not np.isfinite(values).all():
                raise SpecError(f"yields NaN or infinite activations in layer {layer}", file=model.name)
            thresholds[layer] = fit_threshold(values.reshape(-1), sparsity)
    return thresholds


def _scores(model: LoadedModel, ids: Ids, criterion: str, group: range, window: int,
            progress: Progress | None) -> list[NDArray[np.float32]]:
    """Scores of a group of layers, each of shape (tokens, n_units)."""
    scores = [np.empty((ids.size, model.n_units), dtype=np.float32) for _ in group]
    done = 0

    def keep(layer: int, chunk: NDArray[np.float32]) -> None:
        scores[layer - group.start][done:done + chunk.shape[0]] = chunk

    with FfnHooks(model, criterion, on_scores=keep, layers=group):
        for part in windows(ids, window):
            run_dense(model, part)
            done += part.size
            if progress:
                progress("fitting thresholds", (group.start + len(group) * done / ids.size) / len(model.blocks))
    return scores
