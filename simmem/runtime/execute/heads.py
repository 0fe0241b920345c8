"""What do some of the heads of each layer compute, where the others are on another unit?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simmem.runtime.execute.kernels import Rotary, Weights, mixed_values, project, rotate, signed_tables
from simmem.spec.model import Architecture

if TYPE_CHECKING:
    import torch

__all__ = ["SomeHeads"]


class SomeHeads:
    """The heads that one of two units has, and the keys and values that lie in its memory.

    A head is counted by its keys and values: queries that share them go with it.

    Parameters
    ----------
    counts : of each layer, heads whose projections are here.
    kept : of each layer, heads whose keys and values are here.
    context : tokens that they are kept of.
    rotary : None with learned positions.
    """

    def __init__(self, architecture: Architecture, dtype: torch.dtype, device: torch.device, *, counts: Sequence[int],
                 kept: Sequence[int], context: int, rotary: Rotary | None) -> None:
        import torch

        a = self.architecture = architecture
        self.counts = tuple(counts)
        self.group = a.n_heads // a.n_kv_heads

        def empty(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._projected = empty(1, max(self.counts) * (self.group + 2) * a.d_head)
        self._out = empty(1, a.d_model)
        self.keys, self.values = ([empty(n, context, a.d_head) for n in kept] for _ in range(2))
        self._rotary = None if rotary is None else signed_tables(rotary, device, dtype)

    def fill_context(self) -> None:
        """See `Decoder.fill_context`."""
        for kept in (*self.keys, *self.values):
            kept.normal_()

    def project(self, layer: int, x: torch.Tensor, weights: Weights, position: int) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of the layer's heads here, (heads, d_head) each, at a position."""
        n, d_head = self.counts[layer], self.architecture.d_head
        flat = self._projected[:, : n * (self.group + 2) * d_head]
        parts = flat.split([n * self.group * d_head, n * d_head, n * d_head], dim=1)
        for name, out in zip("qkv", parts, strict=True):
            project(x, name, weights, out)
        heads = flat.view(-1, d_head)
        turned, v = heads[: n * (self.group + 1)], heads[n * (self.group + 1):]
        if self._rotary is not None:
            turned = rotate(turned, *(table[position] for table in self._rotary))
        return turned[: n * self.group], turned[n * self.group:], v

    def keep(self, layer: int, first: int, k: torch.Tensor, v: torch.Tensor, position: int) -> None:
        """Keep keys and values of a token's heads, from the `first` of those kept here on."""
        self.keys[layer][first : first + len(k), position] = k
        self.values[layer][first : first + len(v), position] = v

    def mix(self, layer: int, q: torch.Tensor, position: int) -> torch.Tensor:
        """What the queries of all heads kept here see of the context, (1, heads x d_head)."""
        return mixed_values(q, *(kept[layer][:, : position + 1] for kept in (self.keys, self.values)))

    def out(self, mixed: torch.Tensor, weights: Weights) -> torch.Tensor:
        """The output projection of the heads here, without its bias, (1, d_model)."""
        project(mixed, "o", weights, self._out)
        return self._out
