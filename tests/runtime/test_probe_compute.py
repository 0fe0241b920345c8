"""Do the probes of products, rows, interference and the GPU run what they say, on the bytes they say?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from simmem.cost.holdout import family, held_out
from simmem.cost.interference import kept_shares
from simmem.errors import MachineError
from simmem.runtime.probe import agents, cuda, gather, interference, matmul, watched
from simmem.runtime.probe.base import Case, NotHereError, Setting
from simmem.runtime.probe.shapes import BATCH, Product, Shape, decoder_shapes, products, random_shapes
from simmem.spec.measurement import Measurement

KIB, MIB = 1 << 10, 1 << 20
TINY = Setting(quick=True, threads=2, cache_bytes=512 * KIB, memory_bytes=32 * MIB)


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # One try a sample: whether the cores were ours is tested apart, and a busy machine would take four times as long.
    monkeypatch.setattr(watched, "Undisturbed", partial(agents.Undisturbed, tries=1))
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before
    assert not torch.is_inference_mode_enabled()


# --- which products -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "batch", "flop", "n_bytes"), [
    ("fp32", 1, 30, 4 * (15 + 5 + 3)),
    ("fp32", 2, 60, 4 * (15 + 10 + 6)),
    ("bf16", 2, 60, 2 * (15 + 10 + 6)),
    ("int8", 4, 120, 15 + 20 + 4 * 12),  # sums in int32
    ("fp8", 16, 480, 15 + 80 + 2 * 48),  # results in bf16
])
def test_flop_and_bytes_by_hand(dtype: str, batch: int, flop: float, n_bytes: float) -> None:
    assert matmul.product_demand(Product(Shape(3, 5), batch, dtype, 1)) == (flop, n_bytes)


def test_decoder_shapes_are_those_of_the_checkpoints() -> None:
    found = set(decoder_shapes())
    opt_125m = {(768, 768), (3072, 768), (768, 3072), (50272, 768)}
    llama_3_8b = {(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096)}
    mixtral_8x7b_expert = {(14336, 4096), (4096, 14336)}
    assert opt_125m | llama_3_8b | mixtral_8x7b_expert <= found
    assert all(s.rows * s.cols <= 10**6 for s in decoder_shapes(10**6))


def test_random_shapes_repeat_no_pair_of_sides() -> None:
    decoder = decoder_shapes()
    found = random_shapes(300, other_than=decoder)
    assert len({frozenset(s) for s in found} - {frozenset(s) for s in decoder}) == 300
    assert found == random_shapes(300, other_than=decoder)
    assert all(side % 64 == 0 and 256 <= side <= 16384 for s in found for side in s)


def test_products_spread_over_batches_and_ways() -> None:
    ways = [("fp32", 1), ("bf16", 2), ("bf16", 1), ("fp32", 2)]
    found = list(products(random_shapes(200), ways, ways_each=2, max_flop=3e9))
    batches = np.array([p.batch for p in found if p.batch > 1])
    assert {(p.dtype, p.threads) for p in found if p.batch == 1} == set(ways)
    assert BATCH[0] <= batches.min() and batches.max() <= BATCH[1]
    assert np.histogram(np.log2(batches), bins=[1, 3, 5, 7, 10])[0].min() > len(batches) / 10
    assert max(2 * p.shape.rows * p.shape.cols * p.batch for p in found) <= 3e9


def test_enough_shapes_are_held_out_and_none_is_on_both_sides() -> None:
    full = matmul.cases(Setting(quick=False, threads=2, memory_bytes=1 << 31))
    points = [_point(case) for case in full]
    kept = held_out(points)
    shapes = [(p.conditions["rows"], p.conditions["cols"]) for p in points]
    here, there = ({s for s, k in zip(shapes, kept, strict=True) if k == side} for side in (True, False))
    assert len(here) >= 200 <= len(there)
    assert here.isdisjoint(there)
    assert here.isdisjoint({s[::-1] for s in there}), "a matrix and its transpose"
    # Which side is a property of the shape: not of the order, nor of what else was measured.
    assert (held_out(points[::-2]) == kept[::-2]).all()
    assert (held_out(points, salt="another") != kept).any()


def test_what_is_no_product_is_not_held_out() -> None:
    read = Measurement(probe="storage-read", conditions={"size_bytes": 4096}, samples_s=(1.0,))
    assert family(read) is None
    assert not held_out([read] * 3, share=1.0).any()


# --- weights from memory --------------------------------------------------------------------------------------------


def test_every_byte_comes_back_after_four_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = MIB
    pool, touched = matmul.Pool(cache, 64 * MIB), list[tuple[int, int]]()
    real = torch.mm

    def mm(x: torch.Tensor, w: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        assert w.data_ptr() % 64 == 0
        touched.append((w.data_ptr(), w.numel() * w.element_size()))
        return real(x, w, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    cases = [matmul.product_case(Product(Shape(*sides), 1, "fp32", 1), pool, agents.Cpu())
             for sides in ((256, 128), (640, 512), (512, 1024), (256, 128), (1024, 1024), (64, 64))]
    for case in (*cases, *cases):
        with case.setup() as run:
            run()
    assert sum(size for _, size in touched) > 10 * pool.weight_bytes
    base, grain = min(address for address, _ in touched), 64 * 64 * 4  # every matrix is whole grains
    last: dict[int, int] = {}  # by grain: how many bytes had been read when it was read last
    read = 0
    for address, size in touched:
        assert (address - base) % grain == size % grain == 0
        first = (address - base) // grain
        for at in range(first, first + size // grain):  # a matrix is read from its beginning
            now = read + (at - first) * grain
            assert at not in last or now - last[at] >= 4 * cache
            last[at] = now
        read += size


def test_a_pool_says_what_it_cannot_rotate() -> None:
    pool = matmul.Pool(MIB, 64 * MIB)
    assert pool.rotates(Shape(1024, 1024), "fp32")
    assert not pool.rotates(Shape(4096, 4096), "fp32"), "larger than the pool"
    with pytest.raises(NotHereError):
        pool.weights(Shape(4096, 4096), "fp32")
    # 8 MiB hold one matrix of 5 MiB: it would meet itself again after 5 MiB, which is enough; one of 3 MiB too.
    assert [pool.weight_bytes, pool.rotates(Shape(1280, 1024), "fp32"), pool.rotates(Shape(768, 1024), "fp32")] == [
        8 * MIB, True, True]
    assert matmul.cases(Setting(quick=True, threads=1, cache_bytes=64 * MIB, memory_bytes=64 * MIB)) == []


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2), ("fp16", 2e-3), ("int8", 0.0)])
@pytest.mark.parametrize("graph", [False, True])
def test_the_product_is_the_product(dtype: str, tolerance: float, graph: bool) -> None:
    pool = matmul.Pool(256 * KIB, 8 * MIB)
    product = Product(Shape(192, 320), 32, dtype, 1)
    weights = pool.weights(product.shape, dtype)
    at = {w.data_ptr(): w for w in weights.matrices}
    pool.results(32, 192, dtype).fill_(77)
    case = matmul.product_case(product, pool, agents.Cpu(), graph=graph)
    with case.setup() as run:
        assert run() > 0
        out = pool.results(32, 192, dtype).double()
        used = next(w for w in at.values() if w.data_ptr() == pool._last.matrices[pool._last._at].data_ptr())
    wanted = pool.activations(32, 320, dtype).double() @ used.double()
    assert float((out - wanted).norm() / wanted.norm()) <= tolerance


# --- rows -----------------------------------------------------------------------------------------------------------


def test_gathered_and_scattered_rows_are_numpys() -> None:
    random = np.random.default_rng(0)
    for n, rows, width in ((1, 5, 3), (7, 40, 16), (64, 64, 33)):
        table = random.normal(size=(rows, width)).astype(np.float32)
        index = random.choice(rows, n, replace=False)
        into = torch.full((n, width), np.nan)
        gather.gather_rows(torch.from_numpy(table), torch.from_numpy(index), into)
        assert (into.numpy() == table[index]).all()
        new, wanted = random.normal(size=(n, width)).astype(np.float32), table.copy()
        wanted[index] = new
        gather.scatter_rows(torch.from_numpy(new), torch.from_numpy(index), scattered := torch.from_numpy(table.copy()))
        assert (scattered.numpy() == wanted).all()


def test_replaced_rows_leave_the_table_compact() -> None:
    random = np.random.default_rng(1)
    table, n = random.normal(size=(50, 8)).astype(np.float32), 6
    holes = random.choice(44, n, replace=False)
    new = random.normal(size=(n, 8)).astype(np.float32)
    now = torch.from_numpy(table.copy())
    whole = now.view(torch.uint8).numpy().view("V32")[:, 0]
    gather.replace_rows(now, whole, np.sort(holes), np.arange(44, 50), torch.from_numpy(new))
    kept = np.delete(table, holes, axis=0)
    assert sorted(map(tuple, now.numpy()[:44])) == sorted(map(tuple, kept))
    assert (now.numpy()[44:] == new).all()
    untouched = np.setdiff1d(np.arange(44), holes)
    assert (now.numpy()[untouched] == table[untouched]).all()


# --- every case runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Setting]:
    path = tmp_path / "scratch"
    path.write_bytes(os.urandom(16 * MIB))
    fd = os.open(path, os.O_RDONLY)
    yield Setting(quick=True, threads=2, cache_bytes=64 * KIB, memory_bytes=256 * MIB, scratch_fd=fd,
                  scratch_bytes=16 * MIB, scratch_direct=True)
    os.close(fd)


def _run_each(cases: list[Case]) -> None:
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        with case.setup() as run:
            seconds = run()
            assert seconds is not None and seconds > 0, case.key


def _point(case: Case) -> Measurement:
    return Measurement(probe=case.probe, conditions=dict(case.conditions), flop=case.flop, bytes=case.bytes,
                       samples_s=(1.0,))


def test_products_run() -> None:
    _run_each(matmul.cases(TINY))


@pytest.mark.slow
def test_products_of_a_full_run_run() -> None:
    _run_each(matmul.cases(replace(TINY, quick=False)))


def test_products_say_all_that_a_fit_needs() -> None:
    cases = matmul.cases(replace(TINY, quick=False))
    said = {"agent", "rows", "cols", "batch", "dtype", "threads", "level", "working_set_bytes"}
    for case in cases:
        c = case.conditions
        assert set(c) - {"reference"} == said
        assert case.probe == ("gemv" if c["batch"] == 1 else "gemm")
        assert case.flop == 2 * c["rows"] * c["cols"] * c["batch"]
        assert (int(c["working_set_bytes"]) >= 4 * TINY.cache_bytes) == (c["level"] == "dram")
    assert {c.conditions["level"] for c in cases} == {"dram", "cache"}
    assert {c.conditions["threads"] for c in cases} == {1, 2}
    assert {c.conditions["dtype"] for c in cases} == {"fp32", "bf16", "int8", "fp16"}


def test_rows_run() -> None:
    cases = gather.cases(Setting(quick=True, threads=2, cache_bytes=64 * KIB, memory_bytes=64 * MIB))
    _run_each(cases)
    assert {c.probe for c in cases} == {"gather", "scatter", "upkeep"}
    one = next(c for c in cases if c.probe == "upkeep" and c.conditions["rows"] == 16)
    assert one.bytes == 4 * 16 * int(one.conditions["row_bytes"]), "two copies a row, each read and written"
    assert gather.cases(TINY) == [], "no room for four caches and two calls"


def test_interference_runs_and_needs_direct_reads(scratch: Setting) -> None:
    cases = interference.cases(replace(scratch, quick=False))
    _run_each(cases)
    short = {c.key for c in interference.cases(scratch)}
    assert len(short) == 4 and short < {c.key for c in cases}, "the pair that figures rest on, in every run"
    assert {(c.conditions["victim"], c.conditions["aggressor"]) for c in cases} == {
        ("gemv", "none"), ("gemv", "memory-copy"), ("gemv", "storage-read"), ("storage-read", "none"),
        ("storage-read", "gemv")}
    without = Setting(quick=False, threads=1, cache_bytes=64 * KIB, memory_bytes=256 * MIB)
    assert {c.conditions["aggressor"] for c in interference.cases(without)} == {"none", "memory-copy"}


def test_an_aggressor_that_fails_is_not_taken_for_a_quiet_one(scratch: Setting) -> None:
    gone = os.open("/dev/null", os.O_WRONLY)
    cases = interference.cases(replace(scratch, scratch_fd=gone))
    case = next(c for c in cases if c.conditions["aggressor"] == "storage-read")
    with pytest.raises(OSError), case.setup() as run:
        run()
    os.close(gone)


def test_what_runs_on_a_gpu_runs_here() -> None:
    cases = cuda.agent_cases(Setting(quick=True, threads=1, memory_bytes=8 * MIB), agents.Cpu(), cache_bytes=64 * KIB,
                             memory_bytes=8 * MIB)
    runs, absent = [], set()
    for case in cases:
        try:
            _run_each([case])
            runs.append(case)
        except NotHereError:
            absent.add(case.conditions["dtype"])
    assert absent <= {"fp8", "int8"}, "what a CPU may lack"
    assert {c.probe for c in runs} == {"memory-read", "memory-copy", "host-to-device", "device-to-host", "both-ways",
                                       "launch", "overlap", "gemv", "gemm"}
    assert {c.conditions["dtype"] for c in runs if c.probe == "gemm"} >= {"fp32", "tf32", "bf16", "fp16"}
    assert {c.conditions["launch"] for c in runs if c.probe == "launch"} == {"stream", "graph", "waited"}
    assert len({c.key for c in cases}) == len(cases)


def test_transfers_move_the_bytes_they_say() -> None:
    buffers = cuda._Buffers(agents.Cpu(), host_bytes=64 * KIB, device_bytes=64 * KIB)
    for probe, source, target in ((cuda.HOST_TO_DEVICE, buffers.host(pinned=True), buffers.device()),
                                  (cuda.DEVICE_TO_HOST, buffers.device(), buffers.host(pinned=True))):
        source.copy_(torch.randint(0, 255, (64 * KIB,), dtype=torch.uint8))
        target.zero_()
        cuda._copier(probe, buffers, 4096, pinned=True)(5)
        assert (target[5 * 4096:6 * 4096] == source[5 * 4096:6 * 4096]).all()
        assert not target[:5 * 4096].any()
        assert not target[6 * 4096:].any()


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.cases(Setting(quick=True, threads=1)) == []
    with pytest.raises(MachineError, match="no CUDA GPU"):
        cuda.cases(Setting(quick=True, threads=1, device="cuda"))


@pytest.mark.parametrize(("cores", "why"), [(0.1, None), (1.3, "other programs kept 1.3 cores busy")])
def test_interference_by_other_programs_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch, cores: float,
                                                              why: str | None) -> None:
    monkeypatch.setattr(interference, "Load", lambda: SimpleNamespace(others=lambda: {"cores_used_by_others": cores}))
    case = interference.cases(Setting(quick=False, threads=1, cache_bytes=64 * KIB, memory_bytes=256 * MIB))[0]
    with case.setup() as run:
        run()
    assert case.refuse is not None
    assert case.refuse(1.0) == why


# --- noise ----------------------------------------------------------------------------------------------------------


def test_a_sample_without_its_core_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    switches = iter([0, 3, 3, 3,  # the second try is undisturbed
                     0, 5, 5, 6, 6, 9, 9, 14])  # no try is: the least disturbed counts
    monkeypatch.setattr(agents.resource, "getrusage", lambda _: SimpleNamespace(ru_nivcsw=next(switches)))
    clock = iter([0.0, 8.0, 10.0, 11.0, *np.cumsum([0, 50, 1, 2, 1, 30, 1, 40]).astype(float)])
    monkeypatch.setattr(agents.time, "perf_counter", lambda: next(clock))
    watch = agents.Undisturbed(tries=4)
    assert watch.time(lambda: None, 2) == 0.5
    assert watch.refuse(0.0) is None
    assert watch.time(lambda: None, 2) == 1.0
    assert watch.refuse(0.0) is None, "one of two"
    watch.disturbed = 2
    assert "2 of 2" in (watch.refuse(0.0) or "")


def test_a_share_is_the_speed_beside_over_the_speed_alone() -> None:
    def point(seconds: float, **conditions: object) -> Measurement:
        return Measurement(probe="interference", conditions=conditions, samples_s=(seconds,) * 4)

    found = kept_shares([
        point(2.0, victim="gemv", threads=1, aggressor="none"),
        point(3.0, victim="gemv", threads=2, aggressor="none"),
        point(4.0, victim="gemv", threads=2, aggressor="storage-read", aggressor_depth=8),
        point(9.0, victim="gemv", threads=4, aggressor="storage-read", aggressor_depth=8),
        Measurement(probe="gather", conditions={"rows": 1}, samples_s=(1.0,))])
    assert [(s.victim["threads"], s.aggressor["aggressor_depth"], s.share) for s in found] == [(2, 8, 0.75)]
