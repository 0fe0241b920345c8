"""What lies where when two units share every layer: which neurons and heads beside the one, which beside the other?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simmem.policy.layers import STREAM_CHUNK_BYTES
from simmem.runtime.execute.cache import padded
from simmem.runtime.execute.kernels import FfnRows, Pieces, Weights, matrix_of, torch_dtype, vector_of
from simmem.runtime.execute.layout import Stage, ffn_parts
from simmem.runtime.execute.staging import buffer, check_memory, stage_weights
from simmem.runtime.execute.task import HotTask
from simmem.runtime.execute.weights import WeightCheck
from simmem.runtime.reader import Store, in_chunks

if TYPE_CHECKING:
    import torch

__all__ = ["HotMemory", "Side", "check_hot_memory"]

Ints = NDArray[np.int64]
LOADED_UNITS = 4096
"""Neurons read at once."""
_NORMS = ("attention_norm", "ffn_norm")


@dataclass(frozen=True)
class Side:
    """What one of the two units has of a layer."""

    weights: Weights
    """Its heads' projections, the norms it needs, biases of its neurons in the order of their rows."""
    rows: torch.Tensor
    """(neurons, parts x d_model) a neuron's rows and columns side by side."""
    place: Ints
    """(units,) the row of each neuron; -1 where the other unit has it."""

    def gathered(self, index: torch.Tensor, room: torch.Tensor, parts: tuple[str, ...]) -> FfnRows:
        """The neurons of some rows (n,), copied side by side into `room`."""
        import torch

        n, width = len(index), self.rows.shape[1] // len(parts)
        torch.index_select(self.rows, 0, index, out=room[:n])
        held = room[: padded(n)]
        return FfnRows({part: held[:, place * width : (place + 1) * width] for place, part in enumerate(parts)},
                       np.arange(n), index=index)


def check_hot_memory(task: HotTask, device: torch.device) -> None:
    """Raise MachineError where a side has no room for what the plan says it holds."""
    context = task.candidate.context
    used = task.candidate.used_bytes()
    near, far = used[task.memory], used[context.device.host]
    if device.type == "cuda":
        check_memory(near, task.memory, device)
    else:
        far += near  # one memory stands for both
    check_memory(far + (task.layout.units.area_bytes if task.layout.units else 0), context.device.host)


