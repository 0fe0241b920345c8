"""A trace file survives a round trip; a damaged or hostile one is one clear error, without taking memory for it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from simmem.errors import MachineError, TraceError
from simmem.trace.store import MAX_METADATA_BYTES, load_trace_file, read_header, save_trace
from simmem.trace.trace import Quality, Trace, TraceHeader, digest_of


def small_trace(n_units: int = 21, **changes: object) -> Trace:
    bits = np.random.default_rng(7).random((6, 2, n_units)) < 0.4
    active = np.packbits(bits, axis=2, bitorder="little")
    fields = {
        "name": "small", "kind": "captured", "model": "toy", "n_tokens": 6, "n_layers": 2, "n_units": n_units,
        "unit_bytes": 64.0, "criterion": "gate", "threshold": "0.5", "records": "active", "predictor": "gate",
        "quality": Quality(text="other", tokens=10, dense_perplexity=20.0, sparse_perplexity=21.0), "text": "Ünïcode",
        "op_timings_s": {"ffn": 1e-3}, "curves": ({"policy": "lru", "hit_ratio": [0.5]},), "digest": digest_of(active),
    }
    return Trace(TraceHeader(**{**fields, **changes}), active)


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def write_with(path: Path, active: np.ndarray | None = None, header: object = None, **changes: object) -> None:
    """A file that safetensors itself finds in order, with a header of our choice."""
    trace = small_trace()
    text = header if isinstance(header, str) else json.dumps(
        {**json.loads(trace.header.model_dump_json(by_alias=True)), **changes})
    save_file({"active": trace.active if active is None else active}, path, metadata={"header": text})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.safetensors"


def refuses(path: Path, words: str, key: str | None = None) -> None:
    with pytest.raises(TraceError, match=words) as caught:
        load_trace_file(path)
    assert caught.value.file == str(path)
    assert key is None or caught.value.key == key
    assert "\n" not in str(caught.value)


def test_round_trip_keeps_every_bit_and_field(path):
    trace = small_trace()
    save_trace(trace, path)
    again = load_trace_file(path)
    assert again.header == trace.header == read_header(path)
    assert np.array_equal(again.active, trace.active)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    save_trace(again, path)  # replaces
    assert load_trace_file(path).header == trace.header


@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 0.9, 0.999])
def test_truncated(path, share):
    save_trace(small_trace(), path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    refuses(path, "truncated or not a safetensors")


@pytest.mark.parametrize("raw", [b"", b"\x80\x04K\x01.", b"GIF89a" * 30, b"\xff" * 400, b"{}",
                                 b"PK\x03\x04" + b"0" * 99])
def test_not_safetensors(path, raw):
    path.write_bytes(raw)
    refuses(path, "truncated or not a safetensors")


@pytest.mark.parametrize("header", [b"[" * 50_000, b"\xff\xfe{}", b"[1]", b"9" * 5000, b'{"a":', b'"x"'])
def test_header_that_is_no_json_object(path, header):
    write_raw(path, header)
    refuses(path, "truncated or not a safetensors")


def test_header_without_a_trace(path):
    save_file({"active": np.zeros((1, 1, 1), np.uint8)}, path)
    refuses(path, "without the metadata of a trace")
    save_file({"active": np.zeros((1, 1, 1), np.uint8)}, path, metadata={"format": "np"})
    refuses(path, "not a trace")
    write_with(path, header="[1, 2]")
    refuses(path, "not a JSON object")


def test_a_header_longer_than_allowed_is_not_read(path):
    write_raw(path, b" " * (MAX_METADATA_BYTES + 1))
    refuses(path, "at most 1048576 are read")
    write_raw(path, b"{}", length=2**63)
    refuses(path, "longer than the file")


@pytest.mark.parametrize(("changes", "key"), [
    ({"surprise": 1}, "surprise"), ({"n_tokens": -1}, "n_tokens"), ({"n_units": "many"}, "n_units"),
    ({"unit_bytes": float("nan")}, "unit_bytes"), ({"kind": "real"}, "kind"), ({"schema": "simmem.trace/9"}, "schema"),
    ({"name": "a\x1b[2Jb"}, "name"), ({"quality": {"text": "x"}}, "quality.tokens")])
def test_header_fields_are_strict(path, changes, key):
    write_with(path, **changes)
    refuses(path, "header|printed", key)


def test_a_header_that_lies_about_the_tensor(path):
    write_with(path, n_tokens=5)
    refuses(path, "promises U8")
    write_with(path, n_units=9)
    refuses(path, "promises U8")
    write_with(path, active=small_trace().active.astype(np.int8))
    refuses(path, "promises U8")
    write_with(path, active=small_trace().active.reshape(-1))
    refuses(path, "promises U8")
    trace = small_trace()
    text = trace.header.model_dump_json(by_alias=True)
    save_file({"active": trace.active, "b": trace.active}, path, metadata={"header": text})
    refuses(path, "holds the tensors")


def test_huge_promises_take_no_memory(path):
    write_with(path, n_tokens=10**9, n_layers=10**6, n_units=10**9)
    trace = small_trace()
    promise = {**json.loads(trace.header.model_dump_json(by_alias=True)), "n_tokens": 2**40}
    tracemalloc.start()
    refuses(path, "promises .* in a file of")
    write_raw(path, json.dumps({"__metadata__": {"header": json.dumps({**promise, "n_tokens": 6})},
                                "active": {"dtype": "U8", "shape": [2**40, 2, 3], "data_offsets": [0, 36]}}).encode(),
              trace.active.tobytes())
    refuses(path, "truncated or not a safetensors|promises U8")
    write_raw(path, json.dumps({"__metadata__": {"header": json.dumps(promise)},
                                "active": {"dtype": "U8", "shape": [2**40, 2, 3],
                                           "data_offsets": [0, 2**40 * 6]}}).encode())
    refuses(path, "promises .* in a file of")
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_a_file_past_the_bound_is_not_read(path):
    with path.open("wb") as file:
        file.truncate((2 << 30) + 1)  # sparse
    refuses(path, "at most 2147483648")


def test_changed_bits_and_bits_past_the_end(path):
    save_trace(small_trace(), path)
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    refuses(path, "digest", "digest")
    write_with(path, digest="0" * 64)
    refuses(path, "digest", "digest")
    active = small_trace().active.copy()
    active[3, 1, -1] |= 0x80
    write_with(path, active=active, digest=digest_of(active))
    refuses(path, "units past its 21")


def test_what_is_no_file(tmp_path):
    refuses(tmp_path, "is not a file")
    refuses(tmp_path / "absent", "cannot be read: No such file")
    refuses(Path("/dev/zero"), "is not a file")


def test_saving_where_nothing_can_be_written(tmp_path):
    trace = small_trace()
    with pytest.raises(MachineError, match="cannot be written"):
        save_trace(trace, tmp_path / "no" / "t.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MachineError, match="cannot be written"):
        save_trace(trace, tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_saving_refuses_a_wrong_digest(path):
    with pytest.raises(TraceError, match="digest"):
        save_trace(small_trace(digest="0" * 64), path)
    assert not path.exists()


def test_opening_a_synthetic_trace_imports_no_file_format_and_no_scipy():
    code = ("import sys; from simmem.trace import open_trace; from simmem.spec.model import load_model; "
            "open_trace(None, load_model('opt-125m'), n_tokens=4); "
            "print([m for m in ('safetensors', 'scipy', 'torch', 'simpy') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
