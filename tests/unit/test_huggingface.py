"""Is a Hugging Face configuration read as transformers reads it: same defaults, same shapes, same refusals?"""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simmem.errors import SpecError
from simmem.spec.huggingface.families import FAMILIES, WRAPPERS
from simmem.spec.huggingface.keys import MAX_CONFIG_BYTES
from simmem.spec.model import Model, load_model
from tests.unit.fuzzing import mutate_bytes, mutate_json
from tests.unit.torch_modules import counts, groups_of, meta_config, meta_module, place, tensors

Values = dict[str, Any]
CONFIGS = Path(__file__).resolve().parent.parent / "data" / "configs"

SMALL: Values = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 320,
                 "intermediate_size": 96, "max_position_embeddings": 128}
GQA: Values = {"num_key_value_heads": 2}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
BIAS: Values = {"attention_bias": True}
BIASES: Values = BIAS | {"mlp_bias": True}
EXPERTS: Values = {"num_local_experts": 8, "num_experts_per_tok": 3}
NUM_EXPERTS: Values = {"num_experts": 8, "num_experts_per_tok": 3}
DEEPSEEK: Values = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_rope_head_dim": 6, "qk_nope_head_dim": 10,
                    "v_head_dim": 14, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
                    "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
ROUTED: Values = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_shared_experts": 1,
                  "first_k_dense_replace": 2}
GPT: Values = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 320, "n_positions": 96}
MAMBA: Values = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 320}
WINDOW: Values = {"use_sliding_window": True, "sliding_window": 32}
MIXED: Values = {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]}

