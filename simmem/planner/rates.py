"""How many tokens a second does the best plan of a question bring, without all that a plan says besides?

The batch search asks this of many numbers of sequences. It is the search of `ranking` with what only the best candidate
needs: what cannot beat what was found already is left out by its bound, and candidates are compared on one token before
the best of a block are on several.
"""

from __future__ import annotations

import numpy as np

from simmem.planner.bound import agents_bound
from simmem.planner.candidate import blocks, capacity_cut, score, stratified_rows
from simmem.planner.predict import prompt_seconds, tokens_per_s
from simmem.planner.question import Question
from simmem.planner.ranking import SCORING_ROWS, objective_value, search
from simmem.policy.base import Block, Policy, agents_of, policy_named
from simmem.policy.context import Context
from simmem.policy.drafting import drafted

__all__ = ["most_tokens_per_s"]

NO_PROMPT_S = 1e-300
"""What no plan beats; not zero, or a single token would come infinitely often. [s]"""
CLOSER = 4
"""Candidates of a block that are scored on several tokens."""
NEAR = 0.8
"""Share of the best rate so far that a block's must reach on one token to be looked at on several."""


def most_tokens_per_s(question: Question) -> float:
    """Of the best candidate at any of the precisions, prompt included, by the analytic engine; 0 where none fits.
    [token/s]"""
    if question.max_quality_loss is not None:  # then what is allowed has to be known of each candidate
        found = (objective_value(c, "throughput") for p in question.precisions for c in search(question, p).ranked)
        return max((1.0 / value[0] for value in found if value is not None), default=0.0)
    best = 0.0
    contexts = [question.context(precision) for precision in question.precisions]
    for context in sorted(contexts, key=lambda c: c.total_bytes):  # the smallest is the one to beat
        best = max(best, _most_at(question, context, best))
    return best


def _most_at(question: Question, context: Context, best: float) -> float:
    """The same at one precision, if it is more than `best`."""
    ceilings: dict[tuple[str, ...], float] = {}
    main = context.fastest_agent
    fits = False
    for name in sorted(question.policy_names, key=lambda name: name != "resident"):
        policy = drafted(policy_named(name), context)
        if fits and question.open_choice and policy.uses_trace:
            continue  # nobody is advised to
        for block in blocks(policy, context, question.fixed, defaults=question.defaults):
            names = agents_of(policy, context, block)
            if names not in ceilings:
                least = agents_bound(context, names, any_token=True).token_latency_s
                ceilings[names] = tokens_per_s(context.workload, NO_PROMPT_S, least)
            cut = capacity_cut(policy, context, block)
            fits |= name == "resident" and block.structural["agent"] == main and bool(cut.fits.any())
            oracle = question.open_choice and block.structural.get("predictor") == "oracle"
            if ceilings[names] > best and cut.fits.any() and not oracle:
                best = max(best, _most_of(policy, context, block.only(np.flatnonzero(cut.fits)), best))
    return best


def _most_of(policy: Policy, context: Context, block: Block, best: float) -> float:
    """Of a block of candidates that fit."""
    one, several = (stratified_rows(context, policy, n) for n in (1, SCORING_ROWS))
    first = prompt_seconds(policy, context, block)
    rates = tokens_per_s(context.workload, first, score(policy, context, block, one))
    if len(several) == 1 or rates.max() < NEAR * best:
        return float(rates.max())
    top = np.argsort(-rates, kind="stable")[:CLOSER]
    return float(tokens_per_s(context.workload, first[top], score(policy, context, block.only(top), several)).max())
