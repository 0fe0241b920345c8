"""A routing log becomes the trace it says, however it is laid out; a wrong one is one clear error within bounds."""

from __future__ import annotations

import csv
import gzip
import json
import random
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmem.errors import MachineError, SpecError, TraceError
from simmem.spec.model import Architecture, Experts, Model
from simmem.trace.export import export_trace
from simmem.trace.logs import LogLayout, LogShape, import_log, layout_of, shape_of_model, stated_shape
from simmem.trace.store import load_trace_file, save_trace
from simmem.trace.trace import Trace, TraceHeader, digest_of
from tests.unit.fuzzing import mutate_bytes, mutate_json

SHAPE = stated_shape("expert", 2, 12, 1000.0, "int4")
ROUTING = {(4, 1): [3, 11], (4, 2): [0], (5, 1): [2, 3, 9], (5, 2): [], (6, 1): [7, 3], (6, 2): [11, 1]}
"""(token, layer) → experts: what every log below says."""
EXPECTED = [[{3, 11}, {0}], [{2, 3, 9}, set()], [{3, 7}, {1, 11}]]


def sets(trace: Trace) -> list[list[set[int]]]:
    bits = np.unpackbits(trace.active, axis=2, count=trace.header.n_units, bitorder="little")
    return [[set(np.flatnonzero(layer).tolist()) for layer in token] for token in bits]


