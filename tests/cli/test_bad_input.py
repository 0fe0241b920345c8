"""Does each bad input end in one clear line, the right exit code, no traceback and nothing half-written?"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from simmem.planner.api import plan
from simmem.spec.library import resolve
from simmem.trace import Trace, TraceHeader, digest_of, save_trace
from tests.cli.running import Ended, Simmem

PLAN = ("plan", "--device", "iphone15", "--model", "opt-6.7b")
DEVICE = ("plan", "--model", "opt-125m", "--device")
MODEL = ("plan", "--device", "iphone15", "--model")
HOT_COLD = ("plan", "--device", "powerinfer-pc-high", "--model", "opt-30b", "--weights", "fp16", "--policy", "hot-cold")
SMOLLM = ("plan", "--device", "m1-max", "--model", "smollm2-135m", "--trace")
CAPTURE = ("capture", "--model", "smollm2-135m", "--out", "{tmp}/t.safetensors")


# --- files that are wrong ------------------------------------------------------------------------------------------

Make = Callable[[Path], None]


def shipped(what: str, name: str, *changes: tuple[str, str]) -> Make:
    """A copy of a shipped file with some text replaced, as `bad.toml`."""
    text = resolve(what, name).read_text(encoding="utf-8")
    for old, new in changes:
        assert len(re.findall(old, text)) == 1, f"{old} does not stand once in {name}"
        text = re.sub(old, new.replace("\\", r"\\"), text)
    return lambda folder: written(folder / "bad.toml", text.encode())


def written(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def raw(data: bytes, name: str = "bad.toml") -> Make:
    return lambda folder: written(folder / name, data)


def a_trace(n_tokens: int = 80, n_layers: int = 30, n_units: int = 1536, **changes: Any) -> Trace:
    """A captured trace of random activity, by default of the shape of smollm2-135m."""
    active = np.packbits(np.random.default_rng(1).random((n_tokens, n_layers, n_units)) < 0.1, axis=2,
                         bitorder="little")
    header = TraceHeader(
        name="made-up", kind="captured", model="smollm2-135m", n_tokens=n_tokens, n_layers=n_layers, n_units=n_units,
        unit_bytes=3456.0, criterion="gate", threshold="above 0", records="active", predictor="gate", text="none",
        digest=digest_of(active))
    return Trace(header.model_copy(update=changes), active)


def trace_file(**changes: Any) -> Make:
    return lambda folder: save_trace(a_trace(**changes), folder / "t.safetensors")


def truncated_trace(folder: Path) -> None:
    whole = folder / "t.safetensors"
    save_trace(a_trace(), whole)
    whole.write_bytes(whole.read_bytes()[:-1000])


def lying_trace(**changes: Any) -> Make:
    """A file whose header promises other things than its tensor has."""
    def make(folder: Path) -> None:
        trace = a_trace()
        header = trace.header.model_copy(update=changes)
        save_file({"active": trace.active}, folder / "t.safetensors",
                  metadata={"header": header.model_dump_json(by_alias=True)})
    return make


@cache
def written_plan() -> str:
    return plan("m1-max", "opt-125m", policy="flash-window", weights="fp16", dram="400 MB",
                knobs={"window_tokens": 2, "reader_threads": 32}).to_json()


def plan_file(**changes: Any) -> Make:
    """A plan as `simmem plan --out` writes it, with some of it edited: path → value."""
    def make(folder: Path) -> None:
        found = json.loads(written_plan())
        for path, value in changes.items():
            *above, last = path.split("__")
            here = found
            for part in above:
                here = here[part]
            here[last] = value
        written(folder / "plan.json", json.dumps(found).encode())
    return make


ROW = """schema = "simmem.reference/1"
[[row]]
id = "mine"
system = "mine"
device = "m1-max"
model = "opt-125m"
policy = "resident"
quantity = "predicted.token_latency_s"
published = 0.01
unit = "s"
tolerance = 0.5
source = "made up for a test"
"""


# --- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A command that must fail: `{tmp}` in its arguments is a folder that `make` may fill."""

    id: str
    arguments: tuple[str, ...]
    code: int = 2
    says: tuple[str, ...] = ()
    """What the line on stderr must contain."""
    kind: str = "SpecError"
    key: str | None = None
    file: str | None = None
    make: Make | None = None
    tier: str | None = None
    has_json: bool = True


