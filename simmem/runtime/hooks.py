"""Which FFN units does a running network use? Forward hooks that score, mask and hand them out.

`h` is the input of the last FFN projection, one value per unit: act(gate)·up in a gated FFN, act(up)
otherwise. A unit is active when its score exceeds its layer's threshold; with thresholds the hooks
also zero the inactive units, so the network runs exactly as an engine that skips them would.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError, UnknownNameError
from simmem.runtime.models import LoadedModel

if TYPE_CHECKING:
    import torch

__all__ = ["CRITERIA", "FfnHooks", "check_criterion"]

CRITERIA = {
    "wina": "|h| times the norm of the unit's down column (WINA, arXiv:2505.19427)",
    "magnitude": "|h| (TEAL at the down projection, arXiv:2408.14690)",
    "gate": "|act(gate)| (CATS, arXiv:2404.08763)",
}
"""Name of a criterion -> the score it gives a unit. Only `gate` is known before up and down are read."""


def check_criterion(criterion: str) -> str:
    """The criterion itself, or UnknownNameError."""
    if criterion not in CRITERIA:
        raise UnknownNameError("criterion", criterion, CRITERIA, key="criterion")
    return criterion


class FfnHooks:
    """While entered, every FFN of `model` reports its scores or its masks.

    Parameters
    ----------
    model : whose network is run by the caller, batch 1.
    criterion : one of `CRITERIA`.
    thresholds : shape (n_layers,); given, inactive units are zeroed. None: the network stays dense.
    on_scores : called with (layer, float32 scores of shape (tokens, n_units)).
    on_mask : called with (layer, bool mask of shape (tokens, n_units)); needs thresholds.
    """

    def __init__(self, model: LoadedModel, criterion: str, *, thresholds: NDArray[np.float32] | None = None,
                 on_scores: Callable[[int, NDArray[np.float32]], None] | None = None,
                 on_mask: Callable[[int, NDArray[np.bool_]], None] | None = None) -> None:
        check_criterion(criterion)
        if criterion == "gate" and any(block.activation is None for block in model.blocks):
            raise SpecError("the gate criterion needs a gated FFN with an activation module", file=model.name,
                            key="criterion")
        self._model = model
        self._criterion = criterion
        self._thresholds = None if thresholds is None else [float(t) for t in thresholds]
        self._on_scores = on_scores
        self._on_mask = on_mask
        self._gate: torch.Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for layer, block in enumerate(self._model.blocks):
            norms = block.weight.detach().norm(dim=0) if self._criterion == "wina" else None
            if self._criterion == "gate" and block.activation is not None:
                self._handles.append(block.activation.register_forward_hook(self._keep_gate))
            self._handles.append(block.down.register_forward_pre_hook(self._before_down(layer, norms)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._gate = None

    def _keep_gate(self, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        self._gate = output  # the same layer's down projection runs next and takes it

    def _before_down(self, layer: int, norms: torch.Tensor | None) -> Callable[[Any, tuple[Any, ...]], Any]:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            h = inputs[0]
            if self._criterion == "gate":
                assert self._gate is not None  # its hook ran in this layer's activation
                score, self._gate = self._gate.abs(), None
            else:
                score = h.abs()
                if norms is not None:
                    score *= norms
            if self._on_scores is not None:
                self._on_scores(layer, score.reshape(-1, score.shape[-1]).numpy())
            if self._thresholds is None:
                return None
            mask = score > self._thresholds[layer]
            if self._on_mask is not None:
                self._on_mask(layer, mask.reshape(-1, mask.shape[-1]).numpy())
            # In place, as the layer made h for this product alone; a product, not a select: NaN stays visible.
            return (h.mul_(mask), *inputs[1:])

        return hook
