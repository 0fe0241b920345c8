"""Above which score is a unit active, so that a given share of a layer's scores is not?

Fitted on the dense model, each layer by itself, exactly: the threshold is one of the scores. A layer's scores
are held whole, so layers are fitted in groups that fit into memory, with a pass over the text for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.runtime.hooks import FfnHooks
from simmem.runtime.models import LoadedModel
from simmem.runtime.passes import Ids, run_dense, windows

__all__ = ["MAX_SCORES_BYTES", "Progress", "fit_levels", "fit_threshold", "fit_thresholds"]

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done."""

MAX_SCORES_BYTES = 1 << 30
"""Scores held at a time. [B]"""


def fit_threshold(scores: NDArray[np.float32], sparsity: float) -> float:
    """The score that the share `sparsity` of `scores` does not exceed; reorders `scores`.

    A unit is active when its score is greater, so exactly round(sparsity·n) are not, ties aside. Where
    more than that share are zero already (ReLU), the threshold is zero and only zeros are left out.
    """
    return _quantiles(scores, (sparsity,))[0]


def fit_thresholds(model: LoadedModel, ids: Ids, *, criterion: str, sparsity: float, window: int,
                   progress: Progress | None = None, max_bytes: int = MAX_SCORES_BYTES) -> NDArray[np.float32]:
    """One threshold per layer, shape (n_layers,): `fit_levels` at one sparsity."""
    thresholds: NDArray[np.float32] = fit_levels(model, ids, criterion=criterion, sparsities=(sparsity,),
                                                 window=window, progress=progress, max_bytes=max_bytes)[0]
    return thresholds


def fit_levels(model: LoadedModel, ids: Ids, *, criterion: str, sparsities: Sequence[float], window: int,
               progress: Progress | None = None, max_bytes: int = MAX_SCORES_BYTES) -> NDArray[np.float32]:
    """Thresholds of shape (levels, n_layers), fitted on the dense model's scores for `ids`, one level for each of
    `sparsities`. The text is run once, however many they are.

    Holds one float32 per (token, layer, unit) of a group of layers: all of SmolLM2-135M's are one group of 0.57 GB
    for 3072 tokens.

    Raises
    ------
    SpecError
        A layer's scores are not finite.
    """
    n_layers = len(model.blocks)
    thresholds = np.empty((len(sparsities), n_layers), dtype=np.float32)
    at_once = max(1, max_bytes // max(4 * ids.size * model.n_units, 1))
    for first in range(0, n_layers, at_once):
        group = range(first, min(first + at_once, n_layers))
        for layer, values in zip(group, _scores(model, ids, criterion, group, window, progress), strict=True):
            if not np.isfinite(values).all():
                raise SpecError(f"yields NaN or infinite activations in layer {layer}", file=model.name)
            thresholds[:, layer] = _quantiles(values.reshape(-1), sparsities)
    return thresholds


def _quantiles(scores: NDArray[np.float32], shares: Sequence[float]) -> list[float]:
    """The scores that each of `shares` of `scores` does not exceed; reorders `scores`."""
    ranks = [min(max(round(share * scores.size), 1), scores.size) - 1 for share in shares]
    scores.partition(sorted(set(ranks)))
    return [float(scores[rank]) for rank in ranks]


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
