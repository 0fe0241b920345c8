"""Which candidates are worth a closer look, and which is proved best?

Capacity cuts first; one representative token filters each block; survivors are scored on up to
eight stratified tokens; then the event engine runs candidates in ascending analytic order until
the next analytic time is no better than the best events time (a proof, as analytic is a lower
bound) or a limit is reached, which the gap states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.planner.bound import agents_bound
from simmem.planner.candidate import Candidate, blocks, capacity_cut, front, score, stratified_rows
from simmem.planner.predict import energy_j, prefill_seconds, prompt_seconds, quality_of, token_seconds, tokens_per_s
from simmem.planner.question import Question
from simmem.policy.base import Block, Policy, agents_of, policy_named
from simmem.policy.context import Context
from simmem.policy.drafting import drafted

__all__ = [
    "SCORING_ROWS",
    "Found",
    "choose",
    "event_seconds",
    "is_needless",
    "is_oracle",
    "objective_value",
    "pareto_front",
    "prove",
    "search",
]

Array = NDArray[np.float64]

SCORING_ROWS = 8
"""Trace tokens that survivors are scored on."""
SURVIVORS = 48
"""Candidates of a policy and precision that go from one token to eight."""
FRONT_SURVIVORS = 16
"""Beside them, candidates on the front of latency and memory."""
EVENT_LIMIT = 8
"""Candidates that the event engine runs before the search stops without a proof."""
PARETO_LIMIT = 6
"""Entries of the front that are reported."""
SIMPLICITY = ("resident", "layer-split", "stream", "layer-stream", "tier-percent", "hot-cold", "expert-cache",
              "flash-window")
"""Among equally good plans the one with the fewest moving parts is the answer."""
TIE = 1e-6
"""Values that differ by no more than this share are equally good: sums in another order differ by less."""


@dataclass(frozen=True)
class Found:
    """Survivors of one precision, best first, and what was in the way of the others."""

    context: Context
    ranked: tuple[Candidate, ...]
    set_aside: tuple[Candidate, ...]
    """Candidates that drop work where they need not, or that no engine could run (oracles), best first."""
    too_lossy: tuple[Candidate, ...]
    """Candidates that lose more quality than was allowed, or an amount that nobody measured, best first."""
    binding_tier: str | None
    missing_bytes: float
    pruned_s: float = float("inf")
    """What was left out because a bound said so could not be faster than this. [s]"""
    fits: bool = False
    """Whether all weights fit the memory of the fastest unit, so that no work has to be dropped."""


def search(question: Question, weights: str) -> Found:
    """Every policy's grid at one precision: capacity cut, filter, scores on stratified tokens."""
    context = question.context(weights)
    ranked: list[Candidate] = []
    nearest: tuple[float, str] | None = None
    floor: dict[tuple[str, ...], float] = {}
    pruned = float("inf")
    for name in question.policy_names:
        policy = drafted(policy_named(name), context)
        # Within a policy and a way of knowing: the best of each is wanted, if only to compare with.
        fastest: dict[object, float] = {}
        pool: list[Candidate] = []
        for block in blocks(policy, context, question.fixed, defaults=question.defaults):
            # Nothing its agents could do is as fast as what was already found: the whole block is out. Sharing may
            # make what was found slower than the bound, so the proof has to know where the cut was.
            names = agents_of(policy, context, block)
            if names not in floor:
                floor[names] = agents_bound(context, names, any_token=True).token_latency_s
            least, kind = floor[names], _way_of_knowing(block)
            if question.objective == "latency" and least > fastest.get(kind, float("inf")):
                pruned = min(pruned, least)
                continue
            cut = capacity_cut(policy, context, block)
            if not cut.fits.any():
                nearest = min(nearest or (cut.missing_bytes, cut.binding_tier), (cut.missing_bytes, cut.binding_tier))
                continue
            kept = np.flatnonzero(cut.fits)
            block, held = block.only(kept), cut.fast_bytes[kept]
            seconds = _scored(question, policy, context, block, stratified_rows(context, policy, 1))
            fastest[kind] = min(fastest.get(kind, float("inf")), float(seconds.min()))
            pool += [Candidate(context, policy, block.only(np.array([i])), float(seconds[i]), float(held[i]))
                     for i in _survivors(seconds, held)]
        for kind in dict.fromkeys(_way_of_knowing(c.block) for c in pool):
            alike = [c for c in pool if _way_of_knowing(c.block) == kind]
            kept_of_kind = _survivors(np.array([c.score_s for c in alike]), np.array([c.fast_bytes for c in alike]))
            ranked += _rescore(question, policy, context, [alike[i] for i in kept_of_kind])
    ranked.sort(key=lambda c: c.score_s)
    # That the CPU could hold and multiply everything is no reason to leave the GPU beside it without work.
    fits = any(c.policy.name == "resident" and c.block.structural["agent"] == context.fastest_agent for c in ranked)

    def aside(c: Candidate) -> bool:
        return question.open_choice and is_needless(c, fits=fits)

    lossy = _too_lossy(question, ranked)
    allowed = [c for c in ranked if id(c) not in lossy]
    missing_bytes, binding_tier = nearest or (0.0, None)
    return Found(context, tuple(c for c in allowed if not aside(c)), tuple(c for c in allowed if aside(c)),
                 tuple(c for c in ranked if id(c) in lossy), binding_tier, missing_bytes, pruned, fits)


