"""Do the settings that `plan --emit` prints do what the plan says, by the engine's own reading of them?"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import simmem as package
from simmem.planner.api import answer
from simmem.planner.document import Emission, Plan
from simmem.planner.question import ask
from simmem.planner.replan import read_plan, resimulate
from simmem.report.emit.accelerate import device_map
from simmem.report.emit.engines import ENGINES, emission
from simmem.report.emit.ggml_formats import CACHE_TYPES, gguf_bytes, nearest_type
from simmem.report.emit.llama_cpp import ARCHITECTURES
from simmem.report.emit.torch_modules import modules_of
from simmem.spec import load_model
from simmem.spec.huggingface.families import FAMILIES
from simmem.spec.precision import PRECISIONS, matrix_bytes_per_param
from tests.cli.running import Simmem
from tests.unit.gguf_files import assemble, text, u32
from tests.unit.test_huggingface import VARIATIONS
from tests.unit.torch_modules import meta_config, meta_module

# In the table of tools/server/README.md of ggml-org/llama.cpp (docs/emit.md says which).
SERVER_FLAGS = {"--model", "--n-gpu-layers", "--device", "--load-mode", "--no-repack", "--no-warmup", "--fit",
                "--ctx-size", "--parallel", "--predict", "--batch-size", "--ubatch-size", "--cache-type-k",
                "--cache-type-v", "--flash-attn", "--cache-ram"}
TINY = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 96,
        "max_position_embeddings": 64}


def asked(engine: str, device: str, model: str, **question: Any) -> Emission:
    """What an engine makes of a plan."""
    found = ask(device, model, **question)
    emit = emission(answer(found, brief=True), found, engine).emit
    assert emit is not None
    return emit


def flags(emit: Emission) -> dict[str, str]:
    """flag -> its value, of a llama-server command."""
    assert emit.arguments is not None
    found: dict[str, str] = {}
    for argument in emit.arguments[1:]:
        if argument.startswith("--"):
            found[argument] = ""
        else:
            found[list(found)[-1]] = argument
    return found


def tiny_gguf() -> bytes:
    """A Llama of two layers, all in F16."""
    d, ff, vocab, kind = 64, 128, 96, 1
    shapes = {"token_embd": (d, vocab), "output": (d, vocab), "output_norm": (d,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": (d, d) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (d,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.ffn_gate": (d, ff), f"blk.{layer}.ffn_up": (d, ff), f"blk.{layer}.ffn_down": (ff, d)}
    return assemble([("general.architecture", text("llama")), ("llama.block_count", u32(2)),
                     ("llama.context_length", u32(64)), ("llama.attention.head_count", u32(4))],
                    [(f"{name}.weight", shape, kind, 2 * math.prod(shape)) for name, shape in shapes.items()])


def as_a_shell_reads(emit: Emission, folder: Path) -> list[str]:
    """What a program gets when the printed command is pasted into a shell, in a folder that has such a program."""
    program = folder / "llama-server"
    program.write_text("#!/bin/sh\nprintf '%s\\0' llama-server \"$@\"\n")
    program.chmod(0o755)
    assert emit.text is not None
    command = "\n".join(emit.text.splitlines()[len(emit.prepare):])
    done = subprocess.run(["/bin/sh", "-c", command], cwd=folder, env={"PATH": str(folder)}, capture_output=True,
                          text=True, check=True, timeout=60)
    return done.stdout.split("\0")[:-1]


# --- the document -------------------------------------------------------------------------------------------------


def test_emitting_adds_one_field_and_a_plan_without_it_is_still_read(simmem: Simmem, tmp_path: Path) -> None:
    question = ("plan", "--device", "rtx4090-pc", "--model", "llama-2-7b", "--weights", "fp16", "--json")
    plain, told = simmem(*question).document, simmem(*question, "--emit", "llama.cpp").document
    assert plain.pop("emit") is None
    emit = told.pop("emit")
    assert plain == told
    assert emit["engine"] == "llama.cpp"
    for name, document in (("before.json", plain), ("after.json", told | {"emit": emit})):
        (tmp_path / name).write_text(json.dumps(document))
        written = read_plan(tmp_path / name)
        assert (written.emit is None) == (name == "before.json")
        assert resimulate(written, 1)[0].token_latency_s == pytest.approx(written.predicted.token_latency_s)


def test_an_engine_nobody_knows_is_an_error_that_names_those_known(simmem: Simmem) -> None:
    ended = simmem("plan", "--device", "m1-max", "--model", "opt-125m", "--emit", "vllm", "--json")
    assert ended.code == 2
    assert ended.document["key"] == "--emit"
    assert all(name in ended.document["message"] for name in ENGINES)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_cannot_do_is_said_and_nothing_is_offered_to_run(engine: str, simmem: Simmem) -> None:
    arguments = ("plan", "--device", "iphone15", "--model", "llama-2-7b", "--policy", "flash-window", "--emit", engine)
    ended = simmem(*arguments, "--json")
    emit = ended.document["emit"]
    assert (ended.code, emit["realises"]) == (0, "no")
    assert [emit[key] for key in ("text", "arguments", "device_map", "load")] == [None] * 4
    lost = " ".join(emit["cannot"])
    assert all(word in lost for word in ("predictor", "tokens", "bundle", "reads in flight"))
    text = simmem(*arguments).out
    assert text.index(f"{engine} cannot do this plan") < text.index("It cannot:")
    assert "llama-server" not in text
    assert "from_pretrained" not in text


@pytest.mark.parametrize("engine", ENGINES)
def test_every_policy_is_answered_and_one_nobody_knows_is_refused(engine: str) -> None:
    question = ask("rtx4090-pc", "llama-2-7b", weights="fp16", vram="8 GB")
    plan = answer(question, brief=True)
    for name in ("resident", "stream", "flash-window"):
        one = replace(question, policy_names=(name,), fixed={}, open_choice=False)
        emit = emission(answer(one, brief=True), one, engine).emit
        assert emit is not None
        assert (emit.text is None) == (emit.realises == "no")
        assert emit.cannot if emit.realises == "no" else emit.text
    strange = plan.model_copy(update={"policy": plan.policy.model_copy(update={"name": "of-tomorrow"})})
    emit = emission(strange, question, engine).emit
    assert emit is not None
    assert emit.realises == "no"
    assert "of-tomorrow" in emit.cannot[0]


# --- llama.cpp ----------------------------------------------------------------------------------------------------


def test_llama_cpp_runs_a_resident_plan_where_it_says(tmp_path: Path) -> None:
    for device, agent in (("rtx4090-pc", "gpu"), ("m1-max", "gpu"), ("nvme-gen4-pc", "cpu")):
        emit = asked("llama.cpp", device, "llama-2-7b", weights="fp16", policy="resident", prompt=100, new_tokens=60,
                     batch=3, knobs={"agent": agent})
        found = flags(emit)
        assert emit.realises == "exact"
        assert set(found) <= SERVER_FLAGS
        assert found["--n-gpu-layers"] == ("33" if agent == "gpu" else "0")  # 32 layers and the output
        assert found.get("--device") == (None if agent == "gpu" else "none")
        assert int(found["--ctx-size"]) == 3 * 256 >= 3 * 160
        assert (found["--parallel"], found["--fit"], found["--cache-type-k"]) == ("3", "off", "f16")
        assert as_a_shell_reads(emit, tmp_path) == emit.arguments


def test_llama_cpp_streams_by_page_faults_on_the_cpu_and_not_at_all_on_a_gpu() -> None:
    question: dict[str, Any] = {"weights": "fp16", "policy": "stream"}
    mapped = asked("llama.cpp", "nvme-gen4-pc", "llama-2-7b", dram="8 GB", **question)
    assert mapped.realises == "nearest"
    assert flags(mapped) | {"--load-mode": "mmap", "--no-repack": "", "--device": "none"} == flags(mapped)
    assert "page cache" in mapped.cannot[0]
    for tier in ("host", "storage"):
        copied = asked("llama.cpp", "rtx4090-pc", "llama-2-7b", vram="8 GB", **question,
                       knobs={"agent": "gpu", "source_tier": tier, "resident_ratio": 0.5})
        assert (copied.realises, copied.arguments) == ("no", None)
        # Half of 13.5 GB less the head of 0.26 GB, in layers of 0.405 GB: 15, and the output is one more.
        assert copied.instead is not None
        assert "`--n-gpu-layers 16` holds the output and the last 15 of 32 layers" in copied.instead


@pytest.mark.parametrize(("model", "weights"), [("llama-2-13b", "fp16"), ("llama-2-13b", "int8"),
                                                ("llama-3.2-1b", "int8"), ("llama-3-70b", "int3")])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.97])
def test_llama_cpp_never_asks_for_more_than_the_budget(model: str, weights: str, share: float) -> None:
    """Its tensors counted one by one, on each side, and one layer more of those the plan has would not fit."""
    loaded, batch, prompt = load_model(model), 2, 100
    a, kind = loaded.architecture, nearest_type(loaded, weights)
    whole = matrix_bytes_per_param(weights) * loaded.params
    vram = share * whole + 0.4e9
    if vram > 24e9:
        vram = share * 24e9
    emit = asked("llama.cpp", "rtx4090-pc", model, weights=weights, policy="layer-split", prompt=prompt,
                 new_tokens=60, batch=batch, vram=vram)
    each = kind.block_bytes / kind.block
    kv = 2 * 2 * 256 * batch * a.n_kv_heads * a.d_head  # contexts of 256, fp16, a layer
    attention = a.d_model * a.d_head * (2 * a.n_heads + 2 * a.n_kv_heads)
    layer = each * (attention + 3 * a.d_model * a.d_ff) + 4 * 2 * a.d_model
    output = each * a.vocab * a.d_model
    # Activations of the prompt through one layer, logits of each sequence, the mask of attention twice.
    least = 4 * batch * (prompt * (a.d_model + a.d_ff) + a.vocab) + 6 * batch * prompt * 256

    def held(layers: int) -> float:
        passing = 2 * each * a.d_model * a.d_ff if 0 < layers < a.n_layers and batch * prompt >= 32 else 0
        on_gpu = min(layers, a.n_layers)
        return on_gpu * (layer + kv) + (output if layers > a.n_layers else 0) + passing + least

    given = int(flags(emit)["--n-gpu-layers"])
    assert held(given) <= vram
    fewer = [line for line in emit.differs if "layers on the GPU where the plan has" in line]
    assert (emit.realises == "exact") == (weights == "fp16" and not fewer)
    if fewer:
        assert f"{given} layers on the GPU" in fewer[0]
        assert held(given + 2) > vram


def test_weights_of_mixed_precision_are_not_emitted_as_if_they_were_one() -> None:
    for engine in ENGINES:
        emit = asked(engine, "rtx4090-pc", "mixtral-8x7b", weights="attention=int4,experts=int2", policy="resident")
        assert emit.realises == "no"
        assert "bf16 (attention int4, experts int2)" in emit.cannot[0]


def test_a_checkpoint_that_converts_as_it_is_is_not_quantised_again_unasked() -> None:
    own = asked("llama.cpp", "m1-max", "gpt-oss-20b", policy="resident", weights="file")
    assert own.realises == "exact"
    assert own.prepare is not None
    assert [line.split()[0] for line in own.prepare] == ["hf", "python"]
    assert flags(own)["--model"] == own.prepare[-1].split()[-1] == "gpt-oss-20b-MXFP4.gguf"
    other = asked("llama.cpp", "m1-max", "gpt-oss-20b", policy="resident", weights="int8")
    assert other.prepare is not None
    assert other.prepare[-1].startswith("llama-quantize --allow-requantize ")  # refused without it


def test_a_hostile_file_name_stays_one_argument(tmp_path: Path) -> None:
    path = tmp_path / "$(touch gone) ' --n-gpu-layers 0.gguf"
    path.write_bytes(tiny_gguf())
    emit = asked("llama.cpp", "rtx4090-pc", str(path), prompt=4, new_tokens=4)
    assert emit.realises == "exact"  # its own precisions, as they are
    assert emit.prepare == []
    assert as_a_shell_reads(emit, tmp_path) == emit.arguments
    assert flags(emit)["--model"] == str(path)
    assert not (tmp_path / "gone").exists()
    again = asked("llama.cpp", "rtx4090-pc", str(path), prompt=4, new_tokens=4, weights="int8")
    assert [shlex.split(line)[-1] for line in again.prepare] == ["Q8_0"]
    assert asked("accelerate", "rtx4090-pc", str(path), prompt=4, new_tokens=4).realises == "no"


def test_formats_and_architectures_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf", reason="names and sizes are compared with the gguf package's")
    sizes = {kind.name: n_bytes / block for kind, (block, n_bytes) in gguf.GGML_QUANT_SIZES.items()}
    assert set(ARCHITECTURES.values()) <= set(gguf.MODEL_ARCH_NAMES.values())
    assert set(ARCHITECTURES) <= set(FAMILIES)
    assert not {"opt", "persimmon"} & set(gguf.MODEL_ARCH_NAMES.values())
    wanted = {"llama-2-7b": ["F32", "F16", "BF16", "Q8_0", "Q4_K", "Q3_K", "Q2_K"],
              "falcon-7b": ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_0", "Q4_0"]}  # rows of 4544: no blocks of 256
    for name, kinds in wanted.items():
        model = load_model(name)
        assert [nearest_type(model, p).name for p in PRECISIONS] == kinds
        for kind in (nearest_type(model, p) for p in PRECISIONS):
            held = gguf_bytes(model, kind)
            assert held["ffn"] == pytest.approx(model.group("ffn").params * sizes[kind.name])
            assert held["norms"] == 4 * model.group("norms").params
    for precision, cache in CACHE_TYPES.items():
        assert cache.bytes_per_value == sizes[cache.name.upper()]
        assert cache.exact == (sizes[cache.name.upper()] == matrix_bytes_per_param(precision)
                               and precision.startswith(("fp", "bf")))


# --- accelerate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_device_map_has_every_parameter_once(kind: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="its own check judges the map, and it is not installed")
    for index, values in enumerate(VARIATIONS[kind]):
        path = tmp_path / f"{index}.json"
        path.write_text(json.dumps({"model_type": kind, **values}))
        model = load_model(str(path))
        modules = modules_of(model)
        assert modules is not None
        where = device_map(modules, model.architecture.n_layers, 1, 0, "disk", keeps_outside=True)
        module = meta_module(meta_config({"model_type": kind, **values}))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it warns of names that are no modules
            accelerate.utils.modeling.check_device_map(module, where)
        for name, _ in module.named_parameters(remove_duplicate=False):
            assert sum(name == place or name.startswith(f"{place}.") for place in where) == 1, name


def _opt(transformers: Any) -> Any:
    return transformers.OPTConfig(**TINY, ffn_dim=256, word_embed_proj_dim=64, pad_token_id=1)


def _llama(transformers: Any) -> Any:
    return transformers.LlamaConfig(**TINY, intermediate_size=128, num_key_value_heads=2)


@pytest.mark.parametrize("config", [_opt, _llama])
def test_the_emitted_python_loads_offloads_and_computes_the_same(
        config: Callable[[Any], Any], simmem: Simmem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what is printed, on the CPU with layers on disk, against the model loaded whole."""
    torch = pytest.importorskip("torch", reason="the emitted Python is run")
    transformers = pytest.importorskip("transformers", reason="the emitted Python is run")
    pytest.importorskip("accelerate", reason="the emitted Python is run")
    torch.manual_seed(0)
    whole = transformers.AutoModelForCausalLM.from_config(config(transformers)).eval()
    folder = tmp_path / "it's a \"model\""
    whole.save_pretrained(folder)
    total = 4 * sum(p.numel() for p in whole.parameters())
    ended = simmem("plan", "--device", "nvme-gen4-pc", "--model", folder, "--prompt", 8, "--new-tokens", 8,
                   "--weights", "fp32", "--kv", "fp32", "--policy", "stream", "--set", "resident_ratio=0.5",
                   "--emit", "accelerate", "--json")
    emit = ended.document["emit"]
    assert (emit["realises"], emit["load"]["dtype"]) == ("nearest", "float32")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(emit["text"], names)  # the very lines that a user copies
    assert names["device_map"] == emit["device_map"]
    loaded = names["model"].eval()
    resident = 4 * sum(p.numel() for p in loaded.parameters() if p.device.type != "meta")
    layer = 4 * sum(p.numel() for p in whole.base_model.get_submodule(
        "decoder.layers.0" if config is _opt else "layers.0").parameters())
    assert total / 2 - layer < resident <= total / 2  # the most whole layers that half of it can be
    tokens = torch.arange(2, 20).reshape(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens).logits, whole(input_ids=tokens).logits)


