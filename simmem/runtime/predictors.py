"""Which predictor could have known the units of a capture? Fitted on its calibration text, judged on its trace.

`gate` asks for the units whose |act(gate)| is high: one matrix is read whole, the other two for what was asked.
`low-rank` is a small linear map of the FFN input (`simmem.runtime.lowrank`), of the same layer and of the one
before, which leaves time to read. Three quarters of the calibration text fit the map, the last one sets each layer's
threshold so that the wanted share of the active units lies above it. Both are watched while the trace is recorded,
in the network that the trace is of, so that what they asked for stands bit by bit beside what was active; the
perplexity is that of the network that computes exactly what was asked for.

`next-layer` guesses the experts of a layer by giving its router the input of the router before (Eliseev and Mazur,
arXiv 2312.17238 §3.2). It needs no fitting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.runtime.hooks import FfnHooks, matrices_read_first
from simmem.runtime.lowrank import FfnInputs, LowRank, LowRankHooks, Moments, scores_of, solve, tensors_of
from simmem.runtime.measure import perplexity
from simmem.runtime.models import LoadedModel
from simmem.runtime.passes import Ids, PassRecord, Recorder, run_dense, windows
from simmem.runtime.request import Request
from simmem.runtime.stream import Arrays, Partial
from simmem.runtime.thresholds import Progress
from simmem.trace.predictors import judge, simple_predictors
from simmem.trace.trace import Predictor, Quality, Trace

__all__ = ["FITTED_SHARE", "GUESSED", "LOW_RANK_LAYERS_AHEAD", "MAX_FIT_BYTES", "Fitted", "asked_perplexities",
           "fit_predictors", "masks_held", "predictor_hooks", "predictor_rows", "threshold_for", "with_predictors"]

LOW_RANK_LAYERS_AHEAD = (0, 1)
FITTED_SHARE = 0.75
"""Of the calibration text; the rest sets the thresholds."""
MAX_FIT_BYTES = 1 << 30
"""Sums and scores held at a time; layers are fitted in groups, with passes over the text for each. [B]"""
GUESSED = "guessed_order"
"""Per token and layer: all experts, the likeliest by the router's guess first; kept in chunks, not in traces."""
_MORE_EXPERTS = (0, 1, 2)

OnMask = Callable[[int, NDArray[np.bool_]], None]


@dataclass(frozen=True)
class Fitted:
    """A predictor of FFN units that is ready to be asked."""

    thresholds: NDArray[np.float32]
    """(n_layers,); infinite where a layer never used a unit."""
    tokens: int
    """That it was fitted on, those for the thresholds included."""
    low_rank: LowRank | None = None
    """None: the gate's own score."""

    @property
    def name(self) -> str:
        return "gate" if self.low_rank is None else "low-rank"

    @property
    def layers_ahead(self) -> int:
        return 0 if self.low_rank is None else self.low_rank.layers_ahead


def threshold_for(scores: NDArray[np.float32], recall: float) -> float:
    """The highest threshold that at least the share `recall` of `scores` exceeds; infinite where there are none."""
    if not scores.size:
        return math.inf
    above = min(max(math.ceil(recall * scores.size - 1e-9), 1), scores.size)
    at = scores.size - above
    return float(np.nextafter(np.partition(scores, at)[at], np.float32(-np.inf), dtype=np.float32))


def fit_predictors(model: LoadedModel, ids: Ids, request: Request, thresholds: NDArray[np.float32] | None,
                   kept: Partial, say: Progress, *, max_bytes: int = MAX_FIT_BYTES) -> tuple[Fitted, ...]:
    """Those that a resolved request asks for, fitted on a text; found again where they were kept.

    thresholds : of the criterion, (n_layers,).

    Raises SpecError where the text is too short or the model yields NaN.
    """
    if not request.predictors:
        return ()
    arrays = kept.load_arrays("predictors")
    if arrays is None:
        if ids.size < 2:
            raise SpecError(f"found {ids.size} tokens of text, expected at least 2", key="--predictor-tokens")
        arrays = _fit(model, ids, request, thresholds, say, max_bytes)
        kept.save_arrays("predictors", arrays)
    found = []
    if "gate" in request.predictors:
        found.append(Fitted(arrays["gate"], ids.size))
    if "low-rank" in request.predictors:
        found += [Fitted(arrays[f"threshold-{ahead}"], ids.size, LowRank(ahead, *(
            arrays[f"{part}-{ahead}"] for part in ("first", "second", "bias")))) for ahead in LOW_RANK_LAYERS_AHEAD]
    return tuple(found)


