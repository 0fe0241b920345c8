"""How is anything timed here, so that a machine that drifts cannot pass for one that differs?

A `Case` is one thing to time under one set of conditions. `measure` visits all cases in turn, several rounds long and
in another order each round, so that whatever drifts touches all of them alike; every visit warms up, takes samples for
its share of the time left, and is written to a journal before the next begins.

A module of probes offers `cases(setting) -> list[Case]`. Large arrays belong to a pool that its cases share: `setup` is
entered once a visit, has to be quick, and what it allocates is gone when the visit ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from simmem.runtime.probe.journal import Journal, Visit
from simmem.spec.measurement import Condition, Measurement

__all__ = ["ALWAYS", "Case", "NotHereError", "Progress", "Run", "Setting", "measure", "spread"]

Run = Callable[[], float | None]
"""Does it once. Returns None, and is timed from outside; or the seconds it took, e.g. of CUDA events."""

Progress = Callable[[int, int, str], None]
"""Visits done, visits in all, what comes next."""

ROUNDS = 5
ALWAYS = -1
MIN_SAMPLE_S = 2e-3
_MAX_CALLS = 100_000
_MAX_SAMPLES_A_VISIT = 40
_WARM_SHARE = 4
_FIRST_ROUND, _ALWAYS_ROUND = 1 / 3, 1 / 2
_BRIEF = 0.25
"""Of its share of the time a first visit takes: it prepares besides, and what it leaves out is never measured."""
_CLOCK_STEPS = 1000
"""A sample is at least so many steps of the clock long, or its time is refused."""


class NotHereError(Exception):
    """Raised by a case's setup where this machine cannot do it; the text says why, for the user."""


@dataclass(frozen=True)
class Setting:
    """What every module of probes is told."""

    quick: bool
    threads: int
    """Threads that a kernel may use, and the most that read or copy side by side."""
    device: str = "cpu"
    """cpu or cuda: whose kernels are probed besides the CPU's."""
    cache_bytes: int = 32 << 20
    """Last-level cache. Operands are rotated over at least four times as much. [B]"""
    memory_bytes: int = 1 << 30
    """What all arrays of one probe together may take. [B]"""
    scratch_fd: int | None = None
    """A file to read from, opened with direct I/O where `scratch_direct`; offsets and sizes are whole 4 KiB blocks."""
    scratch_bytes: int = 0
    scratch_direct: bool = False
    seed: int = 0
    """Of random weights, and of the random shapes of products: another seed draws shapes nobody has seen."""
    dtypes: tuple[str, ...] = ()
    """Precisions of which products are timed, with all threads; (): all of them, with one thread and with all."""


@dataclass(frozen=True)
class Case:
    """One thing to time under one set of conditions."""

    probe: str
    conditions: Mapping[str, Condition]
    setup: Callable[[], AbstractContextManager[Run]]
    """Entered at every visit; gives what is timed. `contextlib.nullcontext(run)` where nothing has to be undone."""
    flop: float = 0.0
    bytes: float = 0.0
    requests: float = 0.0
    """Of one call of what is timed, as in `Measurement`."""
    calls: int | None = 1
    """Calls of one sample, whose time is divided by them; None: as many as last two milliseconds."""
    weight: float = 1.0
    """Share of the time, relative to other cases."""
    priority: int = 1
    """Cases of a smaller number come earlier: what a short run has to have. `ALWAYS`: left out only by a run far too
    short, so that what is derived from such cases alone rests on the same ones whatever else there was time for."""
    rounds: int | None = None
    """Visits at most; None: as many as there are rounds."""
    refuse: Callable[[float], str | None] | None = None
    """Told the median seconds of a call, says why it is no measurement of what it should be: a page-cache hit, say."""

    @property
    def key(self) -> str:
        """Names the case in a journal."""
        return f"{self.probe} " + " ".join(f"{k}={self.conditions[k]}" for k in sorted(self.conditions))


@dataclass
class _State:
    case: Case
    visits: list[Visit] = field(default_factory=list)
    calls: int = 0
    skipped: str | None = None