VARIATIONS: dict[str, list[Values]] = {
    "opt": [SMALL | {"ffn_dim": 96}, SMALL | {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
            SMALL | {"enable_bias": False} | UNTIED],
    "gpt2": [GPT, GPT | {"n_inner": 100} | UNTIED],
    "gpt_bigcode": [GPT, GPT | {"multi_query": False, "n_inner": 100}],
    "gptj": [GPT | {"rotary_dim": 8}, GPT | {"n_inner": 100, "rotary_dim": 8} | TIED],
    "codegen": [GPT | {"rotary_dim": 8}],
    "gpt_neox": [SMALL, SMALL | {"attention_bias": False} | TIED],
    "bloom": [{"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 320},
              {"n_embed": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320} | UNTIED],
    "mpt": [{"d_model": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 320, "max_seq_len": 64}],
    "falcon": [SMALL, SMALL | {"bias": True, "parallel_attn": False, "multi_query": False},
               SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2} | UNTIED,
               SMALL | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 100}],
    "persimmon": [SMALL, SMALL | {"qk_layernorm": False}],
    "phi": [SMALL, SMALL | GQA | {"qk_layernorm": True}],
    "starcoder2": [SMALL, SMALL | {"use_bias": False, "sliding_window": 16, "num_key_value_heads": 4} | UNTIED],
    "stablelm": [SMALL | GQA, SMALL | {"use_qkv_bias": True, "use_parallel_residual": True,
                                       "num_key_value_heads": 8}],
    "nemotron": [SMALL | {"num_key_value_heads": 8}, SMALL | GQA | BIASES | {"head_dim": 24}],
    "llama": [SMALL, SMALL | GQA | TIED, SMALL | GQA | BIASES | {"head_dim": 24}],
    "arcee": [SMALL, SMALL | GQA | BIASES],
    "mistral": [SMALL, SMALL | GQA | {"sliding_window": None, "head_dim": 24}],
    "ministral": [SMALL | {"head_dim": 8}, SMALL | GQA | MIXED | {"head_dim": 24}],
    "qwen2": [SMALL | GQA, SMALL | GQA | WINDOW | {"max_window_layers": 3} | TIED, SMALL | GQA | WINDOW | MIXED],
    "qwen3": [SMALL | GQA, SMALL | GQA | BIAS | TIED | {"head_dim": 24},
              SMALL | GQA | WINDOW | {"max_window_layers": 1}],
    "gemma": [SMALL | GQA, SMALL | GQA | BIAS | {"head_dim": 24}],
    "gemma2": [SMALL, SMALL | GQA | BIAS | {"head_dim": 24} | MIXED],
    "gemma3_text": [SMALL, SMALL | GQA | BIAS | {"head_dim": 24, "sliding_window_pattern": 2, "sliding_window": 16}],
    "gemma3": [{"text_config": SMALL | GQA | {"head_dim": 24}, "vision_config": {"num_hidden_layers": 1}}],
    "phi3": [SMALL | {"pad_token_id": 1}, SMALL | GQA | {"sliding_window": 31, "pad_token_id": 1}],
    "olmo": [SMALL, SMALL | GQA | BIAS | TIED],
    "olmo2": [SMALL, SMALL | GQA | BIAS],
    "olmo3": [SMALL, SMALL | GQA | MIXED],
    "cohere": [SMALL, SMALL | GQA | BIAS | {"use_qk_norm": True}],
    "cohere2": [SMALL, SMALL | GQA | BIAS | {"sliding_window_pattern": 2}],
    "granite": [SMALL, SMALL | GQA | BIASES | TIED],
    "glm": [SMALL | {"pad_token_id": 1}, SMALL | {"attention_bias": False, "head_dim": 24, "pad_token_id": 1}],
    "glm4": [SMALL | {"pad_token_id": 1}, SMALL | {"attention_bias": False, "head_dim": 24, "pad_token_id": 1}],
    "smollm3": [SMALL | {"pad_token_id": 1}, SMALL | BIASES | UNTIED | WINDOW | {"pad_token_id": 1},
                SMALL | WINDOW | {"no_rope_layers": [1, 0, 1, 0], "pad_token_id": 1}],
    "seed_oss": [SMALL, SMALL | GQA | {"attention_out_bias": True, "mlp_bias": True, "attention_bias": False}],
    "ernie4_5": [SMALL, SMALL | GQA | {"use_bias": True, "head_dim": 24}],
    "mixtral": [SMALL | EXPERTS, SMALL | GQA | EXPERTS | {"sliding_window": 16}, SMALL | GQA | NUM_EXPERTS],
    "phimoe": [SMALL | EXPERTS, SMALL | GQA | EXPERTS | BIAS | {"lm_head_bias": True}],
    "qwen2_moe": [SMALL | NUM_EXPERTS | {"moe_intermediate_size": 40, "shared_expert_intermediate_size": 56,
                                         "num_key_value_heads": 8},
                  SMALL | NUM_EXPERTS | GQA | {"decoder_sparse_step": 2, "qkv_bias": False},
                  SMALL | NUM_EXPERTS | GQA | WINDOW | {"mlp_only_layers": [0, 1], "max_window_layers": 3}],
    "qwen3_moe": [SMALL | NUM_EXPERTS | {"moe_intermediate_size": 40},
                  SMALL | NUM_EXPERTS | GQA | BIAS | WINDOW | {"mlp_only_layers": [0], "head_dim": 24},
                  SMALL | GQA | {"mlp_only_layers": [0, 1, 2, 3]}],
    "olmoe": [SMALL | NUM_EXPERTS, SMALL | NUM_EXPERTS | GQA | BIAS],
    "granitemoe": [SMALL | EXPERTS, SMALL | EXPERTS | GQA | BIAS | TIED],
    "minimax_m2": [SMALL | EXPERTS, SMALL | EXPERTS | GQA | {"head_dim": 24}],
    "gpt_oss": [SMALL | EXPERTS, SMALL | EXPERTS | GQA | {"attention_bias": False, "head_dim": 24} | MIXED],
    "dbrx": [{"d_model": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 320, "max_seq_len": 64,
              "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
              "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 8, "moe_top_k": 3}},
             {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 320, "attn_config": {"rope_theta": 1e4}}],
    "llama4_text": [SMALL | EXPERTS, SMALL | EXPERTS | BIAS | {"interleave_moe_layer_step": 2,
                                                               "intermediate_size_mlp": 80, "head_dim": 24},
                    SMALL | EXPERTS | {"moe_layers": [1, 3], "no_rope_layers": [1, 0, 1, 1]}],
    "llama4": [{"text_config": SMALL | EXPERTS, "vision_config": {"num_hidden_layers": 1}}],
    "ernie4_5_moe": [SMALL | {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 40},
                     SMALL | GQA | UNTIED | {"moe_num_experts": 8, "moe_layer_interval": 2, "use_bias": True,
                                             "moe_num_shared_experts": 1}],
    "glm4_moe": [SMALL | ROUTED | {"pad_token_id": 1}, SMALL | ROUTED | BIAS | {"use_qk_norm": True, "head_dim": 24,
                                                                                "pad_token_id": 1}],
    "dots1": [SMALL | ROUTED | GQA, SMALL | ROUTED | BIAS | {"max_window_layers": 2, "num_key_value_heads": 8}],
    "deepseek_v2": [SMALL | DEEPSEEK, SMALL | DEEPSEEK | BIASES | {"q_lora_rank": None, "n_shared_experts": 1}],
    "deepseek_v3": [SMALL | DEEPSEEK, SMALL | DEEPSEEK | BIAS | {"first_k_dense_replace": 0}],
    "kimi_k2": [SMALL | DEEPSEEK | UNTIED | {"attention_bias": False, "hidden_act": "silu"}],
    "mamba": [MAMBA, MAMBA | {"expand": 3, "state_size": 12, "conv_kernel": 3, "time_step_rank": 9, "use_bias": True,
                              "use_conv_bias": False} | UNTIED],
    "falcon_mamba": [MAMBA, MAMBA | {"time_step_rank": 9, "use_bias": True}],
}
CASES = [pytest.param(kind, values, id=f"{kind}-{i}") for kind, all_values in VARIATIONS.items()
         for i, values in enumerate(all_values)]


def write(folder: Path, values: Any, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def test_every_family_is_compared() -> None:
    assert set(VARIATIONS) == {*FAMILIES, *WRAPPERS}


@pytest.mark.parametrize(("kind", "values"), CASES)
def test_read_as_transformers_reads_it(kind: str, values: Values, tmp_path: Path) -> None:
    """From a file with as few keys as possible, and from the one that transformers saves."""
    config = meta_config({"model_type": kind, **values})
    module = meta_module(config)
    read = load_model(str(write(tmp_path, {"model_type": kind, **values})))
    assert groups_of(read) == counts(module)
    assert read.params == sum(tensor.numel() for tensor in tensors(module).values())

    a, text = read.architecture, config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    window = getattr(text, "attention_chunk_size" if "llama4" in kind else "sliding_window", None)
    sliding = sum(k in ("sliding_attention", "chunked_attention") for k in kinds) if kinds else a.n_layers
    assert a.n_window_layers == (sliding if window else 0)
    assert a.window == (window if sliding and window else None)
    if a.state_space is None and kind not in ("bloom", "mpt"):
        assert a.max_positions == text.max_position_embeddings
    for key in ("hidden_act", "hidden_activation", "activation_function", "activation"):
        assert a.activation == getattr(text, key, a.activation)
    assert a.tied_head == config.tie_word_embeddings

    config.to_json_file(tmp_path / "saved.json")
    if kind != "kimi_k2":  # whose class is not in transformers
        assert load_model(str(tmp_path / "saved.json")).architecture == a


# Defaults that a class has in its code rather than as a field.
IN_CODE = {("gemma3_text", "sliding_window_pattern"), ("cohere2", "sliding_window_pattern")}


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "kimi_k2"])
def test_defaults_are_those_of_the_class(kind: str) -> None:
    found = type(meta_config({"model_type": kind}))
    missing = object()
    for key, value in FAMILIES[kind].defaults.items():
        own = getattr(found, found.attribute_map.get(key, key), missing)
        if own is missing:
            own = next((getattr(found, word) for word in FAMILIES[kind].spellings.get(key, ())
                        if hasattr(found, word)), missing)
        assert own == value or (own is missing and (value is None or (kind, key) in IN_CODE)), key


