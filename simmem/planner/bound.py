"""What can no plan beat? A latency below every schedule at a model, precision and trace.

Whatever lives where, a decode step multiplies attention, head and the active FFN units on some
agent at its achieved rate, and reads from storage what all memories together cannot hold of
them. Constants per op are left out.
"""

from __future__ import annotations

from simmem.cost.roofline import arithmetic_peak
from simmem.planner.document import Bound
from simmem.policy.context import Context

__all__ = ["agent_bound", "lower_bound"]


def _params(context: Context, *, any_token: bool = False) -> tuple[float, float]:
    """Matrix parameters a token multiplies: (always, active share of the FFN), on average or of the least active."""
    model, a = context.model, context.model.architecture
    active = 1.0
    if context.trace is not None:
        by_token = context.table.active_units.mean(axis=1) / context.table.n_units
        active = float(by_token.min() if any_token else by_token.mean())
    e = a.embedding_dim or a.d_model
    return model.group("attention").matrix_params + a.vocab * e, model.group("ffn").matrix_params * active


def agent_bound(context: Context, name: str, *, any_token: bool = False) -> Bound:
    """The same for one agent: its memory or its arithmetic, whichever is slower; with `any_token` below every token."""
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
    """A latency that no policy at this model, precision and trace can beat."""
    best = min((agent_bound(context, name) for name in context.device.agent), key=lambda b: b.token_latency_s)
    dense, ffn = _params(context)
    storage, link = context.storage_link
    room = sum(v for k, v in context.budget_bytes.items() if k != context.device.storage)
    stored = (dense + ffn) * context.unit_bytes / context.unit_params
    reading = max(stored - room, 0.0) / link.rate.value
    if reading > best.token_latency_s:
        return Bound(token_latency_s=reading, resource=f"link.{storage}.rate")
    return best