def measure(cases: Sequence[Case], budget_s: float, *, journal: Journal | None = None, progress: Progress | None = None,
            rounds: int = ROUNDS, clock: Callable[[], float] = time.perf_counter,
            skipped: dict[str, str] | None = None) -> list[Measurement]:
    """Time every case, in turn, until the budget is spent.

    Cases that the first round has not begun within a third of the budget, half of it where their priority is `ALWAYS`,
    are left out: what is begun is visited again. A single round is cut by its budget alone.

    Parameters
    ----------
    cases : with distinct keys.
    budget_s : for all of them together, with what a resumed journal has already spent. [s]
    journal : keeps finished visits; those it holds already are not done again.
    rounds : visits to each case at most.
    skipped : is told, by key, which cases this machine could not do and why.

    Returns one `Measurement` for each case that has a sample, in the order given. KeyboardInterrupt and every error but
    `NotHereError` pass through; what is in the journal stays.
    """
    states = {case.key: _State(case) for case in cases}
    if len(states) != len(cases):
        keys = [case.key for case in cases]
        raise ValueError(f"two cases are called {next(k for k in keys if keys.count(k) > 1)!r}")
    past_s = 0.0
    for visit in journal.visits if journal is not None else ():
        past_s = max(past_s, visit.ended_s)
        if visit.case in states:
            states[visit.case].visits.append(visit)
    begun = clock() - past_s
    random = np.random.default_rng(0)
    todo = [(number, key) for number in range(rounds) for key in _order(states, number, random)]
    done = {(visit.round, key) for key, state in states.items() for visit in state.visits}
    left = sum(states[key].case.weight for item in todo if item not in done for key in item[1:])
    is_cut = False
    for position, (number, key) in enumerate(todo):
        state = states[key]
        if (number, key) in done:
            continue
        spent = clock() - begun
        if not is_cut and rounds > 1 and (number > 0 or spent > _FIRST_ROUND * budget_s):
            is_cut = True
            left = sum(states[key].case.weight for item in todo[position:] if item not in done for key in item[1:]
                       if states[key].visits or states[key].case.priority == ALWAYS)
        if is_cut and not (state.visits or _is_in_time(state.case, number, spent, budget_s)):
            left -= state.case.weight if state.case.priority == ALWAYS else 0.0
            continue
        share = max(budget_s - spent, 0.0) * state.case.weight / max(left, 1e-9)
        if number == 0 and rounds > 1:
            share *= _BRIEF
        left -= state.case.weight
        if state.skipped is not None or spent > budget_s:
            continue
        if progress is not None:
            progress(position, len(todo), key)
        try:
            visit = _visit(state, number, share, begun, clock)
        except NotHereError as why:
            state.skipped = str(why)
            if skipped is not None:
                skipped[key] = str(why)
            continue
        state.visits.append(visit)
        if journal is not None:
            journal.keep(visit)
    return [_measurement(state, clock) for state in states.values() if state.visits]


def _is_in_time(case: Case, number: int, spent_s: float, budget_s: float) -> bool:
    return case.priority == ALWAYS and number == 0 and spent_s <= _ALWAYS_ROUND * budget_s


def _order(states: Mapping[str, _State], number: int, random: np.random.Generator) -> list[str]:
    cases = {k: s.case for k, s in states.items() if s.case.rounds is None or number < s.case.rounds}
    if number == 0:
        return [case.key for case in spread(list(cases.values()))]
    # At random, but what a short run has to have before the rest: time may run out in any round.
    keys = list(cases)
    return sorted((keys[i] for i in random.permutation(len(keys))), key=lambda k: cases[k].priority)


def spread(cases: Sequence[Case]) -> list[Case]:
    """An order of which every beginning covers all ways of all probes, each evenly from end to end.

    Ways take turns, those of a smaller `priority` more often; within one, the order is van der Corput's sequence.
    """
    ways: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        said = case.conditions
        ways.setdefault((case.probe, *map(said.get, ("how", "pattern", "level", "dtype"))), []).append(case)
    turns = [((1 + place) * (1 + max(case.priority, 0)), place, case) for way in ways.values()
             for place, case in enumerate(way[i] for i in sorted(range(len(way)), key=_van_der_corput))]
    return [case for *_, case in sorted(turns, key=lambda turn: turn[:2])]


def _van_der_corput(n: int) -> float:
    """The bits of n behind the point, last first: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    return int(bin(n)[:1:-1], 2) / float(1 << n.bit_length())


def _visit(state: _State, number: int, share_s: float, begun: float, clock: Callable[[], float]) -> Visit:
    case = state.case
    entered = clock()
    at, samples = [], []
    with case.setup() as run:
        first, own = _sample(run, 1, clock)  # warms up
        if state.calls == 0:
            if case.calls is None:
                first, own = _sample(run, 1, clock)
            state.calls = case.calls or int(min(max(MIN_SAMPLE_S / max(first, 1e-9), 1), _MAX_CALLS))
        if clock() - entered < share_s / _WARM_SHARE:  # what is quick the second time was not warm the first
            _sample(run, state.calls, clock)
        while True:
            at.append(clock() - begun)
            sample, own = _sample(run, state.calls, clock)
            samples.append(sample)
            now = clock()
            if len(samples) >= _MAX_SAMPLES_A_VISIT or now - entered + (now - begun - at[-1]) > share_s:
                break
    return Visit(case=case.key, round=number, at_s=tuple(at), samples_s=tuple(samples), ended_s=clock() - begun,
                 calls=state.calls, own_clock=own)


def _sample(run: Run, calls: int, clock: Callable[[], float]) -> tuple[float, bool]:
    """Seconds of one call, over `calls` of them, and whether the run told them itself."""
    told, tells = 0.0, False
    begin = clock()
    for _ in range(calls):
        took = run()
        if took is not None:
            told, tells = told + took, True
    return (told if tells else clock() - begin) / calls, tells


def _measurement(state: _State, clock: Callable[[], float]) -> Measurement:
    case = state.case
    samples = [s for visit in state.visits for s in visit.samples_s]
    at = [t for visit in state.visits for t in visit.at_s]
    median = float(np.median(samples))
    why = case.refuse(median) if case.refuse is not None else None
    if why is None and clock is time.perf_counter and not state.visits[0].own_clock:
        step = time.get_clock_info("perf_counter").resolution
        if median * state.visits[0].calls < _CLOCK_STEPS * step:
            why = f"shorter than {_CLOCK_STEPS} steps of the clock"
    return Measurement(probe=case.probe, conditions=dict(case.conditions), flop=case.flop, bytes=case.bytes,
                       requests=case.requests, samples_s=tuple(max(float(f"{s:.6g}"), 1e-12) for s in samples),
                       at_s=tuple(round(t, 4) for t in at),
                       runs=tuple(len(v.samples_s) for v in state.visits), refused=why)
