"""Which FFN units does a running network use? Forward hooks that score, mask and hand them out.

`h` is the input of the last FFN projection, one value per unit: act(gate)·up in a gated FFN, act(up)
otherwise. A unit is active when its score exceeds its layer's threshold, or is among the token's k
highest; the hooks then also zero the inactive units, so that the network runs exactly as an engine that
skips them would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError, UnknownNameError
from simmem.runtime.models import LoadedModel

if TYPE_CHECKING:
    import torch

__all__ = ["CRITERIA", "FITTED_CRITERIA", "FfnHooks", "check_criterion", "column_norms", "matrices_read_first"]

CRITERIA = {
    "wina": "|h| times the norm of the unit's down column (WINA, arXiv:2505.19427)",
    "magnitude": "|h| (TEAL at the down projection, arXiv:2408.14690)",
    "gate": "|act(gate)| (CATS, arXiv:2404.08763)",
    "relu-zero": "not exactly zero behind the ReLU: leaving out the others changes nothing",
    "top-k": "among the k highest of the token by |h| times the norm of the down column",
}
"""Name of a criterion -> the score it gives a unit, or what makes a unit active."""

FITTED_CRITERIA = ("wina", "magnitude", "gate")
"""Those with a threshold per layer that is fitted on text."""


def check_criterion(criterion: str) -> str:
    """The criterion itself, or UnknownNameError."""
    if criterion not in CRITERIA:
        raise UnknownNameError("criterion", criterion, CRITERIA, key="criterion")
    return criterion


def matrices_read_first(criterion: str, gated: bool) -> int:
    """Matrices of the FFN that must be multiplied whole before the criterion says which units are active.

    The gate tells a gate's units and a gated ReLU's zeros, the up projection an ungated ReLU's; the others score `h`
    and need everything but the down projection.
    """
    if criterion in ("gate", "relu-zero"):
        return 1
    return 2 if gated else 1


def column_norms(model: LoadedModel, criterion: str) -> list[torch.Tensor | None]:
    """What the criterion multiplies |h| by in each layer: the norms of the down columns in float32, or nothing."""
    weighted = criterion in ("wina", "top-k")
    return [block.weight.detach().float().norm(dim=0) if weighted else None for block in model.blocks]


class FfnHooks:
    """While entered, every FFN of `model` reports its scores or its masks.

    Parameters
    ----------
    model : whose network is run by the caller; tokens of a batch come one sequence after another.
    criterion : one of `CRITERIA`.
    thresholds : shape (n_layers,). None: nothing is masked.
    top_k : for "top-k" in the place of thresholds: units that every token keeps.
    on_scores : called with (layer, float32 scores of shape (tokens, n_units)), which hold during the call only.
    on_mask : called with (layer, bool mask of shape (tokens, n_units)); needs thresholds or top_k.
    layers : report these layers alone; all when None. With thresholds all are masked.
    apply : zero the inactive units; False reports them and leaves the network dense.
    norms : `column_norms`, where they are at hand: they cost as much as a few tokens.

    Raises
    ------
    SpecError
        The model has no FFN units, or not those that the criterion looks at.
    """

    def __init__(self, model: LoadedModel, criterion: str, *, thresholds: NDArray[np.float32] | None = None,
                 top_k: int | None = None, on_scores: Callable[[int, NDArray[np.float32]], None] | None = None,
                 on_mask: Callable[[int, NDArray[np.bool_]], None] | None = None,
                 layers: range | None = None, apply: bool = True,
                 norms: Sequence[torch.Tensor | None] | None = None) -> None:
        check_criterion(criterion)
        if not model.blocks:
            raise SpecError("has mixtures of experts; their unit is the expert, not the neuron", file=model.name,
                            key="--unit")
        silent = any(block.activation is None for block in model.blocks)
        if criterion == "gate" and (silent or not model.gated):
            raise SpecError("the gate criterion needs a gated FFN with an activation module", file=model.name,
                            key="criterion")
        if criterion == "relu-zero" and not all(block.zeroes for block in model.blocks):
            kinds = sorted({type(block.activation).__name__ for block in model.blocks})
            raise SpecError(f"the relu-zero criterion needs a ReLU in every layer, found {', '.join(kinds)}",
                            file=model.name, key="criterion")
        self._model = model
        self._criterion = criterion
        self._thresholds = None if thresholds is None else [float(t) for t in thresholds]
        self._top_k = top_k
        self._on_scores = on_scores
        self._on_mask = on_mask
        self._layers = range(len(model.blocks)) if layers is None else layers
        self._norms = norms
        self._apply = apply and criterion != "relu-zero"  # which leaves out what is zero already
        self._from_gate = criterion == "gate" or (criterion == "relu-zero" and model.gated)
        self._gate: torch.Tensor | None = None
        self._scratch: torch.Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        norms = self._norms or column_norms(self._model, self._criterion)
        for layer, block in enumerate(self._model.blocks):
            if layer not in self._layers and self._thresholds is None and self._top_k is None:
                continue
            if self._from_gate and block.activation is not None:
                self._handles.append(block.activation.register_forward_hook(self._keep_gate))
            self._handles.append(block.down.register_forward_pre_hook(self._before_down(layer, norms[layer])))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._gate = self._scratch = None

    def _keep_gate(self, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        self._gate = output  # the same layer's down projection runs next and takes it

    def _score(self, h: torch.Tensor, norms: torch.Tensor | None) -> torch.Tensor:
        """float32 scores in memory that the next layer writes over: fresh pages cost more than the arithmetic."""
        import torch

        source = h
        if self._from_gate:
            assert self._gate is not None  # its hook ran in this layer's activation
            source, self._gate = self._gate, None
        if self._scratch is None or self._scratch.shape != source.shape:
            self._scratch = torch.empty(source.shape, dtype=torch.float32, device=source.device)
        score: torch.Tensor = (torch.abs(source, out=self._scratch) if source.dtype == torch.float32
                               else self._scratch.copy_(source).abs_())
        return score if norms is None else score.mul_(norms)

    def _before_down(self, layer: int, norms: torch.Tensor | None) -> Callable[[Any, tuple[Any, ...]], Any]:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            h = inputs[0]
            score = self._score(h, norms)
            if self._on_scores is not None and layer in self._layers:
                self._on_scores(layer, score.reshape(-1, score.shape[-1]).cpu().numpy())
            mask: torch.Tensor
            if self._top_k is not None:
                mask = _highest(score, self._top_k)
            elif self._thresholds is not None:
                mask = score > self._thresholds[layer]
            else:
                return None
            if self._on_mask is not None and layer in self._layers:
                self._on_mask(layer, mask.reshape(-1, mask.shape[-1]).cpu().numpy())
            if not self._apply:
                return None
            # In place, as the layer made h for this product alone; a product, not a select: NaN stays visible.
            return (h.mul_(mask), *inputs[1:])

        return hook


def _highest(score: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the k highest along the last axis; on the CPU the lowest unit of equal ones comes first."""
    import torch

    if score.device.type != "cpu":
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(k).indices, True)
    values = score.reshape(-1, score.shape[-1]).numpy()  # selecting in numpy takes a tenth of torch's sorting
    least = np.partition(values, values.shape[1] - k, axis=1)[:, values.shape[1] - k, None]
    mask, equal = values > least, values == least
    wanted = k - mask.sum(axis=1, keepdims=True)
    if bool((equal.sum(axis=1, keepdims=True) > wanted).any()):
        equal &= equal.cumsum(axis=1) <= wanted
    return torch.from_numpy(mask | equal).reshape(score.shape)