def masks_held(request: Request) -> int:
    """How many tensors like the activity a trace holds beside it for the predictors that are fitted."""
    return sum(len(LOW_RANK_LAYERS_AHEAD) if name == "low-rank" else 1 for name in request.predictors)


def predictor_hooks(model: LoadedModel, fitted: Fitted, *, on_mask: OnMask | None = None, apply: bool = True
                    ) -> AbstractContextManager[Any]:
    """Hooks that report what a predictor asks for; with `apply` the network computes exactly that."""
    if fitted.low_rank is not None:
        return LowRankHooks(model, fitted.low_rank, fitted.thresholds, on_mask=on_mask, apply=apply)
    return FfnHooks(model, "gate", thresholds=fitted.thresholds, on_mask=on_mask, apply=apply)


def with_predictors(model: LoadedModel, recorder: Recorder, fitted: Sequence[Fitted]) -> Recorder:
    """A recorder that keeps what each predictor asks for beside what it kept before."""
    if not fitted:
        return recorder

    @contextmanager
    def hooks(record: PassRecord) -> Iterator[None]:
        def keep(index: int) -> OnMask:
            return lambda layer, mask: record.keep_rows(_watched(index), layer,
                                                        np.packbits(mask, axis=1, bitorder="little"))

        with ExitStack() as stack:
            for index, one in enumerate(fitted):
                stack.enter_context(predictor_hooks(model, one, on_mask=keep(index), apply=False))
            stack.enter_context(recorder.hooks(record))
            yield

    return Recorder(recorder.n_layers, recorder.n_units, hooks)


def _watched(index: int) -> str:
    """What a chunk calls the bits that a predictor asked for."""
    return f"asked-{index}"


def asked_perplexities(model: LoadedModel, request: Request, fitted: Sequence[Fitted], ids: Ids, kept: Partial,
                       say: Progress) -> list[float]:
    """Perplexity of a text for the networks that compute what each predictor asks for; found again where kept."""
    values = []
    for one in fitted:
        name = f"predictor-{one.name}-{one.layers_ahead}"
        noted = kept.noted(name)
        if noted is None:
            say(f"measuring perplexity with the {one.name} predictor", 0.0)
            with predictor_hooks(model, one):
                noted = {"perplexity": perplexity(model, ids, window=request.passes(model).window)[0]}
            kept.note(name, noted)
        values.append(float(noted["perplexity"]))
    return values


def predictor_rows(model: LoadedModel, trace: Trace, request: Request, fitted: Sequence[Fitted],
                   perplexities: Sequence[float], arrays: Arrays
                   ) -> tuple[tuple[Predictor, ...], NDArray[np.uint8] | None]:
    """Every predictor of a finished capture, judged, and the bits of those that the trace is to hold.

    arrays : what was recorded; what is of predictors alone is taken out of it.
    """
    rows, asked = list(simple_predictors(trace)), []
    dense = trace.header.quality
    for index, (one, sparse) in enumerate(zip(fitted, perplexities, strict=True)):
        assert dense is not None  # a capture measures it
        asked.append(arrays.pop(_watched(index)))
        rows.append(_fitted_row(model, trace, request, one, asked[-1], Quality(
            text=dense.text, tokens=dense.tokens, dense_perplexity=dense.dense_perplexity, sparse_perplexity=sparse)))
    order = arrays.pop(GUESSED, None)
    if order is not None and trace.header.n_layers > 1:
        rows += _next_layer_rows(model, trace, order)
        asked.append(_chosen(order, int(trace.active_counts.max())))
    return tuple(rows), np.stack(asked) if asked else None


