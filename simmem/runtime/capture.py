"""Which FFN units does a real model touch, token by token, and what does leaving out the rest cost?

Teacher-forced: one causal pass over prose gives the masks that a token-by-token decode of the same
text gives, many times faster. Thresholds are fitted on the dense model; the masks are recorded from
the sparse model itself, every token of which, the context included, ran without its inactive units.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.runtime.hooks import FfnHooks, check_criterion
from simmem.runtime.models import LoadedModel, load_network, machine_failures, require
from simmem.runtime.text import SourceText, TokenParts, default_text_path, read_text, split_tokens, tokenize
from simmem.spec.precision import matrix_bytes_per_param
from simmem.trace.curves import replay_document
from simmem.trace.statistics import trace_statistics
from simmem.trace.trace import Quality, Trace, TraceHeader, digest_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "Progress",
    "capture",
    "capture_from",
    "default_text_path",
    "fit_threshold",
    "fit_thresholds",
    "perplexity",
    "record_masks",
    "time_decode",
]

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done."""

WINDOW_TOKENS = 1024
"""Tokens of one pass; the perplexities of shared prose are quoted at this window."""

MIN_TOKENS = 8
"""Fewer have no cold start apart from a steady state, so no curves."""

UNIT_PRECISION = "fp16"
TIMED_PROMPT_TOKENS = 64
TIMED_STEPS = 32
WARM_UP_STEPS = 4
_LOGITS_CHUNK_TOKENS = 256


def capture(model: str, text_path: Path, *, criterion: str = "wina", sparsity: float = 0.5, tokens: int = 512,
            context: int = 512, calibration_tokens: int = 3072, evaluation_tokens: int = 2048,
            threads: int | None = None, progress: Progress | None = None) -> Trace:
    """A trace of a model that runs here, on a text, with its thresholds, perplexities and timings.

    Parameters
    ----------
    model : built-in name ("smollm2-135m"), model folder or GGUF file.
    text_path : UTF-8 prose; its thirds serve for calibration, capture and evaluation.
    criterion : "wina", "magnitude" or "gate" (see `simmem.runtime.hooks.CRITERIA`).
    sparsity : share of units to leave out on the calibration part, in (0, 1).
    tokens, context : tokens recorded, and how many precede the first of them at least (not recorded).
    calibration_tokens, evaluation_tokens : tokens that fit the thresholds and that judge them.
    threads : torch threads; None keeps torch's choice. The masks are reproducible at equal threads.
    progress : called with (what, share done).

    Raises
    ------
    SpecError
        Criterion, sparsity, a count, the text or the model is wrong; the model yields NaN.
    MachineError
        A package or the weights are missing, or memory ran out.
    """
    _check_request(criterion, sparsity, tokens, context, calibration_tokens, evaluation_tokens, threads)
    text = read_text(text_path)
    require("torch", "transformers")
    say = progress or _silent
    with _torch_threads(threads), machine_failures(f"capturing from {model}"):
        say("loading the model", 0.0)
        loaded = load_network(model)
        return capture_from(loaded, text, criterion=criterion, sparsity=sparsity, tokens=tokens, context=context,
                            calibration_tokens=calibration_tokens, evaluation_tokens=evaluation_tokens,
                            progress=say, file=str(text_path))


def capture_from(model: LoadedModel, text: SourceText, *, criterion: str = "wina", sparsity: float = 0.5,
                 tokens: int = 512, context: int = 512, calibration_tokens: int = 3072,
                 evaluation_tokens: int = 2048, progress: Progress | None = None, file: str = "text") -> Trace:
    """`capture` for a model that is loaded and a text that is read (same parameters and errors)."""
    _check_request(criterion, sparsity, tokens, context, calibration_tokens, evaluation_tokens, None)
    window = min(WINDOW_TOKENS, model.max_positions)
    if context >= window:
        raise SpecError(f"found {context}, expected fewer than the {window} tokens of one pass", key="context")
    say = progress or _silent
    parts = split_tokens(tokenize(model, text.content), calibration=calibration_tokens, capture=context + tokens,
                         evaluation=evaluation_tokens, file=file)
    thresholds = fit_thresholds(model, parts.calibration, criterion=criterion, sparsity=sparsity, window=window,
                                progress=say)
    active = record_masks(model, parts.capture, thresholds, criterion=criterion, context=context, window=window,
                          progress=say)
    say("measuring perplexity", 0.0)
    dense, predicted = perplexity(model, parts.evaluation, window=window)
    say("measuring perplexity", 0.5)
    with FfnHooks(model, criterion, thresholds=thresholds):
        sparse, _ = perplexity(model, parts.evaluation, window=window)
    quality = Quality(text=f"{text.title}, last third", tokens=predicted, dense_perplexity=dense,
                      sparse_perplexity=sparse)
    say("timing a short decode", 0.0)
    timings, timed = time_decode(model, parts.capture)
    header = _header(model, text, parts, active, quality, criterion=criterion, sparsity=sparsity, context=context)
    trace = Trace(header, active)
    say("computing curves", 0.0)
    return Trace(header.model_copy(update={
        "op_timings_s": timings,
        "host": "; ".join(part for part in (header.host, timed) if part),
        "statistics": trace_statistics(trace),
        "curves": tuple(replay_document(trace)["curves"]),
    }), active)


