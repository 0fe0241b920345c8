"""Which matrix products should a cost model be fitted on, and which should it be asked to predict?

Decoder shapes are read off the built-in models: every projection of every one of them, so a model added to
`workloads/models` is measured too. Random shapes fill the space between, so that a model has to interpolate. Each shape
gets its products (precision, threads, batch) by its place in the list: the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from simmem.spec.library import names
from simmem.spec.model import load_model

__all__ = ["STEP", "Product", "Shape", "decoder_shapes", "products", "random_shapes"]

RANDOM_SIDES = (256, 16384)
"""Sides of random shapes: log-uniform between these, in whole steps of 64, as the widths of decoders are."""
STEP = 64
MAX_RANDOM_ELEMENTS = 1 << 25
BATCH = (2, 1024)
"""Tokens of the products that are not matrix times vector."""
_GOLDEN = (math.sqrt(5) - 1) / 2


class Shape(NamedTuple):
    """A weight matrix as torch keeps it: rows outputs by cols inputs."""

    rows: int
    cols: int


class Product(NamedTuple):
    """One product to time: `batch` rows of activations times the transposed weight matrix."""

    shape: Shape
    batch: int
    dtype: str
    threads: int


def decoder_shapes(max_elements: float = math.inf) -> list[Shape]:
    """Query, key and value, attention output, FFN up and down (of one expert), and head of every built-in model.

    Ascending by size, each once. Latent attention and state spaces add their FFN and head only.
    """
    found = set()
    for name in names("model"):
        a = load_model(name).architecture
        width = a.experts.d_expert if a.experts else a.d_ff
        found.add(Shape(a.vocab, a.embedding_dim or a.d_model))
        if width:
            found |= {Shape(width, a.d_model), Shape(a.d_model, width)}
        if a.latent_attention is None and a.state_space is None:
            heads, kv = a.n_heads * a.d_head, a.n_kv_heads * a.d_head
            found |= {Shape(heads, a.d_model), Shape(kv, a.d_model), Shape(a.d_model, heads)}
    return sorted((s for s in found if s.rows * s.cols <= max_elements), key=lambda s: (s.rows * s.cols, s))


def random_shapes(n: int, *, max_elements: float = MAX_RANDOM_ELEMENTS, seed: int = 0,
                  other_than: Sequence[Shape] = ()) -> list[Shape]:
    """`n` shapes that differ in their pair of sides from each other and from `other_than`.

    Fewer where so few elements leave no more.
    """
    random = np.random.default_rng(seed)
    low, high = (math.log(side) for side in RANDOM_SIDES)
    known = {frozenset(shape) for shape in other_than}
    found: list[Shape] = []
    for _ in range(100 * n):
        if len(found) == n:
            break
        rows, cols = (STEP * max(round(math.exp(random.uniform(low, high)) / STEP), 1) for _ in range(2))
        if rows * cols <= max_elements and frozenset((rows, cols)) not in known:
            known.add(frozenset((rows, cols)))
            found.append(Shape(rows, cols))
    return found


def products(shapes: Sequence[Shape], ways: Sequence[tuple[str, int]], *, ways_each: int, max_flop: float,
             gemm: bool = True) -> Iterator[Product]:
    """For each shape the next `ways_each` of the pairs (dtype, threads): its GEMV and, with `gemm`, one of a batch.

    The batch is log-uniform in `BATCH` over the shapes, every other one a power of two, and less where the product
    would take more than `max_flop`.
    """
    low, high = (math.log2(b) for b in BATCH)
    for i, shape in enumerate(shapes):
        for j in ((i * ways_each + k) % len(ways) for k in range(min(ways_each, len(ways)))):
            dtype, threads = ways[j]
            yield Product(shape, 1, dtype, threads)
            tokens = 2 ** (low + (high - low) * ((i * len(ways) + j) * _GOLDEN % 1.0))
            tokens = min(tokens, max_flop / (2 * shape.rows * shape.cols))
            if gemm and tokens >= 2:
                yield Product(shape, 2 ** int(math.log2(tokens)) if i % 2 else int(tokens), dtype, threads)
