"""What does a model cost and how well does it predict? Perplexity on a text, and seconds by kind of op.

Both run whatever hooks the caller has entered: with masks applied, the perplexity is that of the sparse model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.runtime.models import LoadedModel
from simmem.runtime.passes import windows

__all__ = ["TIMED_PROMPT_TOKENS", "TIMED_STEPS", "WINDOW_TOKENS", "perplexity", "time_decode"]

WINDOW_TOKENS = 1024
"""Tokens of one pass; the perplexities of shared prose are quoted at this window."""

TIMED_PROMPT_TOKENS = 64
TIMED_STEPS = 32
WARM_UP_STEPS = 4
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_LOGITS_CHUNK_TOKENS = 256


def perplexity(model: LoadedModel, ids: NDArray[np.int64], *, window: int = WINDOW_TOKENS) -> tuple[float, int]:
    """exp of the mean negative log-likelihood per predicted token, and how many were predicted.

    The text is cut into windows without overlap; the first token of each is not predicted.
    """
    import torch

    total, count = 0.0, 0
    for part in windows(ids, window):
        if part.size < 2:
            continue
        with torch.inference_mode():
            inputs = torch.from_numpy(np.ascontiguousarray(part))[None].to(model.device)
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

    blocks = model.blocks or model.experts
    if any(block.attention is None for block in blocks):
        return {}, ""
    ids = ids[:model.max_positions]
    prompt = min(prompt, ids.size // 2)
    steps = min(steps, ids.size - prompt)
    spent = {"attention": 0.0, "ffn": 0.0}
    started = 0.0

    def now() -> float:
        if model.device.type == "cuda":  # kernels are only queued
            torch.cuda.synchronize(model.device)
        return time.perf_counter()

    def before(_module: Any, _inputs: Any) -> None:
        nonlocal started
        started = now()

    def after(kind: str) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, _output: Any) -> None:
            spent[kind] += now() - started
        return hook

    handles = []
    for block in blocks:
        for kind, modules in (("attention", (block.attention,)), ("ffn", block.ffn_modules)):
            for module in modules:
                assert module is not None  # checked above
                handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after(kind))]
    rows: list[tuple[float, float, float]] = []
    try:
        with torch.inference_mode():
            inputs = torch.from_numpy(np.ascontiguousarray(ids))[None].to(model.device)
            cache = model.network(input_ids=inputs[:, :prompt], use_cache=True).past_key_values
            for step in range(steps):
                spent["attention"] = spent["ffn"] = 0.0
                begin = now()
                token = inputs[:, prompt + step:prompt + step + 1]
                cache = model.network(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
                whole = now() - begin
                rows.append((spent["attention"], spent["ffn"], whole - spent["attention"] - spent["ffn"]))
    finally:
        for handle in handles:
            handle.remove()
    counted = rows[WARM_UP_STEPS:] or rows
    medians = np.median(np.array(counted), axis=0)
    dtype = _DTYPES.get(model.dtype, model.dtype)
    return (dict(zip(("attention", "ffn", "other"), map(float, medians), strict=True)),
            f"op timings: dense {dtype} decode, batch 1, median of {len(counted)} steps after {prompt} tokens")
