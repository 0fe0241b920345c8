"""How many experts does each layer use, miss and ask for early, token by token?

The caches are replayed (`simmem.trace.routing`) on a trace of the routing, or where there is none on one that is drawn
uniformly and independently (`Context.routed`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.policy.base import Block
from simmem.policy.context import Context
from simmem.policy.layer_kinds import touched_experts
from simmem.spec.model import Experts
from simmem.trace.bits import count, words_of
from simmem.trace.caches import Policy
from simmem.trace.drawn import asked_at_recall
from simmem.trace.routing import asked_a_layer_early, misses_by_layer

__all__ = ["RECALL", "Parts", "Usage", "agents_of", "computes_on_cpu", "expert_bytes", "experts_of", "helper_of",
           "host_experts", "host_share", "parts_of", "recall_of", "size_grid", "steady_tokens", "usage"]

Array = NDArray[np.float64]

RECALL = 0.788
"""Share of a layer's experts that its gate names when it is shown the input of the layer before: 78.8 % before anything
is added to it, on DeepSeek and Qwen mixtures (Fate, arXiv 2502.12224). Only where the trace does not say."""
SIZES = 33
"""Cache sizes that are searched at most, the largest that fits apart."""
ROW_SIZES = 9
"""Cache sizes by whose misses tokens are chosen that stand for all."""
PASSES = 4
"""Times that each of these is chosen again, the others being as they are."""
COLD_SHARE = 4
"""pin-hot learns from this part of a trace (a quarter, as in a replay)."""


@dataclass(frozen=True)
class Usage:
    """Experts of each layer with experts, all (n_expert_layers, n_columns)."""

    used: Array
    """Distinct ones that the tokens of a step use."""
    early: Array
    """Of the used ones that are not held, those that were asked for a layer early."""
    wasted: Array
    """Asked for early, not held, not used."""
    late: Array
    """Used, not held, and known only when the layer's own router has run."""
    early_from_storage: Array
    """Of `early` and `wasted`, those that host memory does not hold either."""
    late_from_storage: Array


def experts_of(context: Context) -> Experts:
    """The mixture; only for a model that has one."""
    found = context.model.architecture.experts
    assert found is not None
    return found


def expert_bytes(context: Context) -> float:
    """Stored bytes of one expert. [B]"""
    return context.group_bytes["experts"] / (context.model.architecture.n_expert_layers * experts_of(context).count)


def _most(context: Context, *, ahead: bool) -> int:
    """Experts of a layer that a step can use at most; with `ahead`, that may be asked for early."""
    x = experts_of(context)
    asked = asked_a_layer_early(context.routing.trace) if ahead and context.routing is not None else None
    if asked is not None:
        return int(count(words_of(asked)).max())
    return min(x.count, x.per_token * context.workload.step_tokens)


def size_grid(context: Context) -> tuple[int, ...]:
    """Experts a layer that caches are searched with: all numbers, or evenly spaced ones with both ends."""
    n = experts_of(context).count
    return tuple(sorted({round(v) for v in np.linspace(0, n, min(n + 1, SIZES)).tolist()}))