def _fit(model: LoadedModel, ids: Ids, request: Request, thresholds: NDArray[np.float32] | None, say: Progress,
         max_bytes: int) -> Arrays:
    n_layers, n_units, d = len(model.blocks), model.n_units, model.d_model
    cut = min(max(round(FITTED_SHARE * ids.size), 1), ids.size - 1)
    window, recall = request.passes(model).window, request.recall or 1.0
    aheads = LOW_RANK_LAYERS_AHEAD if "low-rank" in request.predictors else ()
    gate, own = "gate" in request.predictors, request.criterion in ("gate", "relu-zero")
    fitted: dict[str, list[NDArray[np.float32]]] = {}
    found = {key: np.empty(n_layers, np.float32) for key in (
        *(("gate",) if gate else ()), *(f"threshold-{ahead}" for ahead in aheads))}
    each = len(aheads) * 8 * d * (d + n_units) + (len(aheads) + gate) * 4 * (ids.size - cut) * n_units
    at_once = max(1, max_bytes // max(each, 1))
    for start in range(0, n_layers, at_once):
        group = range(start, min(start + at_once, n_layers))
        maps = _fit_group(model, ids[:cut], request, thresholds, group, aheads, window, say)
        for ahead, layers in maps.items():
            for parts in layers:
                for name, part in zip(("first", "second", "bias"), parts, strict=True):
                    fitted.setdefault(f"{name}-{ahead}", []).append(part)
        scores = _active_scores(model, ids[cut:], request, thresholds, group, maps, gate, window, say)
        for layer in group:
            for key, by_layer in scores.items():
                found[key][layer] = threshold_for(by_layer[layer - group.start], recall)
    if gate and own:  # it is what makes a unit active, so there is nothing to choose
        found["gate"] = np.zeros(n_layers, np.float32) if thresholds is None else np.asarray(thresholds, np.float32)
    return {**found, **{name: np.stack(parts) for name, parts in fitted.items()}}


Maps = dict[int, list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]]]


def _fit_group(model: LoadedModel, ids: Ids, request: Request, thresholds: NDArray[np.float32] | None, group: range,
               aheads: Sequence[int], window: int, say: Progress) -> Maps:
    """The maps of a group of layers, by layers ahead."""
    import torch

    if not aheads:
        return {}
    sums = {ahead: [Moments(model.d_model, model.n_units, model.device) for _ in group] for ahead in aheads}

    def keep(layer: int, mask: NDArray[np.bool_]) -> None:
        y = torch.from_numpy(mask).to(model.device).float()
        for ahead in aheads:
            sums[ahead][layer - group.start].add(inputs.before(layer, ahead), y)

    with FfnInputs(model) as inputs:
        _run(model, ids, request, thresholds, group, keep, window, "fitting predictors", say)
    for layers in sums.values():
        for layer, moments in zip(group, layers, strict=True):
            if not bool(torch.isfinite(moments.xx).all()):
                raise SpecError(f"yields NaN or infinite activations in layer {layer}", file=model.name)
    return {ahead: [solve(moments, request.rank or 1) for moments in layers] for ahead, layers in sums.items()}


def _active_scores(model: LoadedModel, ids: Ids, request: Request, thresholds: NDArray[np.float32] | None,
                   group: range, maps: Maps, gate: bool, window: int, say: Progress
                   ) -> dict[str, list[NDArray[np.float32]]]:
    """Scores that predictors give to active units, for each layer of a group, by the name of their threshold."""
    import torch

    parts: dict[str, list[list[NDArray[np.float32]]]] = {
        key: [[] for _ in group] for key in (*(("gate",) if gate else ()), *(f"threshold-{ahead}" for ahead in maps))}
    tensors = {ahead: list(tensors_of(LowRank(ahead, *map(np.stack, zip(*layers, strict=True))), model.device))
               for ahead, layers in maps.items()}
    by_gate: dict[int, NDArray[np.float32]] = {}

    def keep_gate(layer: int, scores: NDArray[np.float32]) -> None:
        by_gate[layer] = scores.copy()

    def keep(layer: int, mask: NDArray[np.bool_]) -> None:
        at = layer - group.start
        if gate:
            parts["gate"][at].append(by_gate.pop(layer)[mask])
        for ahead, by_layer in tensors.items():
            scores = scores_of(inputs.before(layer, ahead), by_layer[at])
            parts[f"threshold-{ahead}"][at].append(scores[torch.from_numpy(mask).to(scores.device)].cpu().numpy())

    with ExitStack() as stack:
        inputs = stack.enter_context(FfnInputs(model))
        if gate:  # ahead of the criterion's own hooks, which then find its scores
            stack.enter_context(FfnHooks(model, "gate", on_scores=keep_gate, layers=group))
        _run(model, ids, request, thresholds, group, keep, window, "choosing thresholds of predictors", say)
    return {key: [np.concatenate(chunks) if chunks else np.zeros(0, np.float32) for chunks in layers]
            for key, layers in parts.items()}


