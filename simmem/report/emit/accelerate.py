"""Which device map makes accelerate (through transformers) do a plan, and which parts has it no setting for?

accelerate places whole modules. What is mapped to "cpu" or "disk" is copied to the unit that computes each time it is
used and dropped behind it, one matrix after the other: streaming, by whole layers and without reading ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

from simmem.planner.document import Emission
from simmem.policy.base import one_value
from simmem.report.emit.asked import Asked, Realise, by_policy, cannot, dropped_parts, realised, size
from simmem.report.emit.torch_modules import Modules, modules_of
from simmem.spec.model import Model
from simmem.spec.precision import FILE

__all__ = ["NAME", "POLICIES", "device_map", "emit"]

NAME = "accelerate"

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_QUANTISED = {"int8": ("bitsandbytes", "BitsAndBytesConfig(load_in_8bit=True)", 8.0, 1),
              "int4": ("HQQ", "HqqConfig(nbits=4, group_size=64)", 4.5, 64),
              "int3": ("HQQ", "HqqConfig(nbits=3, group_size=64)", 3.7, 64),
              "int2": ("HQQ", "HqqConfig(nbits=2, group_size=64)", 2.5, 64)}
"""Precision -> (package, quantization_config, bits a weight, what has to divide a row). HQQ has simmem's own groups:
64 weights with a scale and a zero of 16 bits; three bits it packs by tens into 32."""
_HALF = "fp16"
"""What quantised models compute in, and what is not quantised of them."""


def emit(asked: Asked) -> Emission:
    """The device map for a plan, or why there is none."""
    lacks = []
    if modules_of(asked.model) is None:
        lacks.append(f"run {asked.model.name}: simmem does not know what transformers calls the modules of the family "
                     f"{asked.model.family}")
    if "text_config" in asked.model.source:
        lacks.append("place the decoder alone: transformers loads it inside a model that also sees, under other names")
    if asked.agent not in ("cpu", "gpu"):
        lacks.append(f"compute on the {asked.agent}: torch has no device of that name")
    if asked.weights == FILE and asked.is_gguf:
        lacks.append("keep the precisions of a GGUF file: transformers expands all weights when it reads one")
    return by_policy(NAME, POLICIES, asked, lacks)


# --- policies -----------------------------------------------------------------------------------------------------


def _resident(asked: Asked) -> Emission:
    where: dict[str, int | str] = {"": _torch_device(asked)}
    if asked.weights in _DTYPES or asked.weights == FILE:
        return _told(asked, where, [], exact=True)
    lost = _cannot_quantise(asked)
    if lost:
        return cannot(NAME, lost, "plan with --weights fp16")
    package, call, bits, _ = _QUANTISED[asked.weights]
    more = _quantised_bytes(asked.model, bits) - asked.context.total_bytes
    missing = asked.over_budget(asked.fast, more)
    if missing:
        return cannot(NAME, [f"fit: embedding and head stay at 16 bits, which takes {size(missing)} more of "
                             f"{asked.fast} than the budget"], "a plan for a smaller budget, which leaves room for it")
    differs = [f"{asked.weights} by {package}: only the matrices of the layers are "
               f"quantised ({bits:.3g} bits a weight), embedding and head stay at 16 bits: "
               f"{size(asked.context.total_bytes + more)} for {size(asked.context.total_bytes)}",
               "the weights are quantised while they are loaded, from a checkpoint at 16 bits"]
    if where[""] != 0:
        differs.append(f"{package} was written for CUDA; whether it runs on {where['']} depends on its version")
    return _told(asked, where, differs, exact=False, quantisation=call)


def _stream(asked: Asked) -> Emission:
    if asked.share >= 1:
        return _resident(asked)
    modules, model = modules_of(asked.model), asked.model
    if modules is None:
        return cannot(NAME, [])
    if asked.weights not in _DTYPES:
        return _cannot_stream(asked)
    each = _layer_bytes(asked)
    outside = asked.context.total_bytes - sum(each)
    limit = min(asked.share * asked.context.total_bytes, _room(asked))
    keeps_outside = outside <= limit
    whole = sum(total <= limit - outside for total in accumulate(each)) if keeps_outside else 0
    kept = outside * keeps_outside + sum(each[:whole])
    planned = asked.share * asked.context.total_bytes
    differs = [f"whole layers: {whole} of {len(each)} stay, {'with' if keeps_outside else 'without'} embedding and "
               f"head: {size(kept)} where the plan keeps {size(planned)}, so that a token moves "
               f"{size(asked.context.total_bytes - kept)} for {size(asked.context.total_bytes - planned)}"]
    knobs = asked.plan.policy.knobs
    lost = []
    if knobs["prefetch_layers"]:
        lost.append(f"move {knobs['prefetch_layers']} layer(s) ahead of the compute")
    if model.architecture.experts:
        differs.append("of an offloaded layer every expert is moved, also those a token does not use")
    return _offloaded(asked, modules, whole, keeps_outside, planned - kept, differs, lost,
                      readers=f"keep {knobs['reader_threads']} reads in flight")


def _layer_stream(asked: Asked) -> Emission:
    """The same layers stay. What is outside them is copied too, unless the plan keeps that as well."""
    knobs, n_layers = asked.plan.policy.knobs, asked.model.architecture.n_layers
    given = int(one_value(knobs["resident_layers"]))
    if given > n_layers:
        return _resident(asked)
    modules = modules_of(asked.model)
    if modules is None:
        return cannot(NAME, [])
    if asked.weights not in _DTYPES:
        return _cannot_stream(asked)
    each = _layer_bytes(asked)
    outside = asked.context.total_bytes - sum(each)
    room = _room(asked)
    whole = min(given, sum(total <= room for total in accumulate(each)))
    differs = [f"embedding and head, {size(outside)}, are copied whole for every token too; the plan copies the head "
               "and looks rows of the embedding up where it lies"]
    if whole < given:
        differs.insert(0, f"{whole} of {n_layers} layers stay where the plan keeps {given}: the largest module that is "
                          f"brought in takes {size(_largest_bytes(asked, outside=True))} beside them")
    lost = []
    if int(one_value(knobs["buffers"])) > 1:
        lost.append(f"copy a layer while another computes (buffers: {knobs['buffers']})")
    return _offloaded(asked, modules, whole, False, sum(each[whole:given]), differs, lost,
                      readers="read as many chunks at once as suits the storage")


def _offloaded(asked: Asked, modules: Modules, whole: int, keeps_outside: bool, more_bytes: float, differs: list[str],
               lost: list[str], *, readers: str) -> Emission:
    """The map that keeps the first `whole` layers, with what is lost and different for any plan that streams layers.

    more_bytes : held by the source of the weights beyond what is planned. [B]
    readers : what the plan does in flight, should it read from storage.
    """
    far = "cpu" if asked.source == asked.context.device.host else "disk"
    where = device_map(modules, asked.model.architecture.n_layers, whole, _torch_device(asked), far,
                       keeps_outside=keeps_outside)
    differs = [*differs, "an offloaded layer comes one matrix at a time: a copy for each, the next begins when it was "
                         "used"]
    if _torch_device(asked) not in where.values() and asked.agent != "cpu":
        if len(modules.after) == 1:
            return cannot(NAME, ["compute on the GPU with no module there: it takes the CPU then"],
                          "a plan that keeps a layer")
        where[modules.after[0]] = _torch_device(asked)
        differs.append(f"{modules.after[0]} stays on the GPU: with nothing there accelerate would compute on the CPU")
    if far == "disk":
        lost.append(f"{readers}: one thread copies from a mapped file, as far ahead as the system reads")
        differs.append("the system keeps what it read in free host memory, beyond the plan's budget for it")
    elif asked.on_own_memory:
        lost.append("copy from pinned memory: offloaded weights are in ordinary host memory, and copies from there are "
                    "slower")
    missing = asked.over_budget(asked.source, more_bytes) if far == "cpu" else 0.0
    if missing:
        return cannot(NAME, [f"fit: whole layers take {size(missing)} more of {asked.source} than the budget"])
    return _told(asked, where, differs, exact=False, lost=lost)


def _cannot_stream(asked: Asked) -> Emission:
    return cannot(NAME, [f"stream {asked.weights} weights: bitsandbytes expands modules on the cpu or disk to fp32, "
                         "HQQ and quanto refuse them"], "plan with --weights fp16, which it can stream")


def _layer_bytes(asked: Asked) -> list[float]:
    """Weights of each layer. [B]"""
    layers = asked.context.layers
    return [layers.stored_bytes[kind] for kind in layers.kind]


def _room(asked: Asked) -> float:
    """Room for weights that stay, beside keys and values, activations and what is brought in. [B]"""
    outside = asked.plan.policy.name == "layer-stream"
    return (asked.plan.memory[asked.fast].budget_bytes - asked.context.kv_bytes - asked.context.working_bytes
            - _largest_bytes(asked, outside=outside))


def _flash_window(asked: Asked) -> Emission:
    return cannot(
        NAME, dropped_parts(asked),
        "layers offloaded to disk (plan them with --policy stream --weights fp16): every weight that is not resident "
        "is read again for each token" + asked.instead_of_this())


def _layer_split(asked: Asked) -> Emission:
    return cannot(
        NAME, [f"compute layers out of {asked.context.device.host} while others are on the GPU: a module that is kept "
               "there is copied to the GPU for every token"],
        "the same layers, copied for every token: plan them with --policy stream --set source_tier=host")


POLICIES: dict[str, Realise] = {"resident": _resident, "stream": _stream, "flash-window": _flash_window,
                                "layer-split": _layer_split, "layer-stream": _layer_stream}
"""Policy -> what accelerate does with it."""


# --- where modules go ---------------------------------------------------------------------------------------------


def device_map(modules: Modules, n_layers: int, whole: int, device: int | str, far: str, *, keeps_outside: bool
               ) -> dict[str, int | str]:
    """Module -> device: the first `whole` layers stay on `device`, the others are `far`.

    What is outside the layers goes together, because a tied head shares its matrix with the embedding.
    """
    outside = device if keeps_outside else far
    return {**dict.fromkeys(modules.before, outside),
            **{f"{modules.layers}.{i}": device if i < whole else far for i in range(n_layers)},
            **dict.fromkeys(modules.after, outside)}


def _torch_device(asked: Asked) -> int | str:
    """What torch calls the unit. A device file does not say whose GPU it is: Apple's is mps, others have a number."""
    if asked.agent == "cpu":
        return "cpu"
    return "mps" if "Apple" in asked.context.device.title else 0