def fit_threshold(scores: NDArray[np.float32], sparsity: float) -> float:
    """The score that the share `sparsity` of `scores` does not exceed; reorders `scores`.

    A unit is active when its score is greater, so exactly round(sparsity·n) are not, ties aside. Where
    more than that share are zero already (ReLU), the threshold is zero and only zeros are left out.
    """
    rank = min(max(round(sparsity * scores.size), 1), scores.size) - 1
    scores.partition(rank)
    return float(scores[rank])


def fit_thresholds(model: LoadedModel, ids: NDArray[np.int64], *, criterion: str, sparsity: float,
                   window: int = WINDOW_TOKENS, progress: Progress | None = None) -> NDArray[np.float32]:
    """One threshold per layer, shape (n_layers,), fitted on the dense model's scores for `ids`.

    Holds one float32 per (token, layer, unit): 0.57 GB for 3072 tokens of SmolLM2-135M.

    Raises
    ------
    SpecError
        A layer's scores are not finite.
    """
    n_units = model.n_units
    scores = [np.empty((ids.size, n_units), dtype=np.float32) for _ in model.blocks]
    done = 0

    def keep(layer: int, chunk: NDArray[np.float32]) -> None:
        scores[layer][done:done + chunk.shape[0]] = chunk

    with FfnHooks(model, criterion, on_scores=keep):
        for part in _windows(ids, window):
            _run(model, part)
            done += part.size
            if progress:
                progress("fitting thresholds", done / ids.size)
    thresholds = np.empty(len(scores), dtype=np.float32)
    for layer, values in enumerate(scores):
        if not np.isfinite(values).all():
            raise SpecError(f"yields NaN or infinite activations in layer {layer}", file=model.name)
        thresholds[layer] = fit_threshold(values.reshape(-1), sparsity)
    return thresholds


