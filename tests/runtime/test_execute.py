"""Does a run move what its plan says, say when, and leave nothing behind however it ends?"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmem.errors import MachineError, SpecError
from simmem.planner.candidate import Candidate
from simmem.planner.predict import timelines
from simmem.policy.families.flash_window import FlashWindow
from simmem.runtime.execute import drive, staging
from simmem.runtime.execute.drive import plain_reads, settle
from simmem.runtime.execute.engine import Engine
from simmem.runtime.execute.memory import _places
from simmem.runtime.execute.rounds import NO_TIME, Rounds, run_rounds, write_files
from simmem.runtime.execute.session import How, Run, Session, open_session
from simmem.runtime.execute.task import task_of
from simmem.runtime.execute.weights import RandomWeights, block_sums, random_weights, weight_file
from simmem.spec.device import load_device
from simmem.spec.model import Model, load_model
from simmem.validation.runs import demanded_bytes, run_row
from tests.runtime import tiny
from tests.runtime.executing import STREAM, WINDOW, candidate, drawn, spec_of, trace_of, unified

BLOCK = 4096


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return spec_of(tiny.make("llama"), tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before
    assert not list(tmp_path.glob("simmem-*")), "the scratch folder"
    assert not list(tmp_path.glob(".*")), "a half-written file"


def windowed(model: Model, **changes: Any) -> Candidate:
    """`room`: the budget has room for that share of the window's neurons."""
    room = changes.pop("room", None)
    made = partial(candidate, model, "flash-window", {**WINDOW, **changes}, trace=trace_of(drawn(model, 40), model))
    one = made()
    if room is None:
        return one
    assert isinstance(one.policy, FlashWindow)
    beside = one.policy._fixed(one.context, one.block) + one.policy._staging(one.context, one.block)
    wanted = one.policy.cache_units(one.context, one.block).sum() * one.context.unit_bytes
    return made(dram=float(beside[0] + room * wanted))


def run_of(one: Candidate, tmp_path: Path, tokens: int = 6, **how: Any) -> Run:
    with open_session(task_of(one, tokens), How(threads=1, scratch=tmp_path, **how)) as session:
        return session.run()


# --- what is moved ----------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["real", "emulated"])
@pytest.mark.parametrize("changes", [
    {}, {"window_tokens": 0}, {"coalesce": True}, {"bundled": False}, {"attention_resident": 0.5},
    {"prefetch_layers": 1}, {"window_tokens": 1, "coalesce": True, "bundled": False, "attention_resident": 0.0},
    {"room": 0.3}, {"room": 0.8}, {"room": 0.7, "coalesce": True}, {"room": 0.0}, {"predictor": "none"},
], ids=str)
def test_reads_units_and_rows_are_those_of_the_schedule(
        model: Model, changes: dict[str, Any], storage: str, tmp_path: Path) -> None:
    one = windowed(model, **changes)
    task = task_of(one, 6)
    run = run_of(one, tmp_path, storage=storage)
    assert len(run.timelines) == 6
    for token, line in enumerate(run.timelines):
        s = line.schedule
        assert run.counted.moved_bytes[token] == demanded_bytes(s, BLOCK)
        for op in np.flatnonzero(s.timed).tolist():
            k, layer = int(s.op_class[op]), int(s.op_layer[op])
            if s.classes[k].name == "units.flash":
                assert run.counted.requests[token, layer] == s.requests[k, 0]
                assert run.counted.read_bytes[token, layer] == s.bytes["link.flash"][k, 0]
            if s.classes[k].name == "ffn" and task.by_neuron:
                assert run.counted.rows[token, layer] == s.flop[k, 0] / 2 / one.context.unit_params


def test_the_shrunk_window_is_one(model: Model) -> None:
    """The budgets above do bind, and differently."""
    whole, less, little = (task_of(windowed(model, **change), 6) for change in ({}, {"room": 0.8}, {"room": 0.3}))
    assert whole.capacity.sum() > less.capacity.sum() > little.capacity.sum() > 0
    assert any(0 < len(past) < 3 for past in (*less.past(), *little.past()))


