"""Shares of weights, keys and values, and activations on GPU, host and disk; many sequences in GPU batches (FlexGen).

FlexGen, arXiv 2303.06865, §4: a layer's weights are brought once and used for all GPU batches, one after the other
("zig-zag"), before the next layer's; the CPU may attend to the keys and values that it holds, so that they need not
move. The ops stand in `_tier_schedule`, what the tiers hold in `_tier_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.policy.base import Block, Knob, Placement, one_value, register, why_not_plan
from simmem.policy.context import Context
from simmem.policy.families._tier_bound import least_rows
from simmem.policy.families._tier_bytes import BUFFERS, Layout, footprint, layout, placements, route
from simmem.policy.families._tier_schedule import tier_schedule
from simmem.policy.layers import WARM_UP
from simmem.policy.placement_lp import Affine, TierProblem, tier_corners, tier_shares
from simmem.schedule import Phase, Schedule

__all__ = ["TierPercent"]

Array = NDArray[np.float64]

PERCENTS = ("weights_percent", "kv_percent", "activations_percent")
KEYS_AND_VALUES, ACTIVATIONS = 1, 2
"""Their places in it."""
MOST = 10_000_000
"""Sequences of a workload at most, as `Workload` has it."""
SPLITS = 24
"""Ways to cut the sequences into GPU batches that are searched."""
ROUNDING = 1.0 - 1e-8
"""Share of a budget that the linear programme fills: what it places must still fit when it is added up again."""
NEARLY = 1e-11
"""Share of the keys and values that the CPU has where its part goes to nothing."""
SURVIVORS = 8
"""Best of them, by the linear programme, that are scored."""
CORNERS = 4
"""And the best placements of them that leave each kind of tensor in one tier: fewer copies, and copies have latencies
that the programme does not see."""


@register
class TierPercent:
    """FlexGen's policies."""

    name = "tier-percent"
    summary = "shares of weights, keys and values, activations on GPU, host and disk; sequences in GPU batches"
    uses_trace = False

    def why_not(self, context: Context) -> str | None:
        """What is in the way of planning a context, in words; None where nothing is."""
        if context.model.architecture.state_space is not None:
            return f"{context.model.name} keeps a small state instead of keys and values to place"
        return None if _gpus(context) else (
            f"{context.device.name} has no unit with a memory of its own that is copied to and from "
            f"{context.device.host}")

    def agents(self, context: Context, block: Block) -> tuple[str, ...]:
        """The GPU, and the CPU where it attends."""
        host = context.host_agent
        helps = host is not None and bool(np.any(block.columns["cpu_attention"]))
        return (str(block.structural["agent"]), *((host,) if helps and host else ()))

    def passes(self, context: Context, block: Block) -> Array:
        """How often a step reads a weight: once for each GPU batch, (n_candidates,)."""
        return np.asarray(block.columns["n_gpu_batches"], dtype=np.float64)

    def unmeasured(self, context: Context, structural: Mapping[str, Any], fixed: Mapping[str, object]) -> bool:
        """Whole matrices are what FlexGen makes of given shares; shares that are searched are exact."""
        return structural["weights_split"] == "matrices" and "weights_percent" not in fixed

    def sequences(self, fixed: Mapping[str, object]) -> tuple[int, bool]:
        """What the batch must be a multiple of where a GPU batch or their number is set; where both are, the batch.

        Raises SpecError for what is no number of sequences.
        """
        given = [_whole(name, fixed[name]) for name in ("gpu_batch", "n_gpu_batches") if name in fixed]
        return math.prod(given), len(given) == 2

    def knobs(self, context: Context) -> tuple[Knob, ...]:
        if why_not_plan(self, context) is not None:
            return ()
        gpus, batch = _gpus(context), context.workload.batch
        splits = _splits(batch)
        movable: tuple[tuple[float, float], ...] = ((100.0, 0.0), (0.0, 100.0), (50.0, 50.0))
        if _writes(context):
            movable += ((0.0, 0.0), (0.0, 50.0))
        return (
            Knob("agent", "structural", gpus, "which unit computes the layers"),
            Knob("weights_split", "structural", ("fractions", "matrices"),
                 "shares of the weights are exact, or a tier gets whole matrices of each layer (FlexGen)",
                 default="matrices"),
            Knob("weights_percent", "demand", ((100.0, 0.0), (50.0, 50.0), (0.0, 100.0), (0.0, 50.0), (0.0, 0.0)),
                 "weights on GPU and host, the rest in storage", low=0.0, high=100.0),
            Knob("kv_percent", "demand", movable, "keys and values on GPU and host, the rest in storage",
                 low=0.0, high=100.0),
            Knob("activations_percent", "demand", movable[:2] + movable[3:4],
                 "activations between layers on GPU and host, the rest in storage", low=0.0, high=100.0),
            Knob("gpu_batch", "demand", tuple(g for g, _ in splits), "sequences the GPU computes at once",
                 low=1, high=batch),
            Knob("n_gpu_batches", "demand", tuple(n for _, n in splits),
                 "GPU batches that use a layer's weights in turn", low=1, high=batch),
            Knob("cpu_attention", "demand", (False, True) if context.host_agent else (False,),
                 "the CPU attends to keys and values that the GPU does not hold", default=False),
        )

    def refine(self, context: Context, block: Block, fixed: Mapping[str, object]) -> Block:
        """Candidates whose GPU batches make up the workload's batch, with the best shares of each way to do it.

        Raises SpecError for knobs that contradict each other, the workload or the device.
        """
        _check(context, block)
        block = _other_part(context, block, fixed)
        kept = np.flatnonzero(block.columns["gpu_batch"] * block.columns["n_gpu_batches"] == context.workload.batch)
        if not len(kept):
            given = ", ".join(f"{k} {fixed[k]}" for k in ("gpu_batch", "n_gpu_batches") if k in fixed)
            raise SpecError(f"found {given}, expected gpu_batch × n_gpu_batches to be the batch of "
                            f"{context.workload.batch} sequences", key="gpu_batch")
        block = block.only(kept)
        if all(name in fixed for name in PERCENTS):
            return block
        return _placed(context, block, fixed)

    def footprint(self, context: Context, block: Block) -> dict[str, Array]:
        return footprint(context, layout(context, block))

    def decode(self, context: Context, block: Block, rows: NDArray[np.int64]) -> Schedule:
        n_stages = context.model.architecture.n_layers + 1
        # As in `layers.decode_schedule`: enough steps for the pipeline to fill, of which the last is timed.
        n_tokens = 1 + max(1, math.ceil(WARM_UP * BUFFERS / n_stages))
        return tier_schedule(context, layout(context, block, len(rows)), Phase.DECODE, n_tokens)

    def prefill(self, context: Context, block: Block) -> Schedule:
        return tier_schedule(context, layout(context, block), Phase.PREFILL, 1)

    def placements(self, context: Context, block: Block) -> list[Placement]:
        return placements(context, layout(context, block))

    def report(self, context: Context, block: Block, rows: NDArray[np.int64]) -> dict[str, Any]:
        at = layout(context, block)
        step = tier_schedule(context, at, Phase.DECODE, 1)
        read = step.timed_bytes.get(f"link.{context.storage_link[0]}", np.zeros(1))
        matrices = block.structural["weights_split"] == "matrices"
        return {"requested_bytes": float(read[0]), "cache": {}, "active_share": {at.gpu: 1.0},
                "notes": _notes(context, block, at), "perplexity_ratio": 1.0,
                "quality_source": "dense: no work is dropped",
                "least_s": {} if matrices else _least_s(context, block)}


