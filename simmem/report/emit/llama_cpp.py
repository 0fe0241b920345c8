"""Which flags make llama.cpp do a plan, and which parts has it no flag for?

Spelled as `llama-server --help` spells them since July 2026 (docs/emit.md says where each was read). llama.cpp keeps a
layer on a GPU and computes it there, or keeps it in host memory and computes it on the CPU; it copies no weights for a
decode step, and reads from storage only where the system pages a mapped file in.
"""

from __future__ import annotations

import shlex

import numpy as np

from simmem.planner.document import Emission
from simmem.policy.base import Block, one_value, policy_named
from simmem.report.emit.asked import Asked, Realise, by_policy, cannot, dropped_parts, realised, size
from simmem.report.emit.ggml_formats import CACHE_TYPES, converts_as_is, gguf_bytes, is_plain, nearest_type
from simmem.spec.ggml_types import GgmlType
from simmem.spec.precision import FILE, matrix_bytes_per_param

__all__ = ["ARCHITECTURES", "NAME", "POLICIES", "emit"]

NAME = "llama.cpp"

_OWN = {"falcon_mamba": "mamba", "cohere": "command-r", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2",
        "kimi_k2": "deepseek2", "gpt_bigcode": "starcoder", "phi": "phi2", "mistral": "llama", "mixtral": "llama",
        "gpt_neox": "gptneox", "gemma3_text": "gemma3", "llama4_text": "llama4", "olmo3": "olmo2",
        "glm": "chatglm", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss",
        "minimax_m2": "minimax-m2", "ernie4_5_moe": "ernie4_5-moe", "glm4_moe": "glm4moe"}
_SAME = ("arcee", "bloom", "cohere2", "dbrx", "dots1", "ernie4_5", "falcon", "gemma", "gemma2", "glm4", "gpt2",
         "granite", "granitemoe", "llama", "mamba", "mpt", "nemotron", "olmo", "olmo2", "olmoe", "phi3", "phimoe",
         "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2")
ARCHITECTURES = {**_OWN, **{name: name for name in _SAME}}
"""Family in a config.json -> architecture in a GGUF file. OPT, GPT-J, CodeGen and Persimmon have none."""

_AGAIN = "weights that were quantised are quantised again, which loses more than from the original"
_CONTEXT_STEP = 256
"""llama.cpp rounds the context of a sequence up to this (llama-context.cpp, GGML_PAD). [tokens]"""
_MASK_BYTES = 4 + 2
"""Of a prompt's token and a place of its context (llama-graph.cpp; both are weighed in issue 23527). [B]"""


def emit(asked: Asked) -> Emission:
    """The flags for a plan, or why there are none."""
    lacks = []
    if not asked.is_gguf and asked.model.family not in ARCHITECTURES:
        lacks.append(f"run {asked.model.name}: simmem knows no architecture of llama.cpp for the family "
                     f"{asked.model.family}, so no GGUF file of it")
    if asked.agent not in ("cpu", "gpu"):
        lacks.append(f"compute on the {asked.agent}: simmem knows no flag for such a unit")
    return by_policy(NAME, POLICIES, asked, lacks)


# --- policies -----------------------------------------------------------------------------------------------------


def _resident(asked: Asked) -> Emission:
    on_gpu = asked.agent == "gpu"
    placement = (["--n-gpu-layers", str(asked.model.architecture.n_layers + 1), "--load-mode", "none"] if on_gpu else
                 ["--device", "none", "--n-gpu-layers", "0", "--load-mode", "mlock"])
    kind, held = _weights(asked)
    differs, over = _more_bytes(asked, held)
    if over:
        return cannot(NAME, over, "a plan for a smaller budget, which leaves room for it")
    if not on_gpu:
        differs.append("the CPU uses as many threads as llama.cpp finds cores; --threads changes that. Locking memory "
                       "needs a limit (ulimit -l) as large as the model; without it llama.cpp warns and goes on")
    return _told(asked, kind, placement, differs=differs, exact=True)


