"""Do the reads of neurons bring the wanted ones, each where its matrices are then looked for?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simmem.runtime.execute.cache import padded
from simmem.runtime.execute.layout import Layout, Slots, Stage
from simmem.runtime.execute.units import unit_reads
from simmem.spec.model import load_model

BLOCK, LAYERS, PARTS = 4096, 2, ("gate", "up", "down")
MODEL = load_model("smollm2-135m").architecture


def layout_of(units: int, *, bundled: bool) -> Layout:
    stage = Stage(0, 3 * BLOCK, ())
    slots = Slots(3 * BLOCK, units, LAYERS * (1 if bundled else 3), BLOCK)
    return Layout(MODEL, "drawn", "bf16", BLOCK, PARTS, bundled, stage, (stage,) * LAYERS, stage, slots, None,
                  slots.offset + slots.areas * slots.area_bytes)


def one_by_one(layout: Layout, layer: int, new: list[int], gap_units: int | None) -> tuple[list[int], list[list[int]]]:
    """Units in the order of the buffer, and (offset, size, place) of every read, said unit by unit."""
    assert layout.units is not None
    runs: list[list[int]] = []
    for unit in new:
        if runs and gap_units is not None and unit - runs[-1][-1] <= gap_units + 1:
            runs[-1] += range(runs[-1][-1] + 1, unit + 1)
        else:
            runs.append([unit])
    found, place = [], 0
    for area in range(layout.areas_per_layer):
        for run in runs:
            start = layout.units.area_offset(layer * layout.areas_per_layer + area) + run[0] * BLOCK
            found.append([start, len(run) * BLOCK, place])
            place += len(run) * BLOCK
    return [unit for run in runs for unit in run], found


@pytest.mark.parametrize("bundled", [True, False])
@given(st.integers(1, 40), st.data())
def test_every_unit_lies_where_it_is_looked_for(bundled: bool, n_units: int, data: st.DataObject) -> None:
    layout = layout_of(n_units, bundled=bundled)
    layer = data.draw(st.integers(0, LAYERS - 1))
    new = sorted(data.draw(st.sets(st.integers(0, n_units - 1))))
    gap = data.draw(st.none() | st.integers(0, 3))
    room = torch.zeros((3 * n_units + 16) * BLOCK, dtype=torch.uint8)
    read = unit_reads(layout, layer, np.array(new, np.int64), room.numpy(), gap)
    spanned, reads = one_by_one(layout, layer, new, gap)
    assert read.spanned.tolist() == spanned
    assert np.stack(read.asked[:3], axis=1).tolist() == reads
    assert new == (read.spanned if read.index is None else read.spanned[read.index]).tolist()

    file = torch.arange(layout.n_bytes // 2, dtype=torch.int32).mul_(7).to(torch.int16)  # no two rows are alike
    for offset, size, place in reads:
        room[place : place + size] = file.view(torch.uint8)[offset : offset + size]

    def row(unit: int, part: int) -> torch.Tensor:
        assert layout.units is not None
        area, column = (layer, part) if bundled else (3 * layer + part, 0)
        start = (layout.units.area_offset(area) + unit * BLOCK) // 2 + column * MODEL.d_model
        return file[start : start + MODEL.d_model]

    rows = read.rows(room, layout)
    for part, name in enumerate(PARTS):
        assert rows.parts[name].shape == (padded(len(spanned)), MODEL.d_model)
        for i, unit in enumerate(spanned):
            assert torch.equal(rows.parts[name][i].view(torch.int16), row(unit, part))
    cached = torch.zeros((len(new), 3 * MODEL.d_model), dtype=torch.bfloat16)
    for piece in read.new_rows(room, layout):
        cached[:, piece.columns] = piece.rows if piece.index is None else piece.rows[torch.from_numpy(piece.index)]
    for i, unit in enumerate(new):
        assert torch.equal(cached[i].view(torch.int16), torch.cat([row(unit, part) for part in range(3)]))
