"""llama.cpp: the last layers in the GPU's memory and computed there, those before them in host memory, by the CPU.

`--n-gpu-layers`: whole layers, their keys and values with them; one more than there are layers takes the output
projection too. No weights move while decoding, and the two units take turns. A long prompt is another matter: from 32
tokens on the weights of the CPU's layers are copied to the GPU and multiplied there (ggml-org/llama.cpp PR 6083).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.policy.base import Block, Knob, Placement, register, why_not_plan
from simmem.policy.context import Context
from simmem.policy.families._two_agents import (
    PROMPT_ON_GPU,
    gpu_knob,
    host_of,
    output_bytes,
    pass_through_bytes,
    why_not_two,
)
from simmem.policy.ops import Ops
from simmem.schedule import Phase, Schedule

__all__ = ["LayerSplit"]

Array = NDArray[np.float64]


@register
class LayerSplit:
    """Whole layers on the GPU, the others on the CPU."""

    name = "layer-split"
    summary = "the last layers on the GPU, those before them on the CPU, one after the other"
    uses_trace = False
    same_at_every_budget = True

    def why_not(self, context: Context) -> str | None:
        """Why this policy cannot plan a context; None where it can."""
        return why_not_two(context)

    def knobs(self, context: Context) -> tuple[Knob, ...]:
        if why_not_plan(self, context) is not None:
            return ()
        most = context.model.architecture.n_layers + 1
        return (gpu_knob(context),
                Knob("gpu_layers", "demand", tuple(range(most + 1)),
                     f"layers on the GPU; {most} takes the output projection too", low=0, high=most))

    def agents(self, context: Context, block: Block) -> tuple[str, ...]:
        return str(block.structural["agent"]), host_of(context)

    # --- memory ---------------------------------------------------------------------------------

    def _on_gpu(self, context: Context, block: Block) -> Array:
        """1 for every layer and at last the output projection that the GPU has, (n_layers + 1, n)."""
        n_layers, given = context.model.architecture.n_layers, block.columns["gpu_layers"]
        first = n_layers - np.minimum(given, n_layers)
        layers = np.arange(n_layers)[:, None] >= first[None, :]
        return np.concatenate([layers, (given > n_layers)[None, :]]).astype(np.float64)

    def _weights(self, context: Context, on_gpu: Array) -> tuple[Array, Array]:
        """Weights in the GPU's and in host memory, (n,) each. [B]

        The input embedding stays in host memory, where it is looked up; a tied one is on the GPU a second time when
        that computes the output.
        """
        stored = np.array([context.layers.stored_bytes[kind] for kind in context.layers.kind])
        output = output_bytes(context)
        near = np.cumsum(stored[:, None] * on_gpu[:-1], axis=0)[-1] + on_gpu[-1] * output
        copied = on_gpu[-1] * (output - context.group_bytes.get("head", 0.0))
        return near, np.maximum(context.total_bytes - near + copied, 0.0)

    def _held(self, context: Context, block: Block) -> tuple[Array, Array]:
        """Weights, keys and values in the GPU's and in host memory, (n,) each. [B]"""
        on_gpu = self._on_gpu(context, block)
        near, far = self._weights(context, on_gpu)
        kv = context.kv_bytes * np.minimum(block.columns["gpu_layers"], len(on_gpu) - 1) / (len(on_gpu) - 1)
        return near + kv, far + context.kv_bytes - kv

    def _passing(self, context: Context, block: Block) -> Array:
        """Room on the GPU for weights that pass through while the prompt is read, (n,). [B]"""
        given = block.columns["gpu_layers"]
        mixed = (given > 0) & (given < context.model.architecture.n_layers)
        return np.where(mixed, pass_through_bytes(context), 0.0)

    def footprint(self, context: Context, block: Block) -> dict[str, Array]:
        gpu, host = (context.memory_of(name) for name in self.agents(context, block))
        near, far = self._held(context, block)
        return {gpu: near + self._passing(context, block) + context.working_bytes, host: far + context.working_bytes,
                context.device.storage: np.full(block.n_candidates, context.total_bytes)}

    # --- demand ---------------------------------------------------------------------------------

    def decode(self, context: Context, block: Block, rows: NDArray[np.int64]) -> Schedule:
        return self._schedule(context, block, Phase.DECODE, len(rows))

    def prefill(self, context: Context, block: Block) -> Schedule:
        return self._schedule(context, block, Phase.PREFILL)

    def _schedule(self, context: Context, block: Block, phase: Phase, n_rows: int = 1) -> Schedule:
        """Every layer on the unit that has it, hidden vectors crossing where that changes."""
        device, (gpu, host) = context.device, self.agents(context, block)
        vram, dram = context.memory_of(gpu), context.memory_of(host)
        here = np.repeat(self._on_gpu(context, block), n_rows, axis=1)
        ops = Ops(context, here.shape[1], agents=(gpu, host), phase=phase)
        computed = here  # where each layer is computed: not where it lies, when a long prompt takes it to the GPU
        if phase is Phase.PREFILL and ops.n_tokens >= PROMPT_ON_GPU:
            computed = np.concatenate([np.maximum(here[:-1], here[:-1].max(axis=0)), here[-1:]])
        n_layers, last = len(here) - 1, None
        for layer in range(n_layers):
            kind = context.layers.kind[layer]
            near, away = computed[layer], computed[layer] - here[layer]
            copied = ops.chain(ops.move("weights", away * context.layers.stored_bytes[kind], device.path(dram, vram)),
                               layer=layer)
            crossed = self._cross(ops, layer, last, computed, vram, dram)
            waited = (*crossed, *copied)
            for agent, share in ((gpu, near), (host, 1.0 - near)):
                mixer = ops.mixer(agent, ops.n_tokens, ops.context_flop, ops.context_bytes, share)
                waited = (ops.op(mixer, deps=waited, layer=layer),)
                waited = (ops.op(ops.feed(agent, context.layers.names[kind], ops.n_tokens, share), deps=waited,
                                 layer=layer),)
            last = waited[0]
        waited = self._cross(ops, n_layers, last, computed, vram, dram)
        for agent, share in ((gpu, computed[-1]), (host, 1.0 - computed[-1])):
            waited = (ops.op(ops.head(agent, share), deps=waited, layer=n_layers),)
        last = waited[0]
        for what in ops.step(gpu) if phase is Phase.DECODE else []:
            last = ops.op(what, deps=[last], layer=n_layers)
        assert last is not None
        near_held, far_held = (np.repeat(held, n_rows) for held in self._held(context, block))
        return ops.build(last, {vram: near_held, dram: far_held})

    def _cross(self, ops: Ops, stage: int, last: int | None, computed: Array, vram: str, dram: str
               ) -> tuple[int | None, ...]:
        """Hidden vectors (fp32) go over where a stage is not computed where the one before was."""
        waited: tuple[int | None, ...] = (last,)
        if stage == 0:  # the embedding's rows are small, and no engine waits for them
            return waited
        before, now = computed[stage - 1], computed[stage]
        tokens = ops.n_tokens if stage < len(computed) - 1 else ops.n_outputs
        for source, target, crossing in ((dram, vram, now > before), (vram, dram, now < before)):
            moves = ops.hidden("hidden", source, target, tokens * crossing, precision="fp32")
            waited = ops.chain(moves, deps=waited, layer=stage)
        return waited

    # --- what to tell ---------------------------------------------------------------------------

    def placements(self, context: Context, block: Block) -> list[Placement]:
        gpu, host = (context.memory_of(name) for name in self.agents(context, block))
        near, far = (float(w[0]) for w in self._weights(context, self._on_gpu(context, block)))
        kv = float(self._held(context, block)[0][0]) - near
        passing = float(self._passing(context, block)[0])
        layers = min(int(block.columns["gpu_layers"][0]), context.model.architecture.n_layers)
        found = [
            Placement(f"last {layers} layers", gpu, near, loaded=True),
            Placement("the other layers, embeddings", host, far, loaded=True),
            Placement("keys and values", gpu, kv),
            Placement("keys and values", host, context.kv_bytes - kv),
            Placement("weights passing through", gpu, passing),
            Placement("activations", gpu, context.working_bytes),
            Placement("activations", host, context.working_bytes),
            Placement("copy of everything", context.device.storage, context.total_bytes),
        ]
        return [p for p in found if p.bytes > 0]

    def report(self, context: Context, block: Block, rows: NDArray[np.int64]) -> dict[str, Any]:
        gpu, host = self.agents(context, block)
        n_layers, given = context.model.architecture.n_layers, int(block.columns["gpu_layers"][0])
        share = min(given, n_layers) / n_layers
        near = float(self._weights(context, self._on_gpu(context, block))[0][0])
        notes = [f"the {gpu} holds {100 * near / context.total_bytes:.1f} % of the weights and computes "
                 f"{min(given, n_layers)} of {n_layers} layers; the {host} computes the others while it waits"]
        return {"requested_bytes": 0.0, "cache": {}, "active_share": {gpu: share, host: 1.0 - share}, "notes": notes,
                "perplexity_ratio": 1.0, "quality_source": "dense: no work is dropped"}
