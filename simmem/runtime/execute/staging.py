"""Where in memory do weights lie while they are used: what stays, and the buffers that the rest passes through?

A stage is kept up to a block and streamed from there on. A matrix that the border cuts has two pieces; the row that it
cuts stays whole, so that nothing is put together again for each token.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simmem.errors import MachineError
from simmem.runtime.execute.kernels import Pieces, Weights, torch_dtype
from simmem.runtime.execute.layout import Stage, whole_blocks
from simmem.runtime.reader import page_buffer
from simmem.units import format_quantity

if TYPE_CHECKING:
    import torch

__all__ = ["Buffer", "available_bytes", "buffer", "check_memory", "kept_bytes", "stage_weights"]


@dataclass(frozen=True)
class Buffer:
    """Memory that reads go into, and where it is computed on; the same thing where the two share their memory."""

    host: NDArray[np.uint8]
    near: torch.Tensor
    """uint8, on the computing device."""
    pinned: torch.Tensor
    """`host` as a tensor, for copies."""

    def part(self, begin: int, end: int) -> Buffer:
        """Some of its bytes. [B]"""
        return Buffer(self.host[begin:end], self.near[begin:end], self.pinned[begin:end])


def buffer(n_bytes: int, device: torch.device, *, apart: bool) -> Buffer:
    """A buffer of whole pages; `apart`: what is read there has to be copied to the computing device. [B]"""
    import torch

    if device.type == "cuda":
        pinned = torch.zeros(max(n_bytes, 1), dtype=torch.uint8, pin_memory=True)
        host = pinned.numpy()
    else:
        host = page_buffer(n_bytes)
        pinned = torch.from_numpy(host)
    return Buffer(host, torch.zeros(n_bytes, dtype=torch.uint8, device=device) if apart else pinned, pinned)


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say. [B]"""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    try:
        return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, AttributeError):
        return None


def check_memory(needed_bytes: float, tier: str, device: torch.device | None = None) -> None:
    """Raise MachineError where so much memory cannot be had, on a GPU where `device` is one. [B]"""
    available = available_bytes()
    if device is not None and device.type == "cuda":
        import torch

        available = int(torch.cuda.mem_get_info(device)[0])
    if available is not None and needed_bytes > available:
        raise MachineError(f"the run takes {format_quantity(needed_bytes, 'bytes')} of memory, "
                           f"{format_quantity(available, 'bytes')} are available", tier=tier,
                           missing_bytes=float(needed_bytes - available))


def kept_bytes(stage: Stage, streamed: int, block_bytes: int) -> int:
    """What of a stage has to be kept when its last `streamed` bytes are not, in whole blocks. [B]"""
    if streamed >= stage.n_bytes:
        return 0
    border = stage.n_bytes - streamed
    ends = [t.offset + _rows_before(t.offset, t.row_bytes, t.n_bytes, border) * t.row_bytes for t in stage.tensors
            if t.offset < border]
    return min(whole_blocks(max(ends, default=0), block_bytes), stage.n_bytes)


def _rows_before(offset: int, row_bytes: int, n_bytes: int, border: int) -> int:
    """Rows of a tensor that begin before the border."""
    return min(max(-(-(border - offset) // row_bytes), 0), n_bytes // row_bytes)


def stage_weights(stage: Stage, kept: torch.Tensor, streamed: torch.Tensor | None, streamed_bytes: int,
                  precision: str) -> Weights:
    """Views of a stage's tensors.

    Parameters
    ----------
    kept : uint8, the first `kept_bytes` of the stage.
    streamed : uint8, its last `streamed_bytes`; None where nothing is streamed. [B]
    """
    border = stage.n_bytes - streamed_bytes
    found: dict[str, torch.Tensor | Pieces] = {}
    for tensor in stage.tensors:
        width = tensor.row_bytes
        rows = tensor.n_bytes // width
        here = _rows_before(tensor.offset, width, tensor.n_bytes, border)
        pieces = []
        for memory, start, first, last in ((kept, tensor.offset, 0, here),
                                           (streamed, tensor.offset + here * width - border, here, rows)):
            if first < last:
                assert memory is not None
                pieces.append((first, last, _view(memory, start, (last - first) * width, precision)))
        if len(tensor.shape) == 1:
            found[tensor.name] = pieces[0][2]
        else:
            found[tensor.name] = tuple((first, last, flat.view(last - first, -1)) for first, last, flat in pieces)
    return found


def _view(memory: torch.Tensor, start: int, n_bytes: int, precision: str) -> torch.Tensor:
    return memory[start : start + n_bytes].view(torch_dtype(precision))