# --- knobs --------------------------------------------------------------------------------------------


def _gpus(context: Context) -> tuple[str, ...]:
    """Units that compute out of a memory of their own, which can be copied to and from host memory."""
    host = context.device.host
    return tuple(name for name in context.able_agents if context.memory_of(name) != host
                 and route(context, host, context.memory_of(name)) and route(context, context.memory_of(name), host))


def _whole(name: str, given: object) -> int:
    """A number of sequences or of batches from the command line or a file."""
    knob = Knob(name, "demand", (1,), "", low=1, high=MOST)
    return int(one_value(knob.parse(given)))


def _writes(context: Context) -> bool:
    """Whether something can be moved from host memory to storage."""
    return route(context, context.device.host, context.device.storage) is not None


def _splits(batch: int) -> list[tuple[int, int]]:
    """(GPU batch, how many of them) that make up a batch, at most SPLITS."""
    small = [d for d in range(1, math.isqrt(batch) + 1) if batch % d == 0]
    sizes = sorted({*small, *(batch // d for d in small)}, reverse=True)
    picked = np.unique(np.linspace(0, len(sizes) - 1, min(len(sizes), SPLITS)).round().astype(int))
    return [(sizes[i], batch // sizes[i]) for i in picked.tolist()]


def _other_part(context: Context, block: Block, fixed: Mapping[str, object]) -> Block:
    """With the GPU batch set alone as many of them as make up the batch, or the other way round: a grid of the ways to
    cut the batch may have left that out."""
    for name, other in (("gpu_batch", "n_gpu_batches"), ("n_gpu_batches", "gpu_batch")):
        given, rest = block.columns[name][0], block.columns[other]
        if name in fixed and other not in fixed and context.workload.batch % given == 0:
            block = block.only(np.flatnonzero(rest == rest[0]))
            return Block(block.structural, {
                **block.columns, other: np.full(block.n_candidates, context.workload.batch // given)})
    return block


def _check(context: Context, block: Block) -> None:
    for name in PERCENTS:
        percent = block.columns[name]
        over = percent[percent.sum(axis=1) > 100.0 * (1 + 1e-9)]
        if len(over):
            raise SpecError(f"found {over[0][0]:g} and {over[0][1]:g}, expected shares of GPU and host that add up to "
                            "at most 100", key=name)
        if name != "weights_percent" and not _writes(context) and (percent.sum(axis=1) < 100.0 * (1 - 1e-9)).any():
            raise SpecError(f"found {percent[0][0]:g} and {percent[0][1]:g}, which leaves a share to storage; "
                            f"{context.device.name} has no link to write there", key=name)
    if context.host_agent is None and np.any(block.columns["cpu_attention"]):
        raise SpecError(f"{context.device.name} has no unit that computes out of {context.device.host}",
                        key="cpu_attention")


# --- placement ------------------------------------------------------------------------------------------


def _problems(context: Context, gpu: str, ways: Sequence[tuple[int, bool]]) -> list[TierProblem]:
    """The linear programme of each (GPU batches, whether the CPU attends): seconds and bytes at no share anywhere but
    in storage, and what each share adds to them."""
    basis = np.zeros((7, 3, 2))
    basis[1:] = np.eye(6).reshape(6, 3, 2) * 100.0
    n, steps = len(basis), context.workload.decode_steps
    columns = {name: np.tile(basis[:, i], (len(ways), 1)) for i, name in enumerate(PERCENTS)}
    # Where the CPU attends it has a part, however small: what that takes beside its bytes is in every row.
    columns["kv_percent"][:, 0] *= np.where(np.repeat([helps for _, helps in ways], n), 1.0 - NEARLY, 1.0)
    at = layout(context, Block({"agent": gpu}, {
        **columns, "n_gpu_batches": np.repeat([batches for batches, _ in ways], n),
        "cpu_attention": np.repeat([helps for _, helps in ways], n)}))
    used = footprint(context, at)
    prompt, decode = least_rows(context, at, Phase.PREFILL), least_rows(context, at, Phase.DECODE)
    spills = _writes(context)
    return [TierProblem(
        tuple(_affine(row[i: i + n]) for row in prompt), tuple(_affine(steps * row[i: i + n]) for row in decode),
        tuple((_affine(used[tier][i: i + n]), context.budget_bytes[tier] * ROUNDING) for tier in used),
        (True, spills, spills))
        for i in range(0, n * len(ways), n)]


def _affine(values: Array) -> Affine:
    return Affine(float(values[0]), values[1:] - values[0])


def _ways(context: Context, gpu: str) -> dict[tuple[int, bool], TierProblem]:
    """(GPU batches in a step, whether the CPU attends) → its linear programme."""
    key = ("tier-percent programmes", gpu)
    if key not in context.memo:
        ways = [(n, helps) for _, n in _splits(context.workload.batch)
                for helps in ((False, True) if context.host_agent else (False,))]
        context.memo[key] = dict(zip(ways, _problems(context, gpu, ways), strict=True))
    found: dict[tuple[int, bool], TierProblem] = context.memo[key]
    return found


def _placed(context: Context, block: Block, fixed: Mapping[str, object]) -> Block:
    """The best shares for a block of tokens and for a step alone, for the best ways to cut the batch."""
    ways = np.stack([block.columns[k].astype(np.int64) for k in ("gpu_batch", "n_gpu_batches", "cpu_attention")])
    _, first = np.unique(ways, axis=1, return_index=True)
    gpu = str(block.structural["agent"])
    given = {i: block.columns[k][0] / 100.0 for i, k in enumerate(PERCENTS) if k in fixed}
    known = _ways(context, gpu)
    problems = {i: known.get(way := (int(ways[1, i]), bool(ways[2, i]))) or _problems(context, gpu, [way])[0]
                for i in first.tolist()}
    found: list[tuple[int, Array]] = []
    for objective in ("total", "step"):
        solved: list[tuple[float, int, Array]] = []
        corners: list[tuple[float, int, Array]] = []
        for i, problem in problems.items():
            best = tier_shares(problem, objective, given)
            if best is not None:
                solved.append((best.seconds, i, best.shares * 100.0))
                corners += [(one.seconds, i, one.shares * 100.0) for one in tier_corners(problem, objective, given)]
        solved = sorted(solved, key=lambda one: one[0])[:SURVIVORS]
        for some in (solved, sorted(corners, key=lambda one: one[0])[:CORNERS]):
            found += [(i, shares) for _, i, shares in some]
        if ACTIVATIONS not in given:
            for _, i, _ in solved[:CORNERS]:  # a little of the activations elsewhere is a copy more, too
                whole = (tier_shares(problems[i], objective, {**given, ACTIVATIONS: np.array(tier)})
                         for tier in ((1.0, 0.0), (0.0, 1.0)))
                found += [(i, one.shares * 100.0) for one in whole if one is not None]
    if not found:  # the planner says what the least of them lacks
        return block
    index = np.array([i for i, _ in found])
    columns = {k: v[index] for k, v in block.columns.items()}
    for position, name in enumerate(PERCENTS):
        columns[name] = np.array([shares[position] for _, shares in found])
    stacked = np.hstack([np.asarray(v, dtype=np.float64).reshape(len(index), -1) for v in columns.values()])
    _, distinct = np.unique(stacked.round(9), axis=0, return_index=True)
    return Block(block.structural, columns).only(np.sort(distinct))


def _least_s(context: Context, block: Block) -> dict[str, float]:
    """What no shares on the tiers beat with the GPU batches of a block of one candidate, (1,): a decode step for each
    token that it yields ("step"), and the prompt with all decode steps ("total"). [s]"""
    at, new = layout(context, block), context.workload.new_tokens
    known = _ways(context, at.gpu)
    # With all keys and values on the GPU the CPU has nothing to attend to, whether it may or not.
    nothing_away = {KEYS_AND_VALUES: np.array([1.0, 0.0])}
    cases = [(bool(at.cpu_attention[0]), {}), *([(False, nothing_away)] if at.cpu_attention[0] else [])]
    least: dict[str, float] = {}
    for helps, given in cases:
        way = int(at.n_batches[0]), helps
        problem = known[way] if way in known else _problems(context, at.gpu, [way])[0]
        for objective in ("step", "total"):
            found = tier_shares(problem, objective, given)
            if found is not None and (objective == "total" or new > 1):
                seconds = found.seconds / (1 if objective == "total" else new - 1)
                least[objective] = min(least.get(objective, math.inf), seconds)
    return least


def _notes(context: Context, block: Block, at: Layout) -> list[str]:
    n, found = int(at.n_batches[0]), []
    if n > 1:
        found.append(f"each layer's weights serve {n} GPU batches of {context.workload.batch // n} sequences in turn")
    if at.cpu_attention[0] and at.kv.away[0] > 0:
        found.append(f"the CPU attends to {at.kv.away[0]:.0%} of the keys and values, which stay out of the GPU")
    asked = np.asarray(block.columns["weights_percent"])[0] / 100.0
    if abs(at.weights.gpu[0] - asked[0]) > 1e-3 or abs(at.weights.host[0] - asked[1]) > 1e-3:
        found.append(f"as whole matrices, {at.weights.gpu[0]:.0%} of the layers' weights are on the GPU and "
                     f"{at.weights.host[0]:.0%} in host memory, where {asked[0]:.0%} and {asked[1]:.0%} were asked for")
    return found
