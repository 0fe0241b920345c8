"""Where in a decoder are the units of a trace, whatever its family calls its parts?

Found by structure, not by name: the stack of decoder layers is the one list of modules with as many
members as the configuration has layers. In a layer, the FFN is the group of linear projections outside
the attention of which one leads back to the model's width from as many units as the others lead to. A
mixture of experts is a module with one matrix per expert in a three-dimensional parameter, beside the
router that scores as many. So a family that is not named anywhere here works when it is built alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from simmem.errors import SpecError

if TYPE_CHECKING:
    import torch

__all__ = ["ExpertBlock", "FfnBlock", "find_attention", "find_blocks", "find_experts", "find_layers"]

_KNOWN = ("linear projections to the units and back to the model's width (OPT, Llama, Mistral, Falcon, Phi, Phi-3, "
          "Qwen, Gemma and what is built alike), or experts beside a router (Mixtral, Qwen-MoE, DeepSeek, gpt-oss)")
_ZEROING = ("ReLU", "ReLUSquaredActivation")
"""Classes of activations that give an exact zero for every negative input."""


@dataclass(frozen=True)
class FfnBlock:
    """The FFN of one decoder layer; `down.weight` has shape (d_model, n_units)."""

    down: torch.nn.Module
    activation: torch.nn.Module | None
    """The module whose output is act(gate), or act(up) where the FFN is not gated; None where it cannot be told."""
    ffn_modules: tuple[torch.nn.Module, ...]
    attention: torch.nn.Module | None
    gated: bool

    @property
    def weight(self) -> torch.Tensor:
        return cast("torch.Tensor", self.down.weight)

    @property
    def zeroes(self) -> bool:
        """Does its activation give exact zeros (ReLU and its square)?"""
        return type(self.activation).__name__ in _ZEROING


@dataclass(frozen=True)
class ExpertBlock:
    """The mixture of experts of one decoder layer."""

    layer: int
    """Which of the model's layers it is in."""
    experts: torch.nn.Module
    """Called with (hidden states, expert ids, weights), one row of ids and weights per token."""
    router: torch.nn.Module
    """Its output, or the first part of it, is the logits of shape (tokens, n_experts) before the top k."""
    n_experts: int
    expert_params: int
    """Matrix parameters of one expert."""
    ffn_modules: tuple[torch.nn.Module, ...]
    attention: torch.nn.Module | None


def find_blocks(network: Any, name: str) -> tuple[FfnBlock, ...]:
    """The FFN blocks of a transformers decoder in layer order.

    Raises
    ------
    SpecError
        Unless there is one stack of decoder layers and each has one FFN of a known kind and the same width.
    """
    layers = find_layers(network, name)
    blocks = [None if _experts_in(layer) else _ffn_in(layer, network, f"{name}, layer {i}")
              for i, layer in enumerate(layers)]
    found = tuple(block for block in blocks if block is not None)
    if len(found) != len(layers):
        missing = [i for i, block in enumerate(blocks) if block is None]
        mixtures = [i for i in missing if _experts_in(layers[i])]
        raise SpecError(f"has no FFN units in layers {_some(missing)}"
                        + (": they are mixtures of experts, whose unit is the expert" if mixtures else
                           f"; known are {_KNOWN}"), file=name)
    widths = {tuple(block.weight.shape) for block in found}
    if len(widths) != 1:
        raise SpecError(f"has FFNs of different shapes {sorted(widths)}; a trace needs one width", file=name)
    return found


def find_experts(network: Any, name: str) -> tuple[ExpertBlock, ...]:
    """The mixtures of experts of a transformers decoder in layer order; none where it has none.

    Raises
    ------
    SpecError
        No stack of decoder layers, experts without a router beside them, or layers with different experts.
    """
    found = []
    for i, layer in enumerate(find_layers(network, name)):
        inside = _experts_in(layer)
        if not inside:
            continue
        path, experts = inside
        parent = layer.get_submodule(path.rpartition(".")[0])
        matrices = [p for p in experts.parameters(recurse=False) if p.dim() == 3]
        count = int(matrices[0].shape[0])
        routers = [child for _, child in parent.named_children() if child is not experts
                   and tuple(getattr(getattr(child, "weight", None), "shape", ()))[:1] == (count,)]
        if len(routers) != 1:
            raise SpecError(f"has {len(routers)} routers beside the experts of layer {i}, expected one", file=name)
        found.append(ExpertBlock(i, experts, routers[0], count, sum(p.numel() for p in matrices) // count, (parent,),
                                 _attention_in(layer)))
    if len({(block.n_experts, block.expert_params) for block in found}) > 1:
        raise SpecError("has layers with different experts; a trace needs one kind", file=name)
    return tuple(found)