def host_experts(context: Context, agent: str) -> int | None:
    """Experts a layer that host memory holds for an agent with memory of its own; None where it is host memory itself.

    All of them where they fit, else as many as fit beside what is on its way.
    """
    if context.memory_of(agent) == context.device.host:
        return None
    x, each = experts_of(context), expert_bytes(context)
    a_layer = each * context.model.architecture.n_expert_layers
    room = context.budget_bytes[context.device.host]
    if room >= x.count * a_layer:
        return x.count
    buffers = (_most(context, ahead=False) + _most(context, ahead=True)) * each
    return max(int((room - buffers) // a_layer), 0)


def _asked(context: Context) -> NDArray[np.uint8]:
    """What is asked for a layer early: as recorded, or drawn at `RECALL` where the trace does not say."""
    known = context.routed.memo
    if ("asked",) not in known:
        recorded = asked_a_layer_early(context.routed.trace)
        known["asked",] = asked_at_recall(context.routed.trace, RECALL) if recorded is None else recorded
    found: NDArray[np.uint8] = known["asked",]
    return found


def recall_of(context: Context) -> float | None:
    """Share of the needed experts that asking a layer early finds; None where a trace says which."""
    return RECALL if asked_a_layer_early(context.routed.trace) is None else None


def steady_tokens(context: Context, n: int) -> NDArray[np.int64]:
    """Tokens of the routing trace that stand for all but those that pin-hot learns from.

    One of every n-quantile of what LRU caches of all sizes miss together, so that tokens differ among them as in the
    trace; which one, is chosen so that what each size misses keeps to its mean.
    """
    known = context.routed.memo
    if ("rows", n) not in known:
        first, count_of = context.routed.trace.header.n_tokens // COLD_SHARE, experts_of(context).count
        sizes = [round(v) for v in np.linspace(0, count_of - 1, min(count_of, ROW_SIZES)).tolist()]
        counts = _counts(context, "lru", None, ahead=True, sizes=sizes)
        copies = np.array([[t[first:].sum(axis=1) for t in (missed, missed - early, missed + wasted)]
                           for missed, early, wasted, *_ in (counts[size] for size in sizes)], dtype=np.float64)
        means = copies.mean(axis=2)
        if context.routing is None:
            means = _expected(context, np.array(sizes))
        # As shares of a step: what it misses, and the rest of it, which is taken for a copy in every second layer.
        off = (copies - means[..., None]) / (means[:, :1, None] + context.model.architecture.n_expert_layers / 2)
        known["rows", n] = first + _typical(off.reshape(-1, off.shape[2]), n)
    found: NDArray[np.int64] = known["rows", n]
    return found


def _expected(context: Context, sizes: NDArray[np.int64]) -> Array:
    """What a step misses, misses unasked and copies in the mean of all routing that might be drawn, (sizes, 3)."""
    x, layers, trace = experts_of(context), context.model.architecture.n_expert_layers, context.routed.trace
    used = touched_experts(x.count, x.per_token, context.workload.step_tokens) * layers
    wrong = count(words_of(_asked(context)[:, 1:] & ~trace.active[:, 1:])).sum(axis=1).mean()
    each = np.array([used, used * (1.0 - RECALL * (layers - 1) / layers), used + wrong])
    return np.asarray((1.0 - sizes / x.count)[:, None] * each)


def _typical(off: Array, n: int) -> NDArray[np.int64]:
    """Columns of (figures less their means, tokens), one of each n-quantile of the sum, that keep to the means.

    And to the spread: tokens that are all alike would say nothing of the slow ones.
    """
    order = np.argsort(off.sum(axis=0), kind="stable")
    off = np.concatenate([off, off**2 - (off**2).mean(axis=1, keepdims=True)])
    parts = np.array_split(order, min(n, len(order)))
    chosen = [part[len(part) // 2] for part in parts]
    for _ in range(PASSES):
        for i, part in enumerate(parts):
            others = off[:, chosen].sum(axis=1) - off[:, chosen[i]]
            chosen[i] = part[np.argmin(((others[:, None] + off[:, part]) ** 2).sum(axis=0))]
    return np.sort(np.array(chosen, dtype=np.int64))


def _counts(context: Context, policy: str, below: int | None, *, ahead: bool, sizes: Iterable[int]
            ) -> dict[int, NDArray[np.int32]]:
    """Cache size -> (5, tokens, layers) missed, ahead, wasted, late below, early below (`LayerMisses`)."""
    found: dict[int, NDArray[np.int32]] = context.routed.memo.setdefault(("misses", policy, below, ahead), {})
    if not set(sizes) <= set(found):
        new = np.array(sorted(set(sizes) - set(found)))
        trace = context.routed.trace
        counts = misses_by_layer(trace, cast(Policy, policy), new, cold_tokens=trace.header.n_tokens // COLD_SHARE,
                                 asked=_asked(context) if ahead else None, below_units=below)
        for i, size in enumerate(new.tolist()):
            found[size] = np.stack([table[:, i] for table in (
                counts.missed, counts.ahead, counts.wasted, counts.late_below, counts.early_below)]).astype(np.int32)
    return found


def usage(context: Context, block: Block, tokens: NDArray[np.int64]) -> Usage:
    """Counts for a block's columns, candidates × tokens of the routing trace, tokens fastest."""
    held = np.asarray(block.columns["experts_per_layer"], dtype=np.int64).tolist()
    below, ahead = host_experts(context, str(block.structural["agent"])), block.structural["prefetch"] == "next-layer"
    full = below is not None and below >= experts_of(context).count
    part = None if full else below
    # Only a cache below sees what is asked for and not used: without one, both ways share a replay.
    counts = _counts(context, str(block.structural["cache_policy"]), part, ahead=ahead or part is None, sizes=held)
    picked = np.stack([counts[size][:, tokens] for size in held], axis=1).astype(np.float64)
    missed, early, wasted, late_below, early_below = picked.reshape(5, -1, picked.shape[3]).swapaxes(1, 2)
    if not ahead:
        early, wasted = np.zeros_like(missed), np.zeros_like(missed)
    if full:
        late_below, early_below = np.zeros_like(missed), np.zeros_like(missed)
    elif part is None:
        late_below, early_below = missed - early, early + wasted
    used = count(words_of(context.routed.trace.active[tokens])).astype(np.float64).T
    return Usage(np.tile(used, (1, len(held))), early, wasted, missed - early, early_below, late_below)


def host_share(n_experts: int, held: Array, below: int | None) -> Array:
    """Share of what caches of `held` experts miss that is among the `below` in host memory, routing being uniform.

    What the GPU reads passes through host memory, so a cache there holds that too.
    """
    if below is None:
        return np.zeros_like(held)
    if below >= n_experts:
        return np.ones_like(held)
    return np.asarray(np.minimum(np.maximum(below - held, 0.0) / np.maximum(n_experts - held, 1.0), 1.0))


def agents_of(context: Context) -> tuple[str, ...]:
    """Units with memory of their own; on a device where there is none, all of them, the fastest first."""
    able, host = context.able_agents, context.device.host
    fastest = sorted(able, key=lambda name: -able[name].rate.value * able[name].rate_share.value)
    return tuple(name for name in fastest if able[name].memory != host) or tuple(fastest)


def helper_of(context: Context) -> str | None:
    """The unit in host memory that can compute experts beside one with memory of its own."""
    name, agents = context.host_agent, agents_of(context)
    if name is None or name not in context.able_agents or context.memory_of(agents[0]) == context.device.host:
        return None
    try:
        context.device.path(context.memory_of(agents[0]), context.device.host)
    except SpecError:  # nothing can be handed back
        return None
    return name


def computes_on_cpu(context: Context, block: Block) -> bool:
    """Whether missed experts are computed by the CPU: asked for, and there faster than a copy to the GPU."""
    helper = helper_of(context)
    if not block.structural["cpu_experts"] or helper is None:
        return False
    agent, x, together = context.agent(helper), experts_of(context), context.workload.step_tokens
    links = context.device.path(context.device.host, context.memory_of(str(block.structural["agent"])))
    copy_s = expert_bytes(context) / min(context.device.link[name].rate.value for name in links)
    params = context.model.expert_params
    tokens = together * x.per_token / touched_experts(x.count, x.per_token, together)
    peak = agent.computes_as(context.group_precision("experts"))
    assert peak is not None
    read_s = params * context.read_bytes_per_param(helper, "experts")[0] / (agent.rate.value * agent.rate_share.value)
    return max(read_s, 2.0 * tokens * params / (agent.flop_per_s[peak].value * agent.flop_share.value)) < copy_s


@dataclass(frozen=True)
class Parts:
    """What is held where, arrays (n_candidates,). [B]"""

    fast: str
    resident: float
    """Weights but the experts, keys and values, activations."""
    cached: Array
    buffers: Array
    host: Array | None
    """Experts in host memory; None where that is the agent's own."""
    host_buffers: Array


def parts_of(context: Context, block: Block) -> Parts:
    """What a block's candidates hold."""
    agent, x = str(block.structural["agent"]), experts_of(context)
    held = np.asarray(block.columns["experts_per_layer"], dtype=np.float64)
    each = expert_bytes(context)
    a_layer = each * context.model.architecture.n_expert_layers
    buffers = np.minimum(_most(context, ahead=False), x.count - held) * each
    if block.structural["prefetch"] == "next-layer":
        buffers = buffers + np.minimum(_most(context, ahead=True), x.count - held) * each
    below = host_experts(context, agent)
    resident = context.total_bytes - context.group_bytes["experts"] + context.kv_bytes + context.working_bytes
    return Parts(
        fast=context.memory_of(agent), resident=resident, cached=held * a_layer, buffers=buffers,
        host=None if below is None else np.full(block.n_candidates, below * a_layer),
        host_buffers=np.zeros(block.n_candidates) if below is None or below >= x.count else buffers)
