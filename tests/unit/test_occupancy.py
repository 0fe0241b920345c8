"""Waves and caches: what the formulas say, what a simulated cache does, and that neither acts without its figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmem.cost.occupancy import cached_rate, hit_share, wave_factor
from simmem.cost.roofline import durations
from simmem.schedule import DemandClass, OpKind, Products
from simmem.spec.base import Bytes, BytesPerSecond, Count, Seconds
from simmem.spec.device import Device
from tests.unit.test_roofline import DEVICE, fig, one


def gpu_with(**figures: object) -> Device:
    return DEVICE.model_copy(update={
        "agent": {**DEVICE.agent, "gpu": DEVICE.agent["gpu"].model_copy(update=figures)}})


def test_a_last_wave_that_is_nearly_empty_costs_a_whole_one() -> None:
    assert float(wave_factor(128 * 12, 128 * 11, 4096, 132)) == 1.0
    assert float(wave_factor(128 * 19, 128 * 7, 4096, 132)) == pytest.approx(264 / 133)
    assert float(wave_factor(1, 128 * 33, 64, 132)) == 4.0  # nothing to split: three of four processors idle
    assert float(wave_factor(1, 128 * 33, 4096, 132)) == 1.0  # four pieces a tile


@given(st.integers(1, 5000), st.integers(1, 50000), st.integers(1, 20000), st.integers(1, 200))
def test_waves_never_make_a_product_faster(m: int, n: int, k: int, processors: int) -> None:
    assert 1.0 <= float(wave_factor(m, n, k, processors)) <= processors


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.2, 1.5, 2.0, 4.0])
def test_a_loop_hits_as_often_as_in_a_simulated_cache(ratio: float) -> None:
    """500 blocks, evicted at random, under 60 rounds of a loop."""
    rng, n_blocks = np.random.default_rng(1), 500
    place, holds = np.full(int(ratio * n_blocks), -1), np.full(n_blocks, -1)
    hits, filled = 0, 0
    for turn in range(60):
        for block in range(len(place)):
            if place[block] >= 0:
                hits += turn >= 20
                continue
            slot = filled if filled < n_blocks else int(rng.integers(n_blocks))
            filled += filled < n_blocks
            if holds[slot] >= 0:
                place[holds[slot]] = -1
            holds[slot], place[block] = block, slot
    assert float(hit_share(ratio, 1.0)) == pytest.approx(hits / (40 * len(place)), abs=0.02)
    assert float(cached_rate(ratio, 2.0, 1.0, 10.0)) >= 2.0


def test_the_cost_of_an_op_uses_them_only_where_the_agent_states_the_figures() -> None:
    shape = Products(1.0, 64.0, 1.0)
    small = DemandClass("ffn", OpKind.COMPUTE, agent="gpu", precision="fp16", products=shape)
    flop = 2.0 * 64 * 128 * 33
    plain = one(small, flop=flop, bytes={"memory.vram": 1e3}, requests=0.0)
    took = float(durations(plain, DEVICE).occupancy_s[0, 0])
    assert took == flop / 20e12
    waves = gpu_with(processors=Count.model_validate(fig(132)))
    assert float(durations(plain, waves).occupancy_s[0, 0]) == pytest.approx(4 * took)
    moving = one(small, bytes={"memory.vram": 1e6})
    cached = gpu_with(cache=Bytes.model_validate(fig("2 MB")), cache_rate=BytesPerSecond.model_validate(fig("2 TB/s")))
    assert float(durations(moving, DEVICE).occupancy_s[0, 0]) == pytest.approx(5e-6)
    assert float(durations(moving, cached).occupancy_s[0, 0]) == pytest.approx(0.5e-6)
    assert float(durations(one(small, bytes={"memory.vram": 1e9}), cached).occupancy_s[0, 0]) == pytest.approx(5e-3)


def test_graphs_and_attention_have_figures_of_their_own_where_there_are_any() -> None:
    device = gpu_with(graph_overhead=Seconds.model_validate(fig("1 us")),
                      attention_rate=BytesPerSecond.model_validate(fig("10 GB/s")))
    graph = DemandClass("attention", OpKind.COMPUTE, agent="gpu", precision="fp16", launch="graph")
    attention = DemandClass("attention", OpKind.COMPUTE, agent="gpu", precision="fp16", rate="attention")
    for schedule, there, absent in ((one(graph, requests=6.0), 6e-6, 30e-6),
                                    (one(attention, bytes={"memory.vram": 1e9}), 0.1, 5e-3)):
        assert float(durations(schedule, device).occupancy_s[0, 0]) == pytest.approx(there)
        assert float(durations(schedule, DEVICE).occupancy_s[0, 0]) == pytest.approx(absent)
