"""Why this plan? Sentences with numbers, made from the plan alone."""

from __future__ import annotations

from simmem.planner.document import Plan
from simmem.spec.device import Device
from simmem.spec.precision import FILE
from simmem.units import format_quantity

__all__ = ["LIMITS", "precision_words", "rate_digits", "rate_words", "reasons"]

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


SAME = 1e-3
"""Values that differ by less than this share read the same in three digits: a tie."""


def precision_words(precision: str) -> str:
    """A precision as it reads in a sentence."""
    return "the file's own precision" if precision == FILE else precision


def rate_words(tokens_per_s: float) -> str:
    """Tokens a second as they read in a sentence."""
    return f"{rate_digits(tokens_per_s)} tokens/s"


def rate_digits(tokens_per_s: float) -> str:
    """Their number alone, to three digits, of thousands to four."""
    return f"{tokens_per_s:.3g}" if tokens_per_s < 999.5 else f"{float(f'{tokens_per_s:.4g}'):.0f}"


def reasons(plan: Plan, device: Device, notes: list[str]) -> list[str]:
    """The choice, what limits it, what it beats, and under which conditions, in the words of the objective."""
    p, fit, batch = plan.predicted, plan.fit, plan.workload.batch
    by_rate, drafts = plan.objective == "throughput", plan.workload.draft_length > 0
    step = "token" if batch == 1 else "step"  # of all sequences together
    each = "token of every sequence" if batch > 1 and drafts else step  # of which a step yields several
    chosen_weights = precision_words(plan.workload.label)
    native = chosen_weights if plan.workload.mixed else precision_words(fit.weights)
    found, beside = [], " and the draft model" if drafts else ""
    if fit.missing_bytes > 0:
        text = (f"{native} does not fit in {fit.tier}: it needs {format_quantity(fit.needed_bytes, 'bytes')} with "
                f"its keys and values{beside}, {format_quantity(fit.missing_bytes, 'bytes')} more than the budget of "
                f"{format_quantity(fit.budget_bytes, 'bytes')}")
        if fit.stream_token_latency_s is None:
            text += ", and nothing is left to stream it through or from"
        elif by_rate:
            text += (f"; reading all of it for each {step} would bring "
                     f"{rate_words(batch / fit.stream_token_latency_s)} while decoding")
        else:
            text += f"; reading all of it for each {step} would take {format_quantity(fit.stream_token_latency_s, 's')}"
        found.append(text)
    else:
        found.append(f"{native} fits in {fit.tier}: {format_quantity(fit.needed_bytes, 'bytes')} of "
                     f"{format_quantity(fit.budget_bytes, 'bytes')}")
    found.append(_chosen(plan, chosen_weights, each))
    worse = [a for a in plan.alternatives if _seconds_of(plan, a.predicted.token_latency_s, a.predicted.tokens_per_s)
             > _seconds_of(plan, p.token_latency_s, p.tokens_per_s)]
    if worse and plan.workload.weights != fit.weights:
        best = min(worse, key=lambda a: _seconds_of(plan, a.predicted.token_latency_s, a.predicted.tokens_per_s))
        found.append(f"{chosen_weights} is chosen because fewer bytes move: the best {best.weights} plan, "
                     f"{best.policy}, {_does(plan, best.predicted.token_latency_s, best.predicted.tokens_per_s)}; what "
                     f"{chosen_weights} costs in quality was not measured, so name --weights to decide yourself")
    busy = {agent: share for agent, share in p.active_share.items() if share > 0}
    if len(busy) > 1:
        parts = [f"{agent} does {format_quantity(share, 'ratio', 2)}" for agent, share in
                 sorted(busy.items(), key=lambda item: -item[1])]
        found.append(f"{', '.join(parts)} of what is multiplied")
    part, seconds = max(p.breakdown_s.items(), key=lambda item: item[1])
    limit = f"{format_quantity(seconds / p.token_latency_s, 'ratio', 2)} of a {each} goes to {LIMITS[part]}"
    if by_rate:
        whole = batch * plan.workload.new_tokens / p.tokens_per_s
        limit = f"the prompt takes {format_quantity(p.first_token_s / whole, 'ratio', 2)} of the time; {limit}"
    found.append(limit)
    found += _what_helps(plan, each)
    times = p.token_latency_s / plan.bound.token_latency_s
    least = format_quantity(plan.bound.token_latency_s, "s")
    if by_rate:
        found.append(f"no plan at {chosen_weights} can decode more than "
                     f"{rate_words(batch / plan.bound.token_latency_s)} ({plan.bound.resource}); this one decodes "
                     f"{rate_words(p.decode_tokens_per_s)}")
    else:
        found.append(f"no plan at {chosen_weights} can be faster than {least} a {each} ({plan.bound.resource}); this "
                     f"one takes {times:.{2 if times < 100 else 0}f} times that")
    found += notes
    agent = str(plan.policy.knobs.get("agent"))
    together = device.agent[agent].memory == device.host and any(v > 0 for v in p.bytes_per_token.values())
    if together and not device.interference:
        found.append(f"{agent} and storage share {device.host} fairly in this answer; how much they really disturb "
                     "each other was not measured on this device")
    return found


