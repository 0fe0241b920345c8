"""Is a model in a GGUF file the model that transformers builds, and are its bytes those of the file?

The other programs: transformers makes the modules (on the meta device), and the `gguf` package maps their parameters to
llama.cpp's names and writes the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmem.errors import SpecError
from simmem.planner.api import plan
from simmem.spec.model import Model, load_model

gguf = pytest.importorskip("gguf", reason="files are written with the gguf package, which is not installed")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

COMMON = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 160,
          "max_position_embeddings": 512}
GQA = {**COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
EXPERTS = {**GQA, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# architecture in llama.cpp, transformers configuration, metadata beside what every decoder has
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": ("llama", lambda t: t.LlamaConfig(**GQA, tie_word_embeddings=False), {}),
    "llama, tied, biased": ("llama", lambda t: t.LlamaConfig(**GQA, tie_word_embeddings=True, attention_bias=True,
                                                             mlp_bias=True), {}),
    "mixtral": ("llama", lambda t: t.MixtralConfig(**GQA, num_local_experts=8, num_experts_per_tok=2),
                {"expert_used_count": 2}),
    "qwen2": ("qwen2", lambda t: t.Qwen2Config(**GQA), {}),
    "qwen3": ("qwen3", lambda t: t.Qwen3Config(**GQA, head_dim=32), {"attention.key_length": 32}),
    "qwen2moe": ("qwen2moe", lambda t: t.Qwen2MoeConfig(**EXPERTS, num_experts=8, shared_expert_intermediate_size=64),
                 {"expert_used_count": 2}),
    "qwen3moe": ("qwen3moe", lambda t: t.Qwen3MoeConfig(**EXPERTS, num_experts=8, head_dim=16),
                 {"expert_used_count": 2, "attention.key_length": 16}),
    "deepseek2": ("deepseek2", lambda t: t.DeepseekV3Config(
        **EXPERTS, n_routed_experts=8, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, n_shared_experts=1, n_group=2, topk_group=1),
        {"expert_used_count": 2, "rope.dimension_count": 4}),
    "gpt-oss": ("gpt-oss", lambda t: t.GptOssConfig(**{**GQA, "intermediate_size": 32}, num_local_experts=8,
                                                    num_experts_per_tok=2, head_dim=16, sliding_window=128),
                {"expert_used_count": 2, "attention.key_length": 16, "attention.sliding_window": 128}),
    "gemma3": ("gemma3", lambda t: t.Gemma3TextConfig(**{**GQA, "num_hidden_layers": 6}, head_dim=32,
                                                      sliding_window=64),
               {"attention.key_length": 32, "attention.sliding_window": 64}),
    "falcon": ("falcon", lambda t: t.FalconConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                                                  vocab_size=160), {}),
    "phi2": ("phi2", lambda t: t.PhiConfig(**COMMON, intermediate_size=96), {}),
    "phi3": ("phi3", lambda t: t.Phi3Config(**GQA, pad_token_id=0), {}),
    "gpt2": ("gpt2", lambda t: t.GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=160, n_positions=512), {}),
    "olmo, whose norms hold nothing": ("olmo", lambda t: t.OlmoConfig(**GQA, pad_token_id=1), {}),
    "mamba": ("mamba", lambda t: t.MambaConfig(hidden_size=64, num_hidden_layers=3, vocab_size=160), {}),
}


def _llama_cpp_tensors(arch: str, module: Any, n_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name in the file, shape in torch's order) of every parameter."""
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(number, n_layers)
    tied = module.config.tie_word_embeddings
    for name, parameter in module.state_dict().items():
        shape = tuple(parameter.shape)
        if "lm_head.weight" in name and tied:
            continue
        transposed = arch == "gpt2" and re.search(r"\.c_(attn|proj|fc)\.weight", name)  # Conv1D
        biased = name.endswith("_bias") and "score" not in name
        layer = re.search(r"\.(\d+)\.", name)
        if name.endswith("e_score_correction_bias"):
            yield f"blk.{layer[1]}.exp_probs_b.bias", shape
        elif "gate_up_proj" in name and "experts" in name:  # kept as one by transformers, as two by llama.cpp
            out = 1 if arch != "gpt-oss" or biased else 2
            each = [s // 2 if i == out else s for i, s in enumerate(shape)]
            each = each if out == 1 else [each[0], each[2], each[1]]
            for half in ("gate", "up"):
                yield f"blk.{layer[1]}.ffn_{half}_exps.{'bias' if biased else 'weight'}", tuple(each)
        elif name.endswith(("experts.down_proj", "experts.down_proj_bias")):
            swapped = (shape[0], shape[2], shape[1]) if arch == "gpt-oss" and not biased else shape
            yield f"blk.{layer[1]}.ffn_down_exps.{'bias' if biased else 'weight'}", swapped
        else:
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert found is not None, name
            if name.endswith("conv1d.weight"):
                shape = (shape[0], shape[2])
            yield found if "." in found.rsplit("_", 1)[-1] or found[-2:] in ("_a", "_d") else f"{found}.weight", \
                shape[::-1] if transposed else shape


def _write(path: Path, arch: str, module: Any, metadata: dict[str, Any]) -> dict[str, int]:
    """Write the module's shapes as a GGUF file; returns the bytes of every tensor."""
    config = module.config
    n_layers = config.num_hidden_layers
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("a model of the tests")
    writer.add_block_count(n_layers)
    writer.add_context_length(512)
    if arch != "mamba":
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads
                                 if arch != "falcon" else 1)
    for key, value in metadata.items():
        writer.add_uint32(f"{arch}.{key}", value)
    written = {}
    for name, shape in _llama_cpp_tensors(arch, module, n_layers):
        zeros = np.zeros(shape, np.float32)
        kind = gguf.GGMLQuantizationType.F32
        if len(shape) > 1 and not name.endswith("bias"):
            whole = shape[-1] % 32 == 0 and "ffn" in name
            kind = gguf.GGMLQuantizationType.Q4_0 if whole else gguf.GGMLQuantizationType.F16
        data = gguf.quants.quantize(zeros, kind) if kind.name != "F32" else zeros
        writer.add_tensor(name, data, raw_dtype=kind if kind.name == "Q4_0" else None)
        written[name] = data.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model, int]:
    """(the model of the GGUF file, the model of config.json, bytes of all tensors written)."""
    arch, config, metadata = CASES[request.param]
    folder = tmp_path_factory.mktemp("gguf")
    made = config(transformers)
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(made)
    made.to_json_file(folder / "config.json", use_diff=False)
    written = _write(folder / "model.gguf", arch, module, metadata)
    return load_model(str(folder / "model.gguf")), load_model(str(folder / "config.json")), sum(written.values())


