"""How many experts does each layer use, miss and ask for early, token by token or in the mean?

With a trace of the routing the caches are replayed (`simmem.trace.routing`). Without one, routing is taken as uniform
and independent: an expert in use is held with the probability (held experts) / (experts), whatever the cache evicts.
"""

from __future__ import annotations

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
from simmem.trace.routing import asked_a_layer_early, misses_by_layer

__all__ = ["RECALL", "Parts", "Usage", "agents_of", "computes_on_cpu", "expert_bytes", "experts_of", "helper_of",
           "host_experts", "host_share", "parts_of", "recall_of", "size_grid", "steady_tokens", "usage"]

Array = NDArray[np.float64]

RECALL = 0.788
"""Share of a layer's experts that its gate names when it is shown the input of the layer before: 78.8 % before anything
is added to it, on DeepSeek and Qwen mixtures (Fate, arXiv 2502.12224). Only where the trace does not say."""
SIZES = 33
"""Cache sizes that are searched at most, the largest that fits apart."""
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


def recall_of(context: Context) -> float | None:
    """Share of the needed experts that asking a layer early finds; None where a trace says which."""
    if context.routing is not None and asked_a_layer_early(context.routing.trace) is not None:
        return None
    return RECALL


def steady_tokens(context: Context, n: int) -> NDArray[np.int64]:
    """Tokens of the routing trace that stand for all of them: quantiles of experts newly needed; [0] without one.

    Those that pin-hot learns from are left out.
    """
    if context.routing is None:
        return np.zeros(1, dtype=np.int64)
    table = context.routing.table
    steady = np.flatnonzero(table.tokens >= context.routing.trace.header.n_tokens // COLD_SHARE)
    order = steady[np.argsort(table.new_units[steady, :, min(4, table.max_window)].sum(axis=1), kind="stable")]
    n = min(n, len(order))
    return np.asarray(np.sort(table.tokens[order[((np.arange(n) + 0.5) / n * len(order)).astype(np.int64)]]))


def usage(context: Context, block: Block, tokens: NDArray[np.int64]) -> Usage:
    """Counts for a block's columns, candidates × tokens of the routing trace, tokens fastest."""
    held = np.asarray(block.columns["experts_per_layer"], dtype=np.int64)
    below = host_experts(context, str(block.structural["agent"]))
    ahead, policy = block.structural["prefetch"] == "next-layer", str(block.structural["cache_policy"])
    if context.routing is None:
        return _uniform(context, np.repeat(held, len(tokens)), below, ahead, policy)
    return _replayed(context, held, tokens, below, ahead, policy)


def _uniform(context: Context, held: NDArray[np.int64], below: int | None, ahead: bool, policy: str) -> Usage:
    x, layers = experts_of(context), context.model.architecture.n_expert_layers
    used = touched_experts(x.count, x.per_token, context.workload.step_tokens)
    missed = used * (1.0 - held / x.count)
    found = np.zeros((layers, len(held)))
    found[1:] = RECALL if ahead else 0.0  # nothing comes before the first one
    early, wasted = found * missed, np.where(found > 0, 1.0 - found, 0.0) * missed
    absent = 1.0 - host_share(x.count, held.astype(np.float64), below, pinned=policy == "pin-hot")
    late = missed - early
    return Usage(np.full(found.shape, used), early, wasted, late, (early + wasted) * absent, late * absent)


def host_share(n_experts: int, held: Array, below: int | None, *, pinned: bool = False) -> Array:
    """Share of what caches of `held` experts miss that is among the `below` in host memory, routing being uniform.

    What the GPU reads passes through host memory, so a cache there holds that too; pinned experts it never sees.
    """
    if below is None:
        return np.zeros_like(held)
    if below >= n_experts:
        return np.ones_like(held)
    seen = np.full_like(held, below) if pinned else np.maximum(below - held, 0.0)
    return np.asarray(np.minimum(seen / np.maximum(n_experts - held, 1.0), 1.0))


def _replayed(context: Context, held: NDArray[np.int64], tokens: NDArray[np.int64], below: int | None, ahead: bool,
              policy: str) -> Usage:
    assert context.routing is not None
    trace, x = context.routing.trace, experts_of(context)
    asked = asked_a_layer_early(trace) if ahead else None
    known: dict[int, tuple[Array, ...]] = context.memo.setdefault(("routing", policy, ahead, below), {})
    wanted = set(held.tolist())
    if not wanted <= set(known):
        sizes = np.array(sorted({*wanted, *size_grid(context)} - set(known)))
        full = below is not None and below >= x.count
        counts = misses_by_layer(trace, cast(Policy, policy), sizes, cold_tokens=trace.header.n_tokens // COLD_SHARE,
                                 asked=asked, below_units=None if below is None or full else below)
        for i, size in enumerate(sizes.tolist()):
            known[size] = tuple(table[:, i].astype(np.float64) for table in (
                counts.missed, counts.ahead, counts.wasted,
                *(np.zeros_like(table) if full else table for table in (counts.late_below, counts.early_below))))

    def of(index: int) -> Array:  # (layers, candidates · rows)
        picked = np.stack([known[size][index][tokens] for size in held.tolist()])  # (candidates, rows, layers)
        return picked.reshape(-1, picked.shape[2]).T

    used = count(words_of(trace.active))[tokens].astype(np.float64).T
    used = np.tile(used, (1, len(held)))
    missed, early, wasted, late_below, early_below = (of(i) for i in range(5))
    if ahead and asked is None:  # the trace does not say which were asked for: as many as elsewhere
        share = np.zeros((len(used), 1))
        share[1:] = RECALL
        early = share * missed
        wasted = np.where(share > 0, 1.0 - share, 0.0) * used * (1.0 - np.repeat(held, len(tokens)) / x.count)
        gone = np.divide(late_below, missed, out=np.zeros_like(missed), where=missed > 0)
        return Usage(used, early, wasted, missed - early, (early + wasted) * gone, (missed - early) * gone)
    return Usage(used, early, wasted, missed - early, early_below, late_below)


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
