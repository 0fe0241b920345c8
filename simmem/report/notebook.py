"""How does a plan look in a notebook? One table with the answer, how sure it is, and what lives where."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from simmem.planner.document import Plan
from simmem.planner.explain import rate_words
from simmem.report.plan import caveat, quality_words, step_words, trace_words, weights_words
from simmem.units import format_quantity

__all__ = ["html_of"]

_CELL = "padding:0.15em 1.2em 0.15em 0;vertical-align:top;text-align:left"
_WHOLE = ";white-space:nowrap"


def html_of(plan: Plan) -> str:
    """A plan as one self-contained HTML table. Names of any origin are escaped; colours are the notebook's own."""
    p, w, e = plan.predicted, plan.workload, plan.evidence
    step = step_words(plan)
    low, high = p.token_latency_interval_s
    rows: list[tuple[str, str]] = [
        (f"a {step}", f"{_s(p.token_latency_s)}, 90 % interval {_s(low)} to {_s(high)}"),
        ("tokens a second", f"{rate_words(p.decode_tokens_per_s)} while decoding, {rate_words(p.tokens_per_s)} with "
                            f"the prompt"),
        ("first token", f"after {_s(p.first_token_s)}; loading takes {_s(p.load_s)}"),
        ("bound", f"no plan can beat {_s(plan.bound.token_latency_s)} ({plan.bound.resource})"),
        ("quality", quality_words(plan)),
        ("evidence", f"{caveat(plan).removesuffix('.')}; {trace_words(plan)}"
                     + ("; search gap " + format_quantity(e.search_gap, "ratio") if e.search_gap is not None else ""))]
    knobs = ", ".join(f"{name} = {value}" for name, value in plan.policy.knobs.items())
    head = (f"<caption style='caption-side:top;text-align:left'><b>{escape(plan.model)} on {escape(plan.device)}: "
            f"{escape(plan.policy.name)}, {escape(weights_words(plan))}, {escape(_s(p.token_latency_s))} a {step}</b>"
            "<br>"
            f"{w.prompt_tokens} prompt tokens, {w.new_tokens} new; {escape(knobs)}</caption>")
    tiers = [(f"{tier}", f"{_b(use.used_bytes)} of {_b(use.budget_bytes)}", "; ".join(
        f"{placed.tensors} {_b(placed.bytes)}" for placed in plan.residency if placed.tier == tier))
        for tier, use in plan.memory.items()]
    body = "".join(_line(name, [said], span=2) for name, said in rows)
    body += "".join(_line(tier, [used, placed]) for tier, used, placed in tiers)
    return f"<table class='simmem-plan'>{head}<tbody>{body}</tbody></table>"


def _line(name: str, cells: Iterable[str], span: int = 1) -> str:
    spread = f" colspan={span}" if span > 1 else ""
    data = "".join(f"<td style='{_CELL}{_WHOLE if n == 0 and not spread else ''}'{spread}>{escape(cell)}</td>"
                   for n, cell in enumerate(cells))
    return f"<tr><th scope='row' style='{_CELL}{_WHOLE}'>{escape(name)}</th>{data}</tr>"


def _s(value: float) -> str:
    return format_quantity(value, "s")


def _b(value: float) -> str:
    return format_quantity(value, "bytes")
