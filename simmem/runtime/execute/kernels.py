"""What does a decode step compute? torch products of one token with weights that lie in pieces.

A decoder of the OPT or the Llama kind: norm, attention with learned or rotary positions over a preallocated context,
norm, FFN; whole, or over the rows of the neurons that are held. A matrix may lie in two pieces, the rows that stay in
memory and those that were streamed. Everything that is written is allocated beforehand; products go to the library that
torch brings, one token at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simmem.runtime.execute.cache import padded
from simmem.spec.model import Architecture

if TYPE_CHECKING:
    import torch

__all__ = [
    "NORM_EPSILON",
    "Decoder",
    "FfnRows",
    "Pieces",
    "Rotary",
    "Weights",
    "matrix_of",
    "mixed_values",
    "project",
    "rotary_tables",
    "rotate",
    "signed_tables",
    "torch_dtype",
    "vector_of",
]

Ints = NDArray[np.int64]
Pieces = tuple[tuple[int, int, "torch.Tensor"], ...]
"""(first row, row behind the last, rows) of a matrix (outputs, inputs)."""
Weights = Mapping[str, "torch.Tensor | Pieces"]
"""Name -> vector, or pieces of a matrix."""
Rotary = tuple["torch.Tensor", "torch.Tensor"]
"""Cosines and sines (positions, d_head)."""

NORM_EPSILON = 1e-5
ROPE_BASE = 10000.0


@dataclass(frozen=True)
class FfnRows:
    """Rows of some neurons: each part (padded(n), d_model), of which the first n count."""

    parts: Mapping[str, torch.Tensor]
    ids: Ints
    """(n,) which units they are."""
    mask: torch.Tensor | None = None
    """(padded(n),) 1 for rows that count and 0 for others; None: all n do."""
    index: torch.Tensor | None = None
    """`ids` where the rows are, if they lie there already."""


def torch_dtype(precision: str) -> torch.dtype:
    """The element type of a precision."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def rotary_tables(positions: int, d_head: int, base: float = ROPE_BASE) -> Rotary:
    """Cosines and sines (positions, d_head) of rotary positions (arXiv 2104.09864), halves alike."""
    import torch

    angle = torch.arange(positions)[:, None] / base ** (torch.arange(0, d_head, 2)[None] / d_head)
    both = torch.cat((angle, angle), dim=1)
    return both.cos(), both.sin()


def signed_tables(tables: Rotary, device: torch.device, dtype: torch.dtype) -> Rotary:
    """The tables on a device, the first half of the sines negative, as `rotate` wants them."""
    import torch

    cosine, sine = (t.to(device, dtype) for t in tables)
    half = torch.arange(cosine.shape[1], device=device) < cosine.shape[1] // 2
    return cosine, torch.where(half, -sine, sine)


