"""Does every file that simmem reads from others, however it was mangled, end in one clear error of exit code 2?

Each importer is given mutations of sound files until `WANTED` of them were refused. What is not refused has to load
in full: a mutated file may still be sound. Anything but a `SimmemError` of exit code 2 fails the test with the seed
that makes the file again. An importer is one line in `IMPORTERS`.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
import tomllib
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmem.errors import SimmemError, SpecError
from simmem.spec.base import load_toml
from simmem.spec.device import load_device
from simmem.spec.gguf import read_gguf
from simmem.spec.library import resolve
from simmem.spec.model import load_model
from simmem.trace.store import load_trace_file, save_trace
from simmem.trace.trace import Quality, Trace, TraceHeader, digest_of
from simmem.validation.reference import reproduce
from tests.cli.conftest import simmem as simmem  # noqa: PLC0414 - a fixture
from tests.cli.running import Simmem
from tests.unit.fuzzing import mutate_bytes, mutate_json, to_toml
from tests.unit.gguf_files import a_gguf, a_gguf_model

WANTED = 110
MOST = 1200
GGUF_HEADER_BYTES = 1440
MAX_SECONDS = 10.0
MAX_MEMORY_BYTES = 64 << 20

Mutate = Callable[[random.Random], bytes]


@dataclass(frozen=True)
class Importer:
    """How a kind of file is mutated and loaded, and the command that reads it."""

    suffix: str
    mutate: Mutate
    load: Callable[[Path], object]
    command: tuple[str, ...]
    """The file's name is put at its end."""


def either(*ways: Mutate) -> Mutate:
    return lambda rng: rng.choice(ways)(rng)


def toml(what: str, *names: str) -> Mutate:
    """Shipped files, mutated as text or in their values."""
    def values(rng: random.Random) -> bytes:
        return to_toml(mutate_json(parsed(what, rng.choice(names)), rng)).encode()

    return either(lambda rng: mutate_bytes(shipped(what, rng.choice(names)), rng), values, values)


@cache
def shipped(what: str, name: str) -> bytes:
    return resolve(what, name).read_bytes()


@cache
def parsed(what: str, name: str) -> dict[str, Any]:
    return tomllib.loads(shipped(what, name).decode())


