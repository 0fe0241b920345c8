"""Are probes interleaved, resumed and judged as promised, and does the scratch file never leave anything behind?"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from simmem.errors import MachineError, SpecError
from simmem.runtime.probe import base, machine, scratch, storage
from simmem.runtime.probe.base import Case, NotHereError, Run, measure, spread
from simmem.runtime.probe.journal import Journal, Visit, journal_path
from simmem.runtime.probe.shapes import decoder_shapes, random_shapes
from simmem.spec.measurement import Measurement

MIB = 1 << 20


class Clock:
    """Time that passes only where something takes it, on a machine that may drift."""

    def __init__(self, speed: Callable[[float], float] = lambda _: 1.0) -> None:
        self.now, self.speed = 0.0, speed

    def __call__(self) -> float:
        return self.now

    def case(self, name: str, seconds: float, **more: object) -> Case:
        @contextmanager
        def setup() -> Iterator[Run]:
            def run() -> None:
                self.now += seconds * self.speed(self.now)
            yield run
        return Case(name, {"seconds": seconds}, setup, **more)  # type: ignore[arg-type]


# --- rounds ---------------------------------------------------------------------------------------------------------


def test_what_drifts_touches_all_alike() -> None:
    clock = Clock(lambda now: 1.0 + now / 20.0)
    found = measure([clock.case(name, 0.01) for name in "abcdefghij"], 100.0, clock=clock)
    medians = [float(np.median(m.samples_s)) for m in found]
    assert max(medians) / min(medians) < 1.3  # one after the other they would differ by all of it
    assert max(m.samples_s[-1] / m.samples_s[0] for m in found) > 1.6
    for m in found:
        assert len(m.runs) == base.ROUNDS and sum(m.runs) == len(m.samples_s) == len(m.at_s)
        assert list(m.at_s) == sorted(m.at_s)


def test_the_budget_is_kept_and_what_is_begun_is_visited_again() -> None:
    clock = Clock()
    cases = [clock.case(f"c{i}", 0.1, priority=i % 4) for i in range(80)]
    found = measure(cases, 12.0, clock=clock)
    assert 11.0 <= clock.now < 12.0 + 0.5
    assert {m.probe for m in found} >= {c.probe for c in cases if c.priority == 0}
    assert len(found) < len(cases)
    assert all(len(m.runs) >= 3 for m in found)


def test_what_every_run_has_is_not_left_out() -> None:
    clock = Clock()
    cases = [clock.case(f"c{i}", 0.1, priority=base.ALWAYS if i % 8 == 5 else i % 3) for i in range(80)]
    found = {m.probe: m for m in measure(cases, 12.0, clock=clock)}
    assert len(found) < len(cases)
    assert all(len(found[c.probe].runs) >= 3 for c in cases if c.priority == base.ALWAYS)


def test_what_lasts_is_measured_after_all_the_rest(tmp_path: Path) -> None:
    """It begins when most of the time is spent, and still has its own."""
    clock, journal = Clock(), Journal(tmp_path / "d.partial", {})
    measure([clock.case("short", 0.01)], 30.0, clock=clock, journal=journal)
    past_s = journal.visits[-1].ended_s
    found = measure([clock.case(name, 0.5) for name in "ab"], past_s + 20.0, rounds=1, clock=clock, journal=journal)
    assert [len(m.samples_s) >= 15 for m in found] == [True, True]
    assert found[0].at_s[0] >= past_s
    journal.discard()


def test_another_seed_draws_shapes_nobody_has_seen() -> None:
    known = decoder_shapes(1 << 22)
    one, other = (random_shapes(200, seed=seed, other_than=known, max_elements=1 << 22) for seed in (0, 1))
    assert one == random_shapes(200, seed=0, other_than=known, max_elements=1 << 22)
    sides = {frozenset(s) for s in (*known, *one)}
    assert sum(frozenset(s) not in sides for s in other) > 150


def test_quick_calls_are_many_and_what_cannot_be_done_is_said() -> None:
    @contextmanager
    def absent() -> Iterator[Run]:
        raise NotHereError("there is none")
        yield

    clock, skipped = Clock(), dict[str, str]()
    (found,) = measure([clock.case("quick", 1e-5, calls=None, flop=7.0), Case("absent", {}, absent)], 1.0, clock=clock,
                       skipped=skipped)
    assert found.samples_s == pytest.approx([1e-5] * len(found.samples_s))
    assert min(np.diff(found.at_s)) == pytest.approx(base.MIN_SAMPLE_S, rel=0.1)  # 200 calls a sample
    assert skipped == {"absent ": "there is none"}


# --- journal --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    path, request = journal_path(tmp_path / "d.toml"), {"mode": "quick"}
    done: list[tuple[str, int]] = []

    def attempt(kill_after: int) -> list[Measurement]:
        clock = Clock()
        journal = Journal(path, request, resume=path.exists())
        keep, count = journal.keep, [0]

        def watched(visit: Visit) -> None:
            keep(visit)
            done.append((visit.case, visit.round))
            count[0] += 1
            if count[0] == kill_after:
                raise Killed
        journal.keep = watched  # type: ignore[method-assign]
        try:
            return measure([clock.case(n, 0.01) for n in "abc"], 30.0, journal=journal, clock=clock)
        finally:
            journal.close()

    for _ in range(4):
        with contextlib.suppress(Killed):
            attempt(int(rng.integers(1, 4)))
        with path.open("r+b") as stream:  # and what was being written then is torn
            stream.seek(0, os.SEEK_END)
            stream.write(b'0123456789abcdef {"case": "a", "ro')
    found = attempt(1000)
    assert sorted(done) == sorted({*done}), "nothing is measured twice"
    assert len(done) == 3 * base.ROUNDS
    assert [len(m.runs) for m in found] == [base.ROUNDS] * 3


def test_a_damaged_line_is_measured_again_and_another_request_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.toml.partial"
    journal = Journal(path, {"mode": "full"})
    for number in range(3):
        journal.keep(Visit("a", number, (0.0,), (1.0,), 1.0))
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b"1.0", b"9.0"), lines[3]]))
    with pytest.raises(SpecError, match="mode was 'full', now 'quick'"):
        Journal(path, {"mode": "quick"}, resume=True)
    with pytest.raises(SpecError, match="--resume goes on"):
        Journal(path, {"mode": "full"})
    again = Journal(path, {"mode": "full"}, resume=True)
    assert [v.round for v in again.visits] == [0]
    again.discard()
    assert not path.exists()
    path.write_text("notes of mine\n")
    with pytest.raises(SpecError, match="not an unfinished calibration"):
        Journal(path, {}, resume=True)
    assert path.read_text() == "notes of mine\n"


# --- the scratch file and the page cache ----------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_scratch_file_has_no_name_and_no_pattern(tmp_path: Path) -> None:
    with scratch.open_scratch(tmp_path, 32 * MIB) as file:
        assert names(tmp_path) == []
        assert file.size_bytes == os.fstat(file.fd).st_size == 32 * MIB
        assert os.fstat(file.fd).st_blocks * 512 >= 32 * MIB  # no holes
        data = os.pread(file.fd, MIB, 16 * MIB - 1000)
        assert len(set(data)) == 256 and data[:4096] not in data[4096:]
    assert names(tmp_path) == []


@pytest.mark.parametrize("how", ["no room", "an error while it is written"])
def test_a_full_disk_is_said_and_nothing_is_left(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "no room":
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limit[1]))
    else:
        monkeypatch.setattr(os, "pwrite", full)
    try:
        with pytest.raises(MachineError, match="nothing was left there") as error, \
                scratch.open_scratch(tmp_path, 32 * MIB):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.file == str(tmp_path) and names(tmp_path) == []


def test_a_file_in_memory_is_no_storage() -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or not machine.volume(shared).in_memory:
        pytest.skip("needs a folder in memory")
    with scratch.open_scratch(shared, 32 * MIB) as file:
        assert file.direct_fd is None and "no storage to measure" in str(file.why_not_direct)
        assert {c.conditions["how"] for c in storage.cases(file, quick=False) if c.probe == storage.READ} == {"cached"}


def test_reads_are_of_whole_blocks_and_the_page_cache_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                 ) -> None:
    asked: list[tuple[int, int, int]] = []
    read = os.preadv

    def watched(fd: int, buffers: list[memoryview], offset: int) -> int:
        asked.append((fd, sum(map(len, buffers)), offset))
        return read(fd, buffers, offset)

    with scratch.open_scratch(tmp_path, 64 * MIB) as file:
        if file.direct_fd is None:
            pytest.skip(f"needs direct I/O: {file.why_not_direct}")
        monkeypatch.setattr(os, "preadv", watched)
        for how in ("direct", "buffered", "cached"):
            case = next(c for c in storage.cases(file, quick=False) if c.conditions.get("how") == how
                        and c.conditions["size_bytes"] == 65536 and c.conditions["pattern"] == "random")
            asked.clear()
            with case.setup() as run:
                seconds = run()
            assert seconds is not None and seconds > 0
            wanted = [a for a in asked if a[1] == 65536]
            assert {fd for fd, _, _ in wanted} == {file.direct_fd if how == "direct" else file.fd}
            assert all(offset % 4096 == 0 and offset + size <= 64 * MIB for _, size, offset in wanted)
            assert len({offset for *_, offset in wanted}) > 8
        file.forget()
        assert file.held_share() < 0.05
        for start in range(0, 64 * MIB, MIB):
            os.pread(file.fd, MIB, start)
        assert file.held_share() > 0.95


def read_point(how: str, seconds: float, *, pattern: str = "random", size: int = 65536, depth: int = 4) -> Measurement:
    return Measurement(probe=storage.READ, bytes=size, requests=1, samples_s=(seconds,) * 3, conditions={
        "size_bytes": size, "depth": depth, "pattern": pattern, "how": how})


def test_cache_hits_and_our_own_time_are_refused() -> None:
    call = Measurement(probe=storage.CALL, conditions={"depth": 4}, requests=1, samples_s=(6e-6,) * 3)
    points = [call, read_point("direct", 80e-6), read_point("direct", 8e-6, size=4096),
              read_point("buffered", 90e-6), read_point("buffered", 20e-6), read_point("cached", 5e-6),
              read_point("buffered", 60e-6, pattern="sequential"), read_point("buffered", 10e-6, pattern="sequential")]
    refused = [p.refused for p in storage.guard(points)]
    assert [bool(r) for r in refused] == [False, False, True, False, True, False, False, True]
    assert "issuing takes 75 %" in str(refused[2])
    assert "4.0 × as fast as a direct read" in str(refused[4])


def test_a_read_faster_than_the_link_is_refused(tmp_path: Path) -> None:
    where = machine.Volume("ext4", "nvme0n1", "", 10**12, 10**11, 4096, 3.94e9)
    file = scratch.Scratch(fd=3, direct_fd=4, size_bytes=1 << 30, volume=where, why_not_direct=None)
    case = next(c for c in storage.cases(file, quick=False) if c.conditions["size_bytes"] == MIB)
    assert case.refuse is not None
    assert case.refuse(MIB / 3.9e9) is None
    assert "faster than the link" in str(case.refuse(MIB / 4.0e9))


def test_every_beginning_of_a_round_covers_every_probe() -> None:
    where = machine.Volume("ext4", "vda", "", 10**12, 10**11, 4096, None)
    file = scratch.Scratch(fd=3, direct_fd=4, size_bytes=1 << 30, volume=where, why_not_direct=None)
    every = storage.cases(file, quick=False)
    order = spread(every)
    assert sorted(c.key for c in order) == sorted(c.key for c in every)
    ways = {(c.probe, c.conditions.get("how"), c.conditions.get("pattern")) for c in every}
    assert {(c.probe, c.conditions.get("how"), c.conditions.get("pattern")) for c in order[:20]} == ways
    sizes = [c.conditions["size_bytes"] for c in order[:40] if c.conditions.get("how") == "direct"
             and c.conditions["pattern"] == "random"]
    assert len(sizes) > 8 and len({*sizes}) >= 5


def test_the_machine_says_what_it_is_and_what_it_does_not_know() -> None:
    said = machine.describe(machine.volume(Path("/")), threads=1, device="cpu")
    assert json.loads(json.dumps(said)) == said
    assert said["usable_cores"] == len(os.sched_getaffinity(0)) or int(said["usable_cores"]) >= 1
    here = machine.memory()
    assert 0 < here.available_bytes <= here.total_bytes