class HotMemory:
    """Loads a network onto two units as a task says.

    Parameters
    ----------
    device : the one with a memory of its own; the processor is the other.
    check : told (offset, bytes) of all that is read; None: nothing is looked at.

    Raises
    ------
    MachineError
        The memory is not there, or reading failed.
    """

    def __init__(self, task: HotTask, store: Store, device: torch.device, *, check: WeightCheck | None = None) -> None:
        import torch

        layout = task.layout
        self.task, self.device = task, device
        self._store, self._check, self._cpu = store, check, torch.device("cpu")
        self._dtype = torch_dtype(layout.precision)
        fixed = self._stage(layout.fixed)
        self.fixed = {name: vector_of(value).to(device) for name, value in fixed.items() if name != "positions"}
        self.positions = matrix_of(fixed["positions"]) if "positions" in fixed else None
        self.near: list[Side] = []
        self.far: list[Side] = []
        for layer, (stage, heads) in enumerate(zip(layout.layers, task.heads.tolist(), strict=True)):
            whole, hot = self._stage(stage), task.hot[layer]
            rows = self._neurons(layer, hot)
            for sides, where, first, here, some in ((self.near, device, True, hot, rows[0]),
                                                    (self.far, self._cpu, False, ~hot, rows[1])):
                weights = self._cut(whole, heads, np.flatnonzero(here), where, first=first)
                sides.append(Side(weights, some, np.where(here, np.cumsum(here) - 1, -1)))
        head = self._stage(layout.head)
        self.head: Weights = {name: _moved(value, device) for name, value in head.items()}
        self.predictors = self._predictors()
        self._table: torch.Tensor | None = None
        slots = layout.embedding
        if slots is not None:
            self._table = self._elements(slots.offset, slots.area_bytes).view(slots.rows, -1)[:, : self._width]
        self._row = buffer(layout.unit_row_bytes, device, apart=False).pinned.view(self._dtype)

    @property
    def _width(self) -> int:
        return self.task.layout.architecture.d_model

    def embed(self, token_id: int, position: int, hidden: torch.Tensor) -> None:
        """Begin a token: its row of the embedding, and of the learned positions, which lie in host memory."""
        self._row.zero_()
        if self._table is not None:
            self._row.add_(self._table[token_id])
        if self.positions is not None:
            self._row.add_(self.positions[position])
        hidden[0].copy_(self._row, non_blocking=True)
        if self._table is None:  # it is the output projection's
            hidden[0].add_(matrix_of(self.head["head.weight"])[token_id])

    # --- loading --------------------------------------------------------------------------------

    def _cut(self, whole: Weights, heads: int, units: Ints, device: torch.device, *, first: bool) -> Weights:
        """What one side has of a layer.

        heads : that the first side has; the other has the rest.
        units : neurons that this side has.
        """
        import torch

        a = self.task.layout.architecture
        found: dict[str, torch.Tensor | Pieces] = {}
        for name in ("q", "k", "v"):
            cut = heads * a.d_head * (a.n_heads // a.n_kv_heads if name == "q" else 1)
            here = slice(0, cut) if first else slice(cut, None)
            rows = matrix_of(whole[f"{name}.weight"])[here]
            found[f"{name}.weight"] = ((0, len(rows), _copied(rows, device)),)
            if f"{name}.bias" in whole:
                found[f"{name}.bias"] = _copied(vector_of(whole[f"{name}.bias"])[here], device)
        cut = heads * a.d_head * (a.n_heads // a.n_kv_heads)
        columns = matrix_of(whole["o.weight"])[:, slice(0, cut) if first else slice(cut, None)]
        found["o.weight"] = ((0, len(columns), _copied(columns, device)),)
        for name in _NORMS:
            for what in ("weight", "bias"):
                if f"{name}.{what}" in whole:
                    found[f"{name}.{what}"] = _copied(vector_of(whole[f"{name}.{what}"]), device)
        for name in ffn_parts(a) if a.ffn_bias else ():
            bias = vector_of(whole[f"{name}.bias"])
            if name == "down":  # added once
                found["down.bias"] = _copied(bias if first else torch.zeros_like(bias), device)
            else:
                found[f"{name}.bias"] = _copied(bias[torch.from_numpy(units)], device)
        if first and "o.bias" in whole:  # added where both are joined
            found["joined.bias"] = _copied(vector_of(whole["o.bias"]), device)
        return found

    def _neurons(self, layer: int, hot: NDArray[np.bool_]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the hot and of the cold neurons of a layer, each in its memory."""
        import torch

        slots, layout = self.task.layout.units, self.task.layout
        assert slots is not None
        assert layout.bundled
        width = len(layout.parts) * self._width
        n_hot, element = int(hot.sum()), layout.element_bytes
        near = torch.zeros((n_hot, width), dtype=self._dtype, device=self.device)
        # In huge pages, as far as there are any.
        room = buffer((len(hot) - n_hot) * width * element, self._cpu, apart=False)
        far = room.pinned.view(self._dtype).view(len(hot) - n_hot, width)
        begun = [0, 0]
        for begin in range(0, len(hot), LOADED_UNITS):
            n = min(LOADED_UNITS, len(hot) - begin)
            read = self._elements(slots.area_offset(layer) + begin * slots.slot_bytes, n * slots.slot_bytes)
            rows = read.view(n, -1)[:, :width]
            for side, (into, here) in enumerate(((near, hot), (far, ~hot))):
                index = np.flatnonzero(here[begin : begin + n])
                into[begun[side] : begun[side] + len(index)].copy_(rows[torch.from_numpy(index)])
                begun[side] += len(index)
        return near, far

    def _predictors(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Two thin random matrices a layer, of as many parameters as the plan's predictor has."""
        import torch

        a, task = self.task.layout.architecture, self.task
        if not task.predictor_params:
            return []
        rank = max(round(task.predictor_params / (a.d_model + a.d_ff)), 1)
        how = {"dtype": self._dtype, "device": self.device}
        return [(torch.randn(rank, a.d_model, **how) / a.d_model, torch.randn(a.d_ff, rank, **how) / rank)
                for _ in task.layout.layers]

    def _stage(self, stage: Stage) -> Weights:
        import torch

        return stage_weights(stage, self._elements(stage.offset, stage.n_bytes).view(torch.uint8), None, 0,
                             self.task.layout.precision)

    def _elements(self, offset: int, n_bytes: int) -> torch.Tensor:
        """Bytes of the file, in host memory."""
        into = buffer(n_bytes, self._cpu, apart=False)
        asked = in_chunks(offset, n_bytes, int(STREAM_CHUNK_BYTES), into.host)
        self._store.submit(asked).wait()
        if self._check is not None:
            for start, size, place in zip(asked.offsets.tolist(), asked.sizes.tolist(), asked.places.tolist(),
                                          strict=True):
                self._check(start, asked.buffer[place : place + size])
        return into.pinned.view(self._dtype)


def _copied(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A dense copy in a device's memory, which keeps nothing else alive."""
    import torch

    return torch.empty(values.shape, dtype=values.dtype, device=device).copy_(values)


def _moved(value: torch.Tensor | Pieces, device: torch.device) -> torch.Tensor | Pieces:
    if isinstance(value, tuple):
        return tuple((first, last, rows.to(device)) for first, last, rows in value)
    return value.to(device)
