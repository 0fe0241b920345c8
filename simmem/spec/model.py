"""How many parameters does each part of a model hold, and how many bytes at a precision?

Counts are exact: the tests compare every group with the torch module's own parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from simmem.errors import SpecError
from simmem.spec import library
from simmem.spec.base import Frozen, load_toml, validate
from simmem.spec.precision import FILE, matrix_bytes_per_param, vector_bytes_per_param

__all__ = ["Architecture", "Experts", "LatentAttention", "Model", "StateSpace", "TensorGroup", "load_model"]


Width = Annotated[int, Field(gt=0, le=1_000_000)]
"""Wider than any model there is; what is absurd should fail as a specification, not as memory running out."""


class Experts(Frozen):
    """Layers whose FFN is a mixture of experts, of which a router picks a few for every token."""

    count: int = Field(gt=0, le=100_000)
    """Routed experts of a layer."""
    per_token: int = Field(gt=0)
    """Routed experts that a token uses in a layer."""
    d_expert: Width
    """Hidden width of a routed expert."""
    d_shared: int = Field(default=0, ge=0, le=1_000_000)
    """Hidden width of what every token uses beside them, all shared experts together."""
    shared_gate: bool = False
    """The shared expert's output is weighted by a learned gate (d_model parameters)."""
    first_layer: int = Field(default=0, ge=0)
    """The first layer with experts; those before it have a plain FFN."""
    every: PositiveInt = 1
    """From there on each `every`-th layer has experts, the others a plain FFN."""
    router_bias: bool = False
    """One more parameter per expert, added to its score."""
    bias: bool = False
    """The matrices of an expert have biases."""

    @model_validator(mode="after")
    def _picks_what_exists(self) -> Experts:
        if self.per_token > self.count:
            raise ValueError(f"per_token ({self.per_token}) is more than the {self.count} experts there are")
        return self


class LatentAttention(Frozen):
    """Keys and values kept as one compressed vector (DeepSeek-V2, arXiv 2405.04434 §2.1)."""

    q_rank: Width | None = None
    """Rank of the query projection; a full matrix when None."""
    kv_rank: Width
    d_rope: Width
    """Width of a key's part that carries the position, shared by all heads."""
    d_nope: Width
    """Width of a head's key without it."""
    d_value: Width


class StateSpace(Frozen):
    """A selective state space in the place of attention and FFN (Mamba, arXiv 2312.00752 §3)."""

    d_inner: Width
    d_state: Width
    d_conv: Width
    dt_rank: Width
    conv_bias: bool = True
    projection_bias: bool = False