@cache
def a_trace_file() -> tuple[bytes, dict[str, Any]]:
    """A sound trace, as bytes and as the JSON at its front."""
    active = np.packbits(np.random.default_rng(7).random((6, 2, 21)) < 0.4, axis=2, bitorder="little")
    header = TraceHeader(
        name="small", kind="captured", model="toy", n_tokens=6, n_layers=2, n_units=21, unit_bytes=64.0,
        criterion="gate", threshold="0.5", records="active", predictor="gate", text="made up", digest=digest_of(active),
        quality=Quality(text="other", tokens=10, dense_perplexity=20.0, sparse_perplexity=21.0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.safetensors"
        save_trace(Trace(header, active), path)
        raw = path.read_bytes()
    front = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    return raw, front


def mutated_trace(rng: random.Random) -> bytes:
    """The header's own fields, or what safetensors says of the tensor, made wrong and written as they should be."""
    raw, front = a_trace_file()
    tensors = raw[8 + int.from_bytes(raw[:8], "little"):]
    if rng.random() < 0.5:
        header = json.loads(front["__metadata__"]["header"])
        front = {**front, "__metadata__": {"header": json.dumps(mutate_json(header, rng))}}
    else:
        front = mutate_json(front, rng)
    text = json.dumps(front).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def config(rng: random.Random) -> bytes:
    """A published `config.json`."""
    return rng.choice(CONFIGS).read_bytes()


def config_values(rng: random.Random) -> bytes:
    return json.dumps(mutate_json(json.loads(config(rng)), rng)).encode()


CONFIGS = sorted((Path(__file__).parents[1] / "data" / "configs").glob("*.json"))
ROWS = {"schema": "simmem.reference/1", "row": [{
    "id": "mine", "system": "mine", "device": "m1-max", "model": "opt-125m", "policy": "stream",
    "knobs": {"resident_ratio": 0.5}, "workload": {"prompt_tokens": 8, "new_tokens": 8, "weights": "fp16"},
    "budget": {"dram": "2 GB"}, "quantity": "predicted.token_latency_s", "published": 0.01, "unit": "s",
    "tolerance": 0.5, "source": "made up for a test"}]}


def mutated_rows(rng: random.Random) -> bytes:
    return to_toml(mutate_json(ROWS, rng)).encode()


def load_rows(path: Path) -> None:
    """A row that is wrong does not stop the others, so it is a result here: raise what it says."""
    for row in reproduce(files=[path]).rows:
        if row.status == "error":
            raise SpecError(str(row.message), file=str(path))


PLAN_ON, PLAN_OF = ("plan", "--device", "m1-max", "--model"), ("plan", "--model", "opt-125m", "--device")
IMPORTERS = {
    "gguf": Importer(".gguf", lambda rng: mutate_bytes(a_gguf(), rng, within=GGUF_HEADER_BYTES), read_gguf, PLAN_ON),
    "gguf model": Importer(".gguf", lambda rng: mutate_bytes(a_gguf_model(), rng, within=len(a_gguf_model(data=0))),
                           lambda path: load_model(str(path)), PLAN_ON),
    "config": Importer(".json", either(config_values, lambda rng: mutate_bytes(config(rng), rng)),
                       lambda path: load_model(str(path)), PLAN_ON),
    "trace": Importer(".safetensors", either(mutated_trace, lambda rng: mutate_bytes(a_trace_file()[0], rng)),
                      load_trace_file, ("replay",)),
    "device": Importer(".toml", toml("device", "iphone15", "rtx4090-pc", "m1-max"),
                       lambda path: load_device(str(path)), PLAN_OF),
    "model": Importer(".toml", toml("model", "opt-125m", "opt-350m", "smollm2-135m"),
                      lambda path: load_model(str(path)), PLAN_ON),
    "reference": Importer(".toml", either(mutated_rows, lambda rng: mutate_bytes(to_toml(ROWS).encode(), rng)),
                          load_rows, ("reproduce", "--reference")),
}


def refusal(load: Callable[[Path], object], path: Path) -> SimmemError | None:
    try:
        load(path)
    except SimmemError as error:
        return error
    return None  # whatever else is raised is a bug and fails the test


@pytest.mark.parametrize("name", IMPORTERS)
def test_mutated_files_are_refused_cheaply(tmp_path, name):
    importer = IMPORTERS[name]
    refused = 0
    for seed in range(MOST):
        path = tmp_path / f"seed-{seed}{importer.suffix}"  # the name stands in a traceback, and the file is kept
        path.write_bytes(importer.mutate(random.Random(seed)))
        started = time.perf_counter()
        tracemalloc.start()
        error = refusal(importer.load, path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.perf_counter() - started < MAX_SECONDS, path
        assert peak < MAX_MEMORY_BYTES, path
        if error is not None:
            assert error.exit_code == 2 and error.message, path
            refused += 1
        if refused == WANTED:
            return
    pytest.fail(f"{refused} of {MOST} mutated files were refused: tame mutations, or too much is let through")


@pytest.mark.parametrize("name", IMPORTERS)
def test_the_command_says_it_in_one_line(tmp_path, simmem: Simmem, name):
    importer = IMPORTERS[name]
    said = 0
    for seed in range(1000, 1100):
        path = tmp_path / f"seed-{seed}{importer.suffix}"
        path.write_bytes(importer.mutate(random.Random(seed)))
        if refusal(importer.load, path) is None:
            continue
        ended = simmem(*importer.command, path)
        if name == "reference" and ended.code == 1:  # a row that is wrong beside others that may be sound
            assert "\x1b" not in ended.out, path
            continue
        assert (ended.code, ended.out) == (2, ""), (path, ended.err)
        assert ended.err.startswith("simmem: ") and ended.err[:-1].isprintable(), path
        said += 1
        if said == 6:
            return
    pytest.fail(f"the command refused {said}")


LONG = 200_000
TOML = {
    "a key of many parts": (".".join("a" * LONG) + " = 1", "more than 32 parts"),
    "of quoted parts": (".".join(['"a.b"', "''"] * 50_000) + " = 1", "more than 32 parts"),
    "in a table's name": ("[" + " . ".join("a" * LONG) + "]", "more than 32 parts"),
    "behind strings": ("x = [\"\"\" \" ' \"\"\", {" + ".".join("a" * LONG) + " = 1}, \"'\"]", "more than 32 parts"),
    "an integer of many digits": ("n_layers = " + "9" * 5000, "more than 100 characters"),
    "one that is written in hexadecimal": ("n_layers = 0x" + "f" * 100_000, "more than 100 characters"),
    "unfinished strings": ('"\\' * 400_000, "not valid TOML"),
    "nested": ("a = " + "[" * LONG, "not valid TOML"),
    "nested tables": ("a = " + "{a=" * 100_000, "not valid TOML"),
    "what clears the screen": ('title = "\\u001b[2J"', "control a terminal"),
    "what turns the writing": ('title = "\u202egnp.exe"', "control a terminal"),
    "a key that clears the screen": ('"\\u009b2J" = 1', "control a terminal"),
    "not UTF-8": (b"name = '\xff'", "not UTF-8"),
    "too long": ("#" * (2 << 20), "at most 1048576"),
}


@pytest.mark.parametrize("name", TOML)
def test_hostile_toml(tmp_path, name):
    raw, words = TOML[name]
    path = tmp_path / "bad.toml"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    started = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(SpecError, match=words) as caught:
        load_toml(path)
    assert tracemalloc.get_traced_memory()[1] < MAX_MEMORY_BYTES
    tracemalloc.stop()
    assert caught.value.file == str(path)
    assert time.perf_counter() - started < MAX_SECONDS


def test_sound_toml_is_what_tomllib_reads(tmp_path):
    path = tmp_path / "odd.toml"
    path.write_text('''a.b."c.d" = """x ' "" y"""   # ' "
e = [''' + "'''\" it's '''" + ''', 'back\\\\slash', "\\"quoted\\"", "line\\nbreak"]
f = [0.1, 0.2, 1e-3, 0x_ff]
'''.replace("0x_ff", "0xff") + "long = '" + "x" * 5000 + ".y" * 500 + "'\n", encoding="utf-8")
    assert load_toml(path) == tomllib.loads(path.read_text(encoding="utf-8"))