def _too_lossy(question: Question, ranked: Sequence[Candidate]) -> set[int]:
    """Which candidates are not known to keep to the quality that was asked for, by id."""
    if question.max_quality_loss is None:
        return set()
    known: dict[tuple[object, ...], float | None] = {}
    found = set()
    for c in ranked:
        kind = c.policy.name, c.knobs.get("predictor"), c.knobs.get("prefetch_layers")
        if kind not in known:
            known[kind] = quality_of(c).perplexity_ratio
        ratio = known[kind]
        if ratio is None or ratio > 1.0 + question.max_quality_loss:
            found.add(id(c))
    return found


def _way_of_knowing(block: Block) -> object:
    """The predictor of a block: an oracle's plans must not crowd out those that an engine can follow."""
    return block.structural.get("predictor")


def is_oracle(candidate: Candidate) -> bool:
    """Whether no engine could have known which units a token needs before it read them."""
    return candidate.knobs.get("predictor") == "oracle"


def is_needless(candidate: Candidate, *, fits: bool) -> bool:
    """Whether a plan drops work where the dense model fits, or by an oracle: nobody should be advised to."""
    return candidate.policy.uses_trace and (fits or is_oracle(candidate))


def choose(ranked: Sequence[Candidate], objective: str, pruned_s: float = float("inf"), n_rows: int = SCORING_ROWS
           ) -> tuple[Candidate, float | None]:
    """The best by an objective, the simplest of those equally good, and the search gap where it is latency."""
    if objective == "latency":
        return prove(sorted(ranked, key=lambda c: c.score_s), pruned_s, n_rows)
    valued = [(value, c) for c in ranked if (value := objective_value(c, objective)) is not None]
    if not valued:
        raise SpecError(f"{ranked[0].context.device.name} has no sourced energy figures for every part of any plan",
                        key="--objective")
    least, best = min(valued, key=lambda one: one[0])
    near = [(value, c) for value, c in valued if c.context is best.context and value[0] <= least[0] * (1 + TIE)]
    if objective == "memory":  # of the same bytes the fastest
        near = [(value, c) for value, c in near if value[1] <= least[1] * (1 + TIE)]
    first: dict[int, Candidate] = {}
    for _, candidate in sorted(near, key=lambda one: one[0]):
        first.setdefault(_moving_parts(candidate), candidate)
    if len(first) == 1:
        return best, None
    # Equally good by the analytic engine: with what they share, the simpler one may still be the slower one.
    took = {parts: event_seconds(c, n_rows) for parts, c in first.items()}
    limit = min(took.values()) * (1 + TIE)
    return first[min(parts for parts in first if took[parts] <= limit)], None


def _moving_parts(candidate: Candidate) -> int:
    """The place of a policy among all, those that move least first."""
    name = candidate.policy.name
    return SIMPLICITY.index(name) if name in SIMPLICITY else len(SIMPLICITY)


def _survivors(seconds: Array, held_bytes: Array) -> list[int]:
    """The fastest candidates, then some along the front of latency and memory."""
    if not len(seconds):
        return []
    lean = front(seconds, held_bytes)
    lean = lean[np.unique(np.linspace(0, len(lean) - 1, min(len(lean), FRONT_SURVIVORS)).astype(np.int64))]
    fastest = np.argsort(seconds, kind="stable")[:SURVIVORS]
    return list(dict.fromkeys([*fastest.tolist(), *lean.tolist()]))


def _scored(question: Question, policy: Policy, context: Context, block: Block, rows: NDArray[np.int64]) -> Array:
    """`score`, of each candidate once for all budgets where those have no part in what a step of the policy demands."""
    if not getattr(policy, "same_at_every_budget", False):
        return score(policy, context, block, rows)
    alike = policy.name, context.workload, *block.structural.items(), *block.columns, *rows.tolist()
    known = question.scores.setdefault(alike, {})
    values = (column.tolist() if column.ndim == 1 else map(tuple, column.tolist()) for column in block.columns.values())
    each = list(zip(*values, strict=True)) or [()]
    new = [i for i, knobs in enumerate(each) if knobs not in known]
    if new:
        seconds = score(policy, context, block.only(np.array(new)), rows).tolist()
        known.update(zip((each[i] for i in new), seconds, strict=True))
    return np.array([known[knobs] for knobs in each])