class Architecture(Frozen):
    """The shapes of a decoder, in the words of its configuration file."""

    d_model: Width
    n_layers: int = Field(gt=0, le=1000)
    n_heads: int = Field(ge=0, le=1_000_000)
    n_kv_heads: int = Field(ge=0, le=1_000_000)
    d_head: int = Field(ge=0, le=1_000_000)
    d_ff: int = Field(ge=0, le=1_000_000)
    """Hidden width of a plain FFN; 0 where no layer has one."""
    vocab: int = Field(gt=0, le=100_000_000)
    max_positions: int = Field(gt=0, le=1_000_000_000)
    gated: bool
    """Gated FFN (gate, up, down) rather than (up, down)."""
    activation: str
    learned_position_rows: int = Field(default=0, ge=0, le=1_000_000_000)
    embedding_dim: Width | None = None
    """Narrower embeddings, projected to d_model and back (OPT-350M)."""
    tied_head: bool = True
    head_bias: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    ffn_bias: bool = False
    norm: Literal["layernorm", "rmsnorm"]
    norm_bias: bool = True
    """layernorm: it adds a vector as well as scaling by one."""
    norms_per_layer: int = Field(default=2, ge=0)
    final_norm: bool = True
    embedding_norm: bool = False
    """A norm right behind the input embedding."""
    qk_norm: Literal[False, True, "wide"] = False
    """Norms on queries and keys: one of d_head for all heads, or ("wide") one of each projection's full width."""
    sinks: bool = False
    """A learned logit per head that attends to nothing (gpt-oss)."""
    window: int | None = Field(default=None, gt=0)
    """Tokens that a layer with sliding-window attention looks back."""
    n_window_layers: int = Field(default=0, ge=0)
    """How many layers have that window; the others attend to the whole context."""
    experts: Experts | None = None
    latent_attention: LatentAttention | None = None
    state_space: StateSpace | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> Architecture:
        if self.state_space is not None:
            if self.n_heads or self.latent_attention:
                raise ValueError("a state space stands in the place of attention: n_heads must be 0")
            return self
        if not self.n_heads or not self.n_kv_heads or not self.d_head:
            raise ValueError("n_heads, n_kv_heads and d_head must be at least 1 in a model with attention")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) is not a multiple of n_kv_heads ({self.n_kv_heads})")
        if (self.window is None) != (self.n_window_layers == 0) or self.n_window_layers > self.n_layers:
            raise ValueError(f"window ({self.window}) and n_window_layers ({self.n_window_layers} of {self.n_layers}) "
                             "do not fit together")
        if self.n_dense_layers and not self.d_ff:
            raise ValueError(f"d_ff is 0, but {self.n_dense_layers} layers have a plain FFN")
        if self.experts and not self.n_expert_layers:
            raise ValueError(f"experts start at layer {self.experts.first_layer}, but there are {self.n_layers}")
        return self

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose FFN is a mixture of experts."""
        return tuple(range(self.experts.first_layer, self.n_layers, self.experts.every)) if self.experts else ()

    @property
    def n_expert_layers(self) -> int:
        return len(self.expert_layers)

    @property
    def n_dense_layers(self) -> int:
        """Layers with a plain FFN."""
        return 0 if self.state_space else self.n_layers - self.n_expert_layers

    @property
    def activations(self) -> int:
        """Most numbers that one token makes in a layer: its hidden vectors, with queries, keys, values and what
        attention makes of them, or with gates and hidden vector of the FFN and, where experts work, all their outputs.
        """
        x, latent, space = self.experts, self.latent_attention, self.state_space
        gates = 2 if self.gated else 1
        if space is not None:  # its input and gate, and what the convolution makes
            return 2 * self.d_model + 3 * space.d_inner
        key, value = (latent.d_nope + latent.d_rope, latent.d_value) if latent else (self.d_head, self.d_head)
        kv_heads = self.n_heads if latent else self.n_kv_heads
        mixer = 2 * self.d_model + (self.n_heads + kv_heads) * (key + value)
        plain = 4 * self.d_model + gates * self.d_ff if self.n_dense_layers else 0
        routed = 0
        if x is not None:
            hidden, outputs = x.per_token * x.d_expert + x.d_shared, x.per_token + (1 if x.d_shared else 0)
            routed = gates * hidden + (2 + outputs) * self.d_model
        return max(mixer, plain, routed)


@dataclass(frozen=True)
class TensorGroup:
    """A set of tensors placed together: matrix and vector parameters of all its layers."""

    name: str
    matrix_params: int
    vector_params: int

    @property
    def params(self) -> int:
        return self.matrix_params + self.vector_params

    def bytes_at(self, precision: str) -> float:
        """Bytes of the whole group. [B]"""
        return (self.matrix_params * matrix_bytes_per_param(precision)
                + self.vector_params * vector_bytes_per_param(precision))


class Model(Frozen):
    """A model: its architecture and where that was read."""

    schema_: Literal["simmem.model/1"] = Field(alias="schema")
    name: str
    title: str
    family: str
    source: str = Field(min_length=4)
    aliases: tuple[str, ...] = ()
    native_precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    parameters: int | None = None
    """What the shapes must add up to, where the file says it: a list can show it without counting."""
    active_parameters: int | None = None
    """The same of what one token uses."""
    architecture: Architecture
    file_bytes: dict[str, Annotated[float, Field(gt=0, le=1e18)]] | None = None
    """Bytes of each tensor group in the file the model was read from: the precision `file`. [B]"""

    @model_validator(mode="after")
    def _adds_up(self) -> Model:
        for name, said, counted in (("parameters", self.parameters, self.params),
                                    ("active_parameters", self.active_parameters, self.active_params)):
            if said is not None and said != counted:
                raise ValueError(f"{name} says {said}, the architecture adds up to {counted}")
        if self.file_bytes is not None and set(self.file_bytes) != {g.name for g in self.groups()}:
            raise ValueError(f"file_bytes names {sorted(self.file_bytes)}, the model has "
                             f"{sorted(g.name for g in self.groups())}")
        return self

    # --- parameters -------------------------------------------------------------------------

    def groups(self) -> tuple[TensorGroup, ...]:
        """Tensor groups in the order they are used: embedding, positions, attention (or state-space), ffn, router,
        experts, norms, head. `ffn` holds what every token uses: plain FFNs and shared experts."""
        a = self.architecture
        d = a.d_model
        e = a.embedding_dim or d
        embedding = a.vocab * e + (2 * e * d if e != d else 0)
        groups = [
            TensorGroup("embedding", embedding, 0),
            TensorGroup("positions", a.learned_position_rows * d, 0),
            self._state_space() if a.state_space else self._attention(),
            self._ffn(),
            *self._experts(),
            TensorGroup("norms", 0, self.norm_params * (a.norms_per_layer * a.n_layers + a.final_norm
                                                         + a.embedding_norm)),
            TensorGroup("head", 0 if a.tied_head else a.vocab * e, a.vocab if a.head_bias else 0),
        ]
        return tuple(g for g in groups if g.params)

    @property
    def norm_params(self) -> int:
        """Parameters of one norm of a hidden vector."""
        a = self.architecture
        return a.d_model * (2 if a.norm == "layernorm" and a.norm_bias else 1)

    def _attention(self) -> TensorGroup:
        a, latent = self.architecture, self.architecture.latent_attention
        d, heads = a.d_model, a.n_heads
        if latent is None:
            wide, kv = heads * a.d_head, a.n_kv_heads * a.d_head
            matrices = d * (wide + 2 * kv) + wide * d
            vectors = (wide + 2 * kv) if a.qkv_bias else 0
            scales = 2 if a.norm == "layernorm" and a.norm_bias else 1
            vectors += scales * ((wide + kv) if a.qk_norm == "wide" else 2 * a.d_head if a.qk_norm else 0)
        else:
            query = heads * (latent.d_nope + latent.d_rope)
            matrices = d * query if latent.q_rank is None else latent.q_rank * (d + query)
            matrices += d * (latent.kv_rank + latent.d_rope)
            matrices += latent.kv_rank * heads * (latent.d_nope + latent.d_value) + heads * latent.d_value * d
            vectors = latent.kv_rank + (latent.q_rank or 0)  # norms of the compressed vectors
            if a.qkv_bias:
                vectors += (latent.q_rank or 0) + latent.kv_rank + latent.d_rope
        vectors += (d if a.attention_output_bias else 0) + (heads if a.sinks else 0)
        return TensorGroup("attention", a.n_layers * matrices, a.n_layers * vectors)

    def _state_space(self) -> TensorGroup:
        a, s = self.architecture, self.architecture.state_space
        assert s is not None
        matrices = a.d_model * 2 * s.d_inner + s.d_inner * s.d_conv + s.d_inner * (s.dt_rank + 2 * s.d_state)
        matrices += s.dt_rank * s.d_inner + s.d_inner * s.d_state + s.d_inner * a.d_model
        vectors = 2 * s.d_inner + (s.d_inner if s.conv_bias else 0)  # step bias, skip
        vectors += (2 * s.d_inner + a.d_model) if s.projection_bias else 0
        return TensorGroup("state-space", a.n_layers * matrices, a.n_layers * vectors)

    def _ffn(self) -> TensorGroup:
        a, x = self.architecture, self.architecture.experts
        matrices = a.n_dense_layers * self.unit_params * a.d_ff
        vectors = a.n_dense_layers * self.ffn_biases(a.d_ff) if a.ffn_bias else 0
        if x is not None:
            matrices += a.n_expert_layers * self.shared_params
            vectors += a.n_expert_layers * self.ffn_biases(x.d_shared) if a.ffn_bias and x.d_shared else 0
        return TensorGroup("ffn", matrices, vectors)

    @property
    def shared_params(self) -> int:
        """Matrix parameters of what every token uses in a layer with experts, the router apart."""
        x = self.architecture.experts
        return self.unit_params * x.d_shared + (self.architecture.d_model if x.shared_gate else 0) if x else 0

    def ffn_biases(self, width: int) -> int:
        """Bias parameters of an FFN of a hidden width that has them."""
        a = self.architecture
        return width * (2 if a.gated else 1) + a.d_model

    def _experts(self) -> list[TensorGroup]:
        a, x = self.architecture, self.architecture.experts
        if x is None:
            return []
        layers = a.n_expert_layers
        biases = self.ffn_biases(x.d_expert) if x.bias else 0
        return [TensorGroup("router", layers * a.d_model * x.count, layers * x.count if x.router_bias else 0),
                TensorGroup("experts", layers * x.count * self.expert_params, layers * x.count * biases)]

    @property
    def mixer(self) -> TensorGroup:
        """What mixes tokens: attention, or the state space in its place."""
        return self.group("state-space" if self.architecture.state_space else "attention")

    def group(self, name: str) -> TensorGroup:
        """One group by name; empty where the model has no such tensors."""
        return next((g for g in self.groups() if g.name == name), TensorGroup(name, 0, 0))

    @property
    def params(self) -> int:
        """All parameters, tied ones once."""
        return sum(g.params for g in self.groups())

    @property
    def active_params(self) -> int:
        """Parameters that one token uses: all but the experts its router leaves out."""
        x, routed = self.architecture.experts, self.group("experts").params
        return self.params - (routed - routed * x.per_token // x.count if x else 0)

    # --- bytes ------------------------------------------------------------------------------

    @property
    def own_precision(self) -> str:
        """What its weights are published in: `file` where the file holds several precisions."""
        return self.native_precision if self.file_bytes is None else FILE

    def group_bytes(self, precision: str) -> dict[str, float]:
        """Bytes of every tensor group at a precision, or as the model's own file holds them (`file`). [B]"""
        if precision == FILE:
            if self.file_bytes is None:
                raise SpecError(f"found 'file', but {self.name} was not read from a file with its own precisions",
                                key="--weights")
            return {g.name: self.file_bytes[g.name] for g in self.groups()}
        return {g.name: g.bytes_at(precision) for g in self.groups()}

    def bytes_at(self, precision: str) -> float:
        """All weights at one precision. [B]"""
        return sum(self.group_bytes(precision).values())

    # --- what is fetched as one -------------------------------------------------------------

    @property
    def unit_matrices(self) -> int:
        """Matrices an FFN neuron has a row or column in: 2, or 3 when gated."""
        return 3 if self.architecture.gated else 2

    @property
    def unit_params(self) -> int:
        """Matrix parameters of one FFN neuron (LLM in a flash, §3.2: a bundle is 2·d_model, 3· gated)."""
        return self.unit_matrices * self.architecture.d_model

    @property
    def expert_params(self) -> int:
        """Matrix parameters of one routed expert; 0 where there are none."""
        x = self.architecture.experts
        return self.unit_params * x.d_expert if x else 0

    def unit_bytes(self, precision: str) -> float:
        """Bytes of one FFN neuron's rows and columns. [B]"""
        return self.unit_params * matrix_bytes_per_param(precision)

    def units_of(self, unit: str) -> tuple[int, int] | None:
        """(layers, units a layer) that a trace of this model has; None where the model has no such units."""
        a = self.architecture
        if unit == "ffn-neuron" and a.experts is None and a.d_ff:
            return a.n_layers, a.d_ff
        if unit == "expert" and a.experts is not None:
            return a.n_expert_layers, a.experts.count
        return None

    # --- the context ------------------------------------------------------------------------

    def kv_bytes(self, precision: str, context_tokens: float, window_tokens: float | None = None) -> float:
        """What a sequence with this context holds over all layers: keys and values, or its state. [B]

        `window_tokens`: what layers with sliding-window attention hold of it, when not the shorter of both (means).
        Latent attention holds the compressed vector and the positional key (DeepSeek-V2, §2.1.2); a state space one
        state of fixed size and the inputs its convolution still needs.
        """
        a, latent, space = self.architecture, self.architecture.latent_attention, self.architecture.state_space
        each = matrix_bytes_per_param(precision)
        if space is not None:
            return a.n_layers * space.d_inner * (space.d_state + space.d_conv) * each
        per_layer = latent.kv_rank + latent.d_rope if latent else 2 * a.n_kv_heads * a.d_head
        seen = min(context_tokens, a.window or context_tokens) if window_tokens is None else window_tokens
        tokens = (a.n_layers - a.n_window_layers) * context_tokens + a.n_window_layers * seen
        return float(per_layer * tokens * each)

    def attention_flop(self, context_tokens: float, window_tokens: float | None = None, *, prompt: bool = False
                       ) -> float:
        """Arithmetic of one token over its context, all layers, weights apart. [flop]

        Scores and the weighted sum are a multiply-add per head and dimension each. Latent attention is taken with its
        up-projections absorbed, so that it works on compressed vectors (DeepSeek-V2, §2.1.2); in a prompt each key and
        value is made once, for all tokens after it, and attended to at its own width. A state space updates its state
        with three multiply-adds per element (Mamba, §3.2), whatever the context.
        """
        a, latent, space = self.architecture, self.architecture.latent_attention, self.architecture.state_space
        if space is not None:
            return 6.0 * a.n_layers * space.d_inner * space.d_state
        per_head = 2 * a.d_head
        if latent is not None:
            per_head = latent.d_nope + latent.d_rope + latent.d_value if prompt else 2 * latent.kv_rank + latent.d_rope
        seen = min(context_tokens, a.window or context_tokens) if window_tokens is None else window_tokens
        tokens = (a.n_layers - a.n_window_layers) * context_tokens + a.n_window_layers * seen
        return 2.0 * a.n_heads * per_head * tokens

    @property
    def head_params(self) -> int:
        """Matrix parameters a token multiplies outside the layers: the output projection (the embedding's own when
        tied), and the projections to and from narrower embeddings."""
        a = self.architecture
        e = a.embedding_dim or a.d_model
        return a.vocab * e + (2 * e * a.d_model if e != a.d_model else 0)


def load_model(name: str, *, relative_to: Path | None = None) -> Model:
    """A built-in model by name or alias, a model file (TOML), a Hugging Face `config.json` or a GGUF file."""
    path = library.resolve("model", name, relative_to=relative_to)
    if path.is_dir():  # as `huggingface-cli download` leaves it
        path = path / "config.json"
    if path.suffix == ".gguf":
        from simmem.spec.gguf_model import model_from_gguf

        return model_from_gguf(path)
    if path.suffix == ".json":
        from simmem.spec.huggingface import model_from_config

        return model_from_config(path)
    return validate(Model, load_toml(path), file=str(path))
