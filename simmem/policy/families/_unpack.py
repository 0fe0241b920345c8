"""What does an engine add that unpacks quantised weights before each product, instead of inside it?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from simmem.policy.ops import Ops
from simmem.schedule import OpKind

__all__ = ["unpacking"]

Amount = NDArray[np.float64] | float
UNPACKED_BYTES = 2.0
"""A parameter that takes fewer bytes than this in storage is packed. [B]"""


def unpacking(ops: Ops, agent: str, params: Mapping[str, Amount], kernels: Amount) -> tuple[int, str] | None:
    """The op that unpacks matrix parameters (tensor group → how many); None where the engine does it in its products.

    Its traffic is `dequantise_bytes` a parameter: the unpacked ones written, and read again by the product, which reads
    the packed ones too.
    """
    context = ops.context
    each = context.agent(agent).dequantise_bytes
    packed = [n for group, n in params.items() if context.stored_bytes_per_param(group)[0] < UNPACKED_BYTES]
    if each is None or not each.value or not packed:
        return None
    total = sum(packed, np.zeros(ops.builder.n_candidates))
    return ops.compute("unpack", OpKind.MEMORY, agent, 0.0, each.value * total, np.where(total > 0, kernels, 0.0))