def jsonl(records: Sequence[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read(tmp_path: Path, text: str | bytes, name: str = "log.jsonl", columns: str = "", shape: LogShape = SHAPE,
         **options: Any) -> Trace:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return import_log(path, shape, layout_of([columns] if columns else [], **options), name="t")


BY_LAYER = jsonl([{"token": t, "layer": layer, "experts": e} for (t, layer), e in ROUTING.items()])
ACCESSES = "".join(f"{t},{layer},{e}\n" for (t, layer), es in ROUTING.items() for e in (es or [""]))


@pytest.mark.parametrize(("name", "text", "columns"), [
    ("list.jsonl", BY_LAYER, ""),
    ("any-order.jsonl", "".join(reversed(BY_LAYER.splitlines(keepends=True))), ""),
    ("bom.ndjson", "\ufeff\r\n" + BY_LAYER.replace("\n", "\r\n") + "\n\n", ""),
    ("lattice.jsonl", jsonl([{"layer_idx": layer, "token_idx": t, "selected_ids": e, "gate_weights": [0.5] * len(e)}
                             for (t, layer), e in ROUTING.items()]),
     "token=token_idx,layer=layer_idx,expert=selected_ids"),
    ("dotted.jsonl", jsonl([{"at": {"tok": t, "moe": {"l": layer}}, "router.ids": [float(x) for x in e]}
                            for (t, layer), e in ROUTING.items()]), "token=at.tok,layer=at.moe.l,expert=router.ids"),
    ("by-token.jsonl", jsonl([{"token": t, "expert": [None, ROUTING[t, 1], ROUTING[t, 2]]} for t in (4, 5, 6)]), ""),
    ("by-request.jsonl", jsonl([{"routed_experts": [[ROUTING[t, 1], ROUTING[t, 2]] for t in (4, 5, 6)]}]),
     "expert=routed_experts"),
    ("access.csv", "token,layer,unit\n" + ACCESSES, ""),
    ("access.tsv", ("tok\tl\te\n" + ACCESSES.replace(",", "\t")), "token=tok,layer=l,expert=e"),
    ("commented.csv", "# route_trace v1\n# n_expert=12\nstep,layer,slot,expert,weight\n" + "".join(
        f"{t},{layer},{i},{e},0.5\n" for (t, layer), es in ROUTING.items() for i, e in enumerate(es or [""])),
     "token=step"),
    ("cells.csv", "token,layer,experts\n" + "".join(
        f"{t}.0,{layer},{' '.join(map(str, e))}\n" for (t, layer), e in ROUTING.items()), ""),
    ("quoted.csv", 'token,layer,experts\n' + "".join(f'{t},{layer},"{e}"\n' for (t, layer), e in ROUTING.items()), ""),
    ("several.csv", "token,layer,e_10,e_2,e_1\n" + "".join(
        ",".join(map(str, [t, layer, *(e + [""] * 3)[:3]])) + "\n" for (t, layer), e in ROUTING.items()), "expert=e_*"),
])
def test_every_layout_says_the_same(tmp_path, name, text, columns):
    trace = read(tmp_path, text, name, columns)
    assert sets(trace) == EXPECTED
    packed = read(tmp_path, gzip.compress(text.encode()), name + ".gz", columns)
    assert packed.header.digest == trace.header.digest


def test_the_header_says_where_it_comes_from(tmp_path):
    rows = [{"turn": turn, "phase": phase, "tok": t, "layer": layer, "e": [t % 4 + 1, 12 - turn]}
            for t in (0, 1) for turn in (7, 2) for phase in ("decode", "prefill")[: 1 + (t == 0)] for layer in (9, 3)
            if phase == "decode" or t == 0]
    trace = read(tmp_path, jsonl([r for r in rows if not (r["phase"] == "prefill" and r["turn"] == 2)]), "r.jsonl",
                 "token=tok,expert=e", where=["phase=decode"], sequence="turn", first_unit=1)
    assert sets(trace) == [[{0, 4}] * 2, [{1, 4}] * 2, [{0, 9}] * 2, [{1, 9}] * 2], "turn 7 first, as in the log"
    save_trace(trace, tmp_path / "t.safetensors")
    header = load_trace_file(tmp_path / "t.safetensors").header
    log = header.imported
    assert log is not None
    assert (header.kind, header.unit, header.predictor, header.model) == ("captured", "expert", "none", "unknown")
    assert (log.file, log.where, log.layer_ids, log.sequences, log.first_unit, log.missing) == \
        ("r.jsonl", {"phase": "decode"}, (3, 9), 2, 1, 0)
    assert log.columns == {"token": "tok", "layer": "layer", "unit": "e", "sequence": "turn"}
    assert (header.unit_bytes, header.unit_precision) == (1000.0, "int4")


def test_what_is_missing_touches_nothing_where_that_is_allowed(tmp_path):
    gaps = jsonl([{"token": t, "layer": layer, "expert": e} for t, layer, e in ((0, 0, 1), (0, 1, 2), (7, 1, 3))])
    with pytest.raises(TraceError, match="no record of token 1, the first"):
        read(tmp_path, gaps)
    with pytest.raises(TraceError, match="no record of token 1 in layer 0, the first"):
        read(tmp_path, gaps.replace("7", "1"))
    trace = read(tmp_path, gaps, allow_missing=True)
    assert sets(trace) == [[{1}, {2}], [set(), {3}]]
    assert trace.header.imported is not None and trace.header.imported.missing == 1


def moe(**changes: Any) -> Model:
    shapes: dict[str, Any] = {
        "d_model": 8, "n_layers": 3, "n_heads": 2, "n_kv_heads": 2, "d_head": 4, "d_ff": 16, "vocab": 10,
        "max_positions": 64, "gated": True, "activation": "silu", "norm": "rmsnorm",
        "experts": Experts(count=12, per_token=3, d_expert=5, first_layer=1), **changes}
    return Model(schema="simmem.model/1", name="toy-moe", title="Toy", family="toy", source="a test",
                 architecture=Architecture(**shapes))


def test_a_model_gives_the_bytes_and_holds_the_log_to_its_shape(tmp_path):
    shape = shape_of_model(moe(), precision="fp16")
    assert (shape.n_layers, shape.n_units, shape.unit_bytes, shape.most) == (2, 12, 3 * 8 * 5 * 2, 3)
    trace = read(tmp_path, BY_LAYER, shape=shape)
    trace.check_model(moe())
    with pytest.raises(TraceError, match="2 layers of 12 experts, toy-moe has none"):
        trace.check_model(moe(experts=None))
    with pytest.raises(TraceError, match=r"uses 4 experts in layer 2, but toy-moe routes to 3.*--sequence"):
        read(tmp_path, BY_LAYER.replace("[11, 1]", "[11, 1, 2, 4]"), shape=shape)
    neurons = shape_of_model(moe(experts=None), "ffn-neuron", "int8")
    assert (neurons.n_layers, neurons.n_units, neurons.unit_bytes) == (3, 16, 24)
    with pytest.raises(SpecError, match="no ffn-neurons"):
        shape_of_model(moe(), "ffn-neuron")


ONE = {"token": 0, "layer": 0, "expert": [1]}


def second(**changes: Any) -> str:
    """A record that is right, and one that is not."""
    return jsonl([ONE, {**ONE, "layer": 1, **changes}])


WRONG: list[tuple[str | bytes, dict[str, Any], str | None, str]] = [
    ("", {}, None, "holds no record$"),
    (second(), {"where": ["expert=5"]}, None, "holds no record with expert = 5"),
    (second(), {"where": ["phase=decode"]}, "line 1", "found the fields token, layer, expert, expected one named 'pha"),
    (second(), {"columns": "token=tok.en"}, "line 1", "found the fields token, layer, expert, .*'tok.en'$"),
    (jsonl([{"a": 1, "b": {"c": 2}}]), {}, "line 1", "fields a, b.c, expected one named 'expert'; --columns token=NA"),
    (jsonl([{"token": 1, "expert": 2}]), {}, "line 1", "expected one named 'layer'; --columns"),
    (jsonl([{"token": 1, "layer": 1, "expert": 2, "experts": [3]}]), {}, "line 1", "only one of expert and experts"),
    (jsonl([ONE, {"token": 0, "expert": [1]}]), {}, "line 2", "expected one named 'layer'"),
    (second(expert=[-1]), {}, "line 2, expert", "found -1, expected a whole number from 0 to 11"),
    (second(expert=[12]), {}, "line 2, expert", "found 12, expected a whole number from 0 to 11"),
    (second(expert=[0]), {"first_unit": 1}, "line 1|line 2, expert", "found 0, expected a whole number from 1 to 12"),
    (second(expert=[10**400]), {}, "line 2, expert", "found 1000"),
    (second(expert=[1.5]), {}, "line 2, expert", "found 1.5, expected a whole"),
    (second(expert=[float("nan")]), {}, "line 2, expert", "found nan, expected a whole"),
    (second(expert=[True]), {}, "line 2, expert", "found true, expected a whole"),
    (second(expert=None), {}, "line 2, expert", "found null, expected a whole"),
    (second(expert=[[1]]), {}, "line 2, expert", "found a list, expected a whole"),
    (second(expert="1 x"), {}, "line 2, expert", "found 'x', expected a whole"),
    (second(expert="٣"), {}, "line 2, expert", "expected a whole"),
    (second(expert=[4, 5, 4]), {}, "line 2, expert", "found 4 twice, expected every id once"),
    (second(token=-3), {}, "line 2, token", "found -3"),
    (second(layer=2**70), {}, "line 2, layer", "found 1180591620717411303424"),
    (second(layer=0), {}, "line 2", "second record of token 0 in layer 0; .* --sequence"),
    (second() + jsonl([{**ONE, "layer": 2}]), {}, "line 3", "layer 2, beside 0 to 1; --n-layers has 2 layers"),
    (jsonl([ONE]), {}, None, "holds the layers 0: 1, but --n-layers has 2"),
    (jsonl([{"token": 0, "expert": [[1], 2]}]), {}, "line 1, expert", "found 2, expected a list of ids for each layer"),
    (jsonl([{"expert": [[[1], [2]], 3]}]), {}, "line 1, expert", "found 3, expected a list for each layer"),
    (second(seq=[1]), {"sequence": "seq"}, "line 1", "one named 'seq'"),
    (second() + "[1]\n", {}, "line 3", "found a JSON list, expected one object a line"),
    (second() + "{'a': 1}\n", {}, "line 3", "is not JSON"),
    (second() + "[" * 100_000 + "\n", {}, "line 3", "nested too deeply|not JSON"),
    (second() + '{"token": ' + "9" * 5000 + "}\n", {}, "line 3", "a number that is too long"),
    (second().encode() + b"\xff\n", {}, "line 3", "not UTF-8"),
    (second() + "\n" * 1001, {}, "line 1003", "more than 1000 empty"),
    (b" " * ((8 << 20) + 1), {}, "line 1", "longer than 8388608"),
    (b"\x1f\x8b\x08 not", {"name": "l.jsonl.gz"}, "line 1", "damaged or not a gzip"),
    (gzip.compress(BY_LAYER.encode())[:-9], {"name": "l.jsonl.gz"}, "line", "damaged or not a gzip"),
    ("token,layer,expert\n0,0,1\n0,1\n", {"name": "l.csv"}, "line 3", "found 2 cells, expected 3"),
    ("token,layer,expert\n0,0,1\n0,0,1\n", {"name": "l.csv"}, "line 3", "second access of token 0 in layer 0 to 1;"),
    ("token,layer,expert\n0,0,1\n0,0,2 3\n", {"name": "l.csv"}, "line 3", "second record of token 0 in layer 0"),
    ('token,layer,expert\n0,"0,1\n0,1,1\n', {"name": "l.csv"}, "line 2", "not a row of CSV"),
    ("token;layer;expert\n0;0;1\n", {"name": "l.csv"}, "line 2", "found the fields token;layer;expert, expected"),
    ("token,token,expert\n0,0,1\n", {"name": "l.csv"}, "line 1", "the column 'token' twice"),
    ("a," * 100_000 + "\n", {"name": "l.csv"}, "line 1", "100001 columns, expected at most 4096"),
    (second(), {"name": "log.parquet"}, None, "ends in '.parquet', expected one of .jsonl"),
]


@pytest.mark.parametrize(("text", "options", "key", "words"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_said(tmp_path, text, options, key, words):
    with pytest.raises(TraceError, match=words) as caught:
        read(tmp_path, text, **options)
    assert caught.value.file is not None and caught.value.file.startswith(str(tmp_path))
    assert (caught.value.key or "").startswith(tuple((key or "").split("|")))
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(("options", "words"), [
    ({"columns": ["token"]}, "found 'token', expected NAME=VALUE"), ({"columns": ["weight=w"]}, "found 'weight'"),
    ({"columns": ["expert=a", "unit=b"]}, "field of the unit twice"), ({"where": ["a=1", "a=2"]}, "names 'a' twice"),
    ({"first_unit": -1}, "found -1")])
def test_options_that_say_nothing(options, words):
    with pytest.raises(SpecError, match=words):
        layout_of(**options)


def test_nothing_takes_memory_on_a_promise(tmp_path, monkeypatch):
    (tmp_path / "huge.jsonl").touch()
    with (tmp_path / "huge.jsonl").open("r+b") as file:
        file.truncate((4 << 30) + 1)  # sparse
    bomb = gzip.compress(b"\0" * (64 << 20))
    nested = jsonl([{"token": 0, "layer": 0, "expert": [0]}, {"token": 2**52, "layer": 2**52, "expert": [999_999]}])
    wide = stated_shape("expert", 10_000, 1_000_000, 1.0, "int4")
    tracemalloc.start()
    with pytest.raises(TraceError, match="at most 4294967296"):
        import_log(tmp_path / "huge.jsonl", SHAPE, name="t")
    for path in (tmp_path, tmp_path / "none.jsonl", Path("/dev/zero"), Path("a\0b")):
        with pytest.raises((TraceError, SpecError)):
            import_log(path, SHAPE, name="t")
    with pytest.raises(TraceError, match="longer than 8388608"):
        read(tmp_path, bomb, "bomb.csv.gz")
    with pytest.raises(TraceError, match="has at most 0"):
        read(tmp_path, nested, shape=wide)
    assert sets(read(tmp_path, nested.replace("999999", "9"), allow_missing=True))[1] == [set(), {9}]
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    many = gzip.compress(("x" * 1023 + "\n").encode() * (24 << 10))
    with pytest.raises(TraceError, match="not JSON"):
        read(tmp_path, many, "many.jsonl.gz")
    rows = b"token,layer,expert,note\n" + (b"0,0,1," + b"0" * 1000 + b"\n") * 40_000
    with pytest.raises(TraceError, match="expands to more than"):
        read(tmp_path, gzip.compress(rows), "rows.csv.gz", where=["note=1"])


LOGS: Mapping[str, str] = {
    "list.jsonl": jsonl([{**json.loads(r), "phase": "decode"} for r in BY_LAYER.splitlines()]),
    "token.jsonl": jsonl([{"token": t, "expert": [ROUTING[t, 1], ROUTING[t, 2]], "phase": 1} for t in (4, 5, 6)]),
    "cells.csv": "token,layer,experts,phase\n" + "".join(
        f'{t},{layer},"{e}",decode\n' for (t, layer), e in ROUTING.items())}


@pytest.mark.parametrize("name", [*LOGS, "packed.jsonl.gz", "meaning.jsonl"])
def test_mutated_logs_are_refused_or_read(tmp_path, name):
    """60 of each: an error of the user's or a trace that keeps its own rules, and nothing else."""
    if name in LOGS:
        assert sets(read(tmp_path, LOGS[name], name)) == EXPECTED
    refused = accepted = 0
    for seed in range(60):
        rng = random.Random(seed)
        if name == "meaning.jsonl":
            records = mutate_json([json.loads(r) for r in BY_LAYER.splitlines()], rng)
            text = jsonl(records if isinstance(records, list) else [records]).encode()
        elif name == "packed.jsonl.gz":
            text = mutate_bytes(gzip.compress(BY_LAYER.encode(), mtime=0), rng)
        else:
            text = mutate_bytes(LOGS[name].encode(), rng)
        try:
            trace = read(tmp_path, text, name, allow_missing=seed % 2 == 0)
        except TraceError as error:  # which names the file, and ends in 2
            refused += str(error).startswith(str(tmp_path / name))
        else:
            accepted += 1
            save_trace(trace, tmp_path / "t.safetensors")
            assert load_trace_file(tmp_path / "t.safetensors").header == trace.header
    assert refused + accepted == 60 and refused > 15


@st.composite
def any_traces(draw: st.DrawFn) -> Trace:
    n_tokens, n_layers, n_units = (draw(st.integers(1, most)) for most in (9, 4, 70))
    seed, share = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    bits = np.random.default_rng(seed).random((n_tokens, n_layers, n_units)) < share
    active = np.packbits(bits, axis=2, bitorder="little")
    return Trace(TraceHeader(
        name="any", kind="captured", model="toy", n_tokens=n_tokens, n_layers=n_layers, n_units=n_units, unit="expert",
        unit_bytes=8.0, criterion="c", threshold="t", records="active", predictor="none", text="x",
        digest=digest_of(active)), active)


@given(trace=any_traces(), block=st.sampled_from([1, 7, 1 << 22]))
def test_export_says_everything_and_imports_again(trace, block, tmp_path_factory):
    folder, header = tmp_path_factory.mktemp("export"), trace.header
    shape = stated_shape("expert", header.n_layers, header.n_units, 8.0, "fp16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simmem.trace.export._BLOCK_CELLS", block)
        for suffix in (".csv", ".jsonl"):
            path = folder / f"t{suffix}"
            rows = export_trace(trace, path)
            assert rows == len(path.read_text().splitlines()) - (suffix == ".csv")
            again = import_log(path, shape, LogLayout(), name="again")
            assert np.array_equal(again.active, trace.active) and again.header.digest == header.digest
        rows = export_trace(trace, folder / "t.parquet")
    file = pq.ParquetFile(folder / "t.parquet")
    table = file.read().to_pylist()
    with (folder / "t.csv").open(newline="") as stream:
        expected = [{k: int(v) if v else None for k, v in row.items()} for row in csv.DictReader(stream)]
    assert table == expected and len(table) == rows
    assert TraceHeader.model_validate_json(file.schema_arrow.metadata[b"simmem.trace"]) == header
    assert sorted(p.name for p in folder.iterdir()) == ["t.csv", "t.jsonl", "t.parquet"]


def test_export_that_cannot_be(tmp_path, monkeypatch):
    trace = read(tmp_path, BY_LAYER)
    with pytest.raises(SpecError, match=r"ends in '\.xlsx', expected one of \.parquet"):
        export_trace(trace, tmp_path / "t.xlsx")
    with pytest.raises(MachineError, match="cannot be written: No such file"):
        export_trace(trace, tmp_path / "none" / "t.csv")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MachineError, match=r"install with: pip install 'simmem\[export\]'"):
        export_trace(trace, tmp_path / "t.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]