def _seconds_of(plan: Plan, token_latency_s: float, tokens_per_s: float | None) -> float:
    """What plans are compared by: a step, or for throughput the whole answer's time for each token of it. [s]"""
    return 1.0 / tokens_per_s if plan.objective == "throughput" and tokens_per_s else token_latency_s


def _does(plan: Plan, token_latency_s: float, tokens_per_s: float | None) -> str:
    """What a plan takes, or brings where tokens a second are the objective."""
    if plan.objective == "throughput" and tokens_per_s:
        return f"brings {rate_words(tokens_per_s)}"
    return f"takes {format_quantity(token_latency_s, 's')}"


def _chosen(plan: Plan, weights: str, step: str) -> str:
    """The plan beside those as good as it, and the best of the others that compete with it."""
    p, w = plan.predicted, plan.workload
    mine = _seconds_of(plan, p.token_latency_s, p.tokens_per_s)
    text = f"{plan.policy.name} at {weights} {_does(plan, p.token_latency_s, p.tokens_per_s)}"
    if plan.objective != "throughput":
        text += f" a {step}"
    else:
        text += f", prompt included{'' if w.batch == 1 else f', with {w.batch} sequences at once'}"
    rivals = sorted((b for b in plan.baselines if not b.set_aside),
                    key=lambda b: _seconds_of(plan, b.token_latency_s, b.tokens_per_s))
    ties = [b for b in rivals if abs(_seconds_of(plan, b.token_latency_s, b.tokens_per_s) / mine - 1.0) < SAME]
    others = [b for b in rivals if b not in ties]
    if ties:
        text += f", a tie with {_listed([b.policy for b in ties])}"
    if others:
        best = others[0]
        does = _does(plan, best.token_latency_s, best.tokens_per_s)
        text += f"; {best.policy} {does}" if ties else f", against {does.split(' ', 1)[1]} for {best.policy}"
    return text


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _what_helps(plan: Plan, step: str) -> list[str]:
    """The figure that decides most, if any does."""
    if plan.objective == "throughput":
        top = next((s for s in plan.sensitivity if abs(s.tokens_per_s_change or 0.0) > 0.005), None)
        if top is None or top.tokens_per_s_change is None:
            return []
        size = format_quantity(abs(top.tokens_per_s_change), "ratio")
        does = f"brings {size} more" if top.tokens_per_s_change > 0 else f"costs {size} of the"
        replanned = " (replanned, for as many sequences)"
        return [f"{format_quantity(top.change, 'ratio', 2)} more {top.figure} {does} tokens/s, the most of any figure"
                + (replanned if top.replanned else "")]
    top = next((s for s in plan.sensitivity if abs(s.token_latency_change) > 0.005), None)
    if top is None:
        return []
    word = "saves" if top.token_latency_change < 0 else "costs"
    return [f"{format_quantity(top.change, 'ratio', 2)} more {top.figure} {word} "
            f"{format_quantity(abs(top.token_latency_change), 'ratio')} of a {step}'s time, the most of any "
            "figure" + (" (replanned)" if top.replanned else "")]
