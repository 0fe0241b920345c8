"""Which units does a real model touch, token by token, and what does leaving out the rest cost?

Thresholds are fitted on the dense model; the masks are recorded from the sparse model itself, every token
of which, the context included, ran without its inactive units. What is recorded goes to disk pass by pass,
so that a capture that is stopped can go on (`simmem.runtime.stream`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.runtime.experts import RouterHooks
from simmem.runtime.heading import identity_of, make_header
from simmem.runtime.hooks import FfnHooks, column_norms
from simmem.runtime.measure import WINDOW_TOKENS, perplexity, time_decode
from simmem.runtime.models import LoadedModel, load_network, machine_failures, require
from simmem.runtime.pages import MASS_LEVELS, PageHooks
from simmem.runtime.passes import Ids, PassRecord, Recorder, chooser, decode_pass, forced_pass
from simmem.runtime.predictors import (
    GUESSED,
    asked_perplexities,
    fit_predictors,
    masks_held,
    predictor_rows,
    with_predictors,
)
from simmem.runtime.quality import measure_quality, sparse_hooks
from simmem.runtime.request import MIN_TOKENS, Asked, Request
from simmem.runtime.stream import Arrays, Partial
from simmem.runtime.text import SourceText, TokenParts, default_text_path, read_text, split_tokens, tokenize
from simmem.runtime.thresholds import Progress, fit_levels, fit_threshold, fit_thresholds
from simmem.trace.curves import replay_document
from simmem.trace.statistics import trace_statistics
from simmem.trace.store import MAX_FILE_BYTES, MAX_METADATA_BYTES
from simmem.trace.trace import EXTRA_TENSORS, Trace

__all__ = [
    "MIN_TOKENS",
    "Progress",
    "capture",
    "capture_from",
    "default_text_path",
    "fit_threshold",
    "fit_thresholds",
    "perplexity",
    "record_masks",
    "recorder_of",
    "sparse_hooks",
    "time_decode",
]

_COUNTS = "page_counts"
"""Per token and layer: pages in sight, and those needed for each of `MASS_LEVELS`; kept in chunks, not in traces."""


def capture(model: str, text_path: Path, *, dtype: str = "fp32", device: str = "cpu", download: bool = False,
            partial: Path | None = None, resume: bool = False, threads: int | None = None,
            progress: Progress | None = None, **asked: Unpack[Asked]) -> Trace:
    """A trace of a model that runs here, on a text, with its thresholds, perplexities and timings.

    Parameters
    ----------
    model : built-in name ("smollm2-135m"), model folder, GGUF file or hub id.
    text_path : UTF-8 prose; its thirds serve for calibration, capture and evaluation.
    dtype, device, download : see `simmem.runtime.models.load_network`.
    partial : folder that keeps every finished pass; the caller discards it once the trace is safe. A temporary one
        when None.
    resume : go on with what that folder holds.
    threads : torch threads; None keeps torch's choice. The masks are reproducible at equal threads.
    progress : called with (what, share done).
    asked : what to capture, the fields of `simmem.runtime.request.Request`.

    Raises
    ------
    SpecError
        A field of the request, the text or the model is wrong; the model yields NaN; `partial` holds a capture of
        another request.
    MachineError
        A package, the weights or the device are missing, the disk is full, or memory ran out.
    """
    Request(**asked).check()
    if threads is not None and threads < 1:
        raise SpecError(f"found {threads}, expected at least 1", key="threads")
    text = read_text(text_path)
    require("torch", "transformers")
    say = progress or _silent
    with _torch_threads(threads), machine_failures(f"capturing from {model}"):
        say("loading the model", 0.0)
        loaded = load_network(model, dtype=dtype, device=device, download=download)
        return capture_from(loaded, text, partial=partial, resume=resume, progress=say, file=str(text_path), **asked)


def capture_from(model: LoadedModel, text: SourceText, *, partial: Path | None = None, resume: bool = False,
                 progress: Progress | None = None, file: str = "text", **asked: Unpack[Asked]) -> Trace:
    """`capture` for a model that is loaded and a text that is read (same parameters and errors)."""
    request = Request(**asked).resolved(model)
    say = progress or _silent
    stretch = request.context + (0 if request.decode else request.tokens)
    ids = tokenize(model, text.content)
    parts = split_tokens(ids, calibration=request.calibration_tokens if request.fitted else 0,
                         capture=request.batch * stretch, evaluation=request.evaluation_tokens, file=file)
    _check_size(model, request)
    with ExitStack() as stack:
        folder = partial or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="simmem-")))
        kept = Partial(folder, identity_of(model, ids, request), resume=resume)
        by_level = _thresholds(model, parts, request, kept, say)
        thresholds = None if request.level is None else by_level.get(request.level)
        if request.criterion == "relu-zero":
            thresholds = np.zeros(len(model.blocks), np.float32)
        fitted = fit_predictors(model, ids[:min(request.predictor_tokens or 0, ids.size // 3)], request, thresholds,
                                kept, say)
        recorder = with_predictors(model, recorder_of(model, request, thresholds), fitted)
        _record_passes(model, request, recorder, parts.capture.reshape(request.batch, -1), kept, say)
        quality = measure_quality(model, text, parts, request, by_level, kept, say)
        perplexities = asked_perplexities(model, request, fitted, parts.evaluation, kept, say)
        arrays = _assemble(request, model, kept)
    say("timing a short decode", 0.0)
    timings, timed = time_decode(model, parts.capture) if parts.capture.size > 1 else ({}, "")
    counts = arrays.pop(_COUNTS, None)
    active: NDArray[np.uint8] = arrays.pop("active")
    header = make_header(model, text, parts, request, active, quality, thresholds)
    trace = Trace(header, active)
    say("computing curves", 0.0)
    statistics = trace_statistics(trace)
    if "prefill" in arrays:
        union = np.bitwise_count(arrays["prefill"]).sum(axis=-1, dtype=np.int64).mean(axis=0) / header.n_units
        statistics["prefill"] = {"tokens": request.context, "prompts": int(arrays["prefill"].shape[0]),
                                 "union": float(union.mean()), "union_by_layer": union.tolist()}
    if counts is not None:
        statistics["pages_needed"] = _pages_needed(counts)
    predictors, questions = predictor_rows(model, trace, request, fitted, perplexities, arrays)
    if questions is not None:
        arrays["asked"] = questions
    return Trace.with_extras(header.model_copy(update={
        "predictors": predictors,
        "op_timings_s": timings,
        "host": "; ".join(part for part in (header.host, timed) if part),
        "statistics": statistics,
        "curves": tuple(replay_document(trace)["curves"]),
    }), active, {name: arrays[name] for name in EXTRA_TENSORS if name in arrays})


def record_masks(model: LoadedModel, ids: Ids, thresholds: NDArray[np.float32] | None, *, criterion: str,
                 context: int, window: int = WINDOW_TOKENS, top_k: int | None = None) -> NDArray[np.uint8]:
    """Packed masks of `ids[context:]` from the sparse model, shape (tokens, n_layers, ceil(n_units / 8)).

    Passes overlap: each starts `context` tokens before the first token that it records, so the recorded
    tokens are consecutive and every one sees at least `context` tokens before it.
    """
    recorder = _ffn_recorder(model, criterion, thresholds, top_k)
    step = window - context
    return np.concatenate([
        forced_pass(model, recorder, ids[None, first:first + window], context=context).active[0]
        for first in range(0, ids.size - context, step)])


def recorder_of(model: LoadedModel, request: Request, thresholds: NDArray[np.float32] | None) -> Recorder:
    """What a resolved request records, and from which hooks."""
    if request.unit == "expert":
        def routing(record: PassRecord) -> AbstractContextManager[Any]:
            def keep(index: int, logits: NDArray[np.float16], weights: NDArray[np.float16]) -> None:
                record.keep_rows("router_logits", index, logits)
                record.keep_rows("router_weights", index, weights)

            return RouterHooks(model, on_mask=record.keep_mask, on_routing=keep,
                               on_guess=lambda index, order: record.keep_rows(GUESSED, index, order))

        return Recorder(len(model.experts), model.experts[0].n_experts, routing)
    if request.unit == "kv-block":
        page, mass = request.page_tokens or 1, request.mass or 1.0
        n_pages = -(-(request.context + request.tokens) // page)

        def paged(record: PassRecord) -> AbstractContextManager[Any]:
            def keep(layer: int, mask: NDArray[np.bool_]) -> None:
                first = record.first // page  # pages count from the first pass on
                record.keep_mask(layer, np.pad(mask, ((0, 0), (first, n_pages - first - mask.shape[1]))))

            return PageHooks(model, page_tokens=page, mass=mass, apply=not request.observe, on_mask=keep,
                             on_counts=lambda layer, counts: record.keep_rows(_COUNTS, layer, counts))

        return Recorder(model.network.config.get_text_config().num_hidden_layers, n_pages, paged)
    return _ffn_recorder(model, str(request.criterion), thresholds, request.top_k(model), apply=not request.observe)


def _ffn_recorder(model: LoadedModel, criterion: str, thresholds: NDArray[np.float32] | None, top_k: int | None, *,
                  apply: bool = True) -> Recorder:
    norms = column_norms(model, criterion)
    return Recorder(len(model.blocks), model.n_units, lambda record: FfnHooks(
        model, criterion, thresholds=thresholds, top_k=top_k, on_mask=record.keep_mask, apply=apply,
        norms=norms))


def _thresholds(model: LoadedModel, parts: TokenParts, request: Request, kept: Partial, say: Progress
                ) -> dict[float, NDArray[np.float32]]:
    """Those of every level that is measured, of one pass over the calibration text; none where none are fitted."""
    if request.criterion == "relu-zero":
        FfnHooks(model, "relu-zero")  # refuses where there is no ReLU
    if not request.fitted:
        return {}
    levels, noted = request.measured_levels, kept.noted("thresholds")
    if noted is None:
        fitted = fit_levels(model, parts.calibration, criterion=str(request.criterion), sparsities=levels,
                            window=request.passes(model).window, progress=say)
        noted = {"by_level": [[float(t) for t in row] for row in fitted]}  # a float32 is exact in JSON
        kept.note("thresholds", noted)
    return {level: np.array(row, np.float32) for level, row in zip(levels, noted["by_level"], strict=True)}


def _record_passes(model: LoadedModel, request: Request, recorder: Recorder, ids: Ids, kept: Partial, say: Progress
                   ) -> None:
    """Run what is not kept yet, pass by pass; ids of shape (sequences, tokens)."""
    passes = request.passes(model)
    history = ids[:, :request.context]
    for index in range(passes.count):
        first, n = passes.span(index)
        arrays = kept.load_chunk(index)
        if arrays is None:
            if request.decode:
                choose = chooser(request.temperature, request.seed, index)
                record, written = decode_pass(model, recorder, history, n, choose, first=first)
                arrays = {**record.arrays(), "tokens": written.astype(np.int32)}
            else:
                record = forced_pass(model, recorder, ids[:, first:first + request.context + n], first=first,
                                     context=request.context)
                arrays = record.arrays()
            kept.save_chunk(index, arrays)
        if request.decode:  # the context of the next pass is what was written last
            history = np.concatenate((history, arrays["tokens"].astype(np.int64)), axis=1)[:, -request.context:]
        say("recording", (first + n) / passes.tokens)


def _assemble(request: Request, model: LoadedModel, kept: Partial) -> Arrays:
    """All chunks as one: sequence after sequence, each in order of its tokens."""
    passes = request.passes(model)
    joined: Arrays = {}
    for index in range(passes.count):
        chunk = kept.load_chunk(index)
        assert chunk is not None  # just recorded, or found whole
        first, _ = passes.span(index)
        for name, array in chunk.items():
            per_pass = name == "prefill"
            length, at = (passes.count, index) if per_pass else (passes.tokens, first)
            if name not in joined:
                joined[name] = np.empty((request.batch, length, *array.shape[2:]), array.dtype)
            joined[name][:, at:at + array.shape[1]] = array
    if request.unit == "kv-block":
        joined.pop("prefill", None)  # a prompt writes every page
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in joined.items()}


def _pages_needed(counts: NDArray[np.uint16]) -> dict[str, Any]:
    """Means over tokens and layers of the share of the pages in sight that each share of the mass needs."""
    shares = counts[..., 1:] / counts[..., :1]
    return {"in_sight": float(counts[..., 0].mean()),
            **{f"share_for_{100 * level:g}_percent": float(shares[..., i].mean())
               for i, level in enumerate(MASS_LEVELS)},
            "share_for_95_percent_by_layer": shares[..., MASS_LEVELS.index(0.95)].mean(axis=0).tolist()}


def _check_size(model: LoadedModel, request: Request) -> None:
    """Raise SpecError now, rather than after a long run, where the trace would not fit into a file."""
    if request.unit == "expert":
        n_layers, n_units, beside = len(model.experts), model.experts[0].n_experts, 4 * model.experts[0].n_experts
    elif request.unit == "kv-block":
        n_layers = model.network.config.get_text_config().num_hidden_layers
        n_units, beside = (request.context + request.tokens) // (request.page_tokens or 1) + 1, 0
    else:
        n_layers, n_units = len(model.blocks), model.n_units
        beside = masks_held(request) * -(-n_units // 8)
    most = (MAX_FILE_BYTES - MAX_METADATA_BYTES) // (n_layers * (-(-n_units // 8) + beside) + 8) // request.batch
    if request.tokens > most:
        raise SpecError(f"found {request.tokens}, but a trace file of this model holds at most {most} of each sequence",
                        key="tokens")


def _silent(_what: str, _share: float) -> None:
    """Progress of a caller who asked for none."""


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
