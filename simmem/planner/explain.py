"""Why this plan? Sentences with numbers, made from the plan alone."""

from __future__ import annotations

from simmem.planner.document import Plan
from simmem.spec.device import Device
from simmem.spec.precision import FILE
from simmem.units import format_quantity

__all__ = ["LIMITS", "precision_words", "reasons"]

LIMITS = {
    "io": "reading from storage",
    "transfer": "copying over the host link",
    "memory": "rearranging the neuron cache",
    "compute": "computing (arithmetic, or reading the weights it multiplies)",
    "predictor": "predicting which neurons are needed",
    "sync": "fixed costs of a step",
    "draft": "drafting tokens",
    "wait": "waiting",
}
"""What each part of the breakdown is, in words."""


def precision_words(precision: str) -> str:
    """A precision as it reads in a sentence."""
    return "the file's own precision" if precision == FILE else precision


def reasons(plan: Plan, device: Device, notes: list[str]) -> list[str]:
    """The choice, what limits it, what it beats, and under which conditions."""
    p, fit = plan.predicted, plan.fit
    step = "token" if plan.workload.batch == 1 else "step"  # of all sequences together
    native, chosen_weights = precision_words(fit.weights), precision_words(plan.workload.weights)
    found, beside = [], " and the draft model" if plan.workload.draft_length else ""
    if fit.missing_bytes > 0:
        text = (f"{native} does not fit in {fit.tier}: it needs {format_quantity(fit.needed_bytes, 'bytes')} with "
                f"its keys and values{beside}, {format_quantity(fit.missing_bytes, 'bytes')} more than the budget of "
                f"{format_quantity(fit.budget_bytes, 'bytes')}")
        if fit.stream_token_latency_s is not None:
            text += f"; reading all of it for each token would take {format_quantity(fit.stream_token_latency_s, 's')}"
        else:
            text += ", and nothing is left to stream it through or from"
        found.append(text)
    else:
        found.append(f"{native} fits in {fit.tier}: {format_quantity(fit.needed_bytes, 'bytes')} of "
                     f"{format_quantity(fit.budget_bytes, 'bytes')}")
    chosen = f"{plan.policy.name} at {chosen_weights} takes {format_quantity(p.token_latency_s, 's')} a {step}"
    rivals = sorted(plan.baselines, key=lambda b: b.token_latency_s)
    if rivals:
        chosen += f", against {format_quantity(rivals[0].token_latency_s, 's')} for {rivals[0].policy}"
    found.append(chosen)
    slower = [a for a in plan.alternatives if a.predicted.token_latency_s > p.token_latency_s]
    if slower and plan.workload.weights != fit.weights:
        best = min(slower, key=lambda a: a.predicted.token_latency_s)
        found.append(f"{chosen_weights} is chosen because fewer bytes move: the best {best.weights} plan, "
                     f"{best.policy}, takes {format_quantity(best.predicted.token_latency_s, 's')}; what "
                     f"{chosen_weights} costs in quality was not measured, so name --weights to decide yourself")
    busy = {agent: share for agent, share in p.active_share.items() if share > 0}
    if len(busy) > 1:
        parts = [f"{agent} does {format_quantity(share, 'ratio', 2)}" for agent, share in
                 sorted(busy.items(), key=lambda item: -item[1])]
        found.append(f"{', '.join(parts)} of what is multiplied")
    part, seconds = max(p.breakdown_s.items(), key=lambda item: item[1])
    found.append(f"{format_quantity(seconds / p.token_latency_s, 'ratio', 2)} of a {step} goes to {LIMITS[part]}")
    helpful = [s for s in plan.sensitivity if abs(s.token_latency_change) > 0.005]
    if helpful:
        top = helpful[0]
        word = "saves" if top.token_latency_change < 0 else "costs"
        found.append(f"{format_quantity(top.change, 'ratio', 2)} more {top.figure} {word} "
                     f"{format_quantity(abs(top.token_latency_change), 'ratio')} of a {step}'s time, the most of any "
                     "figure" + (" (replanned)" if top.replanned else ""))
    times = p.token_latency_s / plan.bound.token_latency_s
    found.append(f"no plan at {chosen_weights} can be faster than "
                 f"{format_quantity(plan.bound.token_latency_s, 's')} a {step} ({plan.bound.resource}); this one takes "
                 f"{times:.{2 if times < 100 else 0}f} times that")
    found += notes
    agent = str(plan.policy.knobs.get("agent"))
    together = device.agent[agent].memory == device.host and any(v > 0 for v in p.bytes_per_token.values())
    if together and not device.interference:
        found.append(f"{agent} and storage share {device.host} fairly in this answer; how much they really disturb "
                     "each other was not measured on this device")
    return found
