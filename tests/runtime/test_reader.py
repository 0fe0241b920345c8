"""Do batches of reads bring the right bytes, and does whatever goes wrong reach the one who waits?"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from simmem.errors import MachineError
from simmem.runtime.reader import Reader, in_chunks, open_direct, page_buffer, reads

BLOCK, N_BLOCKS = 4096, 300


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "data"
    file.write_bytes(np.random.default_rng(0).bytes(BLOCK * N_BLOCKS))
    return file


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("depth", [1, 3, 32])
def test_every_read_brings_its_bytes(path: Path, depth: int) -> None:
    content = path.read_bytes()
    rng = np.random.default_rng(depth)
    with open_direct(path) as fd, Reader(fd, str(path), depth) as reader:
        tickets = []
        for _ in range(5):
            offsets = rng.integers(0, N_BLOCKS - 4, 40) * BLOCK
            sizes = rng.integers(1, 4, 40) * BLOCK
            tickets.append(reader.submit(reads(offsets, sizes, page_buffer(int(sizes.sum())))))
        for ticket in tickets:
            ticket.wait()
            asked = ticket.asked
            wanted = b"".join(content[o : o + s] for o, s in zip(asked.offsets, asked.sizes, strict=True))
            assert asked.buffer.tobytes() == wanted
            assert 0 < ticket.start_s <= ticket.free_s
        empty = reader.submit(reads(np.zeros(0, np.int64), np.zeros(0, np.int64), page_buffer(0)))
        empty.wait()


def test_a_stretch_is_cut_into_chunks() -> None:
    asked = in_chunks(1000, 25, 10, page_buffer(25))
    assert asked.offsets.tolist() == [1000, 1010, 1020]
    assert asked.sizes.tolist() == [10, 10, 5]
    assert asked.places.tolist() == [0, 10, 20]


def test_a_file_that_became_shorter(path: Path) -> None:
    with open_direct(path) as fd, Reader(fd, str(path), 4) as reader:
        os.truncate(path, BLOCK * 200)
        offsets = np.arange(190, 210) * BLOCK
        ticket = reader.submit(reads(offsets, np.full(20, BLOCK), page_buffer(20 * BLOCK)))
        with pytest.raises(MachineError, match=r"data: a read of 4096 bytes at offset 8\d{5} brought 0: .* shorter"):
            ticket.wait()


def test_a_drive_that_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 7 * BLOCK:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with open_direct(path) as fd, Reader(fd, str(path), 4) as reader:
        good = reader.submit(reads(np.array([0]), np.array([BLOCK]), page_buffer(BLOCK)))
        bad = reader.submit(reads(np.arange(16) * BLOCK, np.full(16, BLOCK), page_buffer(16 * BLOCK)))
        good.wait()
        with pytest.raises(MachineError, match="4096 bytes at offset 28672 failed: Input/output error"):
            bad.wait()


def test_closing_drops_what_has_not_begun(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = os.preadv

    def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
        gate.wait(10)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    with open_direct(path) as fd:
        reader = Reader(fd, str(path), 1)
        ticket = reader.submit(reads(np.arange(50) * BLOCK, np.full(50, BLOCK), page_buffer(50 * BLOCK)))
        closer = threading.Thread(target=reader.close)
        closer.start()
        gate.set()
        closer.join(10)
        assert not closer.is_alive()
        with pytest.raises(MachineError, match="stopped"):
            ticket.wait()


def test_what_is_read_into_lies_in_whole_pages_and_in_huge_ones_where_it_fills_them() -> None:
    for n_bytes in (0, 1, 5000, (2 << 20) - 1, 2 << 20, (5 << 20) + 3):
        buffer = page_buffer(n_bytes)
        assert len(buffer) == n_bytes and not buffer.any()
        assert buffer.ctypes.data % ((2 << 20) if n_bytes >= 2 << 20 else 4096) == 0