LLAMA: Values = {"model_type": "llama", **SMALL, "torch_dtype": "bfloat16"}
V3: Values = {"model_type": "deepseek_v3", **SMALL, **DEEPSEEK, "dtype": "bfloat16"}


def read_error(folder: Path, values: Any) -> SpecError:
    path = write(folder, values)
    with pytest.raises(SpecError) as caught:
        load_model(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    return caught.value


@pytest.mark.parametrize(("change", "key", "message"), [
    ({"hidden_size": True}, "hidden_size", "found true, expected a whole number from 1"),
    ({"hidden_size": 64.0}, "hidden_size", "found 64.0, expected a whole number"),
    ({"hidden_size": "64"}, "hidden_size", 'found "64", expected a whole number'),
    ({"hidden_size": None}, "hidden_size", "found null, expected a whole number"),
    ({"hidden_size": [64]}, "hidden_size", "found a list, expected a whole number"),
    ({"hidden_size": 10**400}, "hidden_size", "expected a whole number from 1 to 1000000"),
    ({"num_hidden_layers": -1}, "num_hidden_layers", "found -1, expected a whole number from 1 to 1000"),
    ({"num_attention_heads": 7}, "num_attention_heads", "expected a divisor of the hidden size 64"),
    ({"num_key_value_heads": 3}, "architecture", "not a multiple of n_kv_heads"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings", "found 1, expected true or false"),
    ({"hidden_act": "x" * 50}, "hidden_act", "expected one short name"),
    ({"hidden_act": "a\x1b[2J"}, "hidden_act", "expected one short name"),
    ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype", "expected float32, float16, bfloat16"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder", "found true, expected false"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures", "expected a decoder that writes text"),
    ({"per_layer_config": {}}, "per_layer_config", "found an object, expected null"),
    ({"model_type": "bert"}, "model_type", "found 'bert', expected a decoder that is known: arcee, bloom"),
    ({"model_type": "jamba"}, "model_type", "found 'jamba', expected a decoder that is known"),
    ({"model_type": 3}, "model_type", "found 3, expected one short name"),
    ({"model_type": None}, "model_type", "is missing"),
    ({"model_type": "kimi_k2"}, "q", "is missing, and its family has no default for it"),
    ({"quantization_config": 4}, "quantization_config", "found 4, expected an object"),
    ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm", "found true, expected false"),
    ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types",
     "names 1 layers, the model has 4"),
    ({"model_type": "gemma2", "layer_types": ["mamba"] * 4}, "layer_types", "found 'mamba', expected full_attention"),
    ({"model_type": "qwen3_moe", "num_experts": 8, "mlp_only_layers": [1]}, "mlp_only_layers",
     "3 of 4 layers have experts, and not each k-th"),
    ({"model_type": "qwen3_moe", "mlp_only_layers": [-1]}, "mlp_only_layers", "nothing but whole numbers from 0"),
    ({"model_type": "mixtral", "num_local_experts": 4, "num_experts": 8}, "num_local_experts",
     "found 4, but num_experts says 8: both mean the same"),
    ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "architecture.experts",
     "per_token (3) is more than the 2 experts there are"),
    ({"model_type": "deepseek_v2", "num_experts_per_tok": 2, "moe_layer_freq": 2}, "moe_layer_freq",
     "found 2, expected 1"),
    ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention", "found true, expected false"),
    ({"model_type": "mpt", "attn_config": {"attn_type": "multiquery_attention"}}, "attn_config.attn_type",
     "expected \"multihead_attention\""),
    ({"model_type": "gemma3", "text_config": {"model_type": "llama"}}, "text_config.model_type",
     "found 'llama', expected 'gemma3_text' inside 'gemma3'"),
    ({"model_type": "gemma3", "text_config": {"hidden_size": 0}}, "text_config.hidden_size", "found 0, expected"),
])
def test_what_does_not_fit_is_one_clear_line(change: Values, key: str, message: str, tmp_path: Path) -> None:
    error = read_error(tmp_path, LLAMA | change)
    assert message in error.message
    assert error.key is not None
    assert error.key.startswith(key)