def _rescore(question: Question, policy: Policy, context: Context, pool: list[Candidate]) -> list[Candidate]:
    """Score candidates on up to eight tokens, and their prompts where those count; those of one structure in one block.
    """
    rows, with_prompt = stratified_rows(context, policy, SCORING_ROWS), question.objective == "throughput"
    if len(rows) == 1 and not with_prompt:
        return pool
    groups: dict[tuple[tuple[str, object], ...], list[Candidate]] = {}
    for candidate in pool:
        groups.setdefault(tuple(candidate.block.structural.items()), []).append(candidate)
    result = []
    for members in groups.values():
        columns = {k: np.concatenate([m.block.columns[k] for m in members]) for k in members[0].block.columns}
        block = replace(members[0].block, columns=columns)
        if len(rows) > 1:
            seconds = _scored(question, policy, context, block, rows).tolist()
            members = [replace(m, score_s=s) for m, s in zip(members, seconds, strict=True)]
        if with_prompt:
            first = prompt_seconds(policy, context, block).tolist()
            members = [replace(m, first_token_s=s) for m, s in zip(members, first, strict=True)]
        result += members
    return result


def objective_value(candidate: Candidate, objective: str) -> tuple[float, float] | None:
    """What is minimised, and the tie-break; None where a figure it needs has no source."""
    workload = candidate.context.workload
    if objective == "memory":
        return candidate.fast_bytes, candidate.score_s
    if objective == "throughput":
        first = candidate.first_token_s if math.isfinite(candidate.first_token_s) else prefill_seconds(candidate)
        return 1.0 / tokens_per_s(workload, first, candidate.score_s), candidate.score_s
    rows = stratified_rows(candidate.context, candidate.policy, SCORING_ROWS)
    energy = energy_j(candidate.context.device, candidate.policy.decode(candidate.context, candidate.block, rows),
                      candidate.score_s * workload.tokens_per_step)
    return None if energy is None else (energy / workload.tokens_per_step, candidate.score_s)


def prove(ranked: Sequence[Candidate], pruned_s: float = float("inf"), n_rows: int = SCORING_ROWS
          ) -> tuple[Candidate, float]:
    """The fastest by the event engine, and the share by which one it did not run could still be faster.

    ranked : ascending in their analytic score, a lower bound on the scoring tokens.
    pruned_s : a lower bound on everything the search left out. [s]
    n_rows : trace tokens of each event run.
    """
    if len(ranked) == 1 and pruned_s == float("inf"):  # nothing to compare it with
        return ranked[0], 0.0
    seconds, best, unrun_s = float("inf"), ranked[0], float("inf")
    for index, candidate in enumerate(ranked):
        if candidate.score_s >= seconds * (1 - 1e-12):
            break
        if index == EVENT_LIMIT:
            unrun_s = candidate.score_s
            break
        took = event_seconds(candidate, n_rows)
        if took < seconds:
            seconds, best = took, candidate
    return _simplest(best, seconds, ranked, n_rows), max(1.0 - min(unrun_s, pruned_s) / seconds, 0.0)


def event_seconds(candidate: Candidate, n_rows: int) -> float:
    """Mean latency of some tokens by the event engine. [s]"""
    return token_seconds(candidate, stratified_rows(candidate.context, candidate.policy, n_rows))


def _simplest(best: Candidate, seconds: float, ranked: Sequence[Candidate], n_rows: int) -> Candidate:
    """The policy that moves least (resident before stream) where it is as fast as the best to a millionth."""
    limit = seconds * (1 + TIE)
    for name in SIMPLICITY:
        if name == best.policy.name:
            break
        tie = next((c for c in ranked if c.policy.name == name and c.context is best.context
                    and c.score_s <= limit), None)
        if tie is not None and event_seconds(tie, n_rows) <= limit:
            return tie
    return best


def pareto_front(ranked: Sequence[Candidate]) -> list[Candidate]:
    """Non-dominated in latency and bytes outside storage, thinned to a readable number.

    Keeps both ends, then whichever is farthest from all kept ones in the logarithms of both.
    """
    # Times to a millionth, as `_simplest` takes them: what is no faster must not stand there for its rounding.
    which = front(np.array([float(f"{c.score_s:.6e}") for c in ranked]), np.array([c.fast_bytes for c in ranked]))
    places = np.log([[ranked[i].score_s, ranked[i].fast_bytes] for i in which])
    places = (places - places.min(axis=0)) / np.maximum(np.ptp(places, axis=0), 1e-12)
    kept = [0, len(which) - 1] if len(which) > 1 else [0]
    while len(kept) < min(PARETO_LIMIT, len(which)):
        distance = np.linalg.norm(places[:, None] - places[None, kept], axis=2).min(axis=1)
        kept.append(int(np.argmax(distance)))
    return [ranked[which[i]] for i in sorted(set(kept))]
