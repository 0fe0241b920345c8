"""Is resident decode at batch 1 where it was measured, with figures that other measurements gave?"""

from __future__ import annotations

import pytest

from simmem.policy.ops import ATTENTION_KERNELS
from simmem.spec import load_device
from simmem.validation.reference import reproduce

MEASURED_US = {
    "h100-sxm": {"7b": (4.0, 37.6, 4.0, 16.05, 4.0, 64.4, 6.4, 38.3, 1.05),
                 "70b": (6.3, 62.75, 4.0, 48.45, 6.0, 311.5, 15.3, 170.7, 1.4)},
    "a100-80g": {"7b": (5.0, 65.7, 5.45, 24.85, 5.0, 115.7, 7.0, 60.15, 2.0),
                 "70b": (8.0, 110.3, 6.25, 92.25, 8.0, 578.85, 21.8, 290.85, 2.0)}}
"""Mean times of the kernels of a layer of Llama-2 at one token, attention over the context apart: norm, q-k-v,
position, output, norm, gate and up, activation, down, residual (microsoft/vidur data/profiling/compute, num_tokens 1,
one GPU)."""
LAYER_PARAMS = {"7b": 4 * 4096 * 4096 + 3 * 4096 * 11008, "70b": 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672}
KERNELS = 2 * ATTENTION_KERNELS - 2
"""What is counted of such a layer without its attention over the context: 7 of 8 there, 7 of the FFN."""


def test_every_row_is_within_its_tolerance() -> None:
    found = reproduce(["resident-decode"])
    assert [(r.id, r.error, r.message) for r in found.failed] == []
    judged = [r for r in found.rows if r.expect == "judged"]
    assert len(judged) >= 12
    assert all(r.tolerance == 0.08 for r in judged if r.system in ("TensorRT-LLM", "LLMServingSim"))


@pytest.mark.parametrize("name", MEASURED_US)
def test_a_measured_layer_of_a_small_model_and_of_a_large_one(name: str) -> None:
    """The share of the memory rate is what more bytes take; launches alone explain what is left.

    One account for both sizes, which neither a share of the rate without a constant nor a constant beside the rate of
    a copy would be.
    """
    gpu, times = load_device(name).agent["gpu"], MEASURED_US[name]
    rate = gpu.rate.value * gpu.rate_share.value
    more = {size: 2.0 * LAYER_PARAMS[size] / rate for size in times}
    assert more["70b"] - more["7b"] == pytest.approx((sum(times["70b"]) - sum(times["7b"])) * 1e-6, rel=2e-3)
    for size, each in times.items():
        assert more[size] + KERNELS * gpu.op_overhead.value == pytest.approx(sum(each) * 1e-6, rel=0.02), size
