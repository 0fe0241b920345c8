"""Can a small linear map of a layer's input tell which FFN units it will use?

The predictor of a layer is x ↦ x·first·second + bias with `first` (d_model, rank) and `second` (rank, n_units), one
score per unit, as in Deja Vu (Liu et al., arXiv 2310.17157) and LLM in a flash (arXiv 2312.11514 §3.1). Those train
it by gradient descent; here it is the reduced-rank regression of the mask on the input, which has a closed form
(Izenman, J. Multivariate Analysis 5, 1975) and needs two sums over the text, whatever its length. A ridge of
`RIDGE` times the mean variance of an input keeps it steady on short texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from simmem.runtime.families import find_layers
from simmem.runtime.models import LoadedModel

if TYPE_CHECKING:
    import torch

__all__ = ["RIDGE", "FfnInputs", "LowRank", "LowRankHooks", "Moments", "scores_of", "solve", "tensors_of"]

RIDGE = 0.1
_FLOOR = 1e-7
"""Of the mean square of an input: what the rounding of its float32 products amounts to."""


@dataclass(frozen=True)
class LowRank:
    """A predictor for every layer: `first` (n_layers, d_model, rank), `second` (n_layers, rank, n_units), `bias`
    (n_layers, n_units), all float32."""

    layers_ahead: int
    first: NDArray[np.float32]
    second: NDArray[np.float32]
    bias: NDArray[np.float32]

    @property
    def params(self) -> int:
        return self.first.size + self.second.size + self.bias.size


class Moments:
    """Sums over tokens of what a layer's regression needs: inputs x (tokens, d), masks y (tokens, n_units).

    Products in float32, sums in float64.
    """

    def __init__(self, d: int, n_units: int, device: torch.device) -> None:
        import torch

        wide = {"dtype": torch.float64, "device": device}
        self.tokens = 0
        self.x, self.y = torch.zeros(d, **wide), torch.zeros(n_units, **wide)
        self.xx, self.xy = torch.zeros(d, d, **wide), torch.zeros(d, n_units, **wide)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.tokens += x.shape[0]
        self.x += x.sum(dim=0)
        self.y += y.sum(dim=0)
        self.xx += x.T @ x
        self.xy += x.T @ y


def solve(moments: Moments, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """first, second and bias of one layer: the regression of this rank with the least squared error.

    With S = cov(x) + ridge and C = cov(x, y): second = Vᵀ and first = S⁻¹ C V, V being the `rank` leading right
    singular vectors of S^(-1/2) C. Its left ones are found instead, of which there are only d.
    """
    import torch

    n = moments.tokens
    mean_x, mean_y = moments.x / n, moments.y / n
    covariance = moments.xx / n - torch.outer(mean_x, mean_x)
    cross = moments.xy / n - torch.outer(mean_x, mean_y)
    d = len(mean_x)
    rounding = _FLOOR * float(moments.xx.trace()) / (n * d) + torch.finfo(torch.float32).tiny
    ridge = max(RIDGE * float(covariance.trace()) / d, rounding)  # inputs that are all alike vary by rounding alone
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors / (values.clamp(min=0.0) + ridge).sqrt()
    whitened = whiten.T @ cross
    left = torch.linalg.eigh(whitened @ whitened.T)[1].flip(1)[:, :min(rank, d)]
    first, second = whiten @ left, left.T @ whitened
    bias = mean_y - mean_x @ first @ second
    arrays = [part.float().cpu().numpy() for part in (first, second, bias)]
    return arrays[0], arrays[1], arrays[2]


class FfnInputs:
    """While entered, keeps the latest FFN input of each layer, and the input of the first layer."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._latest: dict[int, torch.Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        places = {-1: find_layers(self._model.network, self._model.name)[0],
                  **{layer: block.ffn_modules[0] for layer, block in enumerate(self._model.blocks)}}
        for layer, module in places.items():
            self._handles.append(module.register_forward_pre_hook(self._keep(layer), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._latest.clear()

    def before(self, layer: int, ahead: int) -> torch.Tensor:
        """What is known `ahead` layers before a layer's FFN runs, (tokens, d) in float32: the FFN input of that layer,
        or the input of the first one."""
        latest = self._latest[max(layer - ahead, -1)]
        return latest.reshape(-1, latest.shape[-1]).float()

    def _keep(self, layer: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        import torch

        def hook(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._latest[layer] = next(x for x in (*inputs, *named.values())
                                       if isinstance(x, torch.Tensor) and x.is_floating_point())

        return hook


class LowRankHooks:
    """While entered, every FFN of `model` reports what a low-rank predictor scores, and what it asks for.

    Parameters
    ----------
    thresholds : (n_layers,); a unit is asked for where its score exceeds that of its layer. None: nothing is masked.
    on_mask : called with (layer, bool mask of shape (tokens, n_units)).
    apply : units that are not asked for count as zero.
    """

    def __init__(self, model: LoadedModel, low_rank: LowRank, thresholds: NDArray[np.float32], *,
                 on_mask: Callable[[int, NDArray[np.bool_]], None] | None = None, apply: bool = True) -> None:
        self._model, self._low_rank = model, low_rank
        self._thresholds = [float(t) for t in thresholds]
        self._on_mask, self._apply = on_mask, apply
        self._inputs = FfnInputs(model)
        self._maps: list[tuple[torch.Tensor, ...]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._inputs.__enter__()
        self._maps = list(tensors_of(self._low_rank, self._model.device))
        for layer, block in enumerate(self._model.blocks):
            self._handles.append(block.down.register_forward_pre_hook(self._before_down(layer)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._maps.clear()
        self._inputs.__exit__(kind, error, traceback)

    def _before_down(self, layer: int) -> Callable[[Any, tuple[Any, ...]], Any]:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x = self._inputs.before(layer, self._low_rank.layers_ahead)
            mask = scores_of(x, self._maps[layer]) > self._thresholds[layer]
            if self._on_mask is not None:
                self._on_mask(layer, mask.cpu().numpy())
            if not self._apply:
                return None
            h = inputs[0]
            return (h.mul_(mask.reshape(h.shape)), *inputs[1:])

        return hook


def tensors_of(low_rank: LowRank, device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    """first, second and bias of each layer on a device."""
    import torch

    for parts in zip(low_rank.first, low_rank.second, low_rank.bias, strict=True):
        yield tuple(torch.from_numpy(part).to(device) for part in parts)


def scores_of(x: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Scores (tokens, n_units) of inputs (tokens, d)."""
    import torch

    first, second, bias = maps
    return torch.addmm(bias, x @ first, second)
