"""Where in a transformers network are the weights the executor wants, and what else does it need to compute the same?

Decoders of the OPT and the Llama kind (Llama, Mistral, Qwen2, SmolLM2). A network is taken when its parts have those
names; that it computes the same is then shown by its logits, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.runtime.execute.layout import ffn_parts
from simmem.runtime.execute.weights import NetworkWeights
from simmem.runtime.hooks import FfnHooks
from simmem.runtime.models import LoadedModel
from simmem.spec.model import Architecture

if TYPE_CHECKING:
    import torch

__all__ = ["DecoderSettings", "Reference", "decoder_settings", "network_weights", "reference_run"]

Ints = NDArray[np.int64]

_OPT = {"attention_norm": "self_attn_layer_norm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
        "v": "self_attn.v_proj", "o": "self_attn.out_proj", "ffn_norm": "final_layer_norm", "up": "fc1", "down": "fc2"}
_LLAMA = {"attention_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
          "v": "self_attn.v_proj", "o": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
          "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_KINDS = {"opt": _OPT, "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA}
"""`model_type` of a configuration -> the names of a layer's parts."""
OPT_POSITION_OFFSET = 2


@dataclass(frozen=True)
class DecoderSettings:
    """What a network computes with besides its weights."""

    rotary: tuple[torch.Tensor, torch.Tensor] | None
    epsilon: float
    position_offset: int


@dataclass(frozen=True)
class Reference:
    """What a network makes of a text, token by token."""

    logits: torch.Tensor
    """(tokens, vocab), float32."""
    active: NDArray[np.uint8] | None
    """Packed bits (tokens, layers, ceil(units / 8)) of the units it ran with; None: with all of them."""


def network_weights(model: LoadedModel, precision: str) -> NetworkWeights:
    """The weights of a network by the executor's names. Raises SpecError where it is of no kind that is known."""
    parts, base = _KINDS[_kind(model)], _base(model)
    layers = []
    for layer in base.layers:
        found: dict[str, torch.Tensor] = {}
        for name, path in parts.items():
            for which, tensor in layer.get_submodule(path).named_parameters():
                found[f"{name}.{which}"] = tensor
        layers.append(found)
    last = base.final_layer_norm if _kind(model) == "opt" else base.norm
    others: dict[str, torch.Tensor] = {f"final_norm.{k}": v for k, v in last.named_parameters()}
    others["embedding"] = base.embed_tokens.weight
    others["head.weight"] = model.network.get_output_embeddings().weight
    if _kind(model) == "opt":
        others["positions"] = base.embed_positions.weight
    return NetworkWeights(tuple(layers), others, precision)


def decoder_settings(model: LoadedModel, architecture: Architecture, tokens: int) -> DecoderSettings:
    """What the executor's decoder has to be told to compute like this network over a context of `tokens`.

    Raises SpecError where the network is built in a way that the decoder is not.
    """
    import torch

    config, kind = model.network.config, _kind(model)
    if kind == "opt":
        if not config.do_layer_norm_before:
            raise SpecError("has its norms behind attention and FFN, which the executor cannot run", file=model.name)
        return DecoderSettings(None, torch.nn.LayerNorm(1).eps, OPT_POSITION_OFFSET)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < tokens and getattr(config, "use_sliding_window", True):
        raise SpecError(f"looks back {window} tokens, which the executor cannot run over {tokens}", file=model.name)
    if architecture.gated != ("gate" in ffn_parts(architecture)):
        raise SpecError("has another FFN than the plan's model", file=model.name)
    with torch.inference_mode():
        cosine, sine = _base(model).rotary_emb(torch.zeros(1, 1, 1, dtype=torch.float32, device=model.device),
                                               torch.arange(tokens, device=model.device)[None])
    return DecoderSettings((cosine[0], sine[0]), float(config.rms_norm_eps), 0)


def reference_run(model: LoadedModel, ids: Ints, *, criterion: str | None = None,
                  thresholds: tuple[float, ...] = ()) -> Reference:
    """One causal pass of the network itself over `ids` (tokens,), masked by a criterion where one is given."""
    import torch

    packed: dict[int, NDArray[np.uint8]] = {}

    def keep(layer: int, mask: NDArray[np.bool_]) -> None:
        packed[layer] = np.packbits(mask, axis=1, bitorder="little")

    run: Callable[[], Any] = lambda: model.network(  # noqa: E731 - the same call, with and without hooks
        input_ids=torch.from_numpy(ids)[None].to(model.device), use_cache=False).logits[0].float().cpu()
    with torch.inference_mode():
        if criterion is None:
            return Reference(run(), None)
        given = np.array(thresholds or (0.0,) * len(model.blocks), np.float32)
        with FfnHooks(model, criterion, thresholds=given, on_mask=keep):
            logits = run()
    return Reference(logits, np.stack([packed[layer] for layer in range(len(model.blocks))], axis=1))


def _kind(model: LoadedModel) -> str:
    kind = str(getattr(model.network.config, "model_type", "?"))
    if kind not in _KINDS:
        raise SpecError(f"is a {kind} network; run exactly can be {', '.join(_KINDS)}", file=model.name)
    return kind


def _base(model: LoadedModel) -> Any:
    base = model.network.base_model
    return base.decoder if _kind(model) == "opt" else base


