"""Does a policy keep the contract that the planner, the engines and the report rely on?

`check_policy` runs any policy, this package's or a third party's, over random blocks of its own knobs and
raises SpecError at the first rule it breaks. It needs no cost model and no engine: what a policy holds and moves
must be right whatever the ops take, so memory is checked under durations that no device has.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.policy.base import Block, Knob, Placement, Policy, Setting, one_value, why_not_plan
from simmem.policy.context import Context, Replayed
from simmem.schedule import OpKind, Schedule
from simmem.spec.device import load_device
from simmem.spec.model import load_model
from simmem.spec.workload import Workload
from simmem.trace import open_trace

__all__ = ["check_policy", "example_contexts"]

Array = NDArray[np.float64]

BLOCKS = 12
"""Structural settings tried, drawn from all of a policy's."""
CANDIDATES = 6
TIMINGS = 4
"""Sets of random durations that memory is checked under."""
SLACK = 1e-9
REPORTED = ("requested_bytes", "cache", "active_share", "notes", "perplexity_ratio", "quality_source")


def check_policy(policy: Policy, context: Context | None = None, *,
                 same: Iterable[tuple[Mapping[str, Setting], Mapping[str, Setting]]] = (), seed: int = 0) -> None:
    """Raise SpecError, saying what and with which knobs, unless `policy` keeps the contract.

    knobs       parse their own values and defaults, refuse others, and have names of their own
    schedules   name only what the device has; shapes fit; nothing is negative or not finite
    candidates  do not depend on which others stand in their block; twice the same question, twice the same answer
    bytes       what crosses a link reaches the memory behind it, what is read takes a request, and what is
                multiplied was held or has just arrived
    memory      never more than `footprint` and never below nothing, in any timing; `placements` sum to `footprint`
    report      is complete, and asks for no more than the schedule moves
    same        pairs of knob settings that must be the same plan: a neutral knob is an identity

    Parameters
    ----------
    context : what to plan; `example_contexts` when None.
    same : settings are completed by each knob's default, or its first value.
    """
    same = list(same)
    for each in example_contexts() if context is None else [context]:
        knobs, why = policy.knobs(each), why_not_plan(policy, each)
        if not knobs and why is None:
            raise SpecError("has no knobs for a context it should be able to plan", key=policy.name)
        if knobs and why is not None:
            raise SpecError(f"has knobs for a context that it cannot plan: {why}", key=policy.name)
        if knobs:
            _Check(policy, each, knobs, seed).run(same)


def example_contexts() -> list[Context]:
    """Unified and discrete memory, plenty of it and little, a small OPT on its synthetic trace and a small mixture of
    experts."""
    workload, found = Workload(prompt_tokens=16, new_tokens=16), []
    for name in ("opt-125m", "moe-8x3m"):
        model = load_model(name)
        trace = open_trace(None, model, n_tokens=24)
        for device in map(load_device, ("m1-max", "rtx4090-pc")):
            whole = {k: m.budget_bytes for k, m in device.memory.items()}
            tight = {k: v if k == device.storage else 1.2e8 for k, v in whole.items()}
            found += [Context(device, model, workload, Replayed(trace) if trace else None, b) for b in (whole, tight)]
    return found


