"""Does a trace keep its routing beside its activity, and is a file that lies about it one clear error?"""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from simmem.errors import TraceError
from simmem.trace.store import load_trace_file, save_trace
from simmem.trace.trace import Captured, Trace, TraceHeader, digest_of

TOKENS, LAYERS, UNITS, K = 16, 2, 21, 3


def routed() -> Trace:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(TOKENS, LAYERS, UNITS)).astype(np.float16)
    bits = np.zeros(logits.shape, bool)
    np.put_along_axis(bits, np.argsort(-logits, axis=2)[:, :, :K], True, axis=2)
    active = np.packbits(bits, axis=2, bitorder="little")
    header = TraceHeader(
        name="routed", kind="captured", model="toy-moe", n_tokens=TOKENS, n_layers=LAYERS, n_units=UNITS,
        unit="expert", unit_bytes=64.0, criterion="router", threshold="its top 3", records="active", predictor="none",
        text="some", digest=digest_of(active),
        captured=Captured(mode="decoded", context_tokens=4, pass_tokens=8, dtype="float32", device="cpu"))
    return Trace.with_extras(header, active, {
        "router_logits": logits, "router_weights": rng.random((TOKENS, LAYERS, K)).astype(np.float16),
        "prefill": active[:2] | active[2:4], "tokens": np.arange(TOKENS, dtype=np.int32)})


def refuses(path: Path, words: str) -> None:
    with pytest.raises(TraceError, match=words) as caught:
        load_trace_file(path)
    assert caught.value.file == str(path)
    assert "\n" not in str(caught.value)


def write(path: Path, tensors: dict[str, Any] | None = None, header: dict[str, Any] | None = None) -> None:
    """A file that safetensors finds in order, with other tensors or other words than a trace would have."""
    trace = routed()
    text = {**json.loads(trace.header.model_dump_json(by_alias=True)), **(header or {})}
    save_file({"active": trace.active, **trace.extras} if tensors is None else tensors, path,
              metadata={"header": json.dumps(text)})


def test_routing_comes_back_as_it_was(tmp_path: Path) -> None:
    trace, path = routed(), tmp_path / "t.safetensors"
    save_trace(trace, path)
    again = load_trace_file(path)
    assert again.header == trace.header
    assert set(again.extras) == set(trace.extras)
    for name, array in trace.extras.items():
        assert again.extras[name].dtype == array.dtype
        np.testing.assert_array_equal(again.extras[name], array)
    assert again.header.digest == digest_of(trace.active), "the digest is of the activity alone"
    together = again.batched(2)
    assert together.header.tensors == {} and not together.extras  # a union of tokens has no routing of its own


@pytest.mark.parametrize(("change", "says"), [
    ({"router_secrets": {"dtype": "F16", "shape": [16, 2, 21], "sha256": "0"}}, "'router_secrets', known are"),
    ({"router_logits": {"dtype": "F16", "shape": [16, 2, 22], "sha256": "0"}}, "does not go with 16 tokens"),
    ({"router_logits": {"dtype": "U8", "shape": [16, 2, 21], "sha256": "0"}}, "router_logits as U8"),
    ({"router_weights": {"dtype": "F16", "shape": [16, 2, 22], "sha256": "0"}}, "router_weights as F16"),
    ({"prefill": {"dtype": "U8", "shape": [17, 2, 3], "sha256": "0"}}, "prefill as U8"),
    ({"tokens": {"dtype": "I32", "shape": [15], "sha256": "0"}}, "tokens as I32"),
    ({"tokens": {"dtype": "I32", "shape": [], "sha256": "0"}}, "not a trace's"),
    ({"tokens": {"dtype": "I32", "shape": [16], "sha256": "0"}}, "holds the tensors .* expected"),
    ({"tokens": {"dtype": "I64", "shape": [16], "sha256": "0"}}, "not a trace's"),
    ({"tokens": {"dtype": "I32", "shape": [-1], "sha256": "0"}}, "not a trace's"),
    ({"tokens": {"dtype": "I32", "shape": [1, 1, 1, 1, 1], "sha256": "0"}}, "not a trace's"),
])
def test_what_a_header_may_not_describe(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "t.safetensors"
    write(path, header={"tensors": change})
    refuses(path, says)


def test_tensors_that_are_not_what_the_header_says(tmp_path: Path) -> None:
    trace, path = routed(), tmp_path / "t.safetensors"
    held = {"active": trace.active, **trace.extras}
    write(path, held | {"router_weights": held["router_weights"] + np.float16(0.5)})
    refuses(path, "digest of router_weights")
    write(path, held | {"tokens": held["tokens"].astype(np.int64)})
    refuses(path, "a tensor of I64")
    write(path, held | {"tokens": held["tokens"][:4]})
    refuses(path, r"a tensor of I32 \(4,\), its header promises I32 \(16,\)")
    write(path, {"active": trace.active})
    refuses(path, "promises .* bytes of activity in a file of|holds the tensors")
    write(path, held | {"more": np.zeros(4)})
    refuses(path, "holds the tensors")
    write(path, held, header={"captured": {**json.loads(trace.header.model_dump_json())["captured"],
                                           "device": "cpu\x1b[2J"}})
    refuses(path, "cannot be printed")


def test_huge_promises_of_a_tensor_take_no_memory(tmp_path: Path) -> None:
    path, trace = tmp_path / "t.safetensors", routed()
    text = json.loads(trace.header.model_dump_json(by_alias=True))
    text |= {"n_units": 200_000, "n_layers": 100, "n_tokens": 100_000}
    text["tensors"] = {"router_logits": {"dtype": "F16", "shape": [100_000, 100, 200_000], "sha256": "0"}}
    raw = json.dumps({"__metadata__": {"header": json.dumps(text)}, "active": {
        "dtype": "U8", "shape": [100_000, 100, 25_000], "data_offsets": [0, 250_000_000_000]}}).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    tracemalloc.start()
    refuses(path, "promises [0-9]+ bytes of activity in a file of")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_saving_refuses_what_could_not_be_read_back(tmp_path: Path) -> None:
    trace, path = routed(), tmp_path / "t.safetensors"
    with pytest.raises(TraceError, match="describes other tensors than it holds"):
        save_trace(Trace(trace.header, trace.active), path)
    other = {**trace.extras, "tokens": trace.extras["tokens"] + 1}
    with pytest.raises(TraceError, match="digest of tokens"):
        save_trace(Trace(trace.header, trace.active, other), path)
    assert not path.exists()
