"""Every cache policy does what its definition says: equal to caches written unit by unit and to exhaustive search."""

from __future__ import annotations

from itertools import combinations
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmem.errors import SpecError
from simmem.trace import optimum, ordering, recency, replay, stepping
from simmem.trace.bits import words_of
from simmem.trace.caches import POLICIES
from simmem.trace.prefetch import Quality, parse_predictor, predicted_units
from simmem.trace.replay import cache_curve, fewest_misses, window_curve
from simmem.trace.stepping import step_through
from tests.laws.test_replay import activity, sets, trace_of

SCOPES = st.sampled_from(["layer", "global"])
DEMAND = ("lru", "lfu", "slru")
Unit = tuple[int, int]  # layer, unit


class Plain:
    """One cache, as the design words it: pinned while used, ties lowest id, what does not fit is not cached."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: set[Unit] = set()

    def step(self, token: int, used: set[Unit]) -> set[Unit]:
        hits = used & self.held
        missed = used - self.held
        self.note(token, used, hits)
        for unit in sorted(missed):
            if len(self.held) >= self.capacity:
                loose = self.held - used
                if not loose:
                    continue
                self.evict(min(loose, key=self.rank))
            self.held.add(unit)
        return missed

    def evict(self, unit: Unit) -> None:
        self.held.remove(unit)


class PlainLru(Plain):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.clock, self.last = 0, dict[Unit, int]()

    def note(self, token, used, hits):
        self.clock += 1
        self.last.update(dict.fromkeys(used, self.clock))

    def rank(self, unit):
        return self.last[unit], unit


class PlainLfu(Plain):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.uses = dict[Unit, int]()

    def note(self, token, used, hits):
        for unit in used:
            self.uses[unit] = self.uses.get(unit, 0) + 1

    def rank(self, unit):
        return self.uses[unit], unit


class PlainSlru(Plain):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.clock, self.entered, self.protected = 0, dict[Unit, int](), set[Unit]()

    def note(self, token, used, hits):
        self.clock += 1
        self.entered.update(dict.fromkeys(used, self.clock))
        self.protected |= hits
        demoted = sorted(self.protected, key=lambda u: (self.entered[u], u))
        for unit in demoted[: max(0, len(demoted) - int(0.8 * self.capacity + 1e-9))]:
            self.protected.remove(unit)
            self.entered[unit] = self.clock

    def rank(self, unit):
        return unit in self.protected, self.entered[unit], unit

    def evict(self, unit):
        super().evict(unit)
        self.protected.discard(unit)


class PlainBelady(Plain):
    def __init__(self, capacity: int, uses: dict[Unit, list[int]], counted_from: int) -> None:
        super().__init__(capacity)
        self.uses, self.counted_from = uses, counted_from

    def step(self, token, used):
        missed = used - self.held
        for unit in used:
            assert self.uses[unit].pop(0) == token
        later = {u: next(iter(self.uses[u]), np.inf) for u in self.held | used}
        worth = {u: t if t >= self.counted_from else np.inf for u, t in later.items()}
        # the last of those used at once goes first: of one token's units the one in the highest layer
        self.held = set(sorted(worth, key=lambda u: (worth[u], u))[: self.capacity])
        return missed


class PlainPinHot(Plain):
    def __init__(self, capacity: int, uses: dict[Unit, list[int]], cold: int) -> None:
        super().__init__(capacity)
        seen = {u: sum(t < cold for t in times) for u, times in uses.items()}
        self.pinned = set(sorted((u for u in seen if seen[u]), key=lambda u: (seen[u], u))[::-1][:capacity])
        self.cold = cold

    def step(self, token, used):
        self.held = self.pinned if token >= self.cold else set()
        return used - self.held


class PlainWindow(Plain):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.past: list[set[Unit]] = []

    def step(self, token, used):
        missed = used - self.held
        self.past.append(used)
        self.held = set().union(*self.past[max(0, len(self.past) - self.capacity) :])
        return missed


def plain_cache(policy: str, capacity: int, bits: np.ndarray, cold: int) -> Plain:
    uses = {(layer, unit): np.flatnonzero(bits[:, layer, unit]).tolist()
            for layer in range(bits.shape[1]) for unit in range(bits.shape[2])}
    match policy:
        case "belady":
            return PlainBelady(capacity, uses, cold)
        case "pin-hot":
            return PlainPinHot(capacity, uses if capacity else {}, cold)
    return {"lru": PlainLru, "lfu": PlainLfu, "slru": PlainSlru, "window": PlainWindow}[policy](capacity)


def plain_levels(bits, policy, capacity, scope, cold, guesses=None, pages=None) -> np.ndarray:
    """(T, 5) missed, wasted, ahead, from storage, held by both."""
    n_tokens, n_layers, _ = bits.shape
    shared = scope == "global"
    masked = [bits if shared else bits * (np.arange(n_layers) == layer)[:, None] for layer in range(n_layers)]
    caches = [plain_cache(policy, capacity, masked[layer], cold) for layer in range(1 if shared else n_layers)]
    guesses = np.zeros_like(bits) if guesses is None else guesses
    below = PlainLru(pages) if pages is not None else None
    found = np.zeros((n_tokens, 5), np.int64)
    for token in range(n_tokens):
        if policy == "pin-hot":  # it loads as the cold part ends, before anything is used
            for cache in caches:
                cache.step(token, set())
        for layer in range(n_layers):
            cache = caches[0 if shared else layer]
            used = {(layer, unit) for unit in sets(bits, token, layer)}
            guess = {(layer, unit) for unit in sets(guesses, token, layer)} - cache.held
            missed = cache.step(token, used)
            reads = missed | guess
            stored = reads if below is None else below.step(token, reads)
            found[token, :4] += len(missed), len(guess - used), len(guess & used), len(stored)
        if below is not None:
            found[token, 4] = len(below.held & set().union(*(c.held for c in caches)))
    return found


def either_way(data: st.DataObject):
    """Few units are sorted and many are descended to, in blocks of sizes: every way has to give the same."""
    few, block = data.draw(st.sampled_from([(0, 1), (1 << 40, 1), (0, 1 << 18), (1 << 40, 1 << 18)]))
    return (patch.object(ordering, "_FEW_UNITS", few), patch.object(stepping, "_BLOCK_BYTES", block),
            patch.object(recency, "_FEW_UNITS", few), patch.dict(replay._HANDFUL, lfu=few, slru=few))


@given(bits=activity(), scope=SCOPES, policy=st.sampled_from(POLICIES), data=st.data())
def test_every_policy_equals_a_plain_cache(bits, scope, policy, data):
    cold = data.draw(st.integers(0, bits.shape[0] - 1))
    all_units = bits.shape[2] * (bits.shape[1] if scope == "global" else 1)
    sizes = sorted({0, all_units, *data.draw(st.lists(st.integers(0, all_units), max_size=3))})
    if policy == "window":
        scope, sizes = "layer", list(range(data.draw(st.integers(0, 4)) + 1))
    guesses = data.draw(st.sampled_from([None, 0.1, 0.6]))
    if guesses is not None:
        guesses = np.random.default_rng(cold).random(bits.shape) < guesses
    pages = data.draw(st.none() | st.integers(0, bits.shape[1] * bits.shape[2]))
    predicted = None if guesses is None else words_of(np.packbits(guesses, axis=2, bitorder="little"))
    one, two, three, four = either_way(data)
    with one, two, three, four:
        found = step_through(words_of(trace_of(bits).active), policy, np.array(sizes), scope, cold_tokens=cold,
                             predicted=predicted, page_units=pages)
        for i, size in enumerate(sizes):
            expected = plain_levels(bits, policy, size, scope, cold, guesses, pages)
            ours = [found.missed, found.wasted, found.ahead, found.from_storage, found.in_both]
            assert np.array_equal(np.stack([part[:, i] for part in ours], axis=1), expected), (policy, size)
        if policy != "window":
            curve = cache_curve(trace_of(bits), policy, sizes, scope=scope, cold_tokens=cold)
            assert curve.misses.tolist() == found.missed[cold:].sum(axis=0).tolist()
            if policy != "belady":  # which has two optima, of the cold part and of the rest
                assert curve.cold_misses.tolist() == found.missed[:cold].sum(axis=0).tolist()


def most_hits(steps: list[tuple[frozenset[int], bool]], capacity: int) -> int:
    """Most hits on the counted steps that any choice of what to hold after each step can have."""
    best = {frozenset[int](): 0}
    for used, counted in steps:
        after: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            now = hits + counted * len(used & held)
            at_hand = held | used
            for kept in combinations(sorted(at_hand), min(capacity, len(at_hand))):
                after[frozenset(kept)] = max(after.get(frozenset(kept), 0), now)
        best = after
    return max(best.values())


@given(data=st.data(), scope=SCOPES)
def test_belady_is_the_best_of_all_choices(data, scope):
    n_tokens, n_layers, n_units = data.draw(st.sampled_from([(7, 1, 5), (5, 2, 3), (8, 1, 4), (4, 3, 2)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    bits = rng.random((n_tokens, n_layers, n_units)) < data.draw(st.sampled_from([0.3, 0.5, 0.7]))
    cold = data.draw(st.integers(0, n_tokens - 1))
    groups = [range(n_layers)] if scope == "global" else [[layer] for layer in range(n_layers)]
    sizes = list(range(n_units * len(groups[0]) + 1))
    with patch.object(optimum, "_CUTS", data.draw(st.sampled_from([1, 8, 4096]))):
        curve = cache_curve(trace_of(bits), "belady", sizes, scope=scope, cold_tokens=cold)
    for size in sizes:
        expected = [0, 0]
        for group in groups:
            steps = [(frozenset((np.flatnonzero(bits[t, layer]) + layer * n_units).tolist()), t)
                     for t in range(n_tokens) for layer in group]
            expected[0] += most_hits([(used, t < cold) for used, t in steps if t < cold], size) if cold else 0
            expected[1] += most_hits([(used, t >= cold) for used, t in steps], size)
        assert [int(curve.cold_hits[size]), int(curve.hits[size])] == expected


@given(bits=activity(min_tokens=2), scope=SCOPES, data=st.data())
def test_nothing_beats_belady_and_stacks_never_lose_hits(bits, scope, data):
    trace, cold = trace_of(bits), data.draw(st.integers(0, bits.shape[0] - 2))
    all_units = bits.shape[2] * (bits.shape[1] if scope == "global" else 1)
    sizes = np.unique(np.linspace(0, all_units, 9).astype(int))
    curves = {p: cache_curve(trace, p, sizes, scope=scope, cold_tokens=cold) for p in POLICIES if p != "window"}
    best = curves["belady"]
    assert np.array_equal(fewest_misses(trace, best), best.misses)
    for curve in curves.values():
        assert np.all(curve.misses >= best.misses)
        assert np.all(curve.cold_misses >= best.cold_misses)
        assert np.all(curve.misses >= curve.first_uses * (curve.policy != "pin-hot"))
    stack = sizes >= bits.sum(axis=2).max()
    for policy, where in {"belady": slice(None), "pin-hot": slice(None), "lru": stack, "lfu": stack}.items():
        assert np.all(np.diff(curves[policy].hits[where]) >= 0), policy
    window = window_curve(trace, list(range(min(4, bits.shape[0]))), cold_tokens=cold)
    assert np.all(window.misses >= fewest_misses(trace, window))


@settings(max_examples=25)
@given(bits=activity(min_tokens=2, max_units=70), kind=st.sampled_from(["previous-token", "frequent"]))
def test_predictors_ask_for_what_they_say(bits, kind):
    found = np.unpackbits(predicted_units(trace_of(bits), kind).view(np.uint8), axis=2, count=bits.shape[2],
                          bitorder="little").astype(bool)
    assert not found[0].any()
    for token in range(1, bits.shape[0]):
        for layer in range(bits.shape[1]):
            before = sets(bits, token - 1, layer)
            uses = bits[:token, layer].sum(axis=0)
            often = sorted(np.flatnonzero(uses).tolist(), key=lambda u: (uses[u], u))[::-1]
            expected = before if kind == "previous-token" else set(often[: len(before)])
            assert sets(found, token, layer) == expected


def test_a_predictor_of_stated_quality_has_it():
    bits = np.random.default_rng(1).random((60, 4, 500)) < 0.2
    trace = trace_of(bits)
    words = predicted_units(trace, Quality(0.8, 0.5))
    assert np.array_equal(words, predicted_units(trace, Quality(0.8, 0.5)))
    asked = np.unpackbits(words.view(np.uint8), axis=2, count=500, bitorder="little").astype(bool)
    assert (asked & bits).sum() / bits.sum() == pytest.approx(0.8, abs=0.01)
    assert (asked & bits).sum() / asked.sum() == pytest.approx(0.5, abs=0.01)
    exact = predicted_units(trace, parse_predictor("1:1"))
    assert np.array_equal(exact, words_of(trace.active))
    for text in ("often", "0.9", "0.9:", "0:0.5", "0.9:1.1", "nan:1", "1:inf", ":"):
        with pytest.raises(SpecError, match="RECALL:PRECISION"):
            parse_predictor(text)