@pytest.mark.parametrize("config", [_opt, _llama])
@pytest.mark.parametrize("resident", [0, 2, 6, 7])
def test_the_layers_that_stay_are_those_of_the_plan(config: Callable[[Any], Any], resident: int, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """layer-stream's map, run with the CPU in the GPU's place: the very layers, the same logits."""
    torch = pytest.importorskip("torch", reason="the emitted Python is run")
    transformers = pytest.importorskip("transformers", reason="the emitted Python is run")
    pytest.importorskip("accelerate", reason="the emitted Python is run")
    torch.manual_seed(0)
    whole = transformers.AutoModelForCausalLM.from_config(config(transformers)).eval()
    whole.save_pretrained(tmp_path / "model")
    knobs = {"resident_layers": resident, "source_tier": "storage", "buffers": 2}
    emit = asked("accelerate", "rtx4090-pc", str(tmp_path / "model"), prompt=8, new_tokens=8, weights="fp32", kv="fp32",
                 policy="layer-stream", knobs=knobs)
    assert emit.realises == ("exact" if resident == 7 else "nearest")
    assert emit.device_map is not None and 0 in emit.device_map.values()
    if resident == 7:
        assert emit.device_map == {"": 0}
        return
    assert any("buffers: 2" in line for line in emit.cannot)
    stem = "model.decoder.layers" if config is _opt else "model.layers"
    assert [emit.device_map[f"{stem}.{i}"] for i in range(6)] == [0] * resident + ["disk"] * (6 - resident)
    assert emit.text is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(re.sub(r": 0\b", ": 'cpu'", emit.text), names)
    tokens = torch.arange(2, 20).reshape(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(input_ids=tokens).logits, whole(input_ids=tokens).logits)


def test_layer_stream_beyond_what_accelerate_can_is_one_line() -> None:
    question: dict[str, Any] = {"policy": "layer-stream", "knobs": {"source_tier": "host"}}
    quantised = asked("accelerate", "rtx4090-pc", "llama-2-70b", weights="int4", **question)
    assert (quantised.realises, len(quantised.cannot)) == ("no", 1)
    assert "stream int4 weights" in quantised.cannot[0]
    other = asked("llama.cpp", "rtx4090-pc", "llama-2-13b", weights="fp16", **question)
    assert (other.realises, len(other.cannot)) == ("no", 1)
    assert "copy layers from dram to the GPU" in other.cannot[0]
    assert other.instead is not None and "layer-split" in other.instead


def test_a_device_map_names_the_unit_and_the_tier_of_the_plan() -> None:
    question: dict[str, Any] = {"weights": "fp16", "policy": "stream"}
    knobs = {"agent": "gpu", "resident_ratio": 0.5}
    for device, tier, near, far in (("rtx4090-pc", "host", 0, "cpu"), ("rtx4090-pc", "storage", 0, "disk"),
                                    ("m1-max", "storage", "mps", "disk"), ("orin-nano", "storage", 0, "disk")):
        model = "smollm2-135m" if device == "orin-nano" else "llama-2-7b"
        emit = asked("accelerate", device, model, **question, knobs=knobs | {"source_tier": tier})
        assert emit.device_map is not None
        assert set(emit.device_map.values()) == {near, far}
        assert emit.device_map["lm_head"] == emit.device_map["model.embed_tokens"] == near
        assert emit.load is not None
        assert ("offload_folder" in emit.load) == (far == "disk")
        if (device, tier) == ("rtx4090-pc", "host"):
            # Half of 13.476 GB less embedding and head (0.524 GB), in layers of 0.4048 GB.
            assert [emit.device_map[f"model.layers.{i}"] for i in range(32)] == [0] * 15 + ["cpu"] * 17


def test_quantised_weights_are_never_offloaded_and_say_what_they_become() -> None:
    resident = asked("accelerate", "rtx4090-pc", "llama-2-7b", weights="int4", policy="resident")
    assert (resident.realises, resident.device_map) == ("nearest", {"": 0})
    assert resident.load is not None
    assert resident.load["quantization_config"] == "HqqConfig(nbits=4, group_size=64)"
    streamed = asked("accelerate", "rtx4090-pc", "llama-2-7b", weights="int4", policy="stream",
                     knobs={"agent": "gpu", "resident_ratio": 0.5})
    assert streamed.realises == "no"
    assert "int4" in streamed.cannot[0]
    plan: Plan = package.plan("rtx4090-pc", "llama-2-7b", weights="fp16")
    assert plan.emit is None