def find_attention(network: Any, name: str) -> tuple[torch.nn.Module, ...]:
    """The attention module of every decoder layer.

    Raises
    ------
    SpecError
        A layer has none, as in a state-space model.
    """
    found = [_attention_in(layer) for layer in find_layers(network, name)]
    missing = [i for i, module in enumerate(found) if module is None]
    if missing:
        raise SpecError(f"has no attention in layers {_some(missing)}, so no KV pages there", file=name)
    return tuple(module for module in found if module is not None)


def find_layers(network: Any, name: str) -> list[Any]:
    """The decoder layers in order. Raises SpecError unless there is one stack of them."""
    import torch

    n_layers = getattr(network.config.get_text_config(), "num_hidden_layers", None)
    stacks = {path: module for path, module in network.named_modules()
              if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers}
    outer = [path for path in stacks if not any(path.startswith(f"{other}.") for other in stacks)]
    if len(outer) != 1:
        raise SpecError(f"needs exactly one stack of its {n_layers} decoder layers; found {len(outer)}", file=name)
    return list(stacks[outer[0]])


def _attention_in(layer: Any) -> Any | None:
    found = [child for path, child in layer.named_children() if _is_attention(path) and _linears(child)]
    return found[0] if len(found) == 1 else None


def _is_attention(path: str) -> bool:
    first = path.partition(".")[0].lower()
    return "attn" in first or "attention" in first


def _linears(module: Any) -> dict[str, Any]:
    import torch

    return {path: m for path, m in module.named_modules() if isinstance(m, torch.nn.Linear)}


def _experts_in(layer: Any) -> tuple[str, Any] | None:
    """Path and module of a layer's routed experts: at least two parameters with one matrix for each expert."""
    for path, module in layer.named_modules():
        counts = [int(p.shape[0]) for p in module.parameters(recurse=False) if p.dim() == 3]
        if path and len(counts) > 1 and len(set(counts)) == 1 and counts[0] > 1:
            return path, module
    return None


def _ffn_in(layer: Any, network: Any, where: str) -> FfnBlock | None:
    d_model = int(network.config.get_text_config().hidden_size)
    groups: dict[str, dict[str, Any]] = {}
    for path, linear in _linears(layer).items():
        if not _is_attention(path):
            groups.setdefault(path.rpartition(".")[0], {})[path] = linear
    found = []
    for parent, linears in groups.items():
        for down in reversed(linears.values()):  # the last that fits: units may be as many as the model is wide
            n_units = down.in_features
            ups = [u for u in linears.values() if u is not down and u.in_features == d_model
                   and u.out_features in (n_units, 2 * n_units)]
            alone = len(ups) + 1 == len(linears) and not any(True for _ in layer.get_submodule(parent).parameters(
                recurse=False))  # a state space has such a pair too, and more beside it
            if down.out_features == d_model and ups and alone:
                found.append((parent, ups, down))
                break
    if len(found) > 1:
        raise SpecError(f"has {len(found)} FFNs side by side; a trace needs one", file=where)
    if not found:
        return None
    parent, ups, down = found[0]
    inside = layer.get_submodule(parent)
    # A fused projection to twice the units is gated too; so are two projections to as many units each.
    gated = len(ups) > 1 or ups[0].out_features == 2 * down.in_features
    return FfnBlock(down, _activation_in(inside), (inside,) if parent else (*ups, down), _attention_in(layer), gated)


def _activation_in(module: Any) -> Any | None:
    """The one direct part that has no parameters and is neither dropout nor norm."""
    found = [child for child in module.children() if not any(True for _ in child.parameters())
             and not any(word in type(child).__name__ for word in ("Dropout", "Norm", "Identity", "Rotary"))]
    return found[0] if len(found) == 1 else None


def _some(layers: list[int]) -> str:
    return ", ".join(map(str, layers)) if len(layers) < 8 else f"{layers[0]} to {layers[-1]} ({len(layers)})"
