"""What does each kind of op of a model demand of the unit that does it? The parts that schedules are made of.

An agent is an argument of every op, so a schedule may give some to a GPU and others to the CPU beside it. Amounts are
those of one layer unless they say more; a share of 0 leaves an op out, in the columns where it is 0: what is not
demanded takes no time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.policy.context import Context
from simmem.policy.layer_kinds import FfnWork, ffn_products, ffn_work
from simmem.schedule import DRAFT, DemandClass, OpKind, Phase, Products, Schedule, ScheduleBuilder

__all__ = [
    "ATTENTION_KERNELS",
    "HEAD_KERNELS",
    "LATENT_ATTENTION_KERNELS",
    "STATE_SPACE_KERNELS",
    "STREAM_CHUNK_BYTES",
    "Ops",
    "stream_requests",
]

Array = NDArray[np.float64]
Amount = Array | float
Demand = tuple[int, str]
"""A demand class and the stream its ops run on."""

STREAM_CHUNK_BYTES = 4.0 * (1 << 20)
"""Request size of streamed weights: large enough for the sequential rate of every device here. [B]"""

ATTENTION_KERNELS = 8
"""norm, q, k, v, position, attention, output, residual: what a plain decoder launches. [kernels]"""
LATENT_ATTENTION_KERNELS = 12
"""norm, query down, its norm, query up, key-value down, its norm, position, query absorbed, attention, value absorbed,
output, residual. [kernels]"""
STATE_SPACE_KERNELS = 9
"""norm, input projection, convolution, step and state projections, step, scan, gate, output, residual. [kernels]"""
CONTEXT_KERNELS = 1
"""Of these, the attention (or scan) itself. [kernels]"""
OUTPUT_KERNELS, GATED_OUTPUT_KERNELS = 2, 3
"""And those after it: output, residual; latent attention absorbs values and a state space gates before them. [kernels]
"""

MIXER_PRODUCTS = 4.0
"""query, key, value, output; with latent attention and in a state space about as many."""
HEAD_KERNELS = 3
"""norm, output projection, sampling. [kernels]"""
JOIN_TRAFFIC = 3.0
"""Two partial results read and their sum written. [vectors of the model's width per token]"""


def stream_requests(n_bytes: Amount) -> Array:
    """Requests that read `n_bytes` in sequence: one, or as many chunks as they are.

    Not rounded up: a second request that appears when one byte more is read would use the depth that one request
    cannot, and reading more would be faster.
    """
    return np.where(n_bytes > 0, np.maximum(n_bytes / STREAM_CHUNK_BYTES, 1.0), 0.0)


class Ops:
    """Demand classes of a decode step or a prompt, and the ops made of them.

    Parameters
    ----------
    n_columns : columns of the schedule. Amounts below are (n_columns,), one number for all, or (m, n_columns): what is
        returned then stands for m demands, and `op` and `chain` are told which of them they do.
    agents : who computes, the main one first; all of the device's when None. SpecError for one that it has not.
    phase : a decode step (`step_tokens`, over the mean context) or the prompt (all its tokens at once).
    depth : reads in flight, unless a move says otherwise.
    """

    def __init__(self, context: Context, n_columns: int, *, agents: Sequence[str] | None = None,
                 phase: Phase = Phase.DECODE, depth: Amount = 1.0) -> None:
        device, model, workload = context.device, context.model, context.workload
        self.context, self.phase, self.depth = context, phase, depth
        self.agents = tuple(device.agent if agents is None else agents)
        unknown = [name for name in self.agents if name not in device.agent]
        if unknown:
            raise SpecError(f"device {device.name} has no agent {unknown[0]!r}; it has {', '.join(device.agent)}")
        self.builder = ScheduleBuilder(n_columns, [f"link.{n}" for n in device.link] + list(device.agent))
        self._known: dict[tuple[str, str, float, bool], tuple[FfnWork, float, float]] = {}
        a = model.architecture
        if phase is Phase.DECODE:
            self.n_tokens: float = workload.step_tokens
            """Tokens that pass through a layer together."""
            self.n_outputs: float = workload.step_tokens
            """Tokens that the output projection is for: all of a decode step, the last of each prompt."""
            self.context_flop = workload.step_tokens * model.attention_flop(
                workload.mean_decode_context, workload.mean_decode_window(a.window))
            """Arithmetic of attention over the context (or of the scan), all layers and tokens. [flop]"""
            self.context_bytes = context.decode_kv_bytes
            """Keys and values that it reads (the prompt: writes), all layers and sequences. [B]"""
            self.norm_params = model.norm_params * a.norms_per_layer / 2
            """Half of a layer's norms with its attention, half with its FFN; nothing beside a prompt."""
        else:
            self.n_tokens, self.n_outputs = workload.prompt_tokens * workload.batch, workload.batch
            seen = workload.mean_prompt_window(None), workload.mean_prompt_window(a.window)
            self.context_flop = self.n_tokens * model.attention_flop(*seen, prompt=True)
            self.context_bytes = model.kv_bytes(workload.kv, workload.prompt_tokens) * workload.batch
            self.norm_params = 0.0

    # --- moving -----------------------------------------------------------------------------------

    def move(self, name: str, n_bytes: Amount, hops: Sequence[str], *, requests: Amount | None = None,
             copies: Amount = 1.0, depth: Amount | None = None, staged: Amount = 0.0) -> list[Demand]:
        """A demand class for each link of `hops`, in order.

        requests : reads out of storage; as many as a sequential read of `n_bytes` takes when None.
        copies : copies over each of the other links.
        staged : what the last link's target holds of it until another op releases it. [B]
        """
        found: list[Demand] = []
        device = self.context.device
        for index, hop in enumerate(hops):
            link = device.link[hop]
            amounts: dict[str, Amount] = {f"link.{hop}": n_bytes, f"memory.{link.target}": n_bytes}
            if link.kind == "copy":
                amounts[f"memory.{link.source}"] = n_bytes
                asked: Amount = np.where(np.asarray(n_bytes) > 0, copies, 0.0)
            else:
                asked = stream_requests(n_bytes) if requests is None else requests
            if link.bus is not None:
                amounts[f"bus.{link.bus}"] = n_bytes
            kind = OpKind.IO if link.kind == "storage" else OpKind.TRANSFER
            found.append((self.builder.demand(
                DemandClass(f"{name}.{hop}", kind, link=hop), requests=asked,
                depth=self.depth if depth is None else depth, bytes=amounts,
                acquire={link.target: staged if index == len(hops) - 1 else n_bytes},
                release={link.source: n_bytes} if index else {}), f"link.{hop}"))
        return found

    def hidden(self, name: str, source: str, target: str, n_tokens: Amount, *, precision: str = "fp16"
               ) -> list[Demand]:
        """Hidden vectors of some tokens, from one memory to another; room for them is part of the working bytes."""
        return self.move(name, self.context.activation_bytes(1.0, precision) * n_tokens,
                         self.context.device.path(source, target))

    # --- computing --------------------------------------------------------------------------------

    def compute(self, name: str, kind: OpKind, agent: str, flop: Amount, n_bytes: Amount, kernels: Amount, *,
                precision: str | None = None, products: Products | None = None, waits: Amount = 0.0,
                rate: Literal["attention"] | None = None, release: Mapping[str, Amount] | None = None) -> Demand:
        """A demand class on an agent and its memory.

        precision : of the weights; the workload's when None.
        waits : 1 where the op begins behind a read that nothing was done during.
        rate : a special rate of the agent, where it has it.
        release : tier → what is no longer held after the op. [B]
        """
        asked = None if self.phase is Phase.PREFILL else self.context.agent(agent).launch
        what = DemandClass(name, kind, agent=agent, precision=precision or self.context.workload.weights,
                           products=products, launch=asked or "stream", rate=rate)
        return self.builder.demand(what, flop=flop, requests=kernels, waits=waits, release=release,
                                   bytes={f"memory.{self.context.memory_of(agent)}": n_bytes}), agent

    def read_bytes(self, agent: str, group: str, matrices: float, vectors: float) -> float:
        """Bytes an agent reads to multiply parameters of a group. [B]"""
        matrix, vector = self.context.read_bytes_per_param(agent, group)
        return matrices * matrix + vectors * vector

    def mixer(self, agent: str, n_tokens: float, context_flop: Amount, context_bytes: Amount, share: Amount = 1.0, *,
              waits: Amount = 0.0, release: Mapping[str, Amount] | None = None) -> Demand:
        """Attention (or the state space) of one layer in one class: its products and what it does with the context.

        context_flop, context_bytes : of all layers, as `Ops.context_flop` and `Ops.context_bytes`. [flop, B]
        share : of all of it that this agent does.
        """
        model = self.context.model
        mixer, layers = model.mixer, model.architecture.n_layers
        return self.compute(
            mixer.name, OpKind.COMPUTE, agent,
            (2.0 * n_tokens * mixer.matrix_params / layers + context_flop / layers) * share,
            (self.read_bytes(agent, mixer.name, mixer.matrix_params / layers, mixer.vector_params / layers)
             + self.read_bytes(agent, "norms", 0.0, self.norm_params) + context_bytes / layers) * share,
            _present(share, self._mixer_kernels), precision=self.context.group_precision(mixer.name),
            products=Products(n_tokens, float(model.architecture.d_model), MIXER_PRODUCTS), waits=waits,
            release=release)

    @property
    def _mixer_kernels(self) -> int:
        a = self.context.model.architecture
        return STATE_SPACE_KERNELS if a.state_space else LATENT_ATTENTION_KERNELS if a.latent_attention \
            else ATTENTION_KERNELS

    def projections(self, agent: str, n_tokens: float, share: Amount = 1.0, *,
                    part: Literal["all", "before", "after"] = "all", waits: Amount = 0.0,
                    release: Mapping[str, Amount] | None = None) -> Demand:
        """The products of one layer's attention (or state space), the context apart: those before it, after it, or all.

        share : of the heads, and so of the products. Whoever has a share reads the norm and the biases whole.
        """
        model = self.context.model
        a, mixer = model.architecture, model.mixer
        latent, space = a.latent_attention, a.state_space
        heads = a.n_heads * (latent.d_value if latent else a.d_head)
        after = float((space.d_inner if space else heads) * a.d_model)
        last = GATED_OUTPUT_KERNELS if space or latent else OUTPUT_KERNELS
        first, whole = self._mixer_kernels - CONTEXT_KERNELS - last, mixer.matrix_params / a.n_layers
        matrices, kernels, products = {"all": (whole, first + last, MIXER_PRODUCTS),
                                       "before": (whole - after, first, MIXER_PRODUCTS - 1.0),
                                       "after": (after, last, 1.0)}[part]
        beside = 0.0 if part == "after" else (
            self.read_bytes(agent, mixer.name, 0.0, mixer.vector_params / a.n_layers)
            + self.read_bytes(agent, "norms", 0.0, self.norm_params))
        return self.compute(
            "projections", OpKind.COMPUTE, agent, 2.0 * n_tokens * matrices * share,
            self.read_bytes(agent, mixer.name, matrices, 0.0) * share + _present(share, beside),
            _present(share, kernels), precision=self.context.group_precision(mixer.name),
            products=Products(n_tokens, float(a.d_model), products), waits=waits, release=release)

    def attention(self, agent: str, n_tokens: float, context_flop: Amount, context_bytes: Amount, *,
                  kernels: Amount = float(CONTEXT_KERNELS), waits: Amount = 0.0,
                  release: Mapping[str, Amount] | None = None) -> Demand:
        """What one layer does with the context: scores and weighted sum, or the scan. At the agent's `attention_rate`.

        context_flop, context_bytes : of all layers; 0 of both leaves the op out. [flop, B]
        """
        a = self.context.model.architecture
        some = (np.asarray(context_flop) > 0) | (np.asarray(context_bytes) > 0)
        return self.compute("attention", OpKind.COMPUTE, agent, context_flop / a.n_layers, context_bytes / a.n_layers,
                            np.where(some, kernels, 0.0), waits=waits, rate="attention", release=release)

    def feed(self, agent: str, kind: str, n_tokens: float, share: Amount = 1.0, rows: Array | None = None, *,
             groups: Collection[str] | None = None, kernels: Amount | None = None, norms: bool = True,
             waits: Amount = 0.0, release: Mapping[str, Amount] | None = None) -> Demand:
        """The FFN of one layer of a kind ("plain", "experts", "none"; see `Context.layers`).

        share : of its products; with `rows`, only whether the agent has any.
        rows : units of a plain FFN that are multiplied, instead of a share of all.
        groups : only the products of these tensor groups ("ffn", "router", "experts"); say `kernels` with it.
        norms : whether the norm before it (with `rows` the biases too) is read here, and not by another agent.
        """
        context, model = self.context, self.context.model
        key = agent, kind, n_tokens, norms
        if key not in self._known:
            self._known[key] = self._feed_parts(*key)
        work, norm_bytes, vector_bytes = self._known[key]
        kernels = work.kernels if kernels is None else kernels
        if rows is not None:
            params, beside = rows * context.unit_params, vector_bytes + norm_bytes
            return self.compute(
                "ffn", OpKind.COMPUTE, agent, 2.0 * n_tokens * params,
                params * context.read_bytes_per_param(agent, "ffn")[0] + _present(share, beside),
                _present(share, kernels), precision=context.group_precision("ffn"),
                products=Products(n_tokens, float(model.architecture.d_model), float(model.unit_matrices)),
                waits=waits, release=release)
        used = [g for g in work.read_matrix_params if groups is None or g in groups]
        n_bytes = sum(self.read_bytes(agent, g, work.read_matrix_params[g], work.read_vector_params[g])
                      for g in used if work.read_matrix_params[g])
        flop = 2.0 * sum(work.multiplied_params.get(g, 0.0) for g in used)
        return self.compute(
            "ffn", OpKind.COMPUTE, agent, flop * share, n_bytes * share + _present(share, norm_bytes),
            _present(share, kernels), precision=context.group_precision("experts" if "experts" in used else "ffn"),
            products=Products(*ffn_products(model, kind, n_tokens)), waits=waits, release=release)

    def _feed_parts(self, agent: str, kind: str, n_tokens: float, norms: bool) -> tuple[FfnWork, float, float]:
        """Work of an FFN, and bytes of its norm and of a plain one's biases; asked once, for many layers are alike."""
        model = self.context.model
        work = ffn_work(model, kind, n_tokens)
        if not norms:
            return work, 0.0, 0.0
        vectors = model.group("ffn").vector_params / model.architecture.n_layers
        return (work, self.read_bytes(agent, "norms", 0.0, self.norm_params if work.kernels else 0.0),
                self.read_bytes(agent, "ffn", 0.0, vectors))

    def head_bytes(self, agent: str) -> float:
        """Bytes an agent reads for the output projection and the norm before it. [B]"""
        model = self.context.model
        a = model.architecture
        return (self.read_bytes(agent, "embedding" if a.tied_head else "head", model.head_params, 0.0)
                + self.read_bytes(agent, "norms", 0.0, model.norm_params * a.final_norm))

    def head(self, agent: str, share: Amount = 1.0, *, waits: Amount = 0.0,
             release: Mapping[str, Amount] | None = None) -> Demand:
        """The output projection for `n_outputs` tokens, and sampling."""
        model, n = self.context.model, self.n_outputs
        a = model.architecture
        return self.compute(
            "head", OpKind.COMPUTE, agent, 2.0 * n * model.head_params * share, self.head_bytes(agent) * share,
            _present(share, HEAD_KERNELS),
            precision=self.context.group_precision("embedding" if a.tied_head else "head"),
            products=Products(n, float(a.d_model), 1.0), waits=waits, release=release)

    def join(self, agent: str, n_tokens: float, share: Amount = 1.0) -> Demand:
        """Adding what another agent made of the same vectors, for columns where `share` is above 0.

        Part of exchanging results between agents, and counted with the copies.
        """
        vectors = self.context.activation_bytes(n_tokens, "fp16")
        return self.compute(
            "join", OpKind.TRANSFER, agent, _present(share, n_tokens * self.context.model.architecture.d_model),
            _present(share, JOIN_TRAFFIC * vectors), _present(share, 1.0))

    def step(self, agent: str) -> list[Demand]:
        """What a decode step takes beside its layers and the head: the agent's fixed cost, where it has one, and the
        draft of what the next step verifies."""
        has = self.context.agent(agent).step_overhead
        fixed = [self.compute("step", OpKind.SYNC, agent, 0.0, 0.0, 1.0)] if has else []
        return fixed + self.draft(agent)

    def draft(self, agent: str) -> list[Demand]:
        """What the draft model does: one pass after the other for each token of a draft, or all of the prompt at once.

        Its attention, each kind of its FFN, its head and the fixed cost of its steps are a class each, demanding at
        once what all its layers and passes do; [] where nothing is drafted.
        """
        drafting = self.context.drafting
        if drafting is None:
            return []
        own, decoding = Ops(drafting, 1, agents=(agent,), phase=self.phase), self.phase is Phase.DECODE
        kinds = drafting.layers
        parts = [(own.mixer(agent, own.n_tokens, own.context_flop, own.context_bytes), len(kinds.kind)),
                 *((own.feed(agent, name, own.n_tokens), kinds.kind.count(k)) for k, name in enumerate(kinds.names)),
                 (own.head(agent), 1), *((one, 1) for one in (own.step(agent) if decoding else []))]
        for one, _ in parts:
            last = own.op(one)
        once, found = own.build(last), []
        for (k, stream), uses in parts:
            what, times = once.classes[k], uses * (self.context.workload.draft_length if decoding else 1)
            if what.kind is not OpKind.SYNC:
                shape = what.products
                what = replace(what, name=f"{DRAFT}{what.name}", kind=OpKind.DRAFT,
                               products=shape and replace(shape, count=shape.count * times))
            found.append((self.builder.demand(
                what, flop=times * float(once.flop[k, 0]), requests=times * float(once.requests[k, 0]),
                bytes={name: times * float(amount[k, 0]) for name, amount in once.bytes.items()}), stream))
        return found

    # --- the program ------------------------------------------------------------------------------

    def op(self, what: Demand, *, deps: Sequence[int | None] = (), token: int = 0, layer: int = 0, nth: int = 0) -> int:
        """Append an op, of several demands the `nth`; returns its index."""
        return self.builder.op(what[0] + nth, what[1], deps=deps, phase=self.phase, token=token, layer=layer)

    def chain(self, moves: Sequence[Demand], *, deps: Sequence[int | None] = (), token: int = 0, layer: int = 0,
              nth: int = 0) -> tuple[int | None, ...]:
        """Append ops one after the other; returns what to wait for: the last of them, or `deps` if there are none."""
        waited = tuple(deps)
        for what in moves:
            waited = (self.op(what, deps=waited, token=token, layer=layer, nth=nth),)
        return waited

    def build(self, last: int, held_bytes: Mapping[str, Amount] | None = None) -> Schedule:
        """The finished schedule; `last` ends its last token. A prompt passes through the draft model too."""
        if self.phase is Phase.PREFILL:
            for what in self.draft(self.agents[0]):
                last = self.op(what, deps=[last])
        self.builder.end_token(last)
        return self.builder.build(held_bytes)


def _present(share: Amount, amount: Amount) -> Amount:
    """`amount` for the columns with a share above 0."""
    if isinstance(share, (int, float)):
        return amount if share > 0 else 0.0
    return np.where(share > 0, amount, 0.0)