def _stream(asked: Asked) -> Emission:
    if asked.share >= 1:
        return _resident(asked)
    if asked.agent == "gpu":
        return _stream_to_gpu(asked)
    kind, held = _weights(asked)
    knobs, total = asked.plan.policy.knobs, sum(held.values())
    lost = [f"choose what stays resident ({asked.share:.1%} of each layer): the system's page cache holds what it "
            "likes of the mapped file, and a pass over more than it holds can leave nothing for the next",
            f"keep {knobs['reader_threads']} reads in flight: pages are read when a thread touches them, as far ahead "
            "as the system reads"]
    if knobs["prefetch_layers"]:
        lost.append(f"read {knobs['prefetch_layers']} layer(s) ahead of the compute")
    budget = int(asked.plan.memory[asked.fast].budget_bytes)
    planned = sum(asked.plan.predicted.bytes_per_token.values())
    differs = [f"a token reads between {size(planned)} (planned) and {size(total)} (a page cache that keeps nothing)",
               f"llama.cpp keeps to no budget: start it with `systemd-run --scope -p MemoryMax={budget}` or alike, "
               "which counts the page cache too",
               "without --no-repack the weights would be copied into memory of the process, all of them"]
    placement = ["--device", "none", "--n-gpu-layers", "0", "--load-mode", "mmap", "--no-repack", "--no-warmup"]
    return _told(asked, kind, placement, differs=differs, lost=lost, exact=False)


