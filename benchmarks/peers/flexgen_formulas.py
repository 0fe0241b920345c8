"""FlexGen's cost model in our words: throughput of a policy by the formulas of its paper and the constants of its code.

FlexGen, arXiv 2303.06865, §4.3 and appendix A.3. A block of b sequences (GPU batches times their size) with a prompt of
s tokens and n new ones passes through l layers of width h and FFN width f:

    T = l · (T_prompt + (n − 1) · T_step),    throughput = b · n / T
    T_prompt = max(to GPU + from disk, to host + to disk, products)
    T_step   = to GPU + max(to host, from disk, to disk, products + attention)

Copies carry the weights, states and activations that do not live where they are needed. In the code that ships with it
(experimental/cost_model.py @004ffef82b46) the CPU attends to all states that the GPU does not hold, and the rates below
were fitted by gradient descent to whole runs on its T4 node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Constants", "Policy", "tokens_per_s"]

GIB = float(1 << 30)


@dataclass(frozen=True)
class Policy:
    """Shares of weights, of keys and values, and of activations on (GPU, host); the rest is on disk."""

    weights: tuple[float, float]
    states: tuple[float, float]
    activations: tuple[float, float]
    gpu_batch: int
    n_gpu_batches: int


@dataclass(frozen=True)
class Constants:
    """FlexGen's fitted rates for its T4 node. [B/s, flop/s]"""

    to_gpu: float = 12.89 * GIB
    states_to_host: float = 0.97 * GIB
    activations_to_host: float = 4.82 * GIB
    from_disk: float = 0.473 * GIB
    prompt_states_to_disk: float = 0.746 * GIB
    to_disk: float = 2.015 * GIB
    prompt_products: float = 21.24e12
    step_products: float = 4.3e12
    prompt_attention: float = 9.97e12
    step_attention: float = 0.079e12
    cpu: float = 0.0123e12
    corrections: tuple[float, float, float] = (0.0168, 0.0328, 0.0621)
    """Of the CPU's rate, for small GPU batches and narrow models."""
    weights_from_disk_share: float = 0.95


def tokens_per_s(layers: int, width: int, ffn: int, prompt: int, new: int, policy: Policy,
                 at: Constants | None = None) -> float:
    """Generated tokens a second, prompt included, at fp16."""
    c = at or Constants()
    b = policy.gpu_batch * policy.n_gpu_batches
    disk = {name: 1.0 - sum(getattr(policy, name)) for name in ("weights", "states", "activations")}
    layer = 8.0 * width**2 + 4.0 * width * ffn  # bytes, and products' flop of a token
    away = 1.0 - policy.weights[0]
    states_off, activations_off = 1.0 - policy.states[0], 1.0 - policy.activations[0]
    one, both = 2.0 * width * b, 4.0 * width * b  # activations, keys and values of one token of every sequence. [B]

    to_gpu = (layer * away + one * prompt * activations_off) / c.to_gpu
    to_host = both * (prompt + 1) * states_off / c.states_to_host + one * prompt * activations_off / (
        c.activations_to_host)
    from_disk = (layer * disk["weights"] + one * prompt * disk["activations"]) / c.from_disk
    to_disk = both * (prompt + 1) * disk["states"] / c.prompt_states_to_disk + (
        one * prompt * disk["activations"] / c.to_disk)
    products = b * prompt * layer / c.prompt_products + both * prompt**2 / c.prompt_attention
    t_prompt = max(to_gpu + from_disk, to_host + to_disk, products)

    seen = prompt + new / 2
    narrow, small = max(0.0, math.log2(4096 / width)), max(0.0, math.log2(64 / policy.gpu_batch))
    c1, c2, c3 = c.corrections
    cpu = c.cpu * max(0.1, 1 + c1 * small * narrow - c2 * small - c3 * narrow)
    copies = (layer * away + one * activations_off) / c.to_gpu
    t_step = copies + max(
        one * activations_off / c.activations_to_host,
        (both * seen * disk["states"] + one * disk["activations"]) / c.from_disk
        + layer * disk["weights"] / (c.weights_from_disk_share * c.from_disk),
        (both * disk["states"] + one * disk["activations"]) / c.to_disk,
        b * layer / c.step_products + both * seen * policy.states[0] / c.step_attention
        + both * seen * states_off / cpu)
    return b * new / (layers * (t_prompt + (new - 1) * t_step))