def device(title: str, key: str | None, says: str, *changes: tuple[str, str]) -> Case:
    """A copy of the m1-max's file with a mistake in it."""
    return Case(f"device file: {title}", (*DEVICE, "{tmp}/bad.toml"), key=key, says=(says,), file="{tmp}/bad.toml",
                make=shipped("device", "m1-max", *changes))


def model(title: str, key: str | None, says: str, *changes: tuple[str, str]) -> Case:
    """A copy of opt-6.7b's file with a mistake in it."""
    return Case(f"model file: {title}", (*MODEL, "{tmp}/bad.toml"), key=key, says=(says,), file="{tmp}/bad.toml",
                make=shipped("model", "opt-6.7b", *changes))


def device_bytes(title: str, says: str, data: bytes) -> Case:
    return Case(f"device file: {title}", (*DEVICE, "{tmp}/bad.toml"), says=(says,), make=raw(data),
                file="{tmp}/bad.toml")


def trace(title: str, says: str, make: Make, key: str | None = None) -> Case:
    return Case(f"trace: {title}", (*SMOLLM, "{tmp}/t.safetensors"), kind="TraceError", says=(says,), key=key,
                make=make, file="{tmp}/t.safetensors")


def knob(title: str, policy: str, settings: tuple[str, ...], key: str, *says: str) -> Case:
    given = tuple(part for setting in settings for part in ("--set", setting))
    return Case(f"knob: {title}", (*PLAN, *(("--policy", policy) if policy else ()), *given), key=key, says=says)


def unknown(title: str, *arguments: str, close: str, key: str | None = None) -> Case:
    return Case(f"unknown {title}", arguments, kind="UnknownNameError", says=(close,), key=key)


def option(title: str, arguments: tuple[str, ...], key: str | None, *says: str, kind: str = "SpecError",
           code: int = 2, **more: Any) -> Case:
    return Case(title, arguments, code=code, kind=kind, key=key, says=says, **more)


def edited_plan(title: str, key: str | None, says: str, kind: str = "SpecError", **changes: Any) -> Case:
    return Case(f"plan file: {title}", ("simulate", "{tmp}/plan.json"), key=key, says=(says,), kind=kind,
                make=plan_file(**changes), file="{tmp}/plan.json")


