"""Plans of tiny networks, ready to be executed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simmem.planner.candidate import Candidate, blocks
from simmem.policy.base import policy_named
from simmem.policy.context import Context, Replayed
from simmem.runtime.models import LoadedModel, find_blocks
from simmem.spec.device import Device, load_device
from simmem.spec.model import Model, load_model
from simmem.spec.workload import Workload
from simmem.trace.trace import Trace, TraceHeader, digest_of
from tests.runtime import tiny

CONTEXT = 20
STREAM = {"agent": "cpu", "source_tier": "storage", "prefetch_layers": 0, "resident_ratio": 0.4, "reader_threads": 4}
HOT = {"agent": "gpu", "placement": "frequency", "kv_cache": "host"}
WINDOW = {"agent": "cpu", "prefetch_layers": 0, "bundled": True, "coalesce": False, "window_tokens": 3,
          "attention_resident": 1.0, "reader_threads": 4}


def unified(**flash: str) -> Device:
    """A processor with one memory, and a drive in front of it."""
    device = load_device("cloud-vm")
    link = device.link["flash"]
    figures = {name: getattr(link, name).model_copy(update={"value": value}) for name, value in flash.items()}
    return device.model_copy(update={"link": {**device.link, "flash": link.model_copy(update=figures)}})


def long_network(family: str, positions: int) -> LoadedModel:
    """A tiny network that takes a longer text."""
    import torch
    import transformers

    prefix, shape = tiny.DENSE[family][:2]
    config = getattr(transformers, f"{prefix}Config")(**{**shape, "max_position_embeddings": positions})
    torch.manual_seed(7)
    network = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    return LoadedModel(family, network, tiny.tokenizer, find_blocks(network, family))


def spec_of(network: LoadedModel, folder: Path) -> Model:
    """What the planner knows of a network, from the configuration that transformers writes."""
    folder.mkdir(exist_ok=True)
    network.network.config.to_json_file(folder / "config.json")
    return load_model(str(folder / "config.json"))


def trace_of(bits: np.ndarray, model: Model, *, parts: int | None = None, predictor: str = "oracle") -> Trace:
    """A trace of (tokens, layers, units) whose unit has so many matrices; those left out are known first."""
    active = np.packbits(bits, axis=2, bitorder="little")
    matrices = parts or model.unit_matrices
    return Trace(TraceHeader.model_validate({
        "name": "drawn", "kind": "captured", "model": model.name, "n_tokens": bits.shape[0],
        "n_layers": bits.shape[1], "n_units": bits.shape[2], "unit_bytes": 4.0 * matrices * model.architecture.d_model,
        "unit_precision": "fp32", "criterion": "drawn", "threshold": "none", "records": "active",
        "predictor": predictor, "text": "none", "predictor_params_share": 0.0 if predictor == "oracle" else 0.1,
        "digest": digest_of(active)}), active)


def drawn(model: Model, tokens: int, seed: int = 0) -> np.ndarray:
    """Activity with favourites, so that windows both hit and miss."""
    rng = np.random.default_rng(seed)
    a = model.architecture
    often = rng.random((a.n_layers, a.d_ff)) ** 3
    return rng.random((tokens, a.n_layers, a.d_ff)) < 0.8 * often


def context_of(model: Model, *, trace: Trace | None = None, device: Device | None = None, weights: str = "fp32",
               dram: float | None = None) -> Context:
    """A short text on a device, within its memory or less of it."""
    device = device or unified()
    budget = {name: memory.budget_bytes for name, memory in device.memory.items()}
    if dram is not None:
        budget[device.host] = dram
    workload = Workload(CONTEXT // 2, CONTEXT, 1, weights, weights)
    return Context(device, model, workload, Replayed(trace, longest_window=4) if trace else None, budget)


def candidate(model: Model, policy: str, knobs: dict[str, object], *, trace: Trace | None = None,
              device: Device | None = None, weights: str = "fp32", dram: float | None = None) -> Candidate:
    """The one candidate with these knobs."""
    return candidate_in(context_of(model, trace=trace, device=device, weights=weights, dram=dram), policy, knobs)


def candidate_in(context: Context, policy: str, knobs: dict[str, object]) -> Candidate:
    """The same in a context that is there."""
    if context.trace is not None:
        knobs = {"predictor": context.trace.header.predictor, **knobs}
    found = list(blocks(policy_named(policy), context, knobs))
    assert len(found) == 1 and found[0].n_candidates == 1
    return Candidate(context, policy_named(policy), found[0])


def shared(model: Model, trace: Trace, near: float, *, weights: str = "fp32", **changes: object) -> Candidate:
    """A hot-cold plan whose GPU holds a share `near` of attention and neurons."""
    context = context_of(model, trace=trace, device=load_device("rtx4090-pc"), weights=weights)
    size = next(k for k in policy_named("hot-cold").knobs(context) if k.name == "gpu_weight_bytes")
    assert size.low is not None
    assert size.high is not None
    return candidate_in(context, "hot-cold",
                        {**HOT, **changes, "gpu_weight_bytes": size.low + near * (size.high - size.low)})