def test_both_files_describe_the_same_parameters(case: tuple[Model, Model, int]) -> None:
    read, expected, _ = case
    assert {g.name: (g.matrix_params, g.vector_params) for g in read.groups()} == {
        g.name: (g.matrix_params, g.vector_params) for g in expected.groups()}
    assert read.active_params == expected.active_params
    for context in (1, 100, 512):
        assert read.kv_bytes("fp16", context) == expected.kv_bytes("fp16", context)
        assert read.attention_flop(context) == expected.attention_flop(context)


def test_the_bytes_are_those_of_the_file(case: tuple[Model, Model, int]) -> None:
    read, _, written = case
    assert read.bytes_at("file") == written
    assert read.own_precision == "file"


@pytest.mark.parametrize("what", ["qwen3moe", "olmo, whose norms hold nothing"])
def test_a_file_can_be_planned(tmp_path: Path, what: str) -> None:
    arch, config, metadata = CASES[what]
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config(transformers))
    written = _write(tmp_path / "tiny.gguf", arch, module, metadata)
    found = plan("m1-max", str(tmp_path / "tiny.gguf"), new_tokens=8, prompt=8)
    assert found.workload.weights == "file"
    weights = sum(r.bytes for r in found.residency if r.tensors.startswith("weights"))
    assert weights == sum(written.values())


@pytest.mark.parametrize(("change", "named"), [
    (lambda w: w.add_tensor("blk.0.mystery.weight", np.zeros((4, 4), np.float32)), "blk.0.mystery.weight"),
    (lambda w: w.add_tensor("blk.0.attn_extra.weight", np.zeros((64, 64), np.float32)), "llama.attention"),
    (lambda w: w.add_uint32("llama.attention.head_count_kv", 3), "n_kv_heads"),
])
def test_what_is_not_understood_is_refused(tmp_path: Path, change: Any, named: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    for key, value in (("block_count", 1), ("context_length", 64), ("attention.head_count", 4)):
        writer.add_uint32(f"llama.{key}", value)
    for name, shape in (("token_embd", (10, 64)), ("blk.0.attn_q", (64, 64)), ("blk.0.attn_k", (64, 64)),
                        ("blk.0.attn_v", (64, 64)), ("blk.0.attn_output", (64, 64)), ("blk.0.ffn_up", (96, 64)),
                        ("blk.0.ffn_down", (64, 96)), ("blk.0.attn_norm", (64,)), ("output_norm", (64,))):
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SpecError, match=named) as caught:
        load_model(str(tmp_path / "odd.gguf"))
    assert caught.value.file == str(tmp_path / "odd.gguf")