class _Check:
    """One policy in one context."""

    def __init__(self, policy: Policy, context: Context, knobs: Sequence[Knob], seed: int) -> None:
        self.policy, self.context, self.knobs = policy, context, knobs
        self.rng = np.random.default_rng(seed)
        self.rows = np.zeros(1, np.int64)
        if policy.uses_trace and context.trace is not None:
            self.rows = np.arange(min(len(context.table.tokens), 4))
        self.where: dict[str, Setting] = {}

    def require(self, kept: bool | np.bool_, rule: str) -> None:
        if not kept:
            where = ", ".join(f"{k}={v}" for k, v in self.where.items())
            raise SpecError(f"{rule}{f' (with {where})' if where else ''}", key=self.policy.name)

    def run(self, same: Sequence[tuple[Mapping[str, Setting], Mapping[str, Setting]]]) -> None:
        self._knobs()
        for block in self._blocks():
            self.where = block.knobs(0)
            decode, prefill = self._schedules(block)
            footprint = self.policy.footprint(self.context, block)
            self._footprint(block, footprint)
            for schedule, per in ((decode, len(self.rows)), (prefill, 1)):
                self._structure(schedule, block.n_candidates * per)
                self._links(schedule)
                self._held(schedule, footprint, per)
            self._multiplied(decode, block, footprint)
            for i in range(block.n_candidates):
                one = block.only(np.array([i]))
                self.where = one.knobs(0)
                self._placements(one, {k: float(v[i]) for k, v in footprint.items()})
                self._report(one, decode.columns(slice(i * len(self.rows), (i + 1) * len(self.rows))))
            self._independent(block, decode, footprint)
        for left, right in same:
            if self._possible(left) and self._possible(right):
                self._same(left, right)

    # --- knobs ----------------------------------------------------------------------------------

    def _knobs(self) -> None:
        names = [k.name for k in self.knobs]
        self.require(len(set(names)) == len(names), f"two knobs share a name: {', '.join(names)}")
        for knob in self.knobs:
            self.require(bool(knob.values), f"the knob {knob.name} has no values")
            self.require(bool(knob.help), f"the knob {knob.name} does not say what it does")
            stated = (*knob.values, *knob.unsearched, *(() if knob.default is None else (knob.default,)))
            for value in stated:
                self.require(self._parsed(knob, value) == value and self._parsed(knob, str(value)) == value,
                             f"the knob {knob.name} does not parse its own value {value!r}")
            number = isinstance(knob.values[0], (int, float)) and not isinstance(knob.values[0], bool)
            beyond = [*([] if knob.low is None else [knob.low - 1]), *([] if knob.high is None else [knob.high + 1])]
            for wrong in ("no such value", None, *(("nan", "inf", *beyond) if number else ())):
                try:
                    knob.parse(wrong)
                except SpecError:
                    continue
                self.require(False, f"the knob {knob.name} accepts {wrong!r}")

    def _parsed(self, knob: Knob, value: object) -> object:
        try:
            return knob.parse(value)
        except SpecError:
            return None

    def _blocks(self) -> list[Block]:
        structural = [k for k in self.knobs if k.kind == "structural"]
        every = list(itertools.product(*((*k.values, *k.unsearched) for k in structural)))
        picked = self.rng.choice(len(every), min(BLOCKS, len(every)), replace=False)
        found = []
        for i in sorted(picked.tolist()):
            columns = {k.name: self._column(k) for k in self.knobs if k.kind == "demand"}
            found.append(Block(dict(zip([k.name for k in structural], every[i], strict=True)), columns))
        return found

    def _column(self, knob: Knob) -> NDArray[Any]:
        allowed = (*knob.values, *knob.unsearched)
        values = [allowed[i] for i in self.rng.integers(0, len(allowed), CANDIDATES)]
        if isinstance(allowed[0], float) and knob.low is not None and knob.high is not None:
            values[: CANDIDATES // 3] = self.rng.uniform(knob.low, knob.high, CANDIDATES // 3).tolist()
        return np.array(values)

    # --- schedules ------------------------------------------------------------------------------

    def _schedules(self, block: Block) -> tuple[Schedule, Schedule]:
        first, again = (
            (self.policy.decode(self.context, block, self.rows), self.policy.prefill(self.context, block))
            for _ in range(2))
        for one, other in zip(first, again, strict=True):
            self.require(_equal(one, other), "the same question twice gives two schedules")
        return first

    def _structure(self, s: Schedule, n_columns: int) -> None:
        device, need = self.context.device, self.require
        need(s.n_candidates == n_columns, f"a schedule has {s.n_candidates} columns, expected {n_columns}")
        need(s.n_ops > 0 and bool(s.token_ends), "a schedule has no op that ends a token")
        need(list(s.token_ends) == sorted(set(s.token_ends)), "tokens do not end in program order")
        need(all(d < op for op, deps in enumerate(s.deps) for d in deps), "an op depends on a later one")
        for what in s.classes:
            need((what.agent is None) != (what.link is None), f"{what.name}: expected an agent or a link, not both")
            need(what.agent is None or what.agent in device.agent, f"{what.name}: no agent {what.agent!r}")
            need(what.link is None or what.link in device.link, f"{what.name}: no link {what.link!r}")
        known = {f"memory.{m}" for m in device.memory} | {f"link.{k}" for k in device.link} | {
            f"bus.{b}" for b in device.bus}
        need(set(s.bytes) <= known, f"bytes of unknown resources: {sorted(set(s.bytes) - known)}")
        tiers = {*s.acquire_bytes, *s.release_bytes, *s.held_bytes}
        need(tiers <= set(device.memory), f"memory held in unknown tiers: {sorted(tiers - set(device.memory))}")
        tables = {"flop": s.flop, "requests": s.requests, "depth": s.depth, "waits": s.waits, **s.bytes,
                  **{f"acquire {k}": v for k, v in s.acquire_bytes.items()},
                  **{f"release {k}": v for k, v in s.release_bytes.items()}}
        for name, table in tables.items():
            need(table.shape == (len(s.classes), n_columns), f"{name} has the shape {table.shape}")
            need(np.isfinite(table).all() and (table >= 0).all(), f"{name} is negative or not finite somewhere")
        for tier, amount in s.held_bytes.items():
            need(amount.shape == (n_columns,), f"held {tier} has the shape {amount.shape}")
        need((s.depth[s.requests > 0] >= 1).all(), "requests without a depth of at least 1")

    def _links(self, s: Schedule) -> None:
        """What crosses a link is written where it ends and, by a copy, read where it starts."""
        nothing = np.zeros_like(s.flop)
        for k, what in enumerate(s.classes):
            for name, link in self.context.device.link.items():
                crossing = s.bytes.get(f"link.{name}", nothing)[k]
                if name != what.link:
                    self.require(not crossing.any(), f"{what.name}: moves over {name} without naming it")
                    continue
                ends = {link.target} | ({link.source} if link.kind == "copy" else set())
                for end in ends:
                    there = s.bytes.get(f"memory.{end}", nothing)[k]
                    self.require(np.allclose(there, crossing, rtol=SLACK),
                                 f"{what.name}: the bytes over {name} are not the bytes of {end}")
                self.require(not ((crossing > 0) & (s.requests[k] <= 0)).any(), f"{what.name}: bytes without a request")

    # --- memory ---------------------------------------------------------------------------------

    def _footprint(self, block: Block, footprint: Mapping[str, Array]) -> None:
        device, budget = self.context.device, self.context.budget_bytes
        self.require(set(footprint) <= set(device.memory) & set(budget), "footprint names a tier that does not exist")
        for tier, used in footprint.items():
            self.require(np.shape(used) == (block.n_candidates,), f"footprint of {tier} has the shape {np.shape(used)}")
            self.require(bool(np.isfinite(used).all() and (used >= 0).all()), f"footprint of {tier} is negative")

    def _held(self, s: Schedule, footprint: Mapping[str, Array], per: int) -> None:
        zero = np.zeros(s.n_candidates)
        for _ in range(TIMINGS):
            seconds = np.exp(self.rng.normal(0, 3, (len(s.classes), 1))) * s.present
            start, end = _times(s, seconds)
            for tier in {*s.held_bytes, *s.acquire_bytes, *s.release_bytes}:
                limit = np.repeat(footprint[tier], per) if tier in footprint else zero
                low, high = _extremes(s, tier, start, end)
                self.require((low >= -SLACK * np.maximum(limit, high) - 1e-3).all(),
                             f"releases more of {tier} than was acquired")
                over = int(np.argmax(high - limit))
                self.require((high <= limit * (1 + SLACK) + 1e-3).all(),
                             f"holds {high[over]:.0f} bytes of {tier}, more than its footprint of {limit[over]:.0f}")

    def _multiplied(self, s: Schedule, block: Block, footprint: Mapping[str, Array]) -> None:
        """A token multiplies a byte of weights at most once, and only what is there: held, or arrived for it.

        Where a step takes its sequences in several batches, once in each of them.
        """
        if any(a.compute_precision for a in self.context.device.agent.values()):
            return  # this engine widens weights on their way to the multiply
        uses = np.bincount(s.op_class[s.timed], minlength=len(s.classes)).astype(np.float64)
        batches = getattr(self.policy, "passes", None)
        passes = np.ones(block.n_candidates) if batches is None else batches(self.context, block)
        for tier in footprint:
            amount = s.bytes.get(f"memory.{tier}")
            if amount is None:
                continue
            read, there = np.zeros(s.n_candidates), np.repeat(footprint[tier], len(self.rows))
            for k, what in enumerate(s.classes):
                if what.agent is not None and what.kind is OpKind.COMPUTE:
                    read += uses[k] * amount[k]
                elif what.link is not None and self.context.device.link[what.link].target == tier:
                    there = there + uses[k] * amount[k]
            if self.context.model.architecture.state_space:  # a state is read and written, and held once
                read = np.maximum(read - self.context.decode_kv_bytes / 2, 0.0)
            if read.any() and batches is None and tier == self.context.memory_of(str(block.structural["agent"])):
                there = there - self.context.working_bytes  # activations are no weights
            there = there * np.repeat(passes, len(self.rows))
            worst = int(np.argmax(read - there))
            self.require((read <= there * (1 + SLACK) + 1.0).all(),
                         f"multiplies {read[worst]:.0f} bytes of {tier} where {there[worst]:.0f} are held or arrive")

    def _placements(self, one: Block, used: Mapping[str, float]) -> None:
        placed: list[Placement] = self.policy.placements(self.context, one)
        self.require(all(p.bytes >= 0 for p in placed), "a placement is negative")
        storage = self.context.device.storage
        for tier in {*used, *(p.tier for p in placed)}:
            total, most = sum(p.bytes for p in placed if p.tier == tier), used.get(tier, 0.0)
            fits = total <= most * (1 + SLACK) + 1.0 and (tier == storage or total >= most * (1 - SLACK) - 1.0)
            self.require(fits, f"placements put {total:.0f} bytes in {tier}, the footprint says {most:.0f}")

    # --- report, independence, neutral knobs ------------------------------------------------------

    def _report(self, one: Block, decode: Schedule) -> None:
        report = self.policy.report(self.context, one, self.rows)
        missing = [k for k in REPORTED if k not in report]
        self.require(not missing, f"the report lacks {', '.join(missing)}")
        shares = report["active_share"]
        self.require(set(shares) <= set(self.context.device.agent) and abs(sum(shares.values()) - 1) < SLACK,
                     f"active shares are not shares of agents: {shares}")
        for name, cache in report["cache"].items():
            self.require(-SLACK <= cache["hit_ratio"] <= 1 + SLACK, f"cache {name} hits {cache['hit_ratio']}")
        read = decode.timed_bytes.get(f"link.{self.context.storage_link[0]}", np.zeros(1)).mean()
        self.require(report["requested_bytes"] <= read * (1 + SLACK) + 1e-3,
                     f"asks for {report['requested_bytes']:.0f} bytes a token, the schedule reads {read:.0f}")

    def _independent(self, block: Block, decode: Schedule, footprint: Mapping[str, Array]) -> None:
        for i in range(block.n_candidates):
            one = block.only(np.array([i]))
            self.where = one.knobs(0)
            alone = self.policy.decode(self.context, one, self.rows)
            n = len(self.rows)
            self.require(_equal(alone, decode.columns(slice(i * n, (i + 1) * n))),
                         "a candidate's schedule depends on the others in its block")
            for tier, used in self.policy.footprint(self.context, one).items():
                self.require(tier in footprint and used[0] == footprint[tier][i],
                             f"a candidate's footprint in {tier} depends on the others in its block")

    def _possible(self, given: Mapping[str, Setting]) -> bool:
        """Whether this context's knobs take such values: of a model of other depth they may not."""
        return all(self._parsed(k, given[k.name]) is not None for k in self.knobs if k.name in given)

    def _same(self, left: Mapping[str, Setting], right: Mapping[str, Setting]) -> None:
        totals = []
        for given in (left, right):
            full = {k.name: given.get(k.name, k.values[0] if k.default is None else k.default) for k in self.knobs}
            structural = {k.name: one_value(full[k.name]) for k in self.knobs if k.kind == "structural"}
            block = Block(structural, {k.name: np.array([full[k.name]]) for k in self.knobs if k.kind == "demand"})
            s = self.policy.decode(self.context, block, self.rows)
            uses = np.bincount(s.op_class[s.timed], minlength=len(s.classes)).astype(np.float64)
            # Seconds that depend on nothing but what is demanded.
            seconds = s.flop / 2e12 + s.requests / 2e6 + sum(s.bytes.values(), np.zeros_like(s.flop)) / 1e10
            ends = _times(s, seconds)[1][list(s.token_ends)]
            token = ends[-1] - (ends[-2] if len(ends) > 1 else 0.0)
            totals.append({"flop": uses @ s.flop, "a token's time": token,
                           **{k: v for k, v in s.timed_bytes.items() if v.any()},
                           **{f"footprint in {k}": v for k, v in self.policy.footprint(self.context, block).items()}})
        self.where = {**{f"left {k}": v for k, v in left.items()}, **{f"right {k}": v for k, v in right.items()}}
        for name in {*totals[0], *totals[1]}:
            a, b = (np.asarray(t.get(name, 0.0)) for t in totals)
            self.require(np.allclose(a, b, rtol=SLACK, atol=0.0), f"{name} differs: {a.mean():g} and {b.mean():g}")


def _times(s: Schedule, seconds: Array) -> tuple[Array, Array]:
    """Start and end of every op by the recurrence of `simmem.schedule`, both (n_ops, n_candidates). [s]"""
    start, end = np.zeros((2, s.n_ops, s.n_candidates))
    free = np.zeros((len(s.streams), s.n_candidates))
    present = s.present
    for op, (k, stream) in enumerate(zip(s.op_class.tolist(), s.op_stream.tolist(), strict=True)):
        ready = end[list(s.deps[op])].max(axis=0, initial=0.0)
        start[op] = np.where(present[k], np.maximum(ready, free[stream]), ready)
        end[op] = np.where(present[k], start[op] + seconds[k], ready)
        free[stream] = np.where(present[k], end[op], free[stream])
    return start, end


def _extremes(s: Schedule, tier: str, start: Array, end: Array) -> tuple[Array, Array]:
    """Least and most bytes that a tier holds at any time, both (n_candidates,). [B]"""
    zero = np.zeros_like(s.flop)
    gained = s.acquire_bytes.get(tier, zero)[s.op_class]
    lost = s.release_bytes.get(tier, zero)[s.op_class]
    at, change = np.concatenate([end, start]), np.concatenate([-lost, gained])
    order = np.argsort(at, axis=0, kind="stable")  # at one instant releases stand before acquisitions
    held = s.held_bytes.get(tier, np.zeros(s.n_candidates))
    level = held + np.cumsum(np.take_along_axis(change, order, axis=0), axis=0)
    return np.minimum(level.min(axis=0), held), np.maximum(level.max(axis=0), held)


def _equal(a: Schedule, b: Schedule) -> bool:
    """Whether two schedules say the same, to the last bit."""
    tables = [(a.bytes, b.bytes), (a.acquire_bytes, b.acquire_bytes), (a.release_bytes, b.release_bytes),
              (a.held_bytes, b.held_bytes)]
    return ((a.streams, a.classes, a.deps, a.token_ends) == (b.streams, b.classes, b.deps, b.token_ends)
            and all(np.array_equal(x, y, equal_nan=True) for x, y in (
                (a.op_class, b.op_class), (a.op_stream, b.op_stream), (a.flop, b.flop), (a.requests, b.requests),
                (a.depth, b.depth), (a.waits, b.waits)))
            and all(set(x) == set(y) and all(np.array_equal(x[k], y[k], equal_nan=True) for k in x) for x, y in tables))
