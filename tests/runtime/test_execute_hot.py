"""Do two units that share every layer compute what one would, and what the plan says of each?"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmem.errors import MachineError, SpecError
from simmem.runtime.execute import staging
from simmem.runtime.execute.exact import exact_task, run_exactly
from simmem.runtime.execute.hot_engine import HotEngine
from simmem.runtime.execute.networks import decoder_settings, network_weights, reference_run
from simmem.runtime.execute.session import How, open_session
from simmem.runtime.execute.task import HotTask, task_of
from simmem.spec.model import Model
from simmem.trace.hot_order import first_units
from simmem.validation.runs import demanded_bytes, run_row
from tests.runtime import tiny
from tests.runtime.executing import drawn, shared, spec_of, trace_of

BLOCK = 4096
TOKENS = 40
NEAR = (0.0, 0.2, 0.6, 1.0)


@pytest.fixture(scope="module", params=["opt", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return spec_of(tiny.make(request.param), tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before
    assert not list(tmp_path.glob("simmem-*"))


@pytest.mark.parametrize("kv_cache", ["host", "with-heads"])
@pytest.mark.parametrize(("near", "predictor"), [(n, "oracle") for n in NEAR] + [(0.4, "low-rank"), (0.4, "none")])
def test_units_and_bytes_are_those_of_the_schedule(
        model: Model, kv_cache: str, near: float, predictor: str, tmp_path: Path) -> None:
    own = "oracle" if predictor == "none" else predictor
    one = shared(model, trace_of(drawn(model, 40), model, predictor=own), near, kv_cache=kv_cache, predictor=predictor)
    task = task_of(one, 6)
    assert isinstance(task, HotTask)
    with open_session(task, How(threads=1, scratch=tmp_path, check=True)) as session:
        run = session.run()
    predicted = task.predicted()
    assert len(predicted) == len(run.timelines) == 6
    assert run.counted.rows_beside is not None
    both = {"gpu": run.counted.rows, "cpu": run.counted.rows_beside}
    for token, (plan, line) in enumerate(zip(predicted, run.timelines, strict=True)):
        s = plan.schedule
        assert run.counted.moved_bytes[token] == demanded_bytes(s, BLOCK) == demanded_bytes(line.schedule, BLOCK)
        for op in np.flatnonzero(s.timed).tolist():
            k, layer = int(s.op_class[op]), int(s.op_layer[op])
            if s.classes[k].name == "ffn":
                rows = both[str(s.classes[k].agent)]
                assert rows[token, layer] == s.flop[k, 0] / 2 / one.context.unit_params
    if 0.0 < near < 1.0:
        assert all(rows.sum() > 0 for rows in both.values())


@pytest.mark.parametrize("kv_cache", ["host", "with-heads"])
def test_both_agents_stand_in_the_timeline(model: Model, kv_cache: str, tmp_path: Path) -> None:
    one = shared(model, trace_of(drawn(model, 40), model, predictor="low-rank"), 0.5, kv_cache=kv_cache)
    task = task_of(one, 4)
    with open_session(task, How(threads=1, scratch=tmp_path)) as session:
        run = session.run()
    for line in run.timelines:
        s, busy = line.schedule, line.free_s > line.start_s
        present = s.present[s.op_class, 0] & (s.op_class >= 0) & s.timed
        assert busy[present].all(), "an op with demand was not run"
        assert not busy[s.timed & ~present].any(), "an op without demand was"
        assert {s.streams[k] for k in s.op_stream[busy].tolist()} == {"gpu", "cpu", "link.h2d", "link.d2h"}
        for op in np.flatnonzero(s.timed & busy).tolist():
            assert all(line.end_s[d] <= line.start_s[op] + 1e-9 for d in s.deps[op])
    row = run_row("tiny", one, task.predicted(), [run.timelines] * 2, np.array([run.counted.moved_bytes] * 2, float),
                  "real")
    assert row.bytes.predicted == row.bytes.measured > 0
    assert {p.name for p in row.phases} == {"copy", "predictor", "attention", "FFN", "head", "wait"}


def test_a_split_class_is_filled_by_use_then_by_number(model: Model) -> None:
    """And what the plan expects of it, as a share, differs by its units alone."""
    trace = trace_of(drawn(model, 40), model)
    one = shared(model, trace, 0.5)
    task = task_of(one, 6)
    assert isinstance(task, HotTask)
    replayed = one.context.replayed
    assert replayed is not None
    timed = replayed.timed
    bits = np.unpackbits(trace.active, axis=2, count=trace.header.n_units, bitorder="little").astype(int)
    uses = np.delete(bits, timed, axis=0).sum(axis=0)
    for layer, hot in enumerate(task.hot):
        order = sorted(range(len(hot)), key=lambda unit: (-uses[layer, unit], unit))
        assert sorted(order[: hot.sum()]) == np.flatnonzero(hot).tolist()
    assert (first_units(trace, timed, np.array([0, 50])).sum(axis=1) == [0, 50]).all()
    whole = [one.policy.decode(one.context, one.block, task.rows), task.schedule.columns(slice(task.lead, None))]
    shares, counts = (np.array([s.flop[k] for k, what in enumerate(s.classes) if what.name == "ffn"]) / 2
                      / one.context.unit_params for s in whole)
    split = np.unique(uses.max(axis=1)).size  # any class at all
    assert split
    assert shares.sum(axis=0) == pytest.approx(counts.sum(axis=0))
    assert (counts == counts.round()).all()
    largest = replayed.hot.used_by(np.arange(len(replayed.hot.tokens))).max(axis=(0, 2)).max()
    assert np.abs(shares - counts).max() <= largest


@pytest.mark.parametrize("kv_cache", ["host", "with-heads"])
@pytest.mark.parametrize(("family", "criterion"), [("opt", "relu-zero"), ("llama", "wina"), ("qwen2", "magnitude")])
def test_logits_are_those_of_the_masked_network(family: str, criterion: str, kv_cache: str, tmp_path: Path) -> None:
    network = tiny.make(family)
    model = spec_of(network, tmp_path / family)
    ids = np.random.default_rng(1).integers(3, tiny.VOCAB, TOKENS)
    thresholds = (0.0, 0.0) if criterion == "relu-zero" else (0.05, 0.08)
    reference = reference_run(network, ids, criterion=criterion, thresholds=thresholds)
    assert reference.active is not None
    active = np.bitwise_count(reference.active).sum(axis=2)
    how = How(source=network_weights(network, "fp32"), threads=1, check=True, scratch=tmp_path)
    for near in NEAR:
        task = exact_task(shared(model, trace_of(drawn(model, 12), model), near, kv_cache=kv_cache), reference)
        with open_session(task, how) as session:
            found = run_exactly(session, ids, reference, decoder_settings(network, model.architecture, TOKENS))
        assert found.largest_difference < 2e-5
        assert found.same_choice == 1.0
        assert found.counted.rows_beside is not None
        assert (found.counted.rows + found.counted.rows_beside == active).all()
        assert (found.counted.rows.sum() == 0) == (near == 0.0)
        assert (found.counted.rows_beside.sum() == 0) == (near == 1.0)


def test_a_lost_part_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail."""
    network = tiny.make("opt")
    model = spec_of(network, tmp_path / "opt")
    ids = np.random.default_rng(1).integers(3, tiny.VOCAB, 10)
    reference = reference_run(network, ids, criterion="relu-zero", thresholds=(0.0, 0.0))
    real = HotEngine._send_back

    def lost(self: HotEngine, number: int, name: str, layer: int, n: int) -> None:
        self._messages[name].far.zero_()
        real(self, number, name, layer, n)

    monkeypatch.setattr(HotEngine, "_send_back", lost)
    task = exact_task(shared(model, trace_of(drawn(model, 12), model), 0.5), reference)
    with open_session(task, How(source=network_weights(network, "fp32"), threads=1, scratch=tmp_path)) as session:
        assert not run_exactly(session, ids, reference, decoder_settings(network, model.architecture, 10)).agrees