@pytest.mark.parametrize("knobs", [STREAM, {**STREAM, "prefetch_layers": 2}, {**STREAM, "resident_ratio": 1.0},
                                   {**STREAM, "resident_ratio": 0.0, "prefetch_layers": 1}], ids=str)
def test_streams_move_whole_blocks(model: Model, knobs: dict[str, Any], tmp_path: Path) -> None:
    one = candidate(model, "stream", knobs)
    run = run_of(one, tmp_path)
    plan = timelines(one, task_of(one, 6).rows)[0]
    assert set(run.counted.moved_bytes.tolist()) == {demanded_bytes(plan.schedule, BLOCK)}
    stages = len(task_of(one, 6).layout.layers) + 1
    said = float(plan.schedule.timed_bytes["link.flash"][0])
    assert said <= run.counted.moved_bytes[0] < said + stages * BLOCK


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_layer_is_not_read_into_what_was_just_computed_with(model: Model, ahead: int, tmp_path: Path) -> None:
    """Narrow layers take turns through the room of the widest, and each lies whole within it."""
    assert _places([2, 2, 1, 5, 4, 2], 1) == [0, 2, 4, 0, 0, 0]
    streamed = [2] * 12 + [6]
    places = _places(streamed, ahead + 1)
    assert max(place + n for place, n in zip(places, streamed, strict=True)) <= 6
    for where in range(ahead + 1, 12):
        assert abs(places[where] - places[where - ahead - 1]) >= 2, "the same buffer's last one lies elsewhere"
    knobs = {**STREAM, "resident_ratio": 0.0, "prefetch_layers": ahead}
    with open_session(task_of(candidate(model, "stream", knobs), 2), How(threads=1, scratch=tmp_path)) as session:
        task, memory = session.task, session.memory
        for slot in range(ahead + 1):
            parts = [memory.staging(where, slot) for where in range(len(task.streamed))]
            assert [part.host.nbytes for part in parts] == list(task.streamed) == [part.near.nbytes for part in parts]
            begins = np.array([part.host.ctypes.data for part in parts])
            assert (begins - begins.min()).tolist() == _places(task.streamed, ahead + 1)


def test_an_op_waits_where_a_read_stands_before_it_and_nothing_beside(model: Model) -> None:
    def waits(one: Candidate) -> dict[str, set[float]]:
        s = one.policy.decode(one.context, one.block, np.arange(1))
        found: dict[str, set[float]] = {}
        for k, what in enumerate(s.classes):
            if what.agent is not None and s.present[k].any():
                found.setdefault(what.name, set()).update(s.waits[k].tolist())
        return found

    streamed = candidate(model, "stream", STREAM)
    assert waits(streamed) == {"attention": {1.0}, "ffn": {0.0}, "head": {1.0}}
    for ahead_or_whole in ({"prefetch_layers": 1}, {"resident_ratio": 1.0}):
        found = waits(candidate(model, "stream", {**STREAM, **ahead_or_whole}))
        assert found == {"attention": {0.0}, "ffn": {0.0}, "head": {0.0}}
    kept, forgotten = waits(windowed(model)), waits(windowed(model, window_tokens=0))
    assert (kept["upkeep"], kept["ffn"], kept["attention"]) == ({1.0}, {0.0}, {0.0})
    assert forgotten["ffn"] == {1.0} and "upkeep" not in forgotten


def test_a_layer_is_read_while_the_one_before_computes(model: Model, tmp_path: Path) -> None:
    """With a buffer to spare a read begins when the one before it ends, not when what it brought was computed with."""
    one = candidate(model, "stream", {**STREAM, "resident_ratio": 0.0, "prefetch_layers": 1},
                    device=unified(rate=2e7, request_rate=2e7))
    early = []
    for line in run_of(one, tmp_path, storage="emulated").timelines:
        s = line.schedule
        named = {(s.classes[int(s.op_class[op])].name, int(s.op_layer[op])): op
                 for op in np.flatnonzero(s.timed).tolist()}
        early += [line.start_s[named["weights.flash", layer]] < line.end_s[named["ffn", layer - 1]]
                  for layer in range(1, model.architecture.n_layers)]
    assert all(early)


