"""What can no plan beat? A latency below every schedule at a model, precision and trace.

Whatever lives where, a decode step multiplies attention, head and the active FFN units at no more
than the achieved rates of all agents together (the full ones where a fitted model tells what each shape
achieves), and reads from storage what all memories together cannot hold of them. Constants per op are left
out. A step with a draft model has that model's passes too, and yields several tokens. Where the trace holds what
predictors asked for, the least of them counts: one that misses units leaves work out.
"""

from __future__ import annotations

from collections.abc import Sequence

from simmem.cost.roofline import arithmetic_peak, sure_shares
from simmem.planner.document import Bound
from simmem.policy.context import Context
from simmem.policy.layer_kinds import ffn_work, touched_experts
from simmem.policy.ops import Ops
from simmem.spec.device import Agent

__all__ = ["agent_bound", "agents_bound", "lower_bound"]


def _used(context: Context, *, any_token: bool = False) -> tuple[float, dict[str, float]]:
    """Matrix parameters multiplied in a decode step (each as often as tokens use it), and those read, by group; the
    draft model's apart.

    Mean activity of the trace (or of what one of its predictors asked for, where that is less), or that of the least
    active token. Experts are read once for all the tokens that chose them: as many as the step of drawn routing that
    takes fewest, or, where a trace of the routing is there, no more than one token needs.
    """
    model, batch = context.model, context.workload.step_tokens
    active, x = 1.0, context.model.architecture.experts
    skewed = 1.0
    if x is not None and batch > 1:
        fewest = x.per_token if context.routing else context.routed.trace.active_counts.mean(axis=1).min()
        skewed = min(float(fewest) / touched_experts(x.count, x.per_token, batch), 1.0)
    if context.trace is not None:
        for known in (context, *(context.asking(p.name, p.layers_ahead or 0) for p in context.fitted)):
            by_token = known.table.active_units.mean(axis=1) / known.table.n_units
            active = min(active, float(by_token.min() if any_token else by_token.mean()))
    read = {model.mixer.name: context.attention_active_share * float(model.mixer.matrix_params),
            "embedding" if model.architecture.tied_head else "head": float(model.head_params)}
    multiplied = batch * sum(read.values())
    for index, name in enumerate(context.layers.names):
        work, n_layers = ffn_work(model, name, batch), context.layers.kind.count(index)
        multiplied += n_layers * active * sum(work.multiplied_params.values())
        for group, params in work.read_matrix_params.items():
            alike = skewed if group == "experts" else 1.0
            read[group] = read.get(group, 0.0) + n_layers * active * alike * params
    return multiplied, {group: params for group, params in read.items() if params}


def _rate(context: Context, agent: Agent) -> float:
    """The fastest that an agent goes through what no cache holds. [B/s]"""
    rate = agent.rate.value * sure_shares(context.device, agent)[0]
    return rate if agent.attention_rate is None else max(rate, agent.attention_rate.value)


def _peak(context: Context, agent: Agent, name: str) -> tuple[str, float]:
    """Key and value of the fastest arithmetic for any of the weights. [FLOP/s]"""
    drafting = context.drafting.workload.precisions if context.drafting else ()
    return max((arithmetic_peak(agent, name, p) for p in (*context.workload.precisions, *drafting)),
               key=lambda found: found[1])


def _drafted(context: Context, name: str) -> tuple[float, float]:
    """Arithmetic and bytes of what a draft model does for a step on an agent; 0 where there is none. [flop, B]"""
    ops, last = Ops(context, 1, agents=(name,)), None
    for what in ops.draft(name):
        last = ops.op(what)
    if last is None:
        return 0.0, 0.0
    step = ops.build(last)
    return float(step.flop.sum()), float(step.bytes[f"memory.{context.memory_of(name)}"].sum())


def _saved_bytes(context: Context, agent: Agent) -> float:
    """What a cache full costs less than from memory, in bytes of it. [B]"""
    if agent.cache is None or agent.cache_rate is None:
        return 0.0
    return agent.cache.value * max(1.0 - _rate(context, agent) / agent.cache_rate.value, 0.0)


def agent_bound(context: Context, name: str, *, any_token: bool = False) -> Bound:
    """What one agent alone cannot beat: its memory or its arithmetic; with `any_token` below every token."""
    agent = context.device.agent[name]
    multiplied, read = _used(context, any_token=any_token)
    n_bytes = sum(params * context.read_bytes_per_param(name, group)[0] for group, params in read.items())
    draft_flop, draft_bytes = _drafted(context, name)
    n_bytes += context.attention_active_share * context.decode_kv_bytes + draft_bytes - _saved_bytes(context, agent)
    moving, flop_share = max(n_bytes, 0.0) / _rate(context, agent), sure_shares(context.device, agent)[1]
    key, peak = _peak(context, agent, name)
    arithmetic = (2.0 * multiplied + draft_flop) / (peak * flop_share)
    seconds, resource = max((moving, f"agent.{name}.rate"), (arithmetic, key))
    return Bound(token_latency_s=seconds / context.workload.tokens_per_step, resource=resource)


def lower_bound(context: Context) -> Bound:
    """A latency that no policy at this model, precision and trace can beat, agents working side by side included."""
    return _together(context, tuple(context.able_agents), any_token=False)


def agents_bound(context: Context, names: Sequence[str], *, any_token: bool = False) -> Bound:
    """What some agents cannot beat, side by side where they are several; with `any_token` below every token."""
    if len(names) == 1:
        return agent_bound(context, names[0], any_token=any_token)
    return _together(context, names, any_token=any_token)


def _together(context: Context, names: Sequence[str], *, any_token: bool) -> Bound:
    device = context.device
    agents = {name: device.agent[name] for name in names}
    multiplied, read = _used(context, any_token=any_token)
    n_bytes = context.attention_active_share * context.decode_kv_bytes + min(
        sum(params * context.read_bytes_per_param(name, group)[0] for group, params in read.items())
        for name in agents)
    drafted = [_drafted(context, name) for name in agents]
    n_bytes += min(moved for _, moved in drafted)
    together, flop_per_s = 0.0, 0.0
    # Of what an agent goes through, at most a cache full comes at the cache's rate: so much it has for nothing.
    saved = sum(_saved_bytes(context, a) for a in agents.values())
    for memory_name in {a.memory: None for a in agents.values()}:
        rates = [_rate(context, a) for a in agents.values() if a.memory == memory_name]
        limit = device.memory[memory_name].rate
        together += max(*rates, min(sum(rates), limit.value)) if limit else sum(rates)
    for name, agent in agents.items():
        flop_per_s += _peak(context, agent, name)[1] * sure_shares(device, agent)[1]
    storage, link = context.storage_link
    room = sum(v for k, v in context.budget_bytes.items() if k != device.storage)
    stored = sum(params * context.stored_bytes_per_param(group)[0] for group, params in read.items())
    seconds, resource = max(
        (max(n_bytes - saved, 0.0) / together, "memory rate of all agents together"),
        ((2.0 * multiplied + drafted[0][0]) / flop_per_s, "arithmetic of all agents together"),
        (max(stored - room, 0.0) / link.rate.value, f"link.{storage}.rate"))
    return Bound(token_latency_s=seconds / context.workload.tokens_per_step, resource=resource)
