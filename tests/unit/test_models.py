"""Do the model files hold as many parameters, of the same kinds, as the torch modules they describe?

`tests/data/configs` has the shapes of each model's public `config.json`. transformers builds the module from
them, on the meta device, and simmem's own file has to agree with it group by group; that the numbers are
the published ones is what the published totals check.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from simmem.errors import SpecError, UnknownNameError
from simmem.spec import library
from simmem.spec.model import load_model
from tests.unit.torch_modules import counts, groups_of, meta_config, meta_module, place, tensors

NAMES = library.names("model")
CONFIGS = Path(__file__).resolve().parent.parent / "data" / "configs"


@lru_cache(maxsize=1)
def module(name: str) -> Any:
    return meta_module(meta_config(json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))))


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Each model in turn, all tests of one together: its module is built once and not kept."""
    return str(request.param)


def test_every_model_has_its_configuration() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.json")) == NAMES


def test_file_says_what_the_configuration_says(name: str) -> None:
    model, read = load_model(name), load_model(str(CONFIGS / f"{name}.json"))
    assert model.architecture == read.architecture
    assert (model.family, model.native_precision, model.file_bytes) == (
        read.family, read.native_precision, read.file_bytes)


def test_groups_equal_the_torch_module(name: str) -> None:
    torch = pytest.importorskip("torch", reason="counts are compared with torch modules, and torch is not installed")
    model, counted = load_model(name), counts(module(name))
    assert groups_of(model) == counted
    held = sum(tensor.numel() for tensor in tensors(module(name)).values())
    assert model.params == held

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    for precision in {model.native_precision, "fp32"}:
        each = dtype[precision].itemsize
        assert model.group_bytes(precision) == {group: sum(both) * each for group, both in counted.items()}
        assert model.bytes_at(precision) == held * each
    # Quantised weights: one byte a matrix parameter, norms and biases stay at two.
    assert model.bytes_at("int8") == sum(matrix + 2 * vector for matrix, vector in counted.values())


def test_what_the_policies_use_equals_the_torch_module(name: str) -> None:
    """FFN neurons, experts, keys and values per token, and the output projection, from the module's own shapes."""
    model, found = load_model(name), tensors(module(name))
    a = model.architecture
    matrices = {n: p for n, p in found.items() if p.ndim >= 2 and not n.endswith("bias")}
    dense = [p for n, p in matrices.items() if place(n) == "ffn" and "shared_expert" not in n]
    assert len(dense) == 0 or a.n_dense_layers > 0
    if a.n_dense_layers:
        assert sum(p.numel() for p in dense) == a.n_dense_layers * model.unit_params * a.d_ff
        # Each matrix has one row or column a neuron, two where gate and up are one matrix.
        assert all({a.d_ff, 2 * a.d_ff} & set(p.shape) for p in dense)
    if a.experts:
        experts = [p for n, p in matrices.items() if place(n) == "experts"]
        layers = {n.split(".experts.")[0] for n in matrices if place(n) == "experts"}
        assert len(layers) == a.n_expert_layers
        assert {p.shape[0] for p in experts} == {a.experts.count}
        assert sum(p[0].numel() for p in experts) == a.n_expert_layers * model.expert_params

    head = module(name).get_output_embeddings().weight.numel()
    assert model.head_params == head + sum(p.numel() for n, p in found.items() if re.search("project_(in|out)", n))

    attention = {n: p for n, p in matrices.items() if place(n) == "attention"}
    kept = [p.shape[0] for n, p in attention.items() if re.search(r"(k_proj|v_proj|kv_a_proj_with_mqa)\.weight", n)]
    if a.state_space:
        mixers = [n for n in matrices if n.endswith("A_log")]
        state = sum(matrices[n].numel() for n in mixers)
        inputs = sum(p.shape[0] * p.shape[2] for n, p in matrices.items() if n.endswith("conv1d.weight"))
        assert model.kv_bytes("fp16", 1000) == 2 * (state + inputs) == model.kv_bytes("fp16", 1)
        return
    if not kept:  # one fused matrix: what it makes, less the queries
        kept = [p.shape[0] - a.n_heads * a.d_head for n, p in attention.items()
                if re.search(r"(query_key_value|qkv_proj)\.weight", n)]
    assert model.kv_bytes("fp16", 1) == 2 * sum(kept)
    far = 4 * (a.window or 1)
    assert model.kv_bytes("fp16", far) == pytest.approx(
        2 * sum(kept) / a.n_layers * ((a.n_layers - a.n_window_layers) * far + a.n_window_layers * (a.window or 0)))