# --- what goes wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, MachineError("gone"), RuntimeError("a product failed")])
@pytest.mark.parametrize("where", ["_feed", "_feed_beside", "_attend_beside"])
def test_a_failure_on_either_side_ends_both(
        where: str, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spec_of(tiny.make("opt"), tmp_path / "opt")
    real, seen = getattr(HotEngine, where), []

    def failing(self: HotEngine, number: int, *rest: Any) -> Any:
        seen.append(number)
        if number == 2:
            raise error
        return real(self, number, *rest)

    with open_session(task_of(shared(model, trace_of(drawn(model, 40), model), 0.5), 6),
                      How(threads=1, scratch=tmp_path)) as session:
        before = threading.active_count()
        with monkeypatch.context() as patch:
            patch.setattr(HotEngine, where, failing)
            with pytest.raises(error if isinstance(error, type) else type(error)):
                session.run()
        assert max(seen) == 2
        assert threading.active_count() == before
        session.run()  # and nothing of it is left over


def test_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spec_of(tiny.make("opt"), tmp_path / "opt")
    monkeypatch.setattr(staging, "available_bytes", lambda: 20_000)
    with pytest.raises(MachineError, match="of memory, 20 kB are available"), \
            open_session(task_of(shared(model, trace_of(drawn(model, 40), model), 0.5), 4), How(scratch=tmp_path)):
        pass


def test_what_cannot_be_run_is_said(tmp_path: Path) -> None:
    model = spec_of(tiny.make("llama"), tmp_path / "llama")
    trace = trace_of(drawn(model, 40), model)
    with pytest.raises(SpecError, match="only neurons placed by frequency"):
        task_of(shared(model, trace, 0.5, placement="random"), 4)
    with pytest.raises(SpecError, match="2 of the 3 matrices of a neuron"):
        task_of(shared(model, trace_of(drawn(model, 40), model, parts=2, predictor="gate"), 0.5), 4)
    known = trace.header.model_copy(update={"statistics": {"attention_active_share": {"value": 0.4}}})
    with pytest.raises(SpecError, match="uses 40 % of the attention heads, not which"):
        task_of(shared(model, type(trace)(known, trace.active), 0.5), 4)
    half = task_of(shared(model, trace, 0.5, weights="fp16"), 4)
    with pytest.raises(SpecError, match="bf16 or fp32"), open_session(half, How(scratch=tmp_path)):
        pass
