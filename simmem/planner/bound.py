"""What can no plan beat? A latency below every schedule at a model, precision and trace.

Whatever lives where, a decode step multiplies attention, head and the active FFN units at no more
than the achieved rates of all agents together, and reads from storage what all memories together
cannot hold of them. Constants per op are left out.
"""

from __future__ import annotations

from simmem.cost.roofline import arithmetic_peak
from simmem.planner.document import Bound
from simmem.policy.context import Context

__all__ = ["agent_bound", "lower_bound"]


def _params(context: Context, *, any_token: bool = False) -> tuple[float, float]:
    """Matrix parameters a token multiplies: (always, active share of the FFN), on average or of the least active."""
    model = context.model
    active = 1.0
    if context.trace is not None:
        by_token = context.table.active_units.mean(axis=1) / context.table.n_units
        active = float(by_token.min() if any_token else by_token.mean())
    return model.group("attention").matrix_params + model.head_params, model.group("ffn").matrix_params * active


def agent_bound(context: Context, name: str, *, any_token: bool = False) -> Bound:
    """What one agent alone cannot beat: its memory or its arithmetic; with `any_token` below every token."""
    workload, agent = context.workload, context.device.agent[name]
    dense, ffn = _params(context, any_token=any_token)
    matrix, _ = context.compute_bytes_per_param(name)
    kv = context.model.kv_bytes_per_token(workload.kv) * workload.mean_decode_context * workload.batch
    moving = ((dense + ffn) * matrix + kv) / (agent.rate.value * agent.rate_share.value)
    key, peak = arithmetic_peak(agent, name, workload.weights)
    arithmetic = 2.0 * workload.batch * (dense + ffn) / (peak * agent.flop_share.value)
    seconds, resource = max((moving, f"agent.{name}.rate"), (arithmetic, key))
    return Bound(token_latency_s=seconds, resource=resource)


def lower_bound(context: Context) -> Bound:
    """A latency that no policy at this model, precision and trace can beat, agents working side by side included."""
    device, workload = context.device, context.workload
    dense, ffn = _params(context)
    kv = context.model.kv_bytes_per_token(workload.kv) * workload.mean_decode_context * workload.batch
    n_bytes = (dense + ffn) * min(context.compute_bytes_per_param(name)[0] for name in device.agent) + kv
    together, flop_per_s = 0.0, 0.0
    for memory_name in {a.memory: None for a in device.agent.values()}:
        rates = [a.rate.value * a.rate_share.value for a in device.agent.values() if a.memory == memory_name]
        limit = device.memory[memory_name].rate
        together += max(*rates, min(sum(rates), limit.value)) if limit else sum(rates)
    for name, agent in device.agent.items():
        flop_per_s += arithmetic_peak(agent, name, workload.weights)[1] * agent.flop_share.value
    storage, link = context.storage_link
    room = sum(v for k, v in context.budget_bytes.items() if k != device.storage)
    stored = (dense + ffn) * context.unit_bytes / context.unit_params
    seconds, resource = max(
        (n_bytes / together, "memory rate of all agents together"),
        (2.0 * workload.batch * (dense + ffn) / flop_per_s, "arithmetic of all agents together"),
        (max(stored - room, 0.0) / link.rate.value, f"link.{storage}.rate"))
    return Bound(token_latency_s=seconds, resource=resource)