def _run(model: LoadedModel, ids: Ids, request: Request, thresholds: NDArray[np.float32] | None, group: range,
         keep: OnMask, window: int, what: str, say: Progress) -> None:
    """Run a text through the network that the trace is of, reporting the masks of a group of layers."""
    done = 0
    with FfnHooks(model, str(request.criterion), thresholds=thresholds, top_k=request.top_k(model), on_mask=keep,
                  layers=group, apply=not request.observe):
        for part in windows(ids, window):
            run_dense(model, part)
            done += part.size
            say(what, (group.start + len(group) * done / ids.size) / len(model.blocks))


def _fitted_row(model: LoadedModel, trace: Trace, request: Request, fitted: Fitted, bits: NDArray[np.uint8],
                quality: Quality) -> Predictor:
    header, low_rank = trace.header, fitted.low_rank
    whole = 3 if model.gated else 2  # matrices of a neuron
    row_bytes = header.unit_bytes / _matrices(model, request)
    unit_bytes = row_bytes * (whole if low_rank else whole - 1)
    params = low_rank.params if low_rank else len(model.blocks) * model.n_units * model.d_model
    exact = fitted.name == "gate" and request.criterion in ("gate", "relu-zero")
    found = judge(trace.active, bits, n_units=header.n_units, unit_bytes=unit_bytes)
    return Predictor.model_validate({
        "name": fitted.name, "layers_ahead": fitted.layers_ahead, "rank": low_rank and low_rank.first.shape[2],
        "asks": "what the criterion says" if exact else
                f"above a threshold for a recall of {request.recall:g}",
        "target_recall": None if exact else request.recall,
        "fitted_tokens": 0 if exact else fitted.tokens, "unit_bytes": unit_bytes, "params": params,
        "params_share": params / model.params, "flop_per_token": 2.0 * params, "quality": quality, "held": True,
        **found._asdict()})


def _matrices(model: LoadedModel, request: Request) -> int:
    """Matrices that a unit of the trace has a row or column in."""
    whole = 3 if model.gated else 2
    return whole - (matrices_read_first(str(request.criterion), model.gated) if request.skip == "known" else 0)


def _next_layer_rows(model: LoadedModel, trace: Trace, order: NDArray[np.uint16]) -> list[Predictor]:
    """The guess of each layer's experts by the router input of the layer before, asking for k experts and more."""
    header, k = trace.header, int(trace.active_counts.max())
    params = sum(p.numel() for block in model.experts[1:] for p in block.router.parameters())
    rows = []
    for more in _MORE_EXPERTS:
        if k + more > header.n_units:
            break
        found = judge(trace.active, _chosen(order, k + more), n_units=header.n_units, unit_bytes=header.unit_bytes,
                      first_layer=1)
        rows.append(Predictor.model_validate({
            "name": "next-layer", "layers_ahead": 1, "held": more == 0, "unit_bytes": header.unit_bytes,
            "asks": f"{k + more} experts of a layer",
            "params": params, "params_share": params / model.params, "flop_per_token": 2.0 * params,
            **found._asdict()}))
    return rows


def _chosen(order: NDArray[np.uint16], count: int) -> NDArray[np.uint8]:
    """Packed bits of the first experts in an order of shape (tokens, layers, experts); none in the first layer."""
    mask = np.zeros(order.shape, np.bool_)
    np.put_along_axis(mask, order[..., :count].astype(np.int64), True, axis=-1)
    mask[:, 0] = False
    return np.packbits(mask, axis=-1, bitorder="little")
