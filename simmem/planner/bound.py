"""What can no plan beat? A latency below every schedule at a model, precision and trace.

Whatever lives where, a decode step multiplies attention, head and the active FFN units at no more
than the achieved rates of all agents together (the full ones where a fitted model tells what each shape
achieves), and reads from storage what all memories together cannot hold of them. Constants per op are left
out. Where the trace holds what predictors asked for, the least of them counts: one that misses units leaves
work out.
"""

from __future__ import annotations

from simmem.cost.roofline import arithmetic_peak, sure_shares
from simmem.planner.document import Bound
from simmem.policy.context import Context
from simmem.policy.layer_kinds import ffn_work

__all__ = ["agent_bound", "lower_bound"]


def _used(context: Context, *, any_token: bool = False) -> tuple[float, dict[str, float]]:
    """Matrix parameters multiplied in a decode step (each as often as tokens use it), and those read, by group.

    Mean activity of the trace (or of what one of its predictors asked for, where that is less), or that of the least
    active token. Experts are read once for all the sequences that
    chose them.
    """
    model, batch = context.model, context.workload.batch
    active = 1.0
    if context.trace is not None:
        for known in (context, *(context.asking(p.name, p.layers_ahead or 0) for p in context.fitted)):
            by_token = known.table.active_units.mean(axis=1) / known.table.n_units
            active = min(active, float(by_token.min() if any_token else by_token.mean()))
    read = {model.mixer.name: float(model.mixer.matrix_params),
            "embedding" if model.architecture.tied_head else "head": float(model.head_params)}
    multiplied = batch * sum(read.values())
    for index, name in enumerate(context.layers.names):
        work, n_layers = ffn_work(model, name, batch), context.layers.kind.count(index)
        multiplied += n_layers * active * sum(work.multiplied_params.values())
        for group, params in work.read_matrix_params.items():
            read[group] = read.get(group, 0.0) + n_layers * active * params
    return multiplied, {group: params for group, params in read.items() if params}


def agent_bound(context: Context, name: str, *, any_token: bool = False) -> Bound:
    """What one agent alone cannot beat: its memory or its arithmetic; with `any_token` below every token."""
    workload, agent = context.workload, context.device.agent[name]
    multiplied, read = _used(context, any_token=any_token)
    n_bytes = sum(params * context.read_bytes_per_param(name, group)[0] for group, params in read.items())
    rate_share, flop_share = sure_shares(context.device, agent)
    moving = (n_bytes + context.decode_kv_bytes) / (agent.rate.value * rate_share)
    key, peak = arithmetic_peak(agent, name, workload.weights)
    arithmetic = 2.0 * multiplied / (peak * flop_share)
    seconds, resource = max((moving, f"agent.{name}.rate"), (arithmetic, key))
    return Bound(token_latency_s=seconds, resource=resource)


def lower_bound(context: Context) -> Bound:
    """A latency that no policy at this model, precision and trace can beat, agents working side by side included."""
    device, workload, agents = context.device, context.workload, context.able_agents
    multiplied, read = _used(context)
    n_bytes = context.decode_kv_bytes + min(
        sum(params * context.read_bytes_per_param(name, group)[0] for group, params in read.items())
        for name in agents)
    together, flop_per_s = 0.0, 0.0
    for memory_name in {a.memory: None for a in agents.values()}:
        rates = [a.rate.value * sure_shares(device, a)[0] for a in agents.values() if a.memory == memory_name]
        limit = device.memory[memory_name].rate
        together += max(*rates, min(sum(rates), limit.value)) if limit else sum(rates)
    for name, agent in agents.items():
        flop_per_s += arithmetic_peak(agent, name, workload.weights)[1] * sure_shares(device, agent)[1]
    storage, link = context.storage_link
    room = sum(v for k, v in context.budget_bytes.items() if k != device.storage)
    stored = sum(params * context.stored_bytes_per_param(group)[0] for group, params in read.items())
    seconds, resource = max(
        (n_bytes / together, "memory rate of all agents together"),
        (2.0 * multiplied / flop_per_s, "arithmetic of all agents together"),
        (max(stored - room, 0.0) / link.rate.value, f"link.{storage}.rate"))
    return Bound(token_latency_s=seconds, resource=resource)
