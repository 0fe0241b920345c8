"""A plan as an engineer reads it: what lives where, what moves when, how fast, what limits it, what helps."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from simmem.planner.document import MeasuredHere, Plan, Predicted
from simmem.planner.explain import LIMITS, rate_digits, rate_words
from simmem.planner.replan import Simulation
from simmem.report.format import console as new_console
from simmem.report.format import section
from simmem.spec.device import Device
from simmem.spec.precision import FILE
from simmem.units import format_quantity

__all__ = ["caveat", "print_plan", "print_simulation", "quality_words", "step_words", "trace_words", "weights_words"]

CAVEATS = {
    "measured": "The figures this plan rests on were measured.",
    "datasheet": "This plan rests on data-sheet figures: real rates are lower.",
    "derived": "This plan rests on figures derived from others.",
    "fitted": "This plan rests on figures fitted to published runs.",
    "estimated": "This plan rests on ESTIMATED figures, inferred and not measured: read its interval, not its number.",
}


def _b(value: float) -> str:
    return format_quantity(value, "bytes")


def _chunk(value: float) -> str:
    size, unit = (1 << 10, "KiB") if value < 1 << 20 else (1 << 20, "MiB")
    return f"{value / size:.0f} {unit}" if value >= 999.5 * size else f"{value / size:.3g} {unit}"


def _s(value: float) -> str:
    return format_quantity(value, "s")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    for index, name in enumerate(columns):
        words = index == 0 or name in ("tier", "how")
        table.add_column(name, justify="left" if words else "right", overflow="fold")
    return table


def caveat(plan: Plan, device: Device | None = None) -> str:
    """What an answer can be worth, by the weakest figure that it rests on; with a device, how many are estimated."""
    said = CAVEATS.get(plan.evidence.weakest_kind, "What this plan rests on is not known.")
    if device is None:
        return said
    estimated = sum(f.kind == "estimated" for f in device.figures().values())
    return said if not estimated else (
        f"{said} {estimated} of the {len(device.figures())} figures of {device.name} are estimated "
        f"(`simmem devices {device.name}`).")


def weights_words(plan: Plan) -> str:
    """The precision of the weights as it reads after the name of a policy."""
    return "weights as in the file" if plan.workload.weights == FILE else f"{plan.workload.label} weights"


def trace_words(plan: Plan) -> str:
    """Which trace was planned with, and whether a model really ran for it."""
    if plan.trace is None:
        return "no trace"
    return f"{'SYNTHETIC' if plan.trace.kind == 'synthetic' else 'captured'} trace {plan.trace.name}"


def step_words(plan: Plan) -> str:
    """What a decode step yields."""
    w = plan.workload
    return ("token" if w.batch == 1 else f"token of each of {w.batch} sequences" if w.draft_length else
            f"step of {w.batch} tokens")


def print_plan(plan: Plan, device: Device) -> None:
    """Print a plan on stdout."""
    console = new_console()
    p, w = plan.predicted, plan.workload
    console.print(Text(caveat(plan, device), style="yellow" if plan.evidence.weakest_kind == "estimated" else "dim"))
    console.print()
    console.print(Text.assemble(
        (f"{plan.model} on {device.title}", "bold"),
        f"\n{w.prompt_tokens} prompt tokens, {w.new_tokens} new, batch {w.batch}"
        + (f", {w.draft_length} drafted by {w.draft} for each step" if w.draft_length else "")))
    console.print()

    what, step = weights_words(plan), step_words(plan)
    by_rate = plan.objective == "throughput"
    low, high = (_s(end) for end in p.token_latency_interval_s)
    if by_rate:
        best = f"{plan.policy.name}, {what}: {rate_words(p.tokens_per_s)}"
        beside = (f", prompt included\n{_s(p.token_latency_s)} a {step} (90 % interval {low} to {high}), "
                  f"{rate_words(p.decode_tokens_per_s)} while decoding; first token after")
    else:
        best = f"{plan.policy.name}, {what}: {_s(p.token_latency_s)} a {step}"
        beside = (f" (90 % interval {low} to {high})"
                  f"\n{rate_words(p.decode_tokens_per_s)} while decoding; first token after")
    headline = Text.assemble((best, "bold green"), f"{beside} {_s(p.first_token_s)}, loading {_s(p.load_s)}"
                                                   f"\nquality: {quality_words(plan)}")
    console.print(Padding(headline, (0, 0, 1, 0), expand=False))

    body = Text()
    for number, reason in enumerate(plan.why):
        body.append(("\n" if number else "") + "· " + reason + ".")
    section(console, "Why", body)

    table = _table("What lives where", "tier", "bytes")
    for placed in plan.residency:
        table.add_row(placed.tensors, placed.tier, _b(placed.bytes))
    section(console, "Residency", table)
    table = _table("tier", "used", "budget", "")
    for tier, use in plan.memory.items():
        table.add_row(tier, _b(use.used_bytes), _b(use.budget_bytes),
                      format_quantity(use.used_bytes / use.budget_bytes, "ratio", 2))
    section(console, "Memory", table)

    section(console, f"What moves, per {step}", _moves(plan, p, device))
    table = _table("part of a token (critical path)", "time", "share")
    for part, seconds in sorted(p.breakdown_s.items(), key=lambda item: -item[1]):
        if seconds > 0:
            table.add_row(LIMITS[part], _s(seconds), format_quantity(seconds / p.token_latency_s, "ratio", 2))
    section(console, "Where the time goes", table)

    result = "tokens/s" if by_rate else "token latency"
    if plan.sensitivity:
        shown = plan.sensitivity[:6]
        # no column of nothing: rich would take its width out of the names
        table = _table("figure", "changed by", result, *([""] if any(s.replanned for s in shown) else []))
        for s in shown:
            change = s.token_latency_change if s.tokens_per_s_change is None else s.tokens_per_s_change
            table.add_row(s.figure, f"{100 * s.change:+.0f} %", f"{100 * change:+.1f} %",
                          *(["replanned"] if s.replanned else []))
        section(console, "What it depends on", table)

    section(console, "Compared with", _compared(plan, result))

    if plan.pareto:
        table = _table("latency against memory", "weights", "token latency", *(["tokens/s"] if by_rate else []),
                       "memory")
        for a in plan.pareto:
            used = sum(u.used_bytes for t, u in a.memory.items() if t != device.storage)
            table.add_row(a.policy, w.label if a.weights == w.weights else a.weights, _s(a.predicted.token_latency_s),
                          *([rate_digits(a.predicted.tokens_per_s)] if by_rate else []), _b(used))
        section(console, "Less memory", table)

    e = plan.evidence
    gap = "not computed for this objective" if e.search_gap is None else format_quantity(e.search_gap, "ratio", 3)
    trace = "no trace" if plan.trace is None else f"{plan.trace.kind} trace {plan.trace.name}"
    console.print(Text(f"Evidence: {e.engine} engine, cost model {e.cost_model}, weakest figure {e.weakest_kind}, "
                       f"search gap {gap}, {trace}.", style="dim"))
    _measured(console, e.measured)


def _compared(plan: Plan, result: str) -> Table:
    """Other policies, other precisions and the bound, beside the plan, by what was optimised."""
    p, w, by_rate = plan.predicted, plan.workload, plan.objective == "throughput"
    rows = [(b.policy + (" (set aside)" if b.set_aside else ""), w.label, b.token_latency_s, b.tokens_per_s)
            for b in sorted(plan.baselines, key=lambda b: b.token_latency_s)]
    rows += [(a.policy, a.weights, a.predicted.token_latency_s, a.predicted.tokens_per_s) for a in plan.alternatives]
    table = _table("instead", "weights", result, "this plan is")
    for policy, weights, seconds, rate in rows:
        if by_rate and rate:
            table.add_row(policy, weights, rate_digits(rate), f"{p.tokens_per_s / rate:.3g} × as productive")
        else:
            table.add_row(policy, weights, _s(seconds), f"{seconds / p.token_latency_s:.3g} × as fast")
    if by_rate:
        table.add_row("bound: no plan can decode more", w.label, rate_digits(w.batch / plan.bound.token_latency_s),
                      plan.bound.resource)
    else:
        table.add_row("bound: no plan can beat", w.label, _s(plan.bound.token_latency_s), plan.bound.resource)
    return table


def _measured(console: Console, measured: MeasuredHere | None) -> None:
    if measured is not None:
        low, high = (format_quantity(s, "ratio", 2) for s in measured.spread)
        console.print(Text(f"Figures measured here: {measured.figures} of {measured.of}, spread ±{low} to ±{high}.",
                           style="dim"))


def quality_words(plan: Plan) -> str:
    """What the plan costs in quality, and by which measurement."""
    q = plan.quality
    if q.perplexity_ratio is None:
        return f"unknown ({q.source})" if q.source else "unknown: the trace does not say what its sparsity costs"
    if q.perplexity_ratio == 1.0:
        return str(q.source)
    return f"perplexity × {q.perplexity_ratio:.3f} ({q.source})"


def _moves(plan: Plan, p: Predicted, device: Device) -> Text | Table:
    moving = {k: v for k, v in p.bytes_per_token.items() if v > 0}
    if not moving:
        return Text("nothing: all that a token needs is resident")
    knobs = plan.policy.knobs
    table = _table("link", "bytes", "how")
    for name, amount in moving.items():
        how = [f"{_chunk(amount / p.requests_per_token[name])} at a time"] if p.requests_per_token[name] else []
        reads = device.link[name].kind == "storage"
        if reads and "reader_threads" in knobs:
            how.append(f"{knobs['reader_threads']} reads in flight")
        if reads and knobs.get("bundled"):
            how.append("row and column of a neuron in one read")
        if reads and knobs.get("coalesce"):
            how.append("near neurons merged")
        if knobs.get("prefetch_layers"):
            how.append(f"{knobs['prefetch_layers']} layer(s) ahead")
        table.add_row(name, _b(amount), ", ".join(how))
    for name, cache in p.cache.items():
        table.add_row(f"{name} cache", _b(cache.bytes_per_token),
                      f"{format_quantity(cache.hit_ratio, 'ratio')} of needed neurons are already cached, "
                      f"window {knobs.get('window_tokens', '-')} tokens")
    return table


def print_simulation(result: Simulation) -> None:
    """Print what the event engine said of a plan."""
    console = new_console()
    q = result.token_latency_percentiles_s
    change = result.token_latency_s / result.planned_token_latency_s - 1
    console.print(Text.assemble(
        (f"{result.policy}, {result.model} on {result.device}: {_s(result.token_latency_s)} a token", "bold"),
        f" over {result.tokens} trace tokens ({100 * change:+.2f} % against the plan)"
        f"\np50 {_s(q.p50)}, p95 {_s(q.p95)}, p99 {_s(q.p99)}; engine: {result.engine}\n"))
    table = _table("part of a token (critical path)", "time")
    for part, seconds in sorted(result.breakdown_s.items(), key=lambda item: -item[1]):
        if seconds > 0:
            table.add_row(LIMITS[part], _s(seconds))
    section(console, "Where the time goes", table)
    table = _table("stream", "busy", "share")
    for name, seconds in result.busy_s.items():
        if seconds > 0:
            table.add_row(name, _s(seconds), format_quantity(seconds / result.token_latency_s, "ratio", 2))
    section(console, "How busy", table)
    _measured(console, result.measured)