def test_no_default_is_a_key_that_is_missing(tmp_path: Path) -> None:
    values = {"model_type": "kimi_k2", **SMALL, **DEEPSEEK, **UNTIED, "attention_bias": False, "hidden_act": "silu"}
    load_model(str(write(tmp_path, values)))
    del values["kv_lora_rank"]
    assert read_error(tmp_path, values).key == "kv_lora_rank"


@pytest.mark.parametrize(("text", "message"), [
    ("", "is not valid JSON"),
    ("[1]", "holds a list, expected an object"),
    ('{"model_type": "llama", "rope_theta": NaN}', "NaN is not a number of JSON"),
    ('{"model_type": "llama", "a": {"b": -Infinity}}', "-Infinity is not a number of JSON"),
    ('{"hidden_size": 64, "hidden_size": 128}', 'the key "hidden_size" stands there twice'),
    ("[" * 100_000, "is nested too deeply"),
    ('{"a":' * 100_000, "is nested too deeply"),
    ('{"model_type": "llama"', "is not valid JSON"),
])
def test_strict_json(text: str, message: str, tmp_path: Path) -> None:
    assert message in read_error(tmp_path, text).message


def test_bounded_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(SpecError, match="is not UTF-8 text"):
        load_model(str(path))
    with path.open("wb") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    with pytest.raises(SpecError, match="is longer than the"):
        load_model(str(path))
    path.unlink()
    with pytest.raises(SpecError, match="no such file"):  # a folder without one
        load_model(str(tmp_path))


