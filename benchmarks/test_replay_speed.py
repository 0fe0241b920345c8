"""How many accesses a second does replay count, and how many does a hand-written cache in plain Python?

Run: pytest benchmarks/test_replay_speed.py. Each group is one comparison on one trace in one run; `accesses_per_s`
is among the extra information of each line. Targets: window 10 M accesses/s, LRU 3 M, without compiled extras.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest

from simmem.spec.model import load_model
from simmem.trace import open_trace
from simmem.trace.replay import lru_curve, window_curve, window_table
from simmem.trace.synthetic import generate
from simmem.trace.trace import Trace

WINDOW = 5


@pytest.fixture(scope="module")
def trace() -> Trace:
    """OPT-6.7B, 32 layers of 16384 neurons, 48 tokens; 2.7 million accesses."""
    trace = open_trace("opt-published", load_model("opt-6.7b"), n_tokens=48)
    assert trace is not None
    return trace


@pytest.fixture(scope="module")
def accesses(trace: Trace) -> list[list[list[int]]]:
    """The same trace as lists of unit ids, by token and layer."""
    return units(trace)


def units(trace: Trace) -> list[list[list[int]]]:
    bits = np.unpackbits(trace.active, axis=2, count=trace.header.n_units, bitorder="little")
    return [[np.flatnonzero(row).tolist() for row in token] for token in bits]


def plain_lru(accesses: list[list[list[int]]], capacity: int) -> int:
    """What one writes by hand: an OrderedDict a layer (it does not even pin)."""
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in accesses[0]]
    hits = 0
    for token in accesses:
        for cache, layer in zip(caches, token, strict=True):
            for unit in layer:
                if unit in cache:
                    hits += 1
                    cache.move_to_end(unit)
                else:
                    cache[unit] = None
                    if len(cache) > capacity:
                        cache.popitem(last=False)
    return hits


def plain_window(accesses: list[list[list[int]]], window: int) -> int:
    """Sets of the last tokens, one a layer."""
    hits = 0
    for t, token in enumerate(accesses):
        for layer, used in enumerate(token):
            kept = set().union(*(accesses[s][layer] for s in range(max(0, t - window), t)))
            hits += len(kept.intersection(used))
    return hits


def rate(benchmark: Callable[..., object], trace: Trace, function: Callable[..., object], *args: object) -> float:
    started = time.perf_counter()
    benchmark.pedantic(function, args=args, rounds=3, warmup_rounds=0)  # type: ignore[attr-defined]
    stats = benchmark.stats  # type: ignore[attr-defined]
    seconds = stats.stats.min if stats else (time.perf_counter() - started) / 3
    accesses = int(trace.active_counts.sum())
    benchmark.extra_info["accesses_per_s"] = f"{accesses / seconds:.3g}"  # type: ignore[attr-defined]
    print(f" {accesses / seconds / 1e6:.1f} M accesses/s")
    return accesses / seconds


@pytest.mark.benchmark(group="window of 5 tokens")
def test_window(benchmark, trace):
    assert rate(benchmark, trace, window_table, trace, WINDOW) > 10e6


@pytest.mark.benchmark(group="window of 5 tokens")
def test_window_plain_python(benchmark, trace, accesses):
    rate(benchmark, trace, plain_window, accesses, WINDOW)
    curve = window_curve(trace, [WINDOW])
    assert plain_window(accesses, WINDOW) == int(curve.hits[0] + curve.cold_hits[0])


@pytest.mark.benchmark(group="LRU")
def test_lru_twenty_capacities(benchmark, trace):
    assert rate(benchmark, trace, lru_curve, trace, np.arange(1, 21) * trace.header.n_units // 20) > 3e6


@pytest.mark.benchmark(group="LRU")
def test_lru_one_capacity(benchmark, trace):
    assert rate(benchmark, trace, lru_curve, trace, [trace.header.n_units // 4]) > 3e6


@pytest.mark.benchmark(group="LRU")
def test_lru_one_cache_for_all_layers(benchmark, trace):
    capacity = trace.header.n_units * trace.header.n_layers // 4
    rate(benchmark, trace, lambda: lru_curve(trace, [capacity], scope="global"))


@pytest.mark.benchmark(group="LRU")
def test_lru_plain_python_one_capacity(benchmark, trace, accesses):
    rate(benchmark, trace, plain_lru, accesses, trace.header.n_units // 4)


@pytest.mark.benchmark(group="synthetic trace")
def test_draw_96_tokens_of_opt_6_7b(benchmark):
    from simmem.spec import library
    from simmem.trace.synthetic import load_synthetic

    spec, model = load_synthetic(library.resolve("trace", "opt-published")), load_model("opt-6.7b")
    rate(benchmark, generate(spec, model, 96), generate, spec, model, 96)
    if benchmark.stats:
        assert benchmark.stats.stats.min < 0.25
