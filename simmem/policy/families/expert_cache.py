"""Some experts of every layer are cached near the unit that computes; the others are fetched when a token needs them
(Mixtral-offloading, MoE-Infinity), early where the next layer's gate can say which (Fate), or computed by the CPU where
they lie (Fiddler, KTransformers).

Attention, router, shared experts, embeddings and head stay resident. What the cache misses comes from host memory, and
from storage where host memory does not hold all experts. A copy brings one expert into a buffer; there are as many
buffers as a layer may miss, and as many again for what is asked for early. No work is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.policy.base import Block, Knob, Placement, register, why_not_plan, with_largest_that_fits
from simmem.policy.context import Context
from simmem.policy.families import _experts
from simmem.policy.families._expert_ops import decode_step, prefill
from simmem.schedule import Schedule
from simmem.trace.caches import POLICIES

__all__ = ["ExpertCache"]

Array = NDArray[np.float64]
CACHES = tuple(name for name in POLICIES if name not in ("window", "belady"))
"""What evicts: `window` has no size, `belady` is no policy an engine could follow."""


@register
class ExpertCache:
    """Experts cached, the rest fetched or computed where they lie."""

    name = "expert-cache"
    summary = "a cache of experts in every layer, the others fetched when a token needs them"
    uses_trace = False
    """Not of neurons; a trace of the routing, recorded or drawn, through `rows`."""

    def why_not(self, context: Context) -> str | None:
        """Why this policy cannot plan a context; None where it can."""
        if context.model.architecture.experts is None:
            return f"{context.model.name} is no mixture of experts"
        return None if context.able_agents else f"no unit of {context.device.name} computes all of its precisions"

    def knobs(self, context: Context) -> tuple[Knob, ...]:
        if why_not_plan(self, context) is not None:
            return ()
        x = _experts.experts_of(context)
        # Where routing is uniform, all policies hit alike.
        searched: tuple[str, ...] = CACHES if context.routing is not None else ("lru",)
        return (
            Knob("agent", "structural", _experts.agents_of(context), "which unit computes what is resident or fetched"),
            Knob("cache_policy", "structural", searched, "which expert gives way to another", default="lru",
                 unsearched=tuple(name for name in CACHES if name not in searched)),
            Knob("prefetch", "structural", ("none", "next-layer"),
                 "fetch what the next layer's gate names on this layer's input", default="none"),
            Knob("cpu_experts", "structural", (False, True) if _experts.helper_of(context) else (False,),
                 "let the CPU compute missed experts, where that is faster than fetching them", default=False),
            Knob("experts_per_layer", "demand", _experts.size_grid(context), "experts of every layer that are cached",
                 low=0, high=x.count),
        )

    def rows(self, context: Context, n: int) -> NDArray[np.int64]:
        """Tokens of the routing trace, or of the drawn one, to look at."""
        return _experts.steady_tokens(context, n)

    def agents(self, context: Context, block: Block) -> tuple[str, ...]:
        """Who computes."""
        agent, helper = str(block.structural["agent"]), _experts.helper_of(context)
        return (agent, helper) if block.structural["cpu_experts"] and helper else (agent,)

    def refine(self, context: Context, block: Block, fixed: Mapping[str, object]) -> Block:
        """Add the largest cache that fits, which a coarse grid may leave out."""
        if "experts_per_layer" in fixed:
            return block
        sizes = np.arange(_experts.experts_of(context).count + 1)
        return with_largest_that_fits(self, context, block, "experts_per_layer", sizes)

    def footprint(self, context: Context, block: Block) -> dict[str, Array]:
        parts = _experts.parts_of(context, block)
        used = {parts.fast: parts.resident + parts.cached + parts.buffers}
        if parts.host is not None:
            used[context.device.host] = parts.host + parts.host_buffers
        used[context.device.storage] = np.full(block.n_candidates, context.total_bytes)
        return used

    def decode(self, context: Context, block: Block, rows: NDArray[np.int64]) -> Schedule:
        return decode_step(context, block, rows)

    def prefill(self, context: Context, block: Block) -> Schedule:
        return prefill(context, block)

    def placements(self, context: Context, block: Block) -> list[Placement]:
        parts, storage = _experts.parts_of(context, block), context.device.storage
        kept = context.total_bytes - context.group_bytes["experts"]
        found = [Placement("all weights but the experts", parts.fast, kept, loaded=True),
                 Placement("cached experts", parts.fast, float(parts.cached[0]), loaded=True),
                 Placement("buffers of experts", parts.fast, float(parts.buffers[0]))]
        if parts.host is not None:
            found.append(Placement("experts", context.device.host, float(parts.host[0]), loaded=True))
            if parts.host_buffers.any():
                found.append(Placement("buffers of experts", context.device.host, float(parts.host_buffers[0])))
        return [*found, Placement("copy of all weights", storage, context.total_bytes),
                Placement("keys and values", parts.fast, context.kv_bytes),
                Placement("activations", parts.fast, context.working_bytes)]

    def report(self, context: Context, block: Block, rows: NDArray[np.int64]) -> dict[str, Any]:
        use, each = _experts.usage(context, block, rows), _experts.expert_bytes(context)
        agent, count = str(block.structural["agent"]), _experts.experts_of(context).count
        missed, late = use.early + use.late, use.late
        columns = use.used.shape[1]
        cache = {"experts": {"hit_ratio": float(1.0 - missed.sum() / use.used.sum()),
                             "bytes_per_token": float(missed.sum() / columns * each)}}
        read = float((use.early_from_storage + use.late_from_storage).sum() / columns * each)
        below = _experts.host_experts(context, agent)
        if below is not None and below < count and missed.any():
            asked = float((use.early + use.wasted + use.late).sum() / columns * each)
            cache["experts in host memory"] = {"hit_ratio": 1.0 - read / asked, "bytes_per_token": read}
        helper, share = _experts.helper_of(context), 0.0
        if helper is not None and _experts.computes_on_cpu(context, block):
            share = float(late.sum() / use.used.sum())
        active = {agent: 1.0 - share} if helper is None or not share else {agent: 1.0 - share, helper: share}
        return {"requested_bytes": read, "cache": cache, "active_share": active, "notes": _notes(context, block, share),
                "perplexity_ratio": 1.0, "quality_source": "no work is dropped: every chosen expert is computed"}


def _notes(context: Context, block: Block, cpu_share: float) -> list[str]:
    x, notes = _experts.experts_of(context), []
    if context.routing is None:
        notes.append("routing is drawn uniformly, as no trace of it is given: n cached experts of a layer then hit n "
                     f"times in {x.count}, whatever is evicted; real routing repeats itself and hits more often")
    else:
        header = context.routing.trace.header
        notes.append(f"hits are counted on the {header.kind} routing of {header.name}, layer by layer")
    if block.structural["prefetch"] == "next-layer":
        recall = _experts.recall_of(context)
        notes.append("what the next layer's gate asks for on this layer's input was recorded with the trace"
                     if recall is None else f"a layer's experts are asked for one layer early; {100 * recall:.1f} % of "
                     "them are taken as found (Fate, arXiv 2502.12224, on other models)")
    if block.structural["cpu_experts"]:
        notes.append(f"the CPU computes {100 * cpu_share:.0f} % of the experts in use" if cpu_share else
                     "the CPU computes none: fetching a missed expert is faster")
    return notes
