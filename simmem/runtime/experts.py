"""Which experts does a running mixture send each token to? Hooks on the experts and on the router beside them.

What is recorded is what the experts were called with, so it holds for any way of choosing: plain top k,
groups, biases that only choose, or weights that are scaled afterwards. Nothing is changed in the network.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.runtime.models import LoadedModel

if TYPE_CHECKING:
    import torch

__all__ = ["RouterHooks"]

_FP16_MAX = 65504.0


class RouterHooks:
    """While entered, every mixture of experts of `model` reports its choices.

    Parameters
    ----------
    model : whose network is run by the caller; tokens of a batch come one sequence after another.
    on_mask : called with (block, bool mask of shape (tokens, n_experts)).
    on_routing : called with (block, float16 logits of shape (tokens, n_experts) before the top k, float16 weights of
        shape (tokens, k) in ascending order of the expert).

    on_guess : called with (block, uint16 order of shape (tokens, n_experts)) for every block but the first: the
        experts by the logits that its router gives to the input of the router before, highest first.

    Raises
    ------
    SpecError
        While it runs: the experts are not called with ids and weights, or the router gives no logits.
    """

    def __init__(self, model: LoadedModel, *, on_mask: Callable[[int, NDArray[np.bool_]], None] | None = None,
                 on_routing: Callable[[int, NDArray[np.float16], NDArray[np.float16]], None] | None = None,
                 on_guess: Callable[[int, NDArray[np.uint16]], None] | None = None) -> None:
        self._model = model
        self._on_mask = on_mask
        self._on_routing = on_routing
        self._on_guess = on_guess
        self._logits: torch.Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for index, block in enumerate(self._model.experts):
            self._handles.append(block.router.register_forward_hook(self._after_router(index)))
            self._handles.append(block.experts.register_forward_pre_hook(self._before_experts(index), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._logits = None

    def _after_router(self, index: int) -> Callable[[Any, tuple[Any, ...], Any], None]:
        following = index + 1 if self._on_guess is not None and index + 1 < len(self._model.experts) else None

        def hook(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            self._logits = _logits_of(output)
            if following is not None and self._on_guess is not None:
                block = self._model.experts[following]
                guessed = _logits_of(block.router.forward(*inputs)).reshape(-1, block.n_experts)  # without its hooks
                order = guessed.argsort(dim=-1, descending=True, stable=True)
                self._on_guess(following, order.cpu().numpy().astype(np.uint16))

        return hook

    def _before_experts(self, index: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        import torch

        n_experts = self._model.experts[index].n_experts

        def hook(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = [x for x in (*inputs, *named.values()) if isinstance(x, torch.Tensor)]
            ids = next((x for x in given if not x.is_floating_point() and x.dim() == 2), None)
            weights = next((x for x in given[1:] if x.is_floating_point() and ids is not None
                            and x.shape == ids.shape), None)
            logits, self._logits = self._logits, None
            if ids is None or weights is None or logits is None or logits.shape[-1] != n_experts:
                raise SpecError(f"routes in a way that is not known in layer {self._model.experts[index].layer}",
                                file=self._model.name)
            chosen, order = ids.sort(dim=-1)
            if self._on_mask is not None:
                mask = torch.zeros((ids.shape[0], n_experts), dtype=torch.bool, device=ids.device)
                self._on_mask(index, mask.scatter_(-1, chosen, True).cpu().numpy())
            if self._on_routing is not None:
                self._on_routing(index, *(x.float().clamp(-_FP16_MAX, _FP16_MAX).half().cpu().numpy()
                                          for x in (logits.reshape(-1, n_experts), weights.gather(-1, order))))

        return hook


def _logits_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
