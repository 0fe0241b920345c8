"""Do the device files say what they must, is every figure sourced, and do wrong files fail clearly?"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmem.cost.roofline import storage_throughput
from simmem.errors import SpecError, UnknownNameError
from simmem.spec import library
from simmem.spec.base import Figure, Kind, load_toml
from simmem.spec.device import Device, load_device
from simmem.spec.model import load_model

NAMES = library.names("device")
LEDGER = library.data_folder() / "docs" / "ledger.md"


def _all_figures(device: Device) -> dict[str, Figure]:
    """The figures of a device and those of its engines."""
    found = device.figures()
    for key, engine in device.engine.items():
        for field in type(engine).model_fields:
            if isinstance(value := getattr(engine, field), Figure):
                found[f"engine.{key}.{field}"] = value
    return found


def _flash(name: str) -> Any:
    device = load_device(name)
    return next(link for link in device.link.values() if link.kind == "storage")


# ------------------------------------------------------------------------------------- what the files say


def test_the_promised_devices_are_there() -> None:
    assert {"iphone15", "m1-max", "rtx4090-pc", "h100-sxm", "cloud-vm"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_loads_under_its_own_name(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    assert device.title
    for alias in device.aliases:
        assert alias == alias.lower(), "a name is looked up in lower case"
        assert load_device(alias) == device


def test_no_alias_clash() -> None:
    spoken = [word for name in NAMES for word in (name, *load_device(name).aliases)]
    assert len(spoken) == len(set(spoken))


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_sourced(name: str) -> None:
    figures = _all_figures(load_device(name))
    assert len(figures) >= 15
    for key, figure in figures.items():
        where = f"{name}: {key}"
        assert len(figure.source) >= 25, f"{where} names no source"
        assert not re.search(r"\bS\d+\b|\(M\)|\(D\)", figure.source), f"{where} cites a private index"
        low, high = figure.factors
        assert 0 < low <= 1 <= high, where
        if figure.kind is Kind.ESTIMATED:
            inferred = r"inferred|geometric mean|two thread barriers"
            assert re.search(inferred, figure.source), f"{where} does not say what it was inferred from"
        if figure.kind is Kind.MEASURED:
            assert "inferred from" not in figure.source, f"{where} is inferred, not measured"


@pytest.mark.parametrize("name", NAMES)
def test_everything_in_the_file_becomes_a_figure(name: str) -> None:
    """`figures()` misses nothing: as many as there are inline tables with a value in the file."""
    text = library.resolve("device", name).read_text(encoding="utf-8")
    assert len(_all_figures(load_device(name))) == len(re.findall(r"\bvalue = ", text))


def test_the_phone_rests_on_estimates() -> None:
    device = load_device("iphone15")
    assert device.weakest_kind is Kind.ESTIMATED
    kinds = [f.kind for f in device.figures().values()]
    assert kinds.count(Kind.ESTIMATED) > len(kinds) / 2
    assert 2.5e9 < device.memory["dram"].budget_bytes < 3.5e9


@pytest.mark.parametrize("name", NAMES)
def test_spent_rows_are_in_the_ledger(name: str) -> None:
    """Every constant that was fitted, or that reference rows follow from, is accounted for in docs/ledger.md."""
    if not LEDGER.exists():
        pytest.skip("docs/ is not part of the wheel")
    ledger = LEDGER.read_text(encoding="utf-8")
    text = library.resolve("device", name).read_text(encoding="utf-8")
    for key, figure in _all_figures(load_device(name)).items():
        if not figure.spent:
            continue
        line = next((line for line in ledger.splitlines()
                     if line.startswith(f"| `{key}`") and f"devices/{name}.toml" in line), "")
        assert line, f"{name}: {key} is not in the ledger"
        field = key.rsplit(".", 1)[1]
        written = {a or b for a, b in re.findall(rf'(?m)^{field} = {{ value = (?:"([^"]+)"|([0-9.]+))', text)}
        assert any(value in line for value in written), f"{name}: the ledger has another value for {key}"
        for row in figure.spent:
            assert f"`{row}`" in ledger, f"the row {row} is not in the ledger"


# ----------------------------------------------------------------------------------------------- the graph


def _networkx_path(device: Device, source: str, target: str) -> list[str] | None:
    graph = device.graph()
    try:
        nodes = networkx.shortest_path(graph, source, target)
    except networkx.NetworkXNoPath:
        return None
    return [graph.edges[a, b]["name"] for a, b in itertools.pairwise(nodes)]


@pytest.mark.parametrize("name", NAMES)
def test_paths_are_networkx_paths(name: str) -> None:
    device = load_device(name)
    for source in device.memory:
        for target in device.memory:
            expected = _networkx_path(device, source, target)
            if expected is None:
                with pytest.raises(SpecError, match=f"no path from {source} to {target}"):
                    device.path(source, target)
            else:
                assert list(device.path(source, target)) == expected
    for agent in device.agent.values():
        assert device.path(device.storage, agent.memory)


@given(st.sets(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), max_size=8))
def test_paths_of_random_graphs_are_shortest(edges: set[tuple[str, str]]) -> None:
    data = load_toml(library.resolve("device", "m1-max"))
    dram, copy = data["memory"]["dram"], {**data["link"]["flash"], "kind": "copy"}
    for name in "abcd":
        data["memory"][name] = dram
    for source, target in edges:
        data["link"][f"{source}{target}"] = {**copy, "source": source, "target": target}
    device = Device.model_validate(data)
    for source in "abcd":
        for target in "abcd":
            expected = _networkx_path(device, source, target)
            if expected is None:
                with pytest.raises(SpecError, match="no path"):
                    device.path(source, target)
            else:
                found = device.path(source, target)
                assert len(found) == len(expected)
                here = source
                for link in found:
                    assert device.link[link].source == here
                    here = device.link[link].target
                assert here == target


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_holds_everything(name: str) -> None:
    device = load_device(name)
    graph = device.graph()
    assert set(graph.nodes) == {*device.memory, *device.agent}
    assert graph.number_of_edges() == len(device.agent) + len(device.link)
    assert device.is_unified == (len({a.memory for a in device.agent.values()}) == 1)
    assert device.memory[device.storage].kind == "storage"
    assert device.memory[device.host].kind in ("host", "unified")


# ------------------------------------------------------------------------------------- plausible machines


@pytest.mark.parametrize("name", NAMES)
def test_no_agent_outdraws_its_memory(name: str) -> None:
    """What kernels reach of a memory stays below what that memory gives; memories are faster than links."""
    device = load_device(name)
    for agent in device.agent.values():
        memory = device.memory[agent.memory]
        assert memory.rate is not None
        assert agent.rate.value * agent.rate_share.value <= memory.rate.value
    for link in device.link.values():
        for end in (link.source, link.target):
            rate = device.memory[end].rate
            assert rate is None or link.rate.value < rate.value


@pytest.mark.parametrize("name", NAMES)
def test_decode_is_bound_by_bandwidth(name: str) -> None:
    """Two operations a weight of two bytes: on all of these machines memory, not arithmetic, limits batch 1."""
    for agent in load_device(name).agent.values():
        peak = max(f.value for f in agent.flop_per_s.values()) * agent.flop_share.value
        assert peak > agent.rate.value * agent.rate_share.value


# ------------------------------------------------------------------------------------- the storage surface

SIZES = np.array([4, 8, 16, 32, 64, 256, 1024, 16384]) * 1024.0


@pytest.mark.parametrize("name", NAMES)
def test_throughput_rises_with_size_and_depth(name: str) -> None:
    link = _flash(name)
    best = link.best_depth.value
    depths = np.arange(1, best + 1, dtype=float)
    surface = storage_throughput(link, SIZES[:, None], depths[None, :])
    assert np.all(np.diff(surface, axis=0) >= -1e-9 * link.rate.value)
    assert np.all(np.diff(surface, axis=1) >= -1e-9 * link.rate.value)
    assert np.all(surface <= link.rate.value * (1 + 1e-12))
    assert surface[-1, -1] > 0.9 * link.rate.value, "large deep reads come near the sequential rate"
    past = storage_throughput(link, 4096.0, best * np.array([1.0, 2.0, 4.0]))
    assert past[0] > past[1] > past[2], "too many readers lose throughput"


@pytest.mark.parametrize("name", NAMES)
def test_one_small_read_takes_the_latency(name: str) -> None:
    link = _flash(name)
    seconds = 4096 / float(storage_throughput(link, 4096.0, 1.0))
    assert link.latency.value < seconds < 1.15 * link.latency.value


def test_m1_max_meets_its_two_anchors_exactly() -> None:
    """LLM in a flash, Table 2: 1.25 GB/s in rows of 8 KiB, 2.25 GB/s in bundles of 16 KiB, 32 readers."""
    found = storage_throughput(_flash("m1-max"), np.array([8192.0, 16384.0]), 32.0)
    assert found == pytest.approx([1.25e9, 2.25e9], rel=1e-6)


def test_m1_max_at_a_size_it_was_not_fitted_to() -> None:
    """32 KiB bundles: 0.412 GB in 105 ms (LLM in a flash, Table 3, CPU) is 3.93 GB/s; no constant was spent on it."""
    assert float(storage_throughput(_flash("m1-max"), 32768.0, 32.0)) == pytest.approx(3.93e9, rel=0.06)


def test_m1_max_does_not_hang_on_its_estimated_latency() -> None:
    """Anywhere in the latency's range the 32-reader rates, which the paper's rows use, move by a few percent."""
    link = _flash("m1-max")
    for end in link.latency.range:
        moved = link.model_copy(update={"latency": link.latency.model_copy(update={"value": end})})
        ratio = storage_throughput(moved, SIZES[1:4], 32.0) / storage_throughput(link, SIZES[1:4], 32.0)
        assert np.all(np.abs(ratio - 1) < 0.06)


def test_the_form_reproduces_the_m4_max_curve() -> None:
    """4 KiB random reads against worker threads (jundot/omlx PR 3287): the curve the form was chosen on.

    Two of its points set a constant (113.3 us at one worker, 115,185 IOPS at 48) and six the exponent.
    """
    workers = np.array([1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256], dtype=float)
    iops = np.array([8827, 33352, 61510, 89028, 109701, 110664, 115185, 109417, 102239, 98213, 78873, 72091])
    data = load_toml(library.resolve("device", "m1-max"))
    by_hand = {"kind": "measured", "source": "jundot/omlx PR 3287, Apple M4 Max"}
    data["link"]["flash"] |= {"rate": {"value": "7.3 GB/s", **by_hand},
                              "latency": {"value": f"{113.3 - 4096 / 7.3e3!r} us", **by_hand},
                              "request_time": {"value": f"{1e6 / 115_185!r} us", **by_hand},
                              "request_rate": {"value": "100 TB/s", **by_hand}}
    link = Device.model_validate(data).link["flash"]
    error = np.abs(storage_throughput(link, 4096.0, workers) / 4096 / iops - 1)
    assert error.mean() < 0.04
    assert error.max() < 0.09


def test_cloud_vm_meets_what_was_measured() -> None:
    """16 KiB random reads on a c6id.4xlarge saturate at 1.25 GB/s, with 16 threads too (apache/lucene PR 16279)."""
    assert storage_throughput(_flash("cloud-vm"), 16384.0, np.array([16.0, 64.0])) == pytest.approx(1.25e9, rel=0.01)


def test_rtx4090_pc_large_reads() -> None:
    """990 Pro: fio 1 MiB at depth 8, 7.25 GB/s (pastebin.com/X8K6bqep)."""
    assert float(storage_throughput(_flash("rtx4090-pc"), 2.0**20, 8.0)) == pytest.approx(7.25e9, rel=0.01)


def test_iphone_request_time_agrees_with_its_sibling() -> None:
    """Two siblings, one figure: the M4 Max's request time and the A16's sequential rate give at 16 KiB what the
    M3 Pro reaches, 0.84 GB/s (apache/lucene PR 16279)."""
    assert float(storage_throughput(_flash("iphone15"), 16384.0, 32.0)) == pytest.approx(0.84e9, rel=0.03)


# --------------------------------------------------------------------------------------------- the engine


def test_the_cpu_engine_is_fitted_to_the_naive_row() -> None:
    """LLM in a flash, Table 3: naive OPT-6.7B on the CPU, fp32, computes 986 ms a token."""
    device = load_device("m1-max").with_engine("llm-in-a-flash")
    cpu = device.agent["cpu"]
    assert cpu.compute_precision == "fp32"
    model = load_model("opt-6.7b")
    read = model.bytes_at("fp32") - model.group("positions").bytes_at("fp32")
    assert read / (cpu.rate.value * cpu.rate_share.value) == pytest.approx(0.986, rel=1e-4)
    assert cpu.op_overhead == load_device("m1-max").agent["cpu"].op_overhead
    assert device.agent["gpu"] == load_device("m1-max").agent["gpu"]
    assert load_device("m1-max").with_engine("nobody's") == load_device("m1-max")


# --------------------------------------------------------------------------------------- wrong files fail

RATE = 'rate = { value = "6.1 GB/s", kind = "measured"'

# (what is wrong, text in m1-max.toml, its replacement, key in the error, part of the message)
WRONG = [
    ("typo in a key", "block = {", "blok = {", "link.flash.blok", "did you mean block"),
    ("typo in a table", "[link.flash]", "[links.flash]", "links", "did you mean link"),
    ("typo in a figure", 'kind = "fitted"', 'kid = "fitted"', "link.flash.request_time.kid", "did you mean kind"),
    ("no unit", RATE, RATE.replace("6.1 GB/s", "6.1"), "link.flash.rate.value", "no unit"),
    ("bare number", RATE, RATE.replace('"6.1 GB/s"', "6.1"), "link.flash.rate.value", "bare number"),
    ("bits", RATE, RATE.replace("GB/s", "Gb/s"), "link.flash.rate.value", "bits"),
    ("another dimension", RATE, RATE.replace("GB/s", "GB"), "link.flash.rate.value", "1.5 GB/s"),
    ("absurdly fast", RATE, RATE.replace("6.1 GB/s", "6.1 PB/s"), "link.flash.rate.value", "believed"),
    ("absurdly slow", RATE, RATE.replace("6.1 GB/s", "6.1 B/s"), "link.flash.rate.value", "believed"),
    ("absurd latency", 'value = "93 us"', 'value = "93000 s"', "link.flash.latency.value", "believed"),
    ("absurd capacity", 'value = "1 TB"', 'value = "1e6 PB"', "memory.flash.capacity.value", "believed"),
    ("not a number", RATE, RATE.replace("6.1 GB/s", "nan GB/s"), "link.flash.rate.value", "expected a quantity"),
    ("unknown kind", RATE, RATE.replace("measured", "guessed"), "link.flash.rate.kind", "guessed"),
    ("no source", ', source = "LLM in a flash (arXiv 2312.11514), experimental setup: M1 Max with a 1 TB SSD"', "",
     "memory.flash.capacity.source", "is missing"),
    ("fitted to nothing", ', spent = ["llm-in-a-flash/opt-naive-cpu-compute"]', "",
     "engine.llm-in-a-flash/cpu.rate_share", "spent"),
    ("outside its range", 'range = ["77 us", "113.3 us"]', 'range = ["77 us", "80 us"]', "link.flash.latency",
     "outside its own range"),
    ("half a range", 'range = ["77 us", "113.3 us"]', 'range = ["77 us"]', "link.flash.latency.range", "pair"),
    ("range without unit", 'range = ["77 us", "113.3 us"]', 'range = ["77", "113.3"]', "link.flash.latency.range",
     "no unit"),
    ("share above one", "value = 0.866, ", "value = 1.2, ", "agent.gpu.rate_share", "outside its own range"),
    ("share of nothing", 'value = 0.7, kind = "estimated", range = [0.5, 0.9]', 'value = 0, kind = "estimated"',
     "agent.cpu.flop_share", "share lies in"),
    ("exponent too large", "overload_exponent = { value = 0.25", "overload_exponent = { value = 25",
     "link.flash.overload_exponent", "2"),
    ("wrong schema", "simmem.device/1", "simmem.device/9", "schema", "simmem.device/1"),
    ("unknown precision", "fp32 = {", "fp31 = {", "agent.cpu.flop_per_s.fp31", "fp32"),
    ("link to nowhere", 'target = "dram"', 'target = "drams"', None, "link.flash joins 'drams'"),
    ("agent in nowhere", 'memory = "dram"', 'memory = "drams"', None, "agent.cpu.memory is 'drams'"),
    ("storage out of reach", 'source = "flash"\ntarget = "dram"', 'source = "dram"\ntarget = "flash"', None,
     "storage cannot reach"),
    ("no storage", 'kind = "storage"\ncapacity', 'kind = "host"\ncapacity', None, "exactly one storage"),
    ("all reserved", 'reserved = { value = "16 GiB", kind = "estimated", range = ["8 GiB", "18 GiB"]',
     'reserved = { value = "64 GiB", kind = "estimated"', None, "reserves all"),
    ("engine for no agent", 'agent = "cpu"', 'agent = "npu"', None, "'npu'"),
    ("storage without a block", "block = {", "energy_per_bit = {", "link.flash.energy_per_bit", "energy_per_byte"),
    ("not TOML", "[memory.flash]", "[memory.flash", None, "not valid TOML"),
]


@pytest.mark.parametrize(("old", "new", "key", "says"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_wrong_file_gives_one_clear_error(old: str, new: str, key: str | None, says: str, tmp_path: Path) -> None:
    text = library.resolve("device", "m1-max").read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "mine.toml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        load_device(str(file))
    error = caught.value
    assert error.file == str(file)
    assert error.key == key
    assert says in error.message
    assert "\n" not in str(error)
    assert error.exit_code == 2


def test_a_storage_link_needs_its_surface(tmp_path: Path) -> None:
    text = library.resolve("device", "m1-max").read_text(encoding="utf-8")
    file = tmp_path / "mine.toml"
    file.write_text(re.sub(r"(?m)^block = .*$", "", text), encoding="utf-8")
    with pytest.raises(SpecError, match="a storage link needs block") as caught:
        load_device(str(file))
    assert caught.value.key == "link.flash"


def test_unknown_devices_name_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="iphone15"):
        load_device("iphone99")
    with pytest.raises(SpecError, match="no such device file"):
        load_device("mine/device.toml")


def test_a_file_may_stand_anywhere(tmp_path: Path) -> None:
    text = library.resolve("device", "cloud-vm").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    assert load_device("mine.toml", relative_to=tmp_path) == load_device("cloud-vm")
