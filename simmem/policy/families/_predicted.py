"""Which units does a plan read that follows a predictor: those it asks for, or those that were active?

A trace may hold what several predictors asked for (`simmem.trace.trace.Trace.asking`). A plan with one of them is
laid out from what it asked for, false alarms included, misses left out; with any other from the activity itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from simmem.policy.base import Block, Knob, KnobValue
from simmem.policy.context import Context

__all__ = ["as_known", "predictor_knobs", "said_of_predictor", "unknown_cost", "unmeasured"]


def predictor_knobs(context: Context) -> tuple[Knob, Knob]:
    """prefetch_layers and predictor, for a context with a trace: what its trace was recorded with, and `none`."""
    assert context.trace is not None
    header = context.trace.header
    own, fitted = header.predictor, tuple(dict.fromkeys(p.name for p in context.fitted))
    ahead = sorted({p.layers_ahead or 0 for p in context.fitted} - {0})
    # Without a predictor everything is read, which `stream` does sequentially: allowed, never best.
    dense: tuple[KnobValue, ...] = ("none",) if own != "none" else ()
    return (
        # Asking a predictor early costs recall: where that was not measured it may be set, but is not searched.
        Knob("prefetch_layers", "structural", (0, *ahead), "layers the predictor looks ahead", default=0, low=0,
             high=8),
        Knob("predictor", "structural", (own, *fitted), "how units are known before they are read", default=own,
             unsearched=dense, hint=f"the trace {header.name} holds no more; `simmem capture --predictor` records what "
                                    "others ask for"))


def unmeasured(context: Context, structural: Mapping[str, KnobValue]) -> bool:
    """Whether nobody measured how well a block's predictor knows units so many layers ahead."""
    ahead, name = structural["prefetch_layers"], structural["predictor"]
    measured = {p.layers_ahead or 0 for p in context.fitted if p.name == name} or {0}
    return name != "none" and ahead not in measured


def unknown_cost(context: Context, block: Block) -> str | None:
    """Why nobody knows what following a fitted predictor costs; None where it was measured, or is the trace's own."""
    name, ahead = str(block.structural["predictor"]), block.structural["prefetch_layers"]
    if all(p.name != name for p in context.fitted) or not unmeasured(context, block.structural):
        return None
    return f"the cost of asking the {name} predictor {ahead} layer(s) ahead was not measured"


def as_known(context: Context, block: Block) -> Context:
    """The context with the units that the block's predictor asks for in the place of those that were active."""
    return context.asking(str(block.structural["predictor"]), int(block.structural["prefetch_layers"]))


def said_of_predictor(context: Context, block: Block) -> list[str]:
    """What was measured of the predictor of a block, and what was not."""
    name, ahead = str(block.structural["predictor"]), int(block.structural["prefetch_layers"])
    assert context.trace is not None
    notes, measured = [], 0
    if any(p.name == name for p in context.fitted):
        found, _ = context.trace.asked_by(name, ahead)
        measured = found.layers_ahead or 0
        notes.append(f"the {name} predictor, asked {measured} layer(s) ahead, finds {100 * found.recall:.1f} % of the "
                     f"units that are active, and {100 * found.precision:.1f} % of those it asks for are (measured); "
                     "what it misses is left out")
    if ahead > measured and name != "none":
        notes.append(f"the predictor is asked {ahead} layer(s) early, so that reads overlap compute; what that costs "
                     "it in recall was not measured")
    return notes
