"""Which reads bring the neurons that a layer needs, and where do their rows then lie?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simmem.runtime.execute.cache import NewRows, padded
from simmem.runtime.execute.kernels import FfnRows, torch_dtype
from simmem.runtime.execute.layout import Layout, Slots
from simmem.runtime.reader import Reads, reads

if TYPE_CHECKING:
    import torch

__all__ = ["UnitReads", "cache_parts", "unit_reads"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class UnitReads:
    """Reads of some neurons of a layer, and what of the buffer is theirs."""

    asked: Reads
    spanned: Ints
    """Units that the reads bring, in the order of the buffer: those in merged gaps too."""
    index: Ints | None
    """Which of them were wanted, where not all."""

    def matrices(self, buffer: torch.Tensor, layout: Layout) -> Mapping[str, torch.Tensor]:
        """Part → (padded(spanned), d_model) in the buffer; rows behind the spanned ones are of no meaning."""
        assert layout.units is not None
        width, n = layout.unit_row_bytes // layout.element_bytes, len(self.spanned)
        slots = buffer.view(torch_dtype(layout.precision)).view(-1, layout.units.slot_bytes // layout.element_bytes)
        found = {}
        for place, part in enumerate(layout.parts):
            area, column = (0, place) if layout.bundled else (place, 0)
            found[part] = slots[area * n : area * n + padded(n), column * width : (column + 1) * width]
        return found

    def new_rows(self, buffer: torch.Tensor, layout: Layout) -> list[NewRows]:
        """What the cache appends."""
        assert layout.units is not None
        width, n = layout.unit_row_bytes // layout.element_bytes, len(self.spanned)
        slots = buffer.view(torch_dtype(layout.precision)).view(-1, layout.units.slot_bytes // layout.element_bytes)
        if layout.bundled:
            whole = len(layout.parts) * width
            return [NewRows(slice(0, whole), slots[:n, :whole], self.index)]
        return [NewRows(slice(place * width, (place + 1) * width), slots[place * n : (place + 1) * n, :width],
                        self.index) for place in range(len(layout.parts))]

    def rows(self, buffer: torch.Tensor, layout: Layout) -> FfnRows:
        """The neurons where they were read, for a product that keeps none of them."""
        mask = None
        if self.index is not None:
            import torch

            wanted = np.zeros(padded(len(self.spanned)), np.float32)
            wanted[self.index] = 1.0
            mask = torch.from_numpy(wanted).to(buffer.device, torch_dtype(layout.precision))
        return FfnRows(self.matrices(buffer, layout), self.spanned, mask)


def unit_reads(layout: Layout, layer: int, new: Ints, buffer: NDArray[np.uint8], gap_units: int | None) -> UnitReads:
    """Reads of the units `new` (ascending) of a layer into `buffer`.

    Parameters
    ----------
    gap_units : reads are merged across so many units that are not wanted; None: every unit is read by itself.
    """
    assert layout.units is not None
    slot, areas = layout.units.slot_bytes, layout.areas_per_layer
    bases, *alike = _prepared(layout.units, areas)
    if gap_units is None or len(new) == 0:  # all of one size: right after other work every call counts
        sizes, places = (values[: areas * len(new)] for values in alike)
        asked, spanned, index = Reads((bases[layer] + new * slot).ravel(), sizes, places, buffer), new, None
    else:
        edges = np.flatnonzero(np.diff(new) > gap_units + 1) + 1
        first, last = np.r_[0, edges], np.r_[edges, len(new)] - 1
        starts, spans = new[first], new[last] - new[first] + 1
        before = np.cumsum(spans) - spans
        spanned = np.arange(spans.sum()) + np.repeat(starts - before, spans)
        index = np.searchsorted(spanned, new)
        asked = reads((bases[layer] + starts * slot).ravel(), np.tile(spans * slot, areas), buffer)
    return UnitReads(asked, spanned, index)


@lru_cache(maxsize=8)
def _prepared(units: Slots, areas: int) -> tuple[Ints, Ints, Ints]:
    """Where areas begin, (layers, areas per layer, 1); sizes and places of reads of single slots, for a whole layer."""
    bases = units.offset + np.arange(units.areas) * units.area_bytes
    sizes = np.full(areas * units.rows, units.slot_bytes)
    places = np.cumsum(sizes) - sizes
    for values in (bases, sizes, places):
        values.flags.writeable = False
    return bases.reshape(-1, areas, 1), sizes, places


def cache_parts(layout: Layout, rows: torch.Tensor, n: int) -> Mapping[str, torch.Tensor]:
    """Part → (padded(n), d_model) of a cache's rows."""
    d = layout.architecture.d_model
    return {part: rows[: padded(n), place * d : (place + 1) * d] for place, part in enumerate(layout.parts)}
