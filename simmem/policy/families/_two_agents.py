"""What policies share that compute on a GPU with its own memory and on the CPU beside it."""

from __future__ import annotations

from simmem.policy.base import Knob
from simmem.policy.context import Context

__all__ = ["PROMPT_ON_GPU", "gpu_knob", "host_of", "output_bytes", "pass_through_bytes", "why_not_two"]

PROMPT_ON_GPU = 32
"""From so many tokens at once, weights in host memory are copied to the GPU and multiplied there: what llama.cpp does
(ggml-org/llama.cpp PR 6083), and where PowerInfer found computing on the CPU to lose (arXiv 2312.12456, §3.2)."""
_SLICES = 2
"""One is copied while the other is multiplied."""


def host_of(context: Context) -> str:
    """The agent that computes out of host memory; only for contexts where `why_not_two` finds nothing."""
    assert context.host_agent is not None
    return context.host_agent


def why_not_two(context: Context) -> str | None:
    """Why no GPU with memory of its own can share the layers with a CPU here; None where one can."""
    device, host = context.device, context.host_agent
    if device.is_unified:
        return f"{device.name} has one memory for all its units: nothing has to be split between two"
    if host is None or host not in context.able_agents:
        return f"no unit of {device.name} multiplies {context.workload.weights} weights out of host memory"
    if not _gpus(context):
        return (f"no unit of {device.name} multiplies {context.workload.weights} weights out of memory of its own and "
                "is joined to host memory both ways")
    return None


def gpu_knob(context: Context) -> Knob:
    """Which unit computes what lies in its own memory."""
    return Knob("agent", "structural", _gpus(context), "which unit computes beside the CPU")


def output_bytes(context: Context) -> float:
    """Weights that the output projection needs beside it, with the projections of narrow embeddings. [B]"""
    group = "embedding" if context.model.architecture.tied_head else "head"
    return max(context.head_bytes, context.model.head_params * context.stored_bytes_per_param(group)[0])


def pass_through_bytes(context: Context) -> float:
    """Room for weights that pass through the GPU's memory while a prompt is read: a matrix being copied, and one being
    multiplied; nothing where the prompt is too short for that. [B]"""
    workload, model = context.workload, context.model
    if workload.prompt_tokens * workload.batch < PROMPT_ON_GPU:
        return 0.0
    return _SLICES * max(context.layers.ffn_bytes) / model.unit_matrices


def _gpus(context: Context) -> tuple[str, ...]:
    """Able agents with memory of their own that is joined to host memory both ways, fastest first."""
    device, agents = context.device, context.able_agents
    joined = {(link.source, link.target) for link in device.link.values() if link.kind == "copy"}
    found = [name for name, agent in agents.items() if agent.memory != device.host
             and {(device.host, agent.memory), (agent.memory, device.host)} <= joined]
    return tuple(sorted(found, key=lambda name: -agents[name].rate.value * agents[name].rate_share.value))