@pytest.mark.parametrize("source", ["storage", "host"])
def test_a_device_with_a_memory_of_its_own_gets_copies(model: Model, source: str, tmp_path: Path) -> None:
    """The path of a GPU, with the processor in its place."""
    device = load_device("rtx4090-pc")
    one = candidate(model, "stream", {**STREAM, "agent": "gpu", "source_tier": source, "prefetch_layers": 1},
                    device=device)
    run = run_of(one, tmp_path)
    plan = timelines(one, task_of(one, 6).rows)[0]
    assert set(run.counted.moved_bytes.tolist()) == {demanded_bytes(plan.schedule, BLOCK)}
    names = {what.name for what in plan.schedule.classes}
    copied = [name for name in names if name.startswith(("weights.", "head weights."))]
    assert len(copied) == (4 if source == "storage" else 2)
    units = windowed(model)
    units = candidate(model, "flash-window", {**WINDOW, "agent": "gpu"}, trace=units.context.trace, device=device)
    moved = run_of(units, tmp_path)
    assert [demanded_bytes(t.schedule, BLOCK) for t in moved.timelines] == moved.counted.moved_bytes.tolist()


# --- when -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1])
def test_timelines_are_in_order(model: Model, ahead: int, tmp_path: Path) -> None:
    one = windowed(model, prefetch_layers=ahead, attention_resident=0.5)
    run = run_of(one, tmp_path)
    for line in run.timelines:
        s = line.schedule
        busy = line.free_s > line.start_s
        # A read that is handed in early may be over before its stream's last one is: it then takes no time.
        computed = np.array([k != -1 and s.classes[k].link is None for k in s.op_class.tolist()])
        assert busy[s.timed & s.present[s.op_class, 0] & computed].all(), "an op with demand was not run"
        for op in np.flatnonzero(s.timed).tolist():
            assert all(line.end_s[d] <= line.start_s[op] + 1e-9 for d in s.deps[op] if busy[op])
        for stream in range(len(s.streams)):
            mine = np.flatnonzero((s.op_stream == stream) & busy)
            assert (line.start_s[mine][1:] >= line.free_s[mine][:-1]).all()
        assert 0 < line.token_s < 10
    row = run_row("tiny", one, timelines(one, task_of(one, 6).rows), [run.timelines] * 2,
                  np.array([run.counted.moved_bytes] * 2, float), "real")
    assert row.bytes.predicted == row.bytes.measured
    assert {"flash", "upkeep", "attention", "FFN", "head", "wait"} <= {p.name for p in row.phases}
    assert row.measured_s.n == 12
    assert run.token_s.tolist() == [line.token_s for line in run.timelines]


def test_a_held_back_read_is_not_early(model: Model, tmp_path: Path) -> None:
    one = windowed(model)
    slow = candidate(model, "flash-window", WINDOW, trace=one.context.trace,
                     device=unified(rate=2e7, request_rate=2e7, request_time=1e-4, latency=1e-4))
    run = run_of(slow, tmp_path, storage="emulated")
    plan = timelines(slow, task_of(slow, 6).rows)
    for measured, predicted in zip(run.timelines, plan, strict=True):
        s = measured.schedule
        reading = [op for op in np.flatnonzero(s.timed).tolist() if s.classes[int(s.op_class[op])].link]
        for op in reading:
            took, due = (t.free_s[op] - t.start_s[op] for t in (measured, predicted))
            assert took >= due * (1 - 1e-9)


def test_memory_too_slow_to_emulate(model: Model, tmp_path: Path) -> None:
    fast = candidate(model, "stream", STREAM, device=unified(rate=1e13))
    with pytest.raises(MachineError, match="less than 3 times"):
        run_of(fast, tmp_path, storage="emulated")


# --- what goes wrong --------------------------------------------------------------------------------