def _stream_to_gpu(asked: Asked) -> Emission:
    where = asked.source
    if not asked.on_own_memory:
        return cannot(NAME, [f"compute on the GPU with weights that are read from {where} for every token: a GPU "
                             "backend takes memory for every layer it is given"],
                      "the CPU, with a mapped file: plan it with --policy stream --set agent=cpu")
    _, held = _weights(asked)
    layers = asked.context.layers
    outside = held.get("head", held["embedding"])
    each = (sum(held.values()) - held["embedding"] - held.get("head", 0.0)) / len(layers.kind)
    whole = int((asked.share * asked.context.total_bytes - outside) // each)
    holds = (f"`--n-gpu-layers {whole + 1}` holds the output and the last {whole} of {len(layers.kind)} layers in the "
             "room of this plan" if whole >= 0 else "`--n-gpu-layers 0` is all there is room for")
    return cannot(
        NAME, [f"copy weights from {where} to the GPU for every token: a layer that is not in {asked.fast} is computed "
               "by the CPU, out of host memory (only prompts of 32 tokens or more are worth a copy to it)",
               f"hold {asked.share:.1%} of each layer resident: a tensor is on the GPU or not"],
        f"{holds}, and the CPU computes the other layers: another policy, with other times than these")


def _flash_window(asked: Asked) -> Emission:
    return cannot(
        NAME, dropped_parts(asked),
        "a mapped file on the CPU (`--device none --load-mode mmap --no-repack`) runs within little memory, but reads "
        "whole layers: all weights for each token but what the page cache kept" + asked.instead_of_this())


def _layer_stream(asked: Asked) -> Emission:
    given, n_layers = int(one_value(asked.plan.policy.knobs["resident_layers"])), asked.model.architecture.n_layers
    if given > n_layers:
        return _resident(asked)
    return cannot(
        NAME, [f"copy layers from {asked.source} to the GPU for every token: a layer that is not in {asked.fast} is "
               "computed by the CPU, out of host memory (only prompts of 32 tokens or more are worth a copy to it)"],
        f"the CPU computes the other {n_layers - given} layers: plan that with --policy layer-split")


def _layer_split(asked: Asked) -> Emission:
    n_layers, planned = asked.model.architecture.n_layers, int(one_value(asked.plan.policy.knobs["gpu_layers"]))
    kind, held = _weights(asked)
    budget = {tier: use.budget_bytes for tier, use in asked.plan.memory.items()}
    over: dict[int, tuple[float, str]] = {}
    given = planned
    while given >= 0:
        used = _split_bytes(asked, held, given)
        worst = max((used[tier] - budget[tier], tier) for tier in used)
        if worst[0] <= 0:
            break
        over[given] = worst
        given -= 1
    if given < 0:
        missing, tier = min(over.values())
        return cannot(NAME, [f"fit: its formats take {size(missing)} more of {tier} than the budget, however many "
                             "layers are on the GPU"], "a plan for a smaller budget, which leaves room for it")
    differs = []
    if given < planned:
        missing, tier = over[planned]
        differs.append(f"{given} layers on the GPU where the plan has {planned}: in llama.cpp's formats and buffers, "
                       f"output, keys and values included, {planned} would take {size(missing)} more of {tier} than "
                       "the budget")
    if given <= n_layers:
        differs.append("the CPU uses as many threads as llama.cpp finds cores; --threads changes that")
    if _kv_bytes(asked) > asked.context.kv_bytes * 1.001:
        differs.append(f"keys and values take {size(_kv_bytes(asked))} for {size(asked.context.kv_bytes)}: contexts "
                       f"are rounded up to {_context_tokens(asked)} tokens")
    placement = ["--n-gpu-layers", str(given), "--load-mode", "none"]
    if not given:  # with 0 layers alone the GPU would still take long prompts
        placement = ["--device", "none", *placement]
    return _told(asked, kind, placement, differs=differs, exact=given == planned)


def _split_bytes(asked: Asked, held: dict[str, float], given: int) -> dict[str, float]:
    """What llama.cpp holds in each tier with `given` layers on the GPU, one more than there are taking the output.

    Weights, keys and values, activations, and what passes through while a prompt is read, as the plan counts them but
    in llama.cpp's formats; and its attention mask.

    held : bytes of each tensor group in the file. [B]
    """
    context, n_layers = asked.context, asked.model.architecture.n_layers
    policy, own = policy_named("layer-split"), context.group_bytes
    block = Block({"agent": asked.agent}, {"gpu_layers": np.array([given, min(given, n_layers)])})
    placed = [policy.placements(context, block.only(np.array([i]))) for i in range(2)]
    fast, host = asked.fast, context.device.host

    def planned(tensors: str, tier: str, which: int = 0) -> float:
        return sum(p.bytes for p in placed[which] if p.tensors.startswith(tensors) and p.tier == tier)

    outside = {"embedding", "head"}
    growth = (sum(n for group, n in held.items() if group not in outside)
              / sum(n for group, n in own.items() if group not in outside))
    output = held.get("head", held["embedding"]) if given > n_layers else 0.0
    near = growth * planned("last", fast, 1) + output
    # The input embedding is looked up in host memory: a tied one is there a second time.
    far = sum(held.values()) - near + (output if asked.model.architecture.tied_head else 0.0)
    near_kv = _kv_bytes(asked) * min(given, n_layers) / n_layers
    working = context.working_bytes + _mask_bytes(asked)
    return {fast: near + near_kv + growth * planned("weights passing", fast) + (working if given else 0.0),
            host: far + _kv_bytes(asked) - near_kv + working}


def _hot_cold(asked: Asked) -> Emission:
    return cannot(
        NAME, ["multiply only the neurons that a predictor asks for: every row of every matrix is multiplied",
               "put some neurons of a layer on the GPU and others on the CPU, side by side: a tensor is on one"],
        "whole layers on the GPU and the others on the CPU: plan that with --policy layer-split. PowerInfer, a fork "
        "of llama.cpp, does such plans" + asked.instead_of_this())


POLICIES: dict[str, Realise] = {"resident": _resident, "stream": _stream, "flash-window": _flash_window,
                                "layer-split": _layer_split, "layer-stream": _layer_stream, "hot-cold": _hot_cold}
"""Policy -> what llama.cpp does with it."""


# --- weights, keys and values -------------------------------------------------------------------------------------


def _weights(asked: Asked) -> tuple[GgmlType | None, dict[str, float]]:
    """The type of the matrices and the bytes of each group; no type where the file's own are kept. [B]"""
    if asked.weights == FILE and asked.is_gguf:
        return None, asked.context.group_bytes
    as_is = asked.weights == FILE and converts_as_is(asked.model)
    kind = None if as_is else nearest_type(asked.model, asked.weights)
    return kind, gguf_bytes(asked.model, kind)


def _context_tokens(asked: Asked) -> int:
    w = asked.plan.workload
    return -(-(w.prompt_tokens + w.new_tokens) // _CONTEXT_STEP) * _CONTEXT_STEP


def _kv_bytes(asked: Asked) -> float:
    """What llama.cpp takes for keys and values. [B]"""
    kv, batch = asked.plan.workload.kv, asked.plan.workload.batch
    counted = asked.model.kv_bytes(kv, _context_tokens(asked)) * batch
    return counted * CACHE_TYPES[kv].bytes_per_value / matrix_bytes_per_param(kv)


def _mask_bytes(asked: Asked) -> float:
    """The mask of attention that a prompt is read with, in fp32 and once more in fp16 for flash attention. [B]"""
    w = asked.plan.workload
    return _MASK_BYTES * w.batch * w.prompt_tokens * _context_tokens(asked)


def _more_bytes(asked: Asked, held: dict[str, float]) -> tuple[list[str], list[str]]:
    """Where the bytes differ from the plan's, and where they no longer fit."""
    context, total = asked.context, sum(held.values())
    embedding, tied = held["embedding"], asked.model.architecture.tied_head
    fast, host, differs, over = asked.fast, context.device.host, [], []
    more = {fast: total - context.total_bytes + _kv_bytes(asked) - context.kv_bytes + _mask_bytes(asked)}
    if asked.agent == "gpu":  # the input embedding is looked up by the CPU, from host memory
        if fast != host:
            more[fast] -= 0.0 if tied else embedding
            more[host] = embedding
        elif tied:
            more[host] += embedding
        copy = "a second copy of the embedding" if tied else "the input embedding"
        differs.append(f"{copy}, {size(embedding)}, is in {host}: the CPU looks rows up there")
    if _kv_bytes(asked) > context.kv_bytes * 1.001:
        differs.append(f"keys and values take {size(_kv_bytes(asked))} for {size(context.kv_bytes)}: contexts are "
                       f"rounded up to {_context_tokens(asked)} tokens"
                       + ("" if CACHE_TYPES[asked.plan.workload.kv].exact else ", and the nearest type is larger"))
    for tier, extra in more.items():
        missing = asked.over_budget(tier, extra)
        if missing:
            over.append(f"fit: its formats and copies take {size(missing)} more of {tier} than the budget")
    return differs, over


# --- the command --------------------------------------------------------------------------------------------------


def _told(asked: Asked, kind: GgmlType | None, placement: list[str], *, differs: list[str], exact: bool,
          lost: list[str] | None = None) -> Emission:
    w, lost = asked.plan.workload, lost or []
    cache = CACHE_TYPES[w.kv]
    prepare, file, notes = _file(asked, kind)
    prompts = str(w.batch * w.prompt_tokens)
    arguments = ["llama-server", "--model", file, *placement, "--fit", "off",
                 "--ctx-size", str(_context_tokens(asked) * w.batch), "--parallel", str(w.batch),
                 "--predict", str(w.new_tokens), "--batch-size", prompts, "--ubatch-size", prompts,
                 "--cache-type-k", cache.name, "--cache-type-v", cache.name,
                 *(["--flash-attn", "on"] if not cache.exact else []), "--cache-ram", "0"]
    same = kind is None or is_plain(w.weights)
    if kind is not None and not same:
        bits, wanted = 8 * kind.block_bytes / kind.block, _bits(asked)
        mine, planned = sum(gguf_bytes(asked.model, kind).values()), asked.context.total_bytes
        notes.append(f"{w.weights} weights ({wanted:.3g} bits each, groups' scales included) become {kind.name} "
                     f"({bits:.4g} bits): {size(mine)} for {size(planned)}; other rounding, so other quality")
    if not cache.exact:
        notes.append(f"{w.kv} keys and values become {cache.name} ({8 * cache.bytes_per_value:.3g} bits each, blocks "
                     "of 32), which needs --flash-attn on")
        if w.kv in ("int3", "int2"):
            lost.append(f"keep keys and values at {w.kv}: q4_0 is the smallest type")
    return realised(NAME, differs=notes + differs, cannot=lost, exact=exact and same and cache.exact, prepare=prepare,
                    arguments=arguments, text="\n".join([*prepare, _lines(arguments)]))


def _bits(asked: Asked) -> float:
    if asked.weights == FILE:
        return 8 * asked.context.total_bytes / asked.model.params
    return 8 * matrix_bytes_per_param(asked.weights)


def _file(asked: Asked, kind: GgmlType | None) -> tuple[list[str], str, list[str]]:
    """Commands that make the GGUF file, its name, and what has to be said about them."""
    if asked.is_gguf:
        if kind is None:
            return [], str(asked.path), []
        file = f"{asked.model.name}-{kind.name}.gguf"
        again = ["llama-quantize", "--allow-requantize", "--pure", str(asked.path), file, kind.name]
        return ([shlex.join(again)], file,
                [_AGAIN])
    kept = converts_as_is(asked.model)
    notes, first = [], kind.name if kind is not None and kind.name in ("F32", "F16", "BF16") else "F16"
    if kept:
        first = "BF16"
    made, folder = f"{asked.model.name}-{'MXFP4' if kept else first}.gguf", asked.checkpoint
    prepare = []
    if folder is None:
        folder = "CHECKPOINT"
        notes.append("the model file does not say where its checkpoint lies: put its folder in the place of CHECKPOINT")
    elif asked.path is None:
        prepare.append(shlex.join(["hf", "download", folder, "--local-dir", asked.model.name]))
        folder = asked.model.name
    convert = ["python", "convert_hf_to_gguf.py", folder, "--outtype", first.lower(), "--outfile", made]
    prepare.append(shlex.join(convert))
    if kind is None:
        return prepare, made, notes
    file = f"{asked.model.name}-{kind.name}.gguf"
    if file != made:
        again = ["--allow-requantize"] if kept else []
        prepare.append(shlex.join(["llama-quantize", *again, "--pure", made, file, kind.name]))
        notes += [_AGAIN] if kept else []
    return prepare, file, notes


def _lines(arguments: list[str]) -> str:
    """A command with a flag on each line, as a shell reads it."""
    lines = [arguments[0]]
    for argument in arguments[1:]:
        if argument.startswith("--"):
            lines.append(f"  {shlex.quote(argument)}")
        else:
            lines[-1] += f" {shlex.quote(argument)}"
    return " \\\n".join(lines)