def record_masks(model: LoadedModel, ids: NDArray[np.int64], thresholds: NDArray[np.float32], *, criterion: str,
                 context: int, window: int = WINDOW_TOKENS, progress: Progress | None = None) -> NDArray[np.uint8]:
    """Packed masks of `ids[context:]` from the sparse model, shape (tokens, n_layers, ceil(n_units / 8)).

    Passes overlap: each starts `context` tokens before the first token that it records, so the recorded
    tokens are consecutive and every one sees at least `context` tokens before it.
    """
    tokens = ids.size - context
    active = np.zeros((tokens, len(model.blocks), -(-model.n_units // 8)), dtype=np.uint8)
    first = 0

    def keep(layer: int, mask: NDArray[np.bool_]) -> None:
        recorded = mask[context:]
        active[first:first + recorded.shape[0], layer] = np.packbits(recorded, axis=1, bitorder="little")

    with FfnHooks(model, criterion, thresholds=thresholds, on_mask=keep):
        while first < tokens:
            part = ids[first:first + window]
            _run(model, part)
            first += part.size - context
            if progress:
                progress("recording masks", first / tokens)
    return active


def perplexity(model: LoadedModel, ids: NDArray[np.int64], *, window: int = WINDOW_TOKENS) -> tuple[float, int]:
    """exp of the mean negative log-likelihood per predicted token, and how many were predicted.

    The text is cut into windows without overlap; the first token of each is not predicted.
    """
    import torch

    total, count = 0.0, 0
    for part in _windows(ids, window):
        if part.size < 2:
            continue
        with torch.inference_mode():
            inputs = torch.from_numpy(part)[None]
            logits = model.network(input_ids=inputs, use_cache=False).logits[0]
            for start in range(0, part.size - 1, _LOGITS_CHUNK_TOKENS):
                stop = min(start + _LOGITS_CHUNK_TOKENS, part.size - 1)
                total += float(torch.nn.functional.cross_entropy(
                    logits[start:stop].float(), inputs[0, start + 1:stop + 1], reduction="sum"))
        count += part.size - 1
    result = math.exp(total / count) if total / count < 700 else math.inf
    if not math.isfinite(result):
        raise SpecError("yields logits whose perplexity is not finite", file=model.name)
    return result, count


def time_decode(model: LoadedModel, ids: NDArray[np.int64], *, prompt: int = TIMED_PROMPT_TOKENS,
                steps: int = TIMED_STEPS) -> tuple[dict[str, float], str]:
    """Median seconds per step of attention, FFN and everything else in a real dense decode, batch 1. [s]

    A KV-cached decode of `ids`, no units left out; the first steps warm up and are not counted. Returns the
    timings and, in words, what they hold for; both are empty where the attention cannot be told apart.
    """
    import torch

    if any(block.attention is None for block in model.blocks):
        return {}, ""
    ids = ids[:model.max_positions]
    prompt = min(prompt, ids.size // 2)
    steps = min(steps, ids.size - prompt)
    spent = {"attention": 0.0, "ffn": 0.0}
    started = 0.0

    def before(_module: Any, _inputs: Any) -> None:
        nonlocal started
        started = time.perf_counter()

    def after(kind: str) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, _output: Any) -> None:
            spent[kind] += time.perf_counter() - started
        return hook

    handles = []
    for block in model.blocks:
        for kind, modules in (("attention", (block.attention,)), ("ffn", block.ffn_modules)):
            for module in modules:
                assert module is not None  # checked above
                handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after(kind))]
    rows: list[tuple[float, float, float]] = []
    try:
        with torch.inference_mode():
            inputs = torch.from_numpy(ids)[None]
            cache = model.network(input_ids=inputs[:, :prompt], use_cache=True).past_key_values
            for step in range(steps):
                spent["attention"] = spent["ffn"] = 0.0
                begin = time.perf_counter()
                token = inputs[:, prompt + step:prompt + step + 1]
                cache = model.network(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
                whole = time.perf_counter() - begin
                rows.append((spent["attention"], spent["ffn"], whole - spent["attention"] - spent["ffn"]))
    finally:
        for handle in handles:
            handle.remove()
    counted = rows[WARM_UP_STEPS:] or rows
    medians = np.median(np.array(counted), axis=0)
    return (dict(zip(("attention", "ffn", "other"), map(float, medians), strict=True)),
            f"op timings: dense fp32 decode, batch 1, median of {len(counted)} steps after {prompt} tokens")


def _silent(_what: str, _share: float) -> None:
    """Progress of a caller who asked for none."""


def _run(model: LoadedModel, ids: NDArray[np.int64]) -> None:
    """One causal pass over the decoder, without its output head."""
    import torch

    with torch.inference_mode():
        last: torch.Tensor = model.network.base_model(input_ids=torch.from_numpy(ids)[None], use_cache=False)[0]
        if not bool(torch.isfinite(last).all()):
            raise SpecError("yields NaN or infinite activations", file=model.name)


def _windows(ids: NDArray[np.int64], window: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, ids.size, window):
        yield ids[start:start + window]


def _header(model: LoadedModel, text: SourceText, parts: TokenParts, active: NDArray[np.uint8], quality: Quality,
            *, criterion: str, sparsity: float, context: int) -> TraceHeader:
    import torch
    import transformers

    # The gate itself tells which rows of up and columns of down are needed, once it has been read whole.
    by_gate = criterion == "gate"
    matrices = (3 if model.gated else 2) - (1 if by_gate else 0)
    gate_params = len(model.blocks) * model.n_units * model.d_model
    predictor: Literal["gate", "oracle"] = "gate" if by_gate else "oracle"
    start = parts.capture_start
    return TraceHeader(
        name=f"{model.name}-{criterion}-{100 * sparsity:g}",
        kind="captured",
        model=model.name,
        n_tokens=active.shape[0],
        n_layers=active.shape[1],
        n_units=model.n_units,
        unit_bytes=matrices * model.d_model * matrix_bytes_per_param(UNIT_PRECISION),
        unit_precision=UNIT_PRECISION,
        criterion=criterion,
        threshold=f"per layer, score above the {100 * sparsity:g} % quantile of the dense model's scores on "
                  f"{parts.calibration.size} calibration tokens",
        records="active",
        predictor=predictor,
        predictor_params_share=gate_params / model.params if by_gate else 0.0,
        quality=quality,
        text=f"{text.title}; tokens {start + context} to {start + context + active.shape[0] - 1}, "
             f"teacher-forced, at least {context} tokens of context",
        text_licence=text.licence,
        host=f"{_cpu_model()}, {torch.get_num_threads()} torch thread(s)",
        versions={"torch": torch.__version__, "transformers": transformers.__version__,
                  "python": platform.python_version()},
        created=datetime.now(UTC).date().isoformat(),
        digest=digest_of(active),
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


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


def _check_request(criterion: str, sparsity: float, tokens: int, context: int, calibration_tokens: int,
                   evaluation_tokens: int, threads: int | None) -> None:
    check_criterion(criterion)
    if not 0.0 < sparsity < 1.0:  # also false for NaN
        raise SpecError(f"found {sparsity!r}, expected a share between 0 and 1, both excluded", key="sparsity")
    for key, value, least in (("tokens", tokens, MIN_TOKENS), ("context", context, 0),
                              ("calibration_tokens", calibration_tokens, 1),
                              ("evaluation_tokens", evaluation_tokens, 2), ("threads", threads, 1)):
        if value is not None and value < least:
            raise SpecError(f"found {value}, expected at least {least}", key=key)