def test_names_notes_and_precisions(tmp_path: Path) -> None:
    cached = tmp_path / "models--meta-llama--Llama-3.1-8B" / "snapshots" / "0e9e39f249a16976918f6564b8830bc894c89659"
    cached.mkdir(parents=True)
    write(cached, LLAMA)
    model = load_model(str(cached))  # a folder
    assert (model.name, model.native_precision, model.family) == ("Llama-3.1-8B", "bf16", "llama")
    assert model.source == str(cached / "config.json")

    own = tmp_path / "my-model"
    own.mkdir()
    write(own, {"model_type": "llama", **SMALL})
    unsaid = load_model(str(own / "config.json"))
    assert (unsaid.name, unsaid.native_precision) == ("my-model", "fp16")
    assert "states no dtype" in unsaid.source

    write(own, {"model_type": "gemma3", "text_config": {"dtype": "float32", **SMALL}, "torch_dtype": "bfloat16"})
    sees = load_model(str(own))
    assert (sees.title, sees.native_precision, sees.family) == ("my-model, its decoder", "fp32", "gemma3_text")
    assert "what sees is left out" in sees.source

    further = load_model(str(write(own, V3 | {"num_nextn_predict_layers": 1}, "v3.json")))
    assert "layers that predict further tokens are left out" in further.source
    assert "predict" not in load_model(str(write(own, V3 | {"num_nextn_predict_layers": 0}, "v3.json"))).source


def test_awq_checkpoint(tmp_path: Path) -> None:
    """Tensor by tensor what AutoAWQ's gemm layout holds: packed weights and zeros, fp16 scales; the rest as it was."""
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    values = {"model_type": "qwen2", **SMALL, **GQA, "torch_dtype": "float16"}
    model = load_model(str(write(tmp_path, values | {"quantization_config": awq})))
    expected: dict[str, float] = {}
    for name, p in tensors(meta_module(meta_config(values))).items():
        size = 2 * p.numel()
        if name.endswith("_proj.weight"):
            out, width = p.shape
            words = width * out // 8 + width // 32 * out // 8  # int32: qweight, qzeros
            size = 4 * words + 2 * (width // 32) * out
        expected[place(name)] = expected.get(place(name), 0) + size
    assert model.group_bytes("file") == expected
    assert model.own_precision == "file"


@pytest.mark.parametrize("quantization", [
    {"quant_method": "gptq", "bits": 4, "group_size": 128}, {"load_in_4bit": True},
    {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "awq", "bits": 3, "group_size": 32},
    {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True, "group_size": -1},
    {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True},
    {"quant_method": "fp8", "weight_block_size": [128, 128]}, {"quant_method": "mxfp4"},
])
def test_layouts_that_do_not_follow_are_left_out(quantization: Values, tmp_path: Path) -> None:
    model = load_model(str(write(tmp_path, LLAMA | {"quantization_config": quantization})))
    assert model.file_bytes is None
    assert "left out" in model.source


@pytest.mark.parametrize("change", [
    {"weight_block_size": [0, 128]}, {"weight_block_size": [128]}, {"weight_block_size": "128"},
    {"weight_block_size": [128, 1.5]}, {"quant_method": 8},
])
def test_a_quantisation_that_makes_no_sense(change: Values, tmp_path: Path) -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert load_model(str(write(tmp_path, V3 | {"quantization_config": fp8}))).file_bytes is not None
    error = read_error(tmp_path, V3 | {"quantization_config": fp8 | change})
    assert error.key == f"quantization_config.{next(iter(change))}"


def test_mutated_configurations_end_in_one_clear_line(tmp_path: Path) -> None:
    """Every family, values that lie and bytes that are cut: a model that holds together or a SpecError."""
    texts = [json.dumps({"model_type": kind, "torch_dtype": "bfloat16", **all_values[-1]}, indent=1)
             for kind, all_values in VARIATIONS.items()]
    texts += [path.read_text(encoding="utf-8") for path in sorted(CONFIGS.glob("*.json"))]
    path = tmp_path / "config.json"
    refused: list[str] = []
    loaded = 0
    ways: tuple[Callable[[str, random.Random], bytes], ...] = (
        lambda text, rng: json.dumps(mutate_json(json.loads(text), rng)).encode("utf-8", "surrogatepass"),
        lambda text, rng: mutate_bytes(text.encode(), rng))
    tracemalloc.start()
    began = time.perf_counter()
    for seed in range(500):
        rng = random.Random(seed)
        path.write_bytes(rng.choice(ways)(rng.choice(texts), rng))
        try:
            model = load_model(str(path))
        except SpecError as error:
            refused.append(str(error))
        else:
            loaded += 1
            assert isinstance(model, Model)
            assert 0 < model.active_params <= model.params < 1e20, seed
            assert model.kv_bytes("fp16", 100) > 0, seed
            assert model.bytes_at(model.own_precision) > 0, seed
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(refused) >= 150
    assert loaded > 50
    assert [line for line in refused if not line.isprintable() or len(line) > 2000] == []
    assert peak < 64 << 20
    assert time.perf_counter() - began < 30