class Decoder:
    """The state of one sequence and the products that advance it.

    Parameters
    ----------
    context : tokens that keys and values are kept of.
    rotary : cosines and sines (context, d_head), None with learned positions.
    epsilon : of the norms.
    position_offset : learned positions begin in this row (2 in OPT).
    """

    def __init__(self, architecture: Architecture, precision: str, device: torch.device, context: int, *,
                 rotary: Rotary | None = None, epsilon: float = NORM_EPSILON,
                 position_offset: int = 0) -> None:
        import torch

        a = self.architecture = architecture
        dtype = self.dtype = torch_dtype(precision)

        def empty(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._epsilon, self._offset = epsilon, position_offset
        self.hidden = empty(1, a.d_model)
        self._normed = empty(1, a.d_model)
        # Queries and keys side by side: positions turn both at once.
        self._heads = empty(1, (a.n_heads + 2 * a.n_kv_heads) * a.d_head)
        self._q, self._k, self._v = self._heads.split(
            [n * a.d_head for n in (a.n_heads, a.n_kv_heads, a.n_kv_heads)], dim=1)
        self._out = empty(1, a.d_model)
        self._wide = {name: empty(1, padded(a.d_ff)) for name in ("gate", "up", "gate all", "up all")}
        self._low = empty(1, a.d_model)
        self._scores = empty(1, a.d_ff)
        self.logits = empty(1, a.vocab)
        self.keys, self.values = (empty(a.n_layers, a.n_kv_heads, context, a.d_head) for _ in range(2))
        self._rotary = None if rotary is None else signed_tables(rotary, device, dtype)
        self._activate = _Activation(a.activation)

    def fill_context(self) -> None:
        """Keys and values of tokens that were never computed: whatever the context says, it has to be read."""
        for kept in (self.keys, self.values):
            kept.normal_()

    # --- parts of a token ---------------------------------------------------------------------------

    def embed(self, row: torch.Tensor, fixed: Weights, position: int) -> None:
        """Begin a token: its row of the embedding, and its position where that is learned."""
        self.hidden[0].copy_(row)
        if "positions" in fixed:
            self.hidden.add_(matrix_of(fixed["positions"])[position + self._offset])

    def attend(self, layer: int, weights: Weights, position: int) -> None:
        """Attention of one layer over the context up to and with `position`."""
        a = self.architecture
        x = self.attention_input(weights)
        for name, out in (("q", self._q), ("k", self._k), ("v", self._v)):
            project(x, name, weights, out)
        heads = self._heads.view(-1, a.d_head)
        turned, v = heads[: a.n_heads + a.n_kv_heads], heads[a.n_heads + a.n_kv_heads:]
        if self._rotary is not None:
            turned = rotate(turned, *(table[position] for table in self._rotary))
        q, k = turned[: a.n_heads], turned[a.n_heads:]
        self.keys[layer, :, position] = k
        self.values[layer, :, position] = v
        mixed = mixed_values(q, *(kept[layer, :, : position + 1] for kept in (self.keys, self.values)))
        project(mixed, "o", weights, self._out)
        self.hidden.add_(self._out)

    def attention_input(self, weights: Weights) -> torch.Tensor:
        """What attention multiplies (1, d_model)."""
        return self._norm("attention_norm", weights)

    def predict_low_rank(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Score all neurons of a layer by two thin matrices (rank, d_model) and (d_ff, rank)."""
        import torch

        low = self._low[:, : first.shape[0]]
        torch.mm(self.hidden, first.t(), out=low)
        torch.mm(low, second.t(), out=self._scores)

    def predict_whole(self, weights: Weights, names: Sequence[str]) -> None:
        """Multiply matrices of the FFN that tell which neurons are needed; kept for this layer's `feed_rows`."""
        x = self._norm("ffn_norm", weights)
        for name in names:
            project(x, name, weights, self._wide[f"{name} all"][:, : self.architecture.d_ff])

    def feed(self, weights: Weights) -> None:
        """The whole FFN."""
        x, a = self._norm("ffn_norm", weights), self.architecture
        h = self._wide["up"][:, : a.d_ff]
        project(x, "up", weights, h)
        if a.gated:
            gate = self._wide["gate"][:, : a.d_ff]
            project(x, "gate", weights, gate)
            h.mul_(self._activate(gate))
        else:
            h = self._activate(h)
        project(h, "down", weights, self._out)
        self.hidden.add_(self._out)

    def feed_input(self, weights: Weights) -> torch.Tensor:
        """What the FFN multiplies (1, d_model): there before its neurons are."""
        return self._norm("ffn_norm", weights)

    def feed_rows(self, x: torch.Tensor, weights: Weights, held: Sequence[FfnRows], known: Sequence[str] = ()
                  ) -> None:
        """The FFN of `feed_input` over the neurons whose rows are there.

        `known` matrices were multiplied by `predict_whole`.
        """
        import torch

        a = self.architecture
        for rows in held:
            n = len(rows.ids)
            if n == 0:
                continue
            ids = rows.index
            if ids is None and (known or a.ffn_bias):
                ids = torch.from_numpy(rows.ids).to(x.device)
            h = self._inner("up", x, rows, ids, weights, known)
            if a.gated:
                h.mul_(self._activate(self._inner("gate", x, rows, ids, weights, known)))
            else:
                h = self._activate(h)
            if rows.mask is not None:
                h.mul_(rows.mask)
            h[:, n:] = 0
            self.hidden.add_(torch.mm(h, rows.parts["down"], out=self._out))
        if a.ffn_bias:
            self.hidden.add_(vector_of(weights["down.bias"]))

    def finish(self, weights: Weights, fixed: Weights) -> torch.Tensor:
        """Logits and the likeliest token, a tensor of one number."""
        x = self._norm("final_norm", fixed) if "final_norm.weight" in fixed else self.hidden
        project(x, "head", weights, self.logits)
        return self.logits.argmax()

    # --- steps --------------------------------------------------------------------------------------

    def _inner(self, name: str, x: torch.Tensor, rows: FfnRows, ids: torch.Tensor | None, weights: Weights,
               known: Sequence[str]) -> torch.Tensor:
        import torch

        if name in known:
            assert ids is not None
            h = self._wide[name][:, : padded(len(rows.ids))]
            torch.index_select(self._wide[f"{name} all"], 1, ids, out=h[:, : len(rows.ids)])
            return h
        matrix = rows.parts[name]
        h = self._wide[name][:, : matrix.shape[0]]
        torch.mm(x, matrix.t(), out=h)
        if ids is not None and self.architecture.ffn_bias:
            h[0, : len(rows.ids)] += vector_of(weights[f"{name}.bias"])[ids]
        return h

    def _norm(self, name: str, weights: Weights) -> torch.Tensor:
        import torch

        shape, scale = (self.architecture.d_model,), vector_of(weights[f"{name}.weight"])
        if self.architecture.norm == "layernorm":
            bias = weights.get(f"{name}.bias")
            return torch.nn.functional.layer_norm(self.hidden, shape, scale, None if bias is None else vector_of(bias),
                                                  self._epsilon)
        return torch.nn.functional.rms_norm(self.hidden, shape, scale, self._epsilon)


def project(x: torch.Tensor, name: str, weights: Weights, out: torch.Tensor) -> None:
    """x (1, inputs) times the matrix `name`, piece by piece, plus its bias where it has one, into out (1, outputs)."""
    import torch

    pieces = weights[f"{name}.weight"]
    assert isinstance(pieces, tuple)
    for first, last, rows in pieces:
        torch.mm(x, rows.t(), out=out[:, first:last])
    bias = weights.get(f"{name}.bias")
    if bias is not None:
        out.add_(vector_of(bias))


def vector_of(value: torch.Tensor | Pieces) -> torch.Tensor:
    assert not isinstance(value, tuple)
    return value


def matrix_of(value: torch.Tensor | Pieces) -> torch.Tensor:
    assert isinstance(value, tuple) and len(value) == 1
    return value[0][2]


def mixed_values(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What queries (n_heads, d_head) see of keys and values (n_kv_heads, context, d_head), (1, n_heads x d_head)."""
    import torch

    # Two batched products: for a single query torch's fused attention takes six times as long on the CPU in bf16.
    # In fp32, conversion included: 0.2 ms there instead of 0.3 with 32 heads and 150 tokens, 1.0 for 1.6 with 1050.
    dtype, d_head = q.dtype, q.shape[1]
    wide = torch.float32 if q.device.type == "cpu" else dtype
    keys, values = keys.to(wide), values.to(wide)
    scores = torch.bmm(q.view(len(keys), -1, d_head).to(wide), keys.transpose(1, 2)).mul_(d_head**-0.5)
    return torch.bmm(scores.softmax(-1, dtype=torch.float32).to(wide), values).to(dtype).reshape(1, -1)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Halves turned into each other; the first half of `sine` is negative."""
    return (x * cosine).addcmul_(x.roll(x.shape[-1] // 2, 1), sine)


class _Activation:
    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        if self._name == "relu":
            return x.relu_()
        if self._name == "silu":
            return torch.nn.functional.silu(x, inplace=True)
        return torch.nn.functional.gelu(x, approximate="none" if self._name == "gelu" else "tanh")
