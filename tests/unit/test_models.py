"""Do the model files hold as many parameters, of the same kinds, as the torch modules they describe?

The other program is transformers: each module is built on the meta device (shapes, no memory)
from a configuration made of the TOML's numbers, so what is compared is every formula in
`simmem.spec.model`. That the numbers are the published ones is what the published totals check.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import pytest

from simmem.errors import SpecError, UnknownNameError
from simmem.spec import library
from simmem.spec.model import Architecture, Model, load_model

NAMES = library.names("model")

# (part of a parameter name, tensor group it belongs to); the first match counts.
_PLACES: tuple[tuple[str, str], ...] = (
    (r"embed_positions\.", "positions"),
    (r"(embed_tokens|word_embeddings|project_in|project_out)\.", "embedding"),
    (r"lm_head\.", "head"),
    (r"self_attn\.|self_attention\.", "attention"),
    (r"\.mlp\.|\.fc1\.|\.fc2\.", "ffn"),
    (r"(norm|ln_f|layernorm)\.", "norms"),
)


def _module(model: Model) -> Any:
    """The torch module of a model, on the meta device, from the numbers in its file."""
    torch = pytest.importorskip("torch", reason="counts are compared with torch modules, and torch is not installed")
    transformers = pytest.importorskip("transformers",
                                       reason="counts are compared with transformers, which is not installed")
    a = model.architecture
    config, module = _config(transformers, model.family, a)
    with torch.device("meta"):
        return module(config)


def _config(transformers: Any, family: str, a: Architecture) -> tuple[Any, Any]:
    """Configuration and class of a family; what simmem has no name for is asserted, not assumed."""
    common: dict[str, Any] = {"vocab_size": a.vocab, "hidden_size": a.d_model, "num_hidden_layers": a.n_layers,
                              "num_attention_heads": a.n_heads, "max_position_embeddings": a.max_positions,
                              "tie_word_embeddings": a.tied_head}
    if family == "opt":
        assert a.qkv_bias == a.attention_output_bias == a.ffn_bias
        assert a.learned_position_rows == a.max_positions + 2
        config = transformers.OPTConfig(ffn_dim=a.d_ff, word_embed_proj_dim=a.embedding_dim or a.d_model,
                                        do_layer_norm_before=a.final_norm, enable_bias=a.ffn_bias,
                                        activation_function=a.activation, **common)
        return config, transformers.OPTForCausalLM
    if family == "llama":
        config = transformers.LlamaConfig(intermediate_size=a.d_ff, num_key_value_heads=a.n_kv_heads,
                                          head_dim=a.d_head, attention_bias=a.qkv_bias, mlp_bias=a.ffn_bias,
                                          hidden_act=a.activation, **common)
        return config, transformers.LlamaForCausalLM
    if family == "phi":
        config = transformers.PhiConfig(intermediate_size=a.d_ff, num_key_value_heads=a.n_kv_heads,
                                        qk_layernorm=a.qk_norm, hidden_act=a.activation, **common)
        return config, transformers.PhiForCausalLM
    if family == "falcon":
        assert a.qkv_bias == a.attention_output_bias == a.ffn_bias
        config = transformers.FalconConfig(ffn_hidden_size=a.d_ff, multi_query=a.n_kv_heads == 1, bias=a.ffn_bias,
                                           parallel_attn=a.norms_per_layer == 1, alibi=False,
                                           new_decoder_architecture=False, activation=a.activation, **common)
        return config, transformers.FalconForCausalLM
    if family == "persimmon":
        config = transformers.PersimmonConfig(intermediate_size=a.d_ff, qk_layernorm=a.qk_norm,
                                              hidden_act=a.activation, **common)
        return config, transformers.PersimmonForCausalLM
    raise AssertionError(f"no torch module is known for the family {family!r}; add it here")


def _counts(module: Any) -> dict[str, tuple[int, int]]:
    """Group -> (matrix parameters, vector parameters); tied parameters count once."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, parameter in module.named_parameters():
        group = next((g for pattern, g in _PLACES if re.search(pattern, name)), None)
        assert group is not None, f"the parameter {name} belongs to no tensor group"
        found[group][0 if parameter.ndim >= 2 else 1] += parameter.numel()
    return {group: (matrix, vector) for group, (matrix, vector) in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_groups_equal_the_torch_module(name: str) -> None:
    model = load_model(name)
    module = _module(model)
    counted = _counts(module)
    assert {g.name: (g.matrix_params, g.vector_params) for g in model.groups()} == counted
    assert model.params == sum(p.numel() for p in module.parameters())

    torch = pytest.importorskip("torch")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    for precision in {model.native_precision, "fp32"}:
        each = dtype[precision].itemsize
        assert {g.name: g.bytes_at(precision) for g in model.groups()} == {
            group: sum(both) * each for group, both in counted.items()}
        assert model.bytes_at(precision) == sum(p.numel() * each for p in module.parameters())
    # Quantised weights: one byte a matrix parameter, norms and biases stay at two.
    assert model.bytes_at("int8") == sum(matrix + 2 * vector for matrix, vector in counted.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_the_policies_use_equals_the_torch_module(name: str) -> None:
    """FFN neurons, keys and values per token, and the output projection, from the module's own shapes."""
    model = load_model(name)
    module = _module(model)
    ffn = [p for n, p in module.named_parameters() if re.search(r"\.mlp\.|\.fc1\.|\.fc2\.", n) and p.ndim == 2]
    neuron = sum(p.numel() // model.architecture.d_ff for p in ffn) // model.architecture.n_layers
    assert all(model.architecture.d_ff in p.shape for p in ffn)
    assert model.unit_params == neuron
    assert model.unit_bytes("fp16") == 2 * neuron

    head = module.get_output_embeddings().weight.numel()
    narrow = [p for n, p in module.named_parameters() if "project_out" in n or "project_in" in n]
    assert model.head_params == head + sum(p.numel() for p in narrow)

    a = model.architecture
    attention = {n: p for n, p in module.named_parameters() if re.search(r"self_attn|self_attention", n)}
    separate = [p.shape[0] for n, p in attention.items() if re.search(r"(k_proj|v_proj)\.weight", n)]
    if separate:
        kv_values = sum(separate)
    else:  # one fused matrix: what it makes, less the queries
        fused = [p for n, p in attention.items() if n.endswith("query_key_value.weight")]
        kv_values = sum(p.shape[0] - a.n_heads * a.d_head for p in fused)
    assert model.kv_bytes_per_token("fp16") == 2 * kv_values


# Totals printed by the model cards, papers or the hub's safetensors metadata.
@pytest.mark.parametrize(("name", "total"), [
    ("opt-125m", 125_239_296),
    ("opt-350m", 331_196_416),
    ("opt-1.3b", 1_315_758_080),
    ("opt-2.7b", 2_651_596_800),
    ("opt-6.7b", 6_658_473_984),
    ("llama-2-7b", 6_738_415_616),
    ("phi-2", 2_779_683_840),
    ("smollm2-135m", 134_515_008),
])
def test_published_totals(name: str, total: int) -> None:
    assert load_model(name).params == total


@pytest.mark.parametrize(("name", "billions"), [("opt-13b", 13), ("opt-30b", 30), ("opt-66b", 66), ("falcon-7b", 7)])
def test_sizes_in_names(name: str, billions: float) -> None:
    assert load_model(name).params == pytest.approx(billions * 1e9, rel=0.015)


def test_llm_in_a_flash_prints_the_same_ffn_share() -> None:
    """OPT-6.7B's FFN is 64.62 % of the model (LLM in a flash, appendix: 15.5 % = 0.24 x 64.62 %)."""
    model = load_model("opt-6.7b")
    assert model.group("ffn").params / model.params == pytest.approx(0.6462, abs=0.0025)
    assert model.bytes_at("fp16") == pytest.approx(13.4e9, rel=0.01)
    assert model.unit_bytes("fp16") == 16 * 1024


@pytest.mark.parametrize("name", NAMES)
def test_names_and_aliases(name: str) -> None:
    model = load_model(name)
    assert model.name == name
    for alias in model.aliases:
        assert alias == alias.lower(), "a name is looked up in lower case"
        assert load_model(alias) == model


def test_no_alias_clash() -> None:
    models = [load_model(name) for name in NAMES]
    spoken = [word for m in models for word in (m.name, *m.aliases)]
    assert len(spoken) == len(set(spoken))


def test_hub_names_are_found_in_any_case() -> None:
    assert load_model("facebook/OPT-6.7B").name == "opt-6.7b"


def test_unknown_names_name_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"opt-6\.7b"):
        load_model("opt-6.8b")
    with pytest.raises(SpecError, match="no such model file"):
        load_model("nobody/nothing")