# Exact totals of published checkpoints: hub safetensors metadata, or the sum that a paper or model card prints.
@pytest.mark.parametrize(("name", "total"), [
    ("opt-125m", 125_239_296), ("opt-350m", 331_196_416), ("opt-1.3b", 1_315_758_080), ("opt-2.7b", 2_651_596_800),
    ("opt-6.7b", 6_658_473_984), ("phi-2", 2_779_683_840), ("smollm2-135m", 134_515_008),
    ("tinyllama-1.1b", 1_100_048_384), ("llama-2-7b", 6_738_415_616), ("llama-2-13b", 13_015_864_320),
    ("llama-2-70b", 68_976_648_192), ("llama-3-8b", 8_030_261_248), ("llama-3-70b", 70_553_706_496),
    ("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496), ("llama-3.2-1b", 1_235_814_400),
    ("llama-3.2-3b", 3_212_749_824), ("yi-34b", 34_388_917_248), ("mistral-7b", 7_241_732_096),
    ("mixtral-8x7b", 46_702_792_704), ("mixtral-8x22b", 140_620_634_112), ("bloom-176b", 176_247_271_424),
    ("qwen2.5-7b", 7_615_616_512), ("qwen2.5-72b", 72_706_203_648), ("qwen3-4b", 4_022_468_096),
    ("qwen3-8b", 8_190_735_360), ("qwen3-14b", 14_768_307_200), ("qwen3-32b", 32_762_123_264),
    ("qwen3-30b-a3b", 30_532_122_624), ("qwen3-235b-a22b", 235_093_634_560),
    ("qwen1.5-moe-a2.7b", 14_315_784_192), ("qwen2-57b-a14b", 57_408_658_944), ("olmoe-1b-7b", 6_919_161_856),
    ("deepseek-v2-lite", 15_706_484_224), ("deepseek-v3", 671_026_419_200), ("gpt-oss-20b", 20_914_757_184),
    ("gpt-oss-120b", 116_829_156_672), ("gemma-3-1b", 999_885_952), ("mamba-2.8b", 2_768_345_600),
])
def test_published_totals(name: str, total: int) -> None:
    assert load_model(name).params == total


@pytest.mark.parametrize(("name", "total", "rel"), [
    ("qwen3-0.6b", 751_632_384, 0), ("qwen3-1.7b", 2_031_739_904, 0),
    ("falcon-40b", 3.63e9 / 0.0868, 1e-3),  # predictors of 3.63 B are 8.68 % of it (PowerInfer, arXiv 2312.12456)
])
def test_published_totals_with_the_head_twice(name: str, total: float, rel: float) -> None:
    """Checkpoints that hold the tied head a second time, as a matrix of its own."""
    model = load_model(name)
    assert model.params + model.group("embedding").params == pytest.approx(total, rel=rel, abs=0)


@pytest.mark.parametrize(("name", "total"), [
    ("gemma-3-4b", 4_300_079_472), ("gemma-3-12b", 12_187_325_040), ("gemma-3-27b", 27_432_406_640),
    ("llama-4-scout", 108_641_793_536),
])
def test_published_totals_with_what_sees(name: str, total: int) -> None:
    sees = sum(p.numel() for n, p in module(name).named_parameters() if not place(n))
    assert load_model(name).params + sees == total


@pytest.mark.parametrize(("name", "billions"), [
    ("opt-13b", 13), ("opt-30b", 30), ("opt-66b", 66), ("opt-175b", 175), ("falcon-7b", 7), ("llama-7b", 6.7),
    ("llama-13b", 13.0), ("llama-30b", 32.5), ("llama-65b", 65.2), ("relullama-7b", 6.74), ("relullama-13b", 13.0),
    ("relullama-70b", 69.0), ("bamboo-7b", 7.24), ("persimmon-8b", 9.3), ("phi-3.5-moe", 41.9),
    ("kimi-k2", 1026.408),
])
def test_published_sizes(name: str, billions: float) -> None:
    """Papers and model cards that print a rounded size."""
    assert load_model(name).params == pytest.approx(billions * 1e9, rel=0.015)


@pytest.mark.parametrize(("name", "billions", "embedding"), [
    ("mixtral-8x7b", 12.9, True), ("mixtral-8x22b", 39, True), ("qwen1.5-moe-a2.7b", 2.7, True),
    ("qwen2-57b-a14b", 14, True), ("qwen3-30b-a3b", 3.3, True), ("qwen3-235b-a22b", 22, True),
    ("olmoe-1b-7b", 1.3, True), ("phi-3.5-moe", 6.6, True), ("deepseek-v3", 37, True), ("kimi-k2", 32.6, True),
    ("deepseek-v2-lite", 2.4, False), ("gpt-oss-20b", 3.61, False), ("gpt-oss-120b", 5.13, False),
    ("llama-4-scout", 17, True),
])
def test_published_active_sizes(name: str, billions: float, embedding: bool) -> None:
    """Parameters that a token uses, the output projection among them; some makers leave the input embedding out,
    of which a token looks up one row, and round what remains to two digits."""
    model = load_model(name)
    active = model.active_params - (0 if embedding else model.group("embedding").params)
    assert active == pytest.approx(billions * 1e9, rel=0.025)


def test_bytes_of_published_checkpoints() -> None:
    """The totals in the hub's index files; DeepSeek-V3's counts by type are of the layer that predicts a further
    token too, which is one more layer with experts and four more norms, a projection, an embedding and a head."""
    assert load_model("gpt-oss-20b").bytes_at("file") == 13_761_264_768
    assert load_model("gpt-oss-120b").bytes_at("file") == 65_248_815_744

    model = load_model("deepseek-v3")
    layer = {n: p for n, p in module("deepseek-v3").named_parameters() if ".layers.60." in n}
    d, vocab, experts = 7168, 129_280, 256
    kept = [n for n in layer if "norm" in n or "mlp.gate." in n]
    fp8 = sum(p.numel() for n, p in layer.items() if n not in kept)
    bf16 = sum(layer[n].numel() for n in kept) + 2 * d * d + 3 * d + 2 * vocab * d
    scales = sum(count * -(-out // 128) * (width // 128) for count, out, width in (
        (1, 1536, d), (1, 128 * 192, 1536), (1, 576, d), (1, 128 * 256, 512), (1, d, 128 * 128),
        (2 * (experts + 1), 2048, d), (experts + 1, d, 2048)))
    published = 680_571_043_840 + 2 * 3_918_786_560 + 4 * 41_555_600
    assert model.bytes_at("file") == published - (fp8 + 2 * bf16 + 4 * (scales + experts))

    # Its files hold 3416 numbers of two bytes more than the module has, of 1.03e12.
    assert load_model("kimi-k2").bytes_at("file") == pytest.approx(1_029_173_256_720, rel=1e-8)


def test_latent_attention_over_the_context_and_in_a_prompt() -> None:
    """DeepSeek-V3, 61 layers of 128 heads: scores over 512 + 64 and a sum over 512 compressed numbers for each token
    that is attended to; in a prompt, where keys and values are made once, over 128 + 64 and 128."""
    model = load_model("deepseek-v3")
    assert model.attention_flop(1000) == 2 * 61 * 128 * (512 + 64 + 512) * 1000
    assert model.attention_flop(1000, prompt=True) == 2 * 61 * 128 * (128 + 64 + 128) * 1000
    other = load_model("gemma-3-27b")
    assert other.attention_flop(1000, prompt=True) == other.attention_flop(1000)


@pytest.mark.parametrize(("name", "numbers"), [
    ("opt-6.7b", 4 * 4096 + 16384),  # q, k, v and the output are as wide as the model
    ("mixtral-8x7b", 2 * 4096 + 2 * (2 * 14336) + 2 * 4096),  # gates and hidden vectors, and outputs, of two experts
    ("deepseek-v3", 2 * 7168 + 2 * (8 + 1) * 2048 + (8 + 1) * 7168),
    ("deepseek-v2-lite", 2 * 2048 + 2 * (6 + 2) * 1408 + (6 + 1) * 2048),
    ("mamba-2.8b", 2 * 2560 + 3 * 5120),
])
def test_activations_of_a_token(name: str, numbers: int) -> None:
    assert load_model(name).architecture.activations == numbers


def test_llm_in_a_flash_prints_the_same_ffn_share() -> None:
    """OPT-6.7B's FFN is 64.62 % of the model (LLM in a flash, appendix: 15.5 % = 0.24 x 64.62 %)."""
    model = load_model("opt-6.7b")
    assert model.group("ffn").params / model.params == pytest.approx(0.6462, abs=0.0025)
    assert model.bytes_at("fp16") == pytest.approx(13.4e9, rel=0.01)
    assert model.unit_bytes("fp16") == 16 * 1024


def test_published_expert_sizes() -> None:
    """An expert of Mixtral 8x7B is 176 M parameters, 352 MB in bf16; one of DeepSeek-V2-Lite 8.65 M, 17.3 MB, in 26 of
    its 27 layers; 45.1 of Mixtral's 46.7 B parameters are experts (papers on offloading them)."""
    mixtral, lite = load_model("mixtral-8x7b"), load_model("deepseek-v2-lite")
    assert mixtral.expert_params == pytest.approx(176e6, rel=0.002)
    assert lite.expert_params == pytest.approx(8.65e6, rel=0.001)
    assert lite.architecture.n_expert_layers == 26
    assert mixtral.group("experts").params == pytest.approx(45.1e9, rel=0.001)


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
    assert load_model("meta-llama/Llama-3.1-8B").name == "llama-3.1-8b"


def test_unknown_names_name_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"opt-6\.7b"):
        load_model("opt-6.8b")
    with pytest.raises(SpecError, match="no such model file"):
        load_model("nobody/nothing")