def test_a_file_cut_short_while_it_runs(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    with open_session(task_of(windowed(model), 4), How(threads=1, file=file)) as session:
        session.run()
        os.truncate(file, 8 * BLOCK)
        with pytest.raises(MachineError, match=r"weights: a read of .* the file is shorter than it was"):
            session.run()


def test_a_file_changed_while_it_runs(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    with open_session(task_of(windowed(model), 4), How(threads=1, file=file)) as session:
        with file.open("r+b") as stream:
            stream.seek(60 * BLOCK)
            stream.write(b"\0" * BLOCK)
        with pytest.raises(MachineError, match="changed while it was read"):
            session.run()


def test_a_changed_block_is_seen_where_that_is_asked_for(model: Model, tmp_path: Path) -> None:
    file, task = tmp_path / "weights", task_of(windowed(model, window_tokens=0), 4)
    with open_session(task, How(threads=1, file=file)):
        pass
    status, unit = file.stat(), int(task.active(0)[1][0])
    with file.open("r+b") as stream:
        stream.seek(task.layout.units.area_offset(1) + unit * task.layout.units.slot_bytes + 8)  # type: ignore[union-attr]
        stream.write(b"\1")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with open_session(task, How(threads=1, file=file)) as session:
        session.run()
    with open_session(task, How(threads=1, file=file, check=True)) as session, \
            pytest.raises(MachineError, match=r"the block at offset .* is not what was written there"):
        session.run()


def test_a_drive_that_fails(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for knobs in (STREAM, {**STREAM, "agent": "gpu", "prefetch_layers": 1}):
        device = load_device("rtx4090-pc") if knobs["agent"] == "gpu" else None
        one = candidate(model, "stream", knobs, device=device)
        with open_session(task_of(one, 4), How(threads=1, scratch=tmp_path)) as session:
            with monkeypatch.context() as patch:
                patch.setattr(os, "preadv", failing)
                with pytest.raises(MachineError, match="failed: Input/output error"):
                    session.run()
            session.run()  # and nothing of it is left over


def test_interrupted(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = Engine.token, []

    def token(self: Engine, number: int, *rest: Any) -> Any:
        seen.append(number)
        if number == 2:
            raise KeyboardInterrupt
        return real(self, number, *rest)

    monkeypatch.setattr(Engine, "token", token)
    with pytest.raises(KeyboardInterrupt):
        run_of(candidate(model, "stream", {**STREAM, "prefetch_layers": 2}), tmp_path)
    assert seen == [0, 1, 2]


def test_no_memory(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "available_bytes", lambda: 20_000)
    with pytest.raises(MachineError, match="of memory, 20 kB are available") as failed:
        run_of(candidate(model, "resident", {"agent": "cpu"}), tmp_path)
    assert failed.value.missing_bytes is not None
    assert failed.value.missing_bytes > 0
    assert not list(tmp_path.iterdir()), "it is said before anything is written"


def test_no_room_on_the_disk(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(MachineError, match="No space left on device"):
            run_of(windowed(model), tmp_path, file=tmp_path / "weights")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MachineError, match="No space left on device"):
        run_of(windowed(model), tmp_path, file=tmp_path / "weights")
    assert not list(tmp_path.iterdir())


# --- the weight file --------------------------------------------------------------------------------


def test_a_weight_file_is_used_again_while_it_is_the_same(model: Model, tmp_path: Path) -> None:
    task, file, written = task_of(windowed(model), 4), tmp_path / "weights", []
    how = {"file": file, "say": written.append}
    for seed in (0, 0, 1, 1):
        with weight_file(task.layout, RandomWeights("fp32", seed), **how) as opened:  # type: ignore[arg-type]
            assert opened.layout is task.layout
    assert len(written) == 2
    os.utime(file)
    with weight_file(task.layout, RandomWeights("fp32", 1), **how):  # type: ignore[arg-type]
        assert len(written) == 3


def test_one_file_of_random_weights_serves_all_layouts_of_a_precision(model: Model, tmp_path: Path) -> None:
    tasks = [task_of(c, 4) for c in (windowed(model), windowed(model, bundled=False),
                                     candidate(model, "stream", STREAM))]
    assert len({t.layout.n_bytes for t in tasks}) > 1
    ready = write_files([(t, How(check=True)) for t in tasks], tmp_path)
    assert len({how.file for _, how in ready}) == 1
    assert len(list(tmp_path.glob("weights-*[0-9a-f]"))) == 1
    rounds = run_rounds(ready, Rounds(budget_s=0.0, least=1, most=1))
    assert [(len(r.runs), r.stopped) for r in rounds] == [(1, None)] * 3  # checksums of every block held
    assert write_files([(t, How()) for t in tasks], tmp_path)[0][1].file == ready[0][1].file


def test_a_plan_that_breaks_ends_alone_and_what_takes_too_long_is_dropped(
        model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [task_of(c, 2) for c in (windowed(model), candidate(model, "stream", STREAM),
                                     windowed(model, bundled=False))]
    ready = write_files([(t, How()) for t in tasks], tmp_path)
    run, seen = Session.run, list[list[str | None]]()

    def broken(self: Session, between: object = None) -> Run:
        if self.task is tasks[0]:
            raise MachineError("the drive is gone")
        return run(self)

    monkeypatch.setattr(Session, "run", broken)
    found = run_rounds(ready, Rounds(budget_s=0.0, extra=(False, False, True),
                                     after=lambda r: seen.append([one.stopped for one in r])))
    assert [len(r.runs) for r in found] == [0, 3, 1]
    assert [r.stopped for r in found] == ["the drive is gone", None, NO_TIME]
    assert len(seen) == 3


def test_plain_reads_see_the_drive(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(candidate(model, "stream", STREAM), 2)
    (_, how), = write_files([(task, How(source=RandomWeights("fp32", at_least_bytes=8 << 20)))], tmp_path)
    assert how.file is not None
    said = list[str]()
    assert min(plain_reads(how.file, (4096, 4))) > 0
    settle(how.file, 0.1, said.append)  # one look takes longer, and four are needed
    assert len(said) == 1 and "has not settled" in said[0]
    monkeypatch.setattr(drive, "plain_reads", lambda _file, _read: [1e-3])
    assert 0 < settle(how.file, 60.0, said.append) < 30
    assert len(said) == 1
    with pytest.raises(MachineError, match="nowhere"):
        plain_reads(tmp_path / "nowhere", (4096, 1))


def test_another_file_is_not_overwritten(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "thesis"
    file.write_text("chapter one")
    with pytest.raises(SpecError, match="not a weight file of this version"):
        run_of(windowed(model), tmp_path, file=file)
    assert file.read_text() == "chapter one"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_random_weights_are_small_finite_and_random(precision: str) -> None:
    import torch

    from simmem.runtime.execute.kernels import torch_dtype

    data = random_weights(1 << 16, precision, 3)
    values = torch.from_numpy(data).view(torch_dtype(precision)).float()
    assert bool(values.isfinite().all())
    assert 2**-11 <= float(values.abs().min()) < float(values.abs().max()) < 2**-7
    assert abs(float(values.mean())) < 1e-4
    assert (random_weights(1 << 16, precision, 4) != data).mean() > 0.4


def test_no_changed_word_goes_unseen() -> None:
    data = np.random.default_rng(0).integers(0, 256, 4 * BLOCK, np.uint8)
    before = block_sums(data, BLOCK)
    rng = np.random.default_rng(1)
    for at in rng.integers(0, len(data), 200):
        changed = data.copy()
        changed[at] ^= 1 << int(rng.integers(8))
        assert np.flatnonzero(block_sums(changed, BLOCK) != before).tolist() == [at // BLOCK]
    swapped = data.copy()
    swapped[:8], swapped[8:16] = data[8:16], data[:8]
    assert block_sums(swapped, BLOCK)[0] != before[0]


def test_what_cannot_be_run_is_said(model: Model, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="bf16 or fp32"):
        run_of(candidate(model, "resident", {"agent": "gpu"}, device=load_device("rtx4090-pc"), weights="fp16"),
               tmp_path)
    for name, why in (("mixtral-8x7b", "mixtures of experts"), ("opt-350m", "embeddings of their own width")):
        with pytest.raises(SpecError, match=why):
            task_of(candidate(load_model(name), "resident", {"agent": "cpu"}), 4)
    with pytest.raises(SpecError, match="only fp32, bf16, fp16"):
        task_of(candidate(model, "resident", {"agent": "cpu"}, weights="int8"), 4)