def _largest_bytes(asked: Asked, *, outside: bool = False) -> float:
    """The largest matrix that is brought in while others stay; fused ones of gated FFNs and experts as one. [B]

    outside : embedding and head are brought in too.
    """
    a, x = asked.model.architecture, asked.model.architecture.experts
    fused = (2 if a.gated else 1) * a.d_model
    params = max(a.d_ff * fused, a.d_model * a.n_heads * a.d_head, x.count * x.d_expert * fused if x else 0)
    largest = params * asked.context.stored_bytes_per_param("attention" if a.n_heads else "state-space")[0]
    held = asked.context.group_bytes
    return max(largest, held["embedding"], held.get("head", 0.0)) if outside else largest


# --- precision ----------------------------------------------------------------------------------------------------


def _cannot_quantise(asked: Asked) -> list[str]:
    a, (package, _, _, group) = asked.model.architecture, _QUANTISED[asked.weights]
    lost = []
    if a.experts:
        lost.append(f"hold experts at {asked.weights}: transformers keeps them in one tensor, and quantises linear "
                    "modules only")
    if asked.agent == "cpu" and package == "HQQ":
        lost.append(f"hold {asked.weights} weights for the CPU: HQQ refuses a device map with the cpu in it")
    if any(row % group for row in (a.d_model, a.d_ff, a.n_heads * a.d_head)):
        lost.append(f"hold {asked.weights} weights: rows of this model do not divide into groups of {group}")
    if asked.model.family in ("gpt2", "gpt_bigcode") and package == "HQQ":
        lost.append(f"hold {asked.weights} weights: the layers of {asked.model.family} are no linear modules to HQQ")
    return lost


