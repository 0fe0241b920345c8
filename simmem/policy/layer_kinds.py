"""Which kinds of layer does a model have, and what does each store, read and multiply?

Layers differ in their FFN: a plain one, or a mixture of experts of which a token uses a few. What
mixes tokens (attention or a state space) is the same in all, or taken at its mean over the layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simmem.spec.model import Model

__all__ = ["FfnWork", "Layers", "ffn_products", "ffn_work", "layers_of", "touched_experts"]


@dataclass(frozen=True)
class Layers:
    """The kinds of layer of a model at one precision."""

    names: tuple[str, ...]
    """The kinds: "plain", "experts", or "none" for an FFN that is not there."""
    kind: tuple[int, ...]
    """Which of them each layer is."""
    mixer_bytes: float
    """What mixes tokens, and the norms, of one layer. [B]"""
    ffn_bytes: tuple[float, ...]
    """Per kind: its whole FFN, all experts and the router included. [B]"""

    @property
    def stored_bytes(self) -> tuple[float, ...]:
        """Per kind: everything a layer holds. [B]"""
        return tuple(float(self.mixer_bytes + ffn) for ffn in self.ffn_bytes)


@dataclass(frozen=True)
class FfnWork:
    """What the FFN of one layer multiplies and reads for n tokens at once, by tensor group."""

    multiplied_params: Mapping[str, float]
    """Matrix parameters times the tokens that use them."""
    read_matrix_params: Mapping[str, float]
    read_vector_params: Mapping[str, float]
    kernels: float


FFN_KERNELS = 3
"""up, activation, down; a gated FFN launches two more (gate, product). [kernels]"""
AROUND_KERNELS = 2
"""norm before, residual after. [kernels]"""
ROUTER_KERNELS = 3
"""scores, choice of the experts, weighted sum of their outputs; experts run in grouped kernels. [kernels]"""


def touched_experts(count: int, per_token: int, n_tokens: float) -> float:
    """Distinct experts that n tokens use in a layer, when routing is uniform and independent: count·(1 − (1 − k/E)ⁿ).

    Without a trace of the routing nothing better is known; real routing is skewed and touches fewer.
    """
    return float(count * (1.0 - (1.0 - per_token / count) ** n_tokens))


def _ffn_kinds(model: Model) -> tuple[str, ...]:
    """Kind of FFN of every layer: "plain", "experts" or "none"."""
    a = model.architecture
    if a.state_space is not None:
        return ("none",) * a.n_layers
    with_experts = set(a.expert_layers)
    return tuple("experts" if layer in with_experts else "plain" for layer in range(a.n_layers))


def layers_of(model: Model, group_bytes: Mapping[str, float]) -> Layers:
    """What each kind of layer stores, given the bytes of the tensor groups."""
    a, names = model.architecture, _ffn_kinds(model)
    kinds = tuple(dict.fromkeys(names))
    mixer = (group_bytes[model.mixer.name] + group_bytes.get("norms", 0.0)) / a.n_layers
    return Layers(kinds, tuple(kinds.index(name) for name in names), mixer,
                  tuple(_ffn_bytes(model, kind, group_bytes) for kind in kinds))


def _ffn_bytes(model: Model, kind: str, group_bytes: Mapping[str, float]) -> float:
    if kind == "none":
        return 0.0
    a, ffn = model.architecture, model.group("ffn")
    plain, shared = ffn_work(model, "plain", 1), ffn_work(model, "experts", 1)
    # A file's bytes are known for the group: they are shared out by parameters.
    per_param = group_bytes.get("ffn", 0.0) / max(ffn.params, 1)
    if kind == "plain":
        return per_param * (plain.read_matrix_params["ffn"] + plain.read_vector_params["ffn"])
    held = per_param * (shared.read_matrix_params["ffn"] + shared.read_vector_params["ffn"])
    return held + (group_bytes["router"] + group_bytes["experts"]) / a.n_expert_layers


def ffn_work(model: Model, kind: str, n_tokens: float) -> FfnWork:
    """What the FFN of one layer of a kind costs for `n_tokens` tokens that pass through it together."""
    a, x = model.architecture, model.architecture.experts
    if kind == "none" or (kind == "experts" and x is None):
        return FfnWork({}, {"ffn": 0.0}, {"ffn": 0.0}, 0.0)
    kernels = FFN_KERNELS + (2 if a.gated else 0)
    if kind == "plain":
        matrices, vectors = model.unit_params * a.d_ff, model.ffn_biases(a.d_ff) if a.ffn_bias else 0
        return FfnWork({"ffn": matrices * n_tokens}, {"ffn": float(matrices)}, {"ffn": float(vectors)},
                       AROUND_KERNELS + kernels)
    assert x is not None
    router, experts = model.group("router"), model.group("experts")
    layers = a.n_expert_layers
    shared, touched = float(model.shared_params), touched_experts(x.count, x.per_token, n_tokens)
    biases = float(model.ffn_biases(x.d_shared)) if a.ffn_bias and x.d_shared else 0.0
    scores = router.matrix_params / layers
    return FfnWork(
        {"ffn": shared * n_tokens, "router": scores * n_tokens,
         "experts": model.expert_params * x.per_token * n_tokens},
        {"ffn": shared, "router": scores, "experts": model.expert_params * touched},
        {"ffn": biases, "router": router.vector_params / layers,
         "experts": experts.vector_params / layers / x.count * touched},
        AROUND_KERNELS + ROUTER_KERNELS + kernels + (kernels + 1 if x.d_shared else 0))


def ffn_products(model: Model, kind: str, n_tokens: float) -> tuple[float, float, float]:
    """Tokens a product of the FFN multiplies at once, mean length of a row of its matrices, and how many products.

    The rows of up and gate are as long as the model is wide, those of down as the FFN is. Tokens spread over experts
    evenly.
    """
    a, x = model.architecture, model.architecture.experts
    matrices = model.unit_matrices

    def mean_row(width: float) -> float:
        return matrices * a.d_model * width / ((matrices - 1) * width + a.d_model)

    if kind == "experts" and x is not None:
        touched = touched_experts(x.count, x.per_token, n_tokens)
        count = matrices * (touched + (1.0 if x.d_shared else 0.0))
        return n_tokens * x.per_token / touched, mean_row(x.d_expert), count
    return n_tokens, mean_row(max(a.d_ff, 1)), float(matrices)