FLASH_RATE = r'rate = \{ value = "6\.1 GB/s"'
CASES = [
    unknown("device", "plan", "--device", "iphne15", "--model", "opt-6.7b", close="did you mean iphone15"),
    unknown("model", "plan", "--device", "iphone15", "--model", "opt-6.7", close="did you mean opt-6.7b"),
    unknown("trace", *PLAN, "--trace", "opt-publishd", close="did you mean opt-published"),
    unknown("policy", *PLAN, "--policy", "flash-windw", close="did you mean flash-window"),
    unknown("device to show", "devices", "m1max-", close="m1max"),
    unknown("model to show", "models", "phi-3", close="phi-2"),
    unknown("trace to show", "traces", "phi-2-publishd", close="phi-2-published"),
    unknown("policy to show", "policies", "resident2", close="did you mean resident"),
    unknown("schema", "schema", "plann", close="did you mean plan"),
    unknown("reference set", "reproduce", "llm-in-a-flsh", close="did you mean llm-in-a-flash"),
    unknown("engine", "plan", "--device", "m1-max", "--model", "opt-6.7b", "--engine", "llm-in-a-flsh", key="--engine",
            close="did you mean llm-in-a-flash"),
    unknown("cache policy", "replay", "opt-published", "--policy", "windw", key="--policy", close="mean window"),
    unknown("name that is empty", "plan", "--device", "iphone15", "--model", "", close="no model named ''"),
    unknown("name that would break the line", "devices", "iphone\n15", close=r"no device named 'iphone\n15'"),

    Case("a log in the place of a trace", ("replay", "{tmp}/log.jsonl"), file="{tmp}/log.jsonl",
         make=raw(b"{}", "log.jsonl"), says=("simmem import",)),
    Case("an output in the folder that is read", (*MODEL, "{tmp}", "--out", "{tmp}/config.json"),
         file="{tmp}/config.json", make=raw(b'{"model_type": "llama"}', "config.json"), says=("folder that is read",)),
    option("two outputs in one file", (*PLAN, "--out", "{tmp}/a.png", "--plot", "{tmp}/a.png"), "--plot", "--out",
           file="{tmp}/a.png"),
    option("budget without a unit", (*PLAN, "--dram", "6"), "--dram", "no unit", "'6 GB'", kind="UnitError"),
    option("budget in bits", (*PLAN, "--dram", "6 Gb"), "--dram", "b is bits", kind="UnitError"),
    option("negative budget", (*PLAN, "--dram", "-3GB"), "--dram", "-3GB", kind="UnitError"),
    option("absurd budget", (*PLAN, "--dram", "1e30GB"), "--dram", "believed", kind="UnitError"),
    option("budget with the wrong kilo", (*PLAN, "--dram", "600 KB"), "--dram", "kB for 1000 B", kind="UnitError"),
    option("budget that is no number", (*PLAN, "--dram", "nan GB"), "--dram", "'nan GB'", kind="UnitError"),
    option("budget above capacity", (*PLAN, "--dram", "100GB"), "--dram", "iphone15 has 6.44"),
    option("VRAM on unified memory", (*PLAN, "--vram", "1GB"), "--vram", "unified memory", "--dram"),

    knob("typo", "flash-window", ("window_token=3",), "--set", "no knob 'window_token'", "window_tokens"),
    knob("of another policy", "resident", ("window_tokens=3",), "--set", "resident has no knob 'window_tokens'"),
    knob("out of range", "flash-window", ("window_tokens=1000",), "window_tokens", "from 0 to 32"),
    knob("not finite", "flash-window", ("window_tokens=nan",), "window_tokens", "finite"),
    knob("infinite", "stream", ("resident_ratio=inf",), "resident_ratio", "finite"),
    knob("not whole", "flash-window", ("window_tokens=1.5",), "window_tokens", "whole number"),
    knob("neither true nor false", "flash-window", ("bundled=perhaps",), "bundled", "true or false"),
    knob("of a wrong choice", "flash-window", ("agent=npu",), "agent", "gpu, cpu"),
    knob("without a policy", "", ("window_tokens=3",), "--set", "--policy"),
    knob("set twice", "stream", ("resident_ratio=0.5", "resident_ratio=0.6"), "--set", "twice"),
    knob("without a value", "stream", ("resident_ratio",), "--set", "KNOB=VALUE"),
    knob("without a name", "stream", ("=0.5",), "--set", "KNOB=VALUE"),
    *(option(f"knob in bytes: {said}", (*HOT_COLD, "--set", f"gpu_weight_bytes={value}"), "gpu_weight_bytes", said,
             kind=kind) for value, said, kind in (
        ("10 bananas", "expected a quantity such as '6 GB'", "UnitError"), ("8Gb", "b is bits", "UnitError"),
        ("500GB", "found '500GB', expected a value from 4.", "SpecError"), ("10", "to 63.", "SpecError"))),
    option("knob that the batch does not divide by", (
        "plan", "--device", "flexgen-t4", "--model", "opt-1.3b", "--policy", "tier-percent", "--set", "gpu_batch=6"),
        "--batch", "found 1, expected a multiple of 6", "--set gpu_batch=6", "--objective throughput"),

    device("typo in a key", "link.flash.latncy", "did you mean latency", (r"\nlatency = ", "\nlatncy = ")),
    device("missing unit", "link.flash.rate.value", "no unit", (FLASH_RATE, 'rate = { value = "6.1"')),
    device("bare number", "link.flash.rate.value", "bare number", (FLASH_RATE, "rate = { value = 6.1")),
    device("wrong unit", "link.flash.rate.value", "'6.1 GB'", (FLASH_RATE, 'rate = { value = "6.1 GB"')),
    device("absurd figure", "link.flash.rate.value", "believed", (FLASH_RATE, 'rate = { value = "6100000 GB/s"')),
    device("missing source", "memory.flash.capacity.source", "missing",
           (r'(value = "1 TB", kind = "datasheet"), source = "[^"]*"', 'value = "1 TB", kind = "datasheet"')),
    device("fitted, but spent on nothing", "link.flash.request_time", "spent",
           (r'(request_time = .*), spent = \[.*?\]', 'request_time = { value = "5 us", kind = "fitted", '
                                                     'source = "a made-up fit"')),
    device("unknown kind", "link.flash.rate.kind", "'guessed'",
           (FLASH_RATE + ', kind = "measured"', 'rate = { value = "6.1 GB/s", kind = "guessed"')),
    device("range that leaves the value out", "link.flash.rate", "outside its own range",
           (FLASH_RATE + r'(.*)range = \["5\.8 GB/s"', 'rate = { value = "6.1 GB/s", kind = "measured", '
                                                       'range = ["6.2 GB/s"')),
    device("missing part", "link", "missing", (r"(?s)\[link\.flash\].*?(?=\n\n)", "")),
    device("link to nowhere", None, "no memory of this device", (r'\ntarget = "dram"', '\ntarget = "vram"')),
    device("other schema", "schema", "simmem.device/1", (r"simmem\.device/1", "simmem.device/9")),
    device_bytes("broken TOML", "not valid TOML", b'schema = "simmem.device/1\nname'),
    device_bytes("not UTF-8", "UTF-8", b'schema = "\xff\xfe"'),
    device_bytes("oversized", "at most", b"#" * ((1 << 20) + 1)),
    Case("device file: empty", (*DEVICE, "{tmp}/bad.toml"), says=("is missing",), file="{tmp}/bad.toml", key="schema",
         make=raw(b"")),
    Case("device file: a folder", (*DEVICE, "{tmp}"), says=("is not a file",), file="{tmp}"),
    Case("device file: not there", (*DEVICE, "{tmp}/none.toml"), says=("no such device file",), file="{tmp}/none.toml"),

    model("zero layers", "architecture.n_layers", "greater than 0", (r"n_layers = 32", "n_layers = 0")),
    model("more layers than can be", "architecture.n_layers", "less than", (r"n_layers = 32", "n_layers = 32000000")),
    model("heads that do not divide", "architecture", "not a multiple of n_kv_heads (5)",
          (r"n_kv_heads = 32", "n_kv_heads = 5")),
    model("typo in a key", "architecture.d_modl", "did you mean d_model", (r"d_model = 4096", "d_modl = 4096")),
    model("a fraction of a layer", "architecture.n_layers", "integer", (r"n_layers = 32", "n_layers = 32.5")),

    trace("truncated", "promises 460800 bytes of activity in a file of", truncated_trace),
    trace("more tokens than the file holds", "promises", lying_trace(n_tokens=10**9)),
    trace("another shape than its tensor", "its header promises U8", lying_trace(n_layers=29)),
    trace("another digest than its bits", "digest", lying_trace(digest="0" * 64), key="digest"),
    trace("not safetensors", "not a safetensors file", raw(b"PK\x03\x04 not a trace" * 50, "t.safetensors")),
    trace("a header that is longer than the file", "truncated", raw(b"\xff" * 64, "t.safetensors")),
    trace("characters that cannot be printed", "printed", lying_trace(criterion="gate\x1b[31m"), key="criterion"),
    trace("no header of a trace", "not a trace",
          lambda folder: save_file({"active": np.zeros(4, np.uint8)}, folder / "t.safetensors", metadata={"a": "b"})),
    Case("trace: of another model", (*SMOLLM, "{tmp}/t.safetensors"), kind="TraceError", key="made-up",
         says=("29 layers of 1536", "smollm2-135m has 30"), make=trace_file(n_layers=29)),
    Case("trace: too short for the batch", (*SMOLLM, "{tmp}/t.safetensors", "--batch", "32"), kind="TraceError",
         key="made-up", says=("too few for batch 32",), make=trace_file()),

    option("context past the model's limit", (*PLAN, "--prompt", "2000"), "--prompt", "2048", "opt-6.7b"),
    option("batch of nothing", (*PLAN, "--batch", "0"), "--batch", "found 0"),
    option("no new tokens", (*PLAN, "--new-tokens", "0"), "--new-tokens", "found 0"),
    option("prompt that is no number", (*PLAN, "--prompt", "many"), "--prompt", "many"),
    option("unknown precision", (*PLAN, "--weights", "fp15"), "--weights", "fp16"),
    option("unknown precision of keys", (*PLAN, "--kv", "int1"), "--kv", "int2"),
    option("unknown objective", (*PLAN, "--objective", "speed"), "--objective", "latency"),

    option("output in a folder that is not there", (*PLAN, "--out", "{tmp}/none/plan.json"), None, "does not exist",
           file="{tmp}/none/plan.json"),
    option("output under a file", (*PLAN, "--out", "{tmp}/bad.toml/plan.json"), None, "does not exist",
           file="{tmp}/bad.toml/plan.json", make=raw(b"")),
    option("output that is a folder", (*PLAN, "--out", "{tmp}"), None, "is a folder", file="{tmp}"),
    option("output that is a device", (*PLAN, "--out", "/dev/null"), None, "not a regular file", file="/dev/null"),
    option("output with too long a name", (*PLAN, "--out", "{tmp}/" + 300 * "x"), None, "too long", code=4,
           kind="MachineError", file="{tmp}/" + 300 * "x"),
    option("timeline in a folder that is not there", ("simulate", "{tmp}/plan.json", "--timeline", "{tmp}/none/t.json"),
           None, "does not exist", file="{tmp}/none/t.json", make=plan_file()),
    option("capture into a folder that is not there", ("capture", "--model", "smollm2-135m", "--out", "{tmp}/a/t.st"),
           None, "does not exist", file="{tmp}/a/t.st"),
    option("capture into a file that could not be read back", ("capture", "--model", "smollm2-135m", "--out",
           "{tmp}/t.npz"), "--out", "expected .safetensors", file="{tmp}/t.npz"),
    option("timeline over the plan it is made from", ("simulate", "{tmp}/plan.json", "--timeline", "{tmp}/plan.json"),
           None, "also what is read", file="{tmp}/plan.json", make=plan_file()),

    Case("nothing fits", (*PLAN, "--dram", "20MB"), code=3, kind="InfeasiblePlanError", tier="dram",
         says=("more bytes of dram", "20000000")),
    Case("one policy does not fit", (*PLAN, "--policy", "resident", "--weights", "fp16"), code=3, tier="dram",
         kind="InfeasiblePlanError", says=("more bytes of dram",)),

    Case("plan file: not there", ("simulate", "{tmp}/none.json"), says=("cannot be read",), file="{tmp}/none.json"),
    Case("plan file: a folder", ("simulate", "{tmp}"), says=("directory",), file="{tmp}"),
    Case("plan file: not JSON", ("simulate", "{tmp}/p"), says=("not a JSON document",), file="{tmp}/p",
         make=raw(b"policy: resident", "p")),
    Case("plan file: nested without end", ("simulate", "{tmp}/p"), says=("not a JSON document",), file="{tmp}/p",
         make=raw(b"[" * 200_000, "p")),
    Case("plan file: another document", ("simulate", "{tmp}/p"), says=("simmem.error/1", "simmem.plan/1"), key="schema",
         file="{tmp}/p", make=raw(b'{"schema": "simmem.error/1"}', "p")),
    edited_plan("knob edited out of range", "window_tokens", "from 0 to 32", policy__knobs__window_tokens=99),
    edited_plan("knob of another policy", "--set", "no knob 'windows'", policy__knobs__windows=3),
    edited_plan("unknown policy", None, "did you mean flash-window", kind="UnknownNameError",
                policy__name="flash-windo"),
    edited_plan("other trace", "trace.digest", "digest differs", kind="TraceError", trace__digest="0" * 64),
    edited_plan("number edited into text", "predicted.load_s", "number", predicted__load_s="soon"),
    edited_plan("field that is not known", "comment", "not a key that is known", comment="mine"),
    edited_plan("device that is gone", None, "no device named", kind="UnknownNameError", device="iphone99"),
    option("background load without a share", ("simulate", "{tmp}/plan.json", "--background", "memory.dram"),
           "--background", "RESOURCE=SHARE", make=plan_file()),
    option("background load on nothing", ("simulate", "{tmp}/plan.json", "--background", "memory.hbm=0.1"),
           "--background", "memory.dram", make=plan_file()),
    option("background load of everything", ("simulate", "{tmp}/plan.json", "--background", "memory.dram=1"),
           "--background", "[0, 1)", make=plan_file()),
    option("more tokens than a simulation takes", ("simulate", "{tmp}/plan.json", "--tokens", "65"), "--tokens", "64"),

    Case("reference file: typo at the top", ("reproduce", "--reference", "{tmp}/bad.toml"), key="rows",
         says=("not a key that is known",), file="{tmp}/bad.toml",
         make=raw(ROW.replace("[[row]]", "[[rows]]").encode())),
    Case("reference file: other schema", ("reproduce", "--reference", "{tmp}/bad.toml"), key="schema",
         says=("simmem.reference/1",), file="{tmp}/bad.toml",
         make=raw(ROW.replace("reference/1", "device/1").encode())),
    Case("reference file: not there", ("reproduce", "--reference", "{tmp}/none.toml"), file="{tmp}/none.toml",
         says=("cannot be read",)),

    option("size without a unit", ("replay", "opt-published", "--size", "100"), "--size", "no unit", kind="UnitError"),
    option("size for the window policy", ("replay", "opt-published", "--policy", "window", "--size", "1MB"), "--size",
           "lru"),
    option("window for lru", ("replay", "opt-published", "--policy", "lru", "--window", "3"), "--window", "window"),
    option("one cache for all layers of a window", ("replay", "opt-published", "--policy", "window", "--global"),
           "--global", "lru"),
    option("window longer than the trace", ("replay", "opt-published", "--window", "500"), "--window", "0 to 95"),
    option("unknown precision of a replay", ("replay", "opt-published", "--weights", "fp15"), "--weights", "fp16"),

    option("capture of everything", (*CAPTURE, "--sparsity", "0"), "sparsity", "between 0 and 1"),
    option("capture without prose", (*CAPTURE, "--text", "{tmp}/none.txt"), None, "none.txt", file="{tmp}/none.txt"),

    option("unknown option", (*PLAN, "--drm", "6GB"), "--drm", "did you mean --draft or --dram"),
    option("missing option", ("plan", "--device", "iphone15"), "--model", "required"),
    option("missing argument", ("simulate",), "PLAN", "required"),
    option("option without a value", ("plan", "--device", "m1-max", "--model"), "--model", "argument", has_json=False),
    option("one argument too many", ("simulate", "a", "b"), None, "unexpected extra argument"),
    option("unknown command", ("pln",), None, "pln"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_one_clear_line(case: Case, simmem: Simmem, tmp_path: Path) -> None:
    if case.make is not None:
        case.make(tmp_path)
    before = contents(tmp_path)
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in case.arguments]
    file = None if case.file is None else case.file.replace("{tmp}", str(tmp_path))
    for as_json in (False, True) if case.has_json else (False,):
        ended = simmem(*arguments, *(["--json"] if as_json else []))
        assert ended.code == case.code, ended.err
        one_line(ended)
        for words in (*case.says, file, case.key):
            assert words is None or words in ended.err
        assert contents(tmp_path) == before, "something was left behind"
        if not as_json:
            assert ended.out == ""
            continue
        error = ended.document
        assert error["schema"] == "simmem.error/1"
        assert {k: error[k] for k in ("kind", "file", "key", "tier")} == {
            "kind": case.kind, "file": file, "key": case.key, "tier": case.tier}
        assert (error["missing_bytes"] or 0) > 0 if case.tier else error["missing_bytes"] is None


def one_line(ended: Ended) -> None:
    assert "Traceback" not in ended.err
    assert ended.err.startswith("simmem: ")
    assert ended.err.count("\n") == 1
    assert ended.err.endswith("\n")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


# --- what the table cannot say -------------------------------------------------------------------------------------


def test_a_typo_in_a_row_stops_only_that_row(simmem: Simmem, tmp_path: Path) -> None:
    file = tmp_path / "rows.toml"
    file.write_text(ROW + ROW.partition("\n")[2].replace('"mine"', '"second"').replace("tolerance", "tolerence"))
    ended = simmem("reproduce", "--reference", file, "--json")
    assert ended.code == 1
    first, second = ended.document["rows"]
    assert first["status"] in ("pass", "fail")
    assert second["status"] == "error"
    assert "tolerence" in second["message"]
    assert "did you mean tolerance" in second["message"]
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_package_is_named_with_its_remedy(missing: str, simmem: Simmem, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # as good as not installed
    ended = simmem("capture", "--model", "smollm2-135m", "--out", tmp_path / "t.safetensors", "--json")
    assert ended.code == 4
    one_line(ended)
    assert ended.document["kind"] == "MachineError"
    assert missing in ended.err
    assert "simmem[capture]" in ended.err
    assert contents(tmp_path) == {}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody can write")
def test_an_unwritable_folder_is_the_machines_failure(simmem: Simmem) -> None:
    ended = simmem(*PLAN, "--out", "/proc/plan.json", "--json")
    assert ended.code == 4
    one_line(ended)
    assert ended.document["kind"] == "MachineError"
    assert ended.document["file"] == "/proc/plan.json"


def test_a_file_is_kept_when_its_plan_fails(simmem: Simmem, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    out.write_text("precious")
    assert simmem(*PLAN, "--dram", "20MB", "--out", out).code == 3
    assert contents(tmp_path) == {"plan.json": b"precious"}


def test_a_bug_keeps_its_traceback_and_has_its_own_code(simmem: Simmem, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("simmem.report.listing.list_names", broken)
    ended = simmem("devices", "--json")
    assert ended.code == 70
    assert "Traceback" in ended.err
    assert ended.document["kind"] == "InternalError"
    assert "a bug" in ended.document["message"]


@pytest.mark.parametrize(("raised", "code", "kind"), [
    (KeyboardInterrupt(), 130, None), (MemoryError(), 4, "MachineError"),
    (OSError(28, "No space left on device", "/somewhere"), 4, "MachineError")], ids=["interrupted", "memory", "disk"])
def test_what_happens_to_the_machine(raised: BaseException, code: int, kind: str | None, simmem: Simmem,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise raised

    monkeypatch.setattr("simmem.report.listing.list_names", fails)
    ended = simmem("devices", "--json")
    assert ended.code == code
    one_line(ended)
    assert (ended.document["kind"] if kind else ended.out or None) == kind


# --- as a user runs it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "code"), [
    ((*PLAN, "--dram", "6"), 2), ((*PLAN, "--dram", "20MB"), 3), (("devices", "iphne15"), 2), (("plan",), 2)])
def test_a_process_ends_the_same(arguments: tuple[str, ...], code: int, tmp_path: Path) -> None:
    done = subprocess.run([Path(sys.executable).with_name("simmem"), *arguments, "--json"], capture_output=True,
                          text=True, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == code
    one_line(Ended(done.returncode, done.stdout, done.stderr))
    assert json.loads(done.stdout)["schema"] == "simmem.error/1"
    assert contents(tmp_path) == {}


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{Path(sys.executable).with_name('simmem')} schema | head -c 10 > /dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize(("command", "code", "says"), [
    ("PYTHONIOENCODING=ascii {simmem} plan --device m1-max --model opt-125m", 0, ""),
    ("{simmem} plan --device m1-max --model opt-125m | head -n 1; exit ${{PIPESTATUS[0]}}", 0, ""),
    ("{simmem} plan --device m1-max --model opt-125m --json > /dev/full", 4, "No space left"),
    ("PYTHONUNBUFFERED=1 {simmem} plan --device m1-max --model opt-125m --json > /dev/full", 4, "No space left"),
    ("{simmem} devices >&-", 0, ""),
])
def test_whatever_standard_output_is(command: str, code: int, says: str) -> None:
    """Another encoding, a reader that leaves, a full disk, none at all: the contract's exit code, never a traceback."""
    line = command.format(simmem=Path(sys.executable).with_name("simmem"))
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1
