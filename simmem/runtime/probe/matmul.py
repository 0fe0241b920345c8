"""How fast does this machine multiply weights by one token (GEMV) and by many (GEMM)?

Timed is what an executor calls: `torch.mm(x, w.t(), out=out)`, which is what `torch.nn.functional.linear` comes to,
into memory that is already there. (`torch.mv` is another kernel: on an EPYC of Zen 4 it takes 1.75 times as long in
bf16.) Weights are random and every call takes the next matrix of a pool of at least four last-level caches, so they
come from memory (`level` dram); a matrix that stays the same and fits is a point of its own (`level` cache).

int8 is the product alone, into int32, as an executor with quantised activations calls it: torch's own dynamic linear
layer is about to be removed. fp8 exists on GPUs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from simmem.runtime.probe.agents import Agent, Cpu, fp32_products, torch_threads
from simmem.runtime.probe.base import ALWAYS, ROUNDS, Case, NotHereError, Run, Setting
from simmem.runtime.probe.shapes import STEP, Product, Shape, decoder_shapes, products, random_shapes
from simmem.runtime.probe.watched import watched
from simmem.spec.measurement import Condition

__all__ = ["ELEMENT_BYTES", "Pool", "Rotation", "cases", "gpu_cases", "product_case", "product_demand"]

ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}
ROTATION = 4
"""Last-level caches that calls go through before they come back to the same weights."""
N_SHAPES = 480
"""Shapes of a full run: half of the families are kept to judge a model by, and that shall be 200 and more."""
MAX_FLOP = {"cpu": 2e9, "cuda": 3e12}
"""Of one product; larger ones would leave no time for others. [FLOP]"""
REFERENCE = (Shape(1024, 4096), Shape(2048, 2048), Shape(4096, 1024), Shape(2048, 5632), Shape(4096, 4096))
"""Sides as decoders of one to eight billion parameters have them: what a machine reaches is derived from these alone,
so that it does not hang on how many other shapes there was time for."""
_REFERENCE_FLOP = 2.2e9
_QUICK_SHAPES = 4
"""A cost model takes ten times as many: a quick run needs the reference."""
_EXTRA_SHAPES = 40
"""For precisions that are no better than another for most products, and for a quick run on a GPU."""
_TORCH = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8",
          "fp8": "float8_e4m3fn"}
_RESULT = {"int8": "int32", "fp8": "bfloat16"}
_RESULT_BYTES = {"int8": 4, "fp8": 2}
_SMALLEST_BATCH = {"int8": 32, "fp8": 16}
"""Below, GPUs have no such product."""
_BLOCK_ELEMENTS = 1 << 22
_SQUARE = 4096
_ALIGN_BYTES = 64
_GRAPH_S = 1e-3
_MAX_GRAPH_CALLS = 256


class Rotation:
    """Matrices that calls take in turn: some once, to the end of the pool, then all of it from its beginning, over and
    over. A byte comes back after no less than the pool but for one matrix, whatever used the pool before."""

    def __init__(self, once: Sequence[Any], start_bytes: int, every: Sequence[Any], size_bytes: int) -> None:
        self.matrices = (*once, *every)
        self._once, self._at = len(once), -1
        self._start_bytes, self._size_bytes = start_bytes, size_bytes

    def next(self) -> Any:
        """The next of them."""
        self._at = self._at + 1 if self._at + 1 < len(self.matrices) else self._once
        return self.matrices[self._at]

    @property
    def ends_bytes(self) -> int:
        """Where in the pool the last one that was taken ends. [B]"""
        if self._at < self._once:
            return self._start_bytes + (self._at + 1) * self._size_bytes
        return (self._at + 1 - self._once) * self._size_bytes


class Pool:
    """Random weights and activations of every precision, made when first asked for and shared by all cases.

    Parameters
    ----------
    cache_bytes : the agent's last-level cache. [B]
    memory_bytes : what all arrays together may take. [B]
    device : as torch calls it.
    seed : of the random numbers.
    """

    def __init__(self, cache_bytes: int, memory_bytes: int, *, device: str = "cpu", seed: int = 0) -> None:
        self.cache_bytes = cache_bytes
        # Four precisions, and their activations. Twice the rotation leaves room for matrices that do not divide it.
        self.weight_bytes = int(min(max(2 * ROTATION * cache_bytes, memory_bytes / 8), 0.2 * memory_bytes))
        self.device, self.seed = device, seed
        self._arrays: dict[tuple[str, str], Any] = {}
        self._last: Rotation | None = None

    def rotates(self, shape: Shape, dtype: str) -> bool:
        """Do whole matrices of this shape fill four caches?"""
        size = shape.rows * shape.cols * ELEMENT_BYTES[dtype]
        return self.weight_bytes // size * size >= ROTATION * self.cache_bytes

    def square(self) -> Shape:
        """The largest square matrix up to 4096 × 4096 of which the pool holds four in fp32, in steps of 64."""
        side = math.isqrt(self.weight_bytes // (4 * ELEMENT_BYTES["fp32"]))
        return Shape(*(2 * (max(min(side, _SQUARE) // STEP * STEP, STEP),)))

    def weights(self, shape: Shape, dtype: str) -> Rotation:
        """The pool's matrices of a shape, transposed: (cols, rows) each. Calls go on where the last rotation ended,
        since what that one used may be in the cache."""
        elements, size = shape.rows * shape.cols, shape.rows * shape.cols * ELEMENT_BYTES[dtype]
        if size > self.weight_bytes:
            raise NotHereError("the weights do not fit in the memory there is for the probe")
        flat = self._random("weights", self.weight_bytes // ELEMENT_BYTES[dtype], dtype)

        def from_byte(start: int) -> tuple[Any, ...]:
            part = flat[start // ELEMENT_BYTES[dtype]:]
            count = part.numel() // elements
            return tuple(part[:count * elements].view(count, *shape).transpose(1, 2).unbind(0)) if count else ()

        start = -(-self._last.ends_bytes // _ALIGN_BYTES) * _ALIGN_BYTES if self._last else self.weight_bytes
        self._last = Rotation(from_byte(start), start, from_byte(0), size)
        return self._last

    def activations(self, rows: int, cols: int, dtype: str) -> Any:
        """Random, (rows, cols)."""
        return self._random("activations", rows * cols, dtype)[:rows * cols].view(rows, cols)

    def results(self, rows: int, cols: int, dtype: str) -> Any:
        """Room for (rows, cols) of what a product of that precision gives."""
        import torch

        key = ("results", dtype)
        if key not in self._arrays or self._arrays[key].numel() < rows * cols:
            kind = getattr(torch, _RESULT.get(dtype, _TORCH[dtype]))
            self._arrays[key] = torch.zeros(rows * cols, dtype=kind, device=self.device)
        return self._arrays[key][:rows * cols].view(rows, cols)

    def flush(self) -> None:
        """Read four caches' worth of other memory, so that what was in the cache no longer is."""
        self._random("other", ROTATION * self.cache_bytes // ELEMENT_BYTES["fp32"], "fp32").sum()

    def _random(self, what: str, elements: int, dtype: str) -> Any:
        import torch

        key = (what, _TORCH[dtype])
        if key not in self._arrays or self._arrays[key].numel() < elements:
            kind = getattr(torch, _TORCH[dtype])
            random = torch.Generator(device=self.device).manual_seed(self.seed)
            block = torch.randn(min(elements, _BLOCK_ELEMENTS), generator=random, device=self.device)
            block = (block * 40).clamp(-127, 127).to(kind) if dtype == "int8" else block.to(kind)
            array = torch.empty(elements, dtype=kind, device=self.device)
            for start in range(0, elements, block.numel()):
                part = array[start:start + block.numel()]
                part.copy_(block[:part.numel()])
            self._arrays[key] = array
        return self._arrays[key]


def product_demand(product: Product) -> tuple[float, float]:
    """FLOP of a product, and its bytes: weights, activations and results, each once. [FLOP], [B]"""
    (rows, cols), batch, size = product.shape, product.batch, ELEMENT_BYTES[product.dtype]
    result = _RESULT_BYTES.get(product.dtype, size)
    return 2.0 * rows * cols * batch, float(rows * cols * size + cols * batch * size + rows * batch * result)


def product_case(product: Product, pool: Pool, agent: Agent, *, level: str = "dram", graph: bool = False,
                 priority: int = 1) -> Case:
    """One product on an agent.

    With `graph` a sample is one launch of as many calls as last a millisecond, after the cache has been flushed; else
    as many calls as last two milliseconds, each with the next matrix of the pool.
    """
    flop, moved = product_demand(product)
    weights = product.shape.rows * product.shape.cols * ELEMENT_BYTES[product.dtype]
    cycle = weights * (pool.weight_bytes // weights if level == "dram" else 1)
    conditions: dict[str, Condition] = {
        "agent": agent.name, "rows": product.shape.rows, "cols": product.shape.cols, "batch": product.batch,
        "dtype": product.dtype, "threads": product.threads, "level": level,
        "working_set_bytes": int(moved) - weights + cycle}
    if graph:
        setup, refuse = _graphed(product, pool, agent, level), None
    else:
        setup, refuse = watched(product.threads, lambda: _call(product, pool, level))
    return Case(probe="gemv" if product.batch == 1 else "gemm", conditions=conditions, setup=setup, flop=flop,
                bytes=moved, requests=1, priority=priority, refuse=refuse)


def _call(product: Product, pool: Pool, level: str) -> Callable[[], Any]:
    """The product with the next weights, or always with the same."""
    multiply, rotation = _multiply(product, pool), pool.weights(product.shape, product.dtype)
    if level == "cache":
        same = rotation.next()
        return lambda: multiply(same)
    return lambda: multiply(rotation.next())


def _graphed(product: Product, pool: Pool, agent: Agent, level: str) -> Callable[[], AbstractContextManager[Run]]:
    known_calls: list[int] = []

    @contextmanager
    def setup() -> Iterator[Run]:
        with torch_threads(product.threads), fp32_products(tf32=product.dtype == "tf32"):
            step = _call(product, pool, level)
            try:
                step()
            except RuntimeError as error:
                if product.dtype not in _SMALLEST_BATCH:
                    raise
                raise NotHereError(f"{product.dtype} products: {str(error).splitlines()[0]}") from None
            if not known_calls:
                known_calls.append(int(min(max(_GRAPH_S / agent.time(step), 1), _MAX_GRAPH_CALLS)))
            weights = product.shape.rows * product.shape.cols * ELEMENT_BYTES[product.dtype]
            # No matrix twice: the second time it might come from the cache.
            calls = known_calls[0] if level == "cache" else min(known_calls[0], pool.weight_bytes // weights)
            launch = agent.graph([step] * calls)

            def run() -> float:
                if level == "dram":
                    pool.flush()
                return agent.time(launch) / calls

            yield run
            agent.wait()

    return setup


def _multiply(product: Product, pool: Pool) -> Callable[[Any], Any]:
    """What multiplies activations by a transposed weight matrix."""
    import torch

    dtype = product.dtype
    x = pool.activations(product.batch, product.shape.cols, dtype)
    out = pool.results(product.batch, product.shape.rows, dtype)
    if dtype == "int8":
        return lambda w: torch._int_mm(x, w, out=out)
    if dtype == "fp8":
        one = torch.ones((), device=x.device)
        return lambda w: torch._scaled_mm(x, w, one, one, out_dtype=torch.bfloat16, out=out)
    return lambda w: torch.mm(x, w, out=out)


def cases(setting: Setting) -> list[Case]:
    """GEMV and GEMM on the CPU's cores: decoder shapes, random shapes, one thread and all, out of memory and cache."""
    pool, agent = Pool(setting.cache_bytes, setting.memory_bytes, seed=setting.seed), Cpu()
    if not pool.rotates(Shape(256, 256), "fp32"):
        return []
    every = sorted({1, setting.threads})
    ways = [("fp32", every[0]), ("bf16", every[-1]), ("bf16", every[0]), ("fp32", every[-1])][:2 * len(every)]
    decoder = decoder_shapes(pool.weight_bytes / ELEMENT_BYTES["fp32"])
    reference = ways
    if setting.dtypes:
        ways = [(dtype, every[-1]) for dtype in setting.dtypes]
        reference = sorted({*ways, ("fp32", every[-1])})
    elif setting.quick:
        decoder = decoder[::-(-len(decoder) // _QUICK_SHAPES)]
    found = _reference(reference, pool, agent) + _cases(decoder, ways, len(ways), pool, agent)
    cached = [s for s in decoder if s.rows * s.cols * ELEMENT_BYTES["fp32"] <= setting.cache_bytes / 2]
    found += [product_case(Product(s, 1, *way), pool, agent, level="cache") for s in cached[::4] for way in ways]
    if not setting.quick:
        random = random_shapes(N_SHAPES - len(decoder), seed=setting.seed, other_than=decoder,
                               max_elements=pool.weight_bytes / 8)
        found += _cases(random, ways, len(ways), pool, agent, priority=2)
    if not setting.quick and not setting.dtypes:
        some = decoder[::-(-len(decoder) // _EXTRA_SHAPES)]
        found += _cases(some, [("int8", n) for n in every], 1, pool, agent, priority=2)
        # fp16 has a kernel of its own for one token and none worth its name for more.
        found += _cases(some, [("fp16", n) for n in every], 1, pool, agent, priority=2, gemm=False)
    return found


def _reference(ways: Sequence[tuple[str, int]], pool: Pool, agent: Agent) -> list[Case]:
    """One token, and as many (a power of two) as make some 2 GFLOP."""
    found = []
    for shape in REFERENCE:
        tokens = 2 ** int(math.log2(_REFERENCE_FLOP / (2 * shape.rows * shape.cols)))
        every = [product_case(Product(shape, batch, *way), pool, agent, priority=ALWAYS)
                 for way in ways if pool.rotates(shape, way[0]) for batch in (1, tokens)]
        found += [replace(c, conditions={**c.conditions, "reference": True}, rounds=ROUNDS, weight=2.0) for c in every]
    return found


def gpu_cases(setting: Setting, agent: Agent, cache_bytes: int) -> list[Case]:
    """GEMV and GEMM on a GPU whose cache is so large; `setting.memory_bytes` is of its memory."""
    pool = Pool(cache_bytes, setting.memory_bytes, device=agent.device, seed=setting.seed)
    decoder = decoder_shapes(pool.weight_bytes / ELEMENT_BYTES["fp32"])
    if setting.quick:
        decoder = decoder[::-(-len(decoder) // _EXTRA_SHAPES)]
    random = random_shapes(_EXTRA_SHAPES if setting.quick else N_SHAPES - len(decoder), seed=setting.seed,
                           other_than=decoder, max_elements=pool.weight_bytes / 8)
    ways, found = [("fp32", 1), ("bf16", 1), ("tf32", 1), ("fp16", 1)], []
    if setting.quick:
        found = _cases(decoder[::4], ways[2:], 1, pool, agent, graph=True, priority=3)
        ways = ways[:2]
    for shapes, priority in ((decoder, 1), (random, 2)):
        found += _cases(shapes, ways, 2, pool, agent, graph=True, priority=priority)
    some = decoder[::-(-len(decoder) // _EXTRA_SHAPES)]
    found += [case for dtype in ("int8", "fp8")
              for case in _cases(some, [(dtype, 1)], 1, pool, agent, graph=True, priority=3)
              if int(case.conditions["batch"]) >= _SMALLEST_BATCH[dtype]]
    cached = [s for s in decoder if s.rows * s.cols * ELEMENT_BYTES["fp32"] <= cache_bytes / 2]
    found += [product_case(Product(s, 1, *way), pool, agent, level="cache", graph=True, priority=2)
              for s in cached[::4] for way in ways]
    return found


def _cases(shapes: Sequence[Shape], ways: Sequence[tuple[str, int]], ways_each: int, pool: Pool, agent: Agent,
           *, graph: bool = False, gemm: bool = True, priority: int = 1) -> list[Case]:
    return [product_case(product, pool, agent, graph=graph, priority=priority)
            for product in products(shapes, ways, ways_each=ways_each, max_flop=MAX_FLOP[agent.device], gemm=gemm)
            if pool.rotates(product.shape, product.dtype)]
