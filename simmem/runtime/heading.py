"""What does a captured trace say of itself: which units, what they weigh, who could have known them, what ran?"""

from __future__ import annotations

import hashlib
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from simmem.runtime.hooks import matrices_read_first
from simmem.runtime.models import LoadedModel
from simmem.runtime.pages import page_values
from simmem.runtime.request import Request
from simmem.runtime.text import SourceText, TokenParts
from simmem.spec.precision import matrix_bytes_per_param
from simmem.trace.trace import Captured, Quality, TraceHeader, Unit, digest_of

__all__ = ["UNIT_PRECISION", "identity_of", "make_header"]

UNIT_PRECISION = "fp16"
_SAMPLED_VALUES = 256


def identity_of(model: LoadedModel, ids: NDArray[np.int64], request: Request) -> dict[str, Any]:
    """Everything that decides the bits of a capture of a text's tokens, as plain data for JSON.

    The weights enter by name, shape and up to 256 evenly spaced values of every parameter: quick, and different for
    models that differ by training or rounding.
    """
    import torch

    hasher = hashlib.sha256()
    for name, parameter in model.network.named_parameters():
        flat = parameter.detach().reshape(-1)
        some = flat[::max(1, flat.numel() // _SAMPLED_VALUES)].float().cpu().numpy()
        hasher.update(f"{name} {tuple(parameter.shape)}".encode() + some.tobytes())
    text = hashlib.sha256(ids.tobytes()).hexdigest()
    return {"model": model.name, "weights": hasher.hexdigest(), "text": text, **request.identity(),
            "dtype": model.dtype, "device": str(model.device), "host": _host(model), "versions": _versions(),
            "instructions": torch.backends.cpu.get_cpu_capability()}


def make_header(model: LoadedModel, text: SourceText, parts: TokenParts, request: Request,
                active: NDArray[np.uint8], quality: Quality, thresholds: NDArray[np.float32] | None) -> TraceHeader:
    """The header of a finished capture; `active` has shape (n_tokens, n_layers, ceil(n_units / 8))."""
    unit, n_units, unit_bytes, rule, predictor, share = _unit_of(model, request, parts)
    start, context = parts.capture_start, request.context
    stretches = f"{request.batch} stretches of {request.context + request.tokens} tokens from {start} on"
    where = (f"tokens {start + context} to {start + context + request.tokens - 1}" if request.batch == 1 else stretches)
    if request.decode:
        where = (f"{request.tokens} tokens that the model wrote" + ("" if request.batch == 1 else " in each stretch")
                 + f" behind {context} tokens from {start} on")
    passes = request.passes(model)
    return TraceHeader(
        name=f"{model.name}-{request.label}",
        kind="captured",
        model=model.name,
        n_tokens=active.shape[0],
        n_layers=active.shape[1],
        n_units=n_units,
        unit=unit,
        unit_bytes=unit_bytes,
        unit_precision=UNIT_PRECISION,
        criterion={"expert": "router", "kv-block": "attention-mass"}.get(unit) or str(request.criterion),
        threshold=rule,
        records="active",
        predictor=predictor,
        predictor_params_share=share,
        quality=quality,
        text=f"{text.title}; {where}, {request.mode}, at least {context} tokens of context",
        text_licence=text.licence,
        captured=Captured(
            mode=request.mode, applied=not request.observe, sequences=request.batch, context_tokens=context,
            pass_tokens=passes.step, dtype=model.dtype, device=str(model.device),
            layers=_layers(model, unit), thresholds=() if thresholds is None else tuple(map(float, thresholds)),
            page_tokens=request.page_tokens, temperature=request.temperature if request.decode else None,
            seed=request.seed if request.decode and request.temperature else None),
        host=_host(model),
        versions=_versions(),
        created=datetime.now(UTC).date().isoformat(),
        digest=digest_of(active),
    )


def _unit_of(model: LoadedModel, request: Request, parts: TokenParts
             ) -> tuple[Unit, int, float, str, Literal["none", "gate", "oracle"], float]:
    """Unit, units of a layer, bytes of one, what makes one active, who knows it beforehand and that one's parameters
    as a share of the model's."""
    each = matrix_bytes_per_param(UNIT_PRECISION)
    if request.unit == "expert":
        block = model.experts[0]
        return "expert", block.n_experts, block.expert_params * each, "the experts that the router chose", "none", 0.0
    if request.unit == "kv-block":
        page, mass = request.page_tokens or 1, request.mass or 1.0
        rule = (f"the fewest pages of {page} tokens that hold {100 * mass:g} % of a token's attention mass, mean over "
                "heads, and its own page")
        n_pages = -(-(request.context + request.tokens) // page)
        return "kv-block", n_pages, page * page_values(model) * each, rule, "oracle", 0.0
    matrices, first = 3 if model.gated else 2, matrices_read_first(str(request.criterion), model.gated)
    known = request.skip == "known"
    params = first * len(model.blocks) * model.n_units * model.d_model
    if request.fitted:
        share = 100 * (request.sparsity or 0.0)
        rule = (f"per layer, score above the {share:g} % quantile of the dense model's scores on "
                f"{parts.calibration.size} calibration tokens")
    else:
        rule = "not zero" if request.criterion == "relu-zero" else (
            f"the {request.top_k(model)} units of a layer with the highest scores, each token")
    return ("ffn-neuron", model.n_units, (matrices - first if known else matrices) * model.d_model * each, rule,
            "gate" if known else "oracle", params / model.params if known else 0.0)


def _layers(model: LoadedModel, unit: Unit) -> tuple[int, ...]:
    """Which of the model's layers have experts, where not all do."""
    layers = tuple(block.layer for block in model.experts) if unit == "expert" else ()
    total = model.network.config.get_text_config().num_hidden_layers
    return () if len(layers) in (0, total) else layers


def _host(model: LoadedModel) -> str:
    import torch

    here = f"{_cpu_model()}, {torch.get_num_threads()} torch thread(s)"
    return here if model.device.type == "cpu" else f"{torch.cuda.get_device_name(model.device)}; {here}"


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