def _quantised_bytes(model: Model, bits: float) -> float:
    """Weights when only the matrices of the layers are quantised. [B]"""
    inside = ("attention", "ffn", "state-space")
    return sum(g.matrix_params * bits / 8 + 2 * g.vector_params if g.name in inside else g.bytes_at(_HALF)
               for g in model.groups())


# --- the text -----------------------------------------------------------------------------------------------------


def _told(asked: Asked, where: dict[str, int | str], differs: list[str], *, exact: bool, lost: Sequence[str] = (),
          quantisation: str | None = None) -> Emission:
    w, lost = asked.plan.workload, list(lost)
    computes = w.weights if w.weights in _DTYPES else asked.model.native_precision if w.weights == FILE else _HALF
    dtype = "auto" if w.weights == FILE else _DTYPES[computes]
    if w.kv != computes:
        lost.append(f"hold keys and values at {w.kv}: they have the precision of the activations, {computes}"
                    + ("; generate(cache_implementation='quantized') is nearest" if w.kv.startswith("int") else ""))
    name = asked.checkpoint
    if name is None:
        name = "CHECKPOINT"
        differs = ["the model file does not say where its checkpoint lies: put its folder in the place of CHECKPOINT",
                   *differs]
    load: dict[str, object] = {"dtype": dtype}
    if "disk" in where.values():
        load["offload_folder"] = "offload"
        differs = [*differs, "the checkpoint has to be in safetensors, which is read where it lies; only what "
                             "transformers converts while loading (experts) is written to offload_folder"]
    extra = {"gguf_file": asked.path.name} if asked.is_gguf and asked.path is not None else {}
    if extra and asked.path is not None:
        name = str(asked.path.parent)
    arguments = {**load, **extra}
    told = {**arguments, "quantization_config": quantisation} if quantisation else dict(arguments)
    used = {str(_torch_device(asked)): asked.plan.memory[asked.fast].budget_bytes}
    if "cpu" in where.values() and asked.agent != "cpu":
        used["cpu"] = asked.plan.memory[asked.context.device.host].budget_bytes
    return realised(NAME, differs=differs, cannot=lost, exact=exact, device_map=where,
                    load={"pretrained_model_name_or_path": name, **told, "max_memory": used},
                    text=_script(name, where, arguments, quantisation))


def _script(name: str, where: dict[str, int | str], arguments: dict[str, object], quantisation: str | None) -> str:
    classes = ["AutoModelForCausalLM", *([quantisation.split("(")[0]] if quantisation else [])]
    given = [f"    {key}={value!r}," for key, value in arguments.items()]
    if quantisation:
        given.append(f"    quantization_config={quantisation},")
    return "\n".join([f"from transformers import {', '.join(classes)}", "", "device_map = {", *_rows(where), "}",
                      "model = AutoModelForCausalLM.from_pretrained(", f"    {name!r},", *given,
                      "    device_map=device_map,", ")"])


def _rows(where: dict[str, int | str]) -> list[str]:
    """The entries of a map; runs of layers on one device as one comprehension."""
    rows = []
    for (is_layer, device), run in groupby(where.items(), key=lambda item: (item[0][-1:].isdigit(), item[1])):
        names = [name for name, _ in run]
        if is_layer:
            stem, _, first = names[0].rpartition(".")
            rows.append(f'    **{{f"{stem}.{{i}}": {device!r} for i in range({first}, {int(first) + len(names)})}},')
        else:
            rows += [f"    {name!r}: {device!r}," for name in names]
    return rows
