"""What does a copy get of a memory that others use at the same time?"""

from __future__ import annotations

from collections.abc import Sequence

from simmem.policy.context import Context

__all__ = ["fair_share"]


def fair_share(context: Context, name: str, beside: Sequence[str]) -> float:
    """The least that a link gets of the memories and the bus that it uses, beside all units and these links. [B/s]"""
    device, link = context.device, context.device.link[name]
    found, others = link.rate.value, [device.link[k] for k in beside]
    shared = [(f"memory.{m}", [a.rate.value for a in device.agent.values() if a.memory == m]
               + [k.rate.value for k in others if m in (k.source, k.target)])
              for m in (link.source, link.target) if m != device.storage]
    if link.bus is not None:
        shared.append((f"bus.{link.bus}", [k.rate.value for k in others if k.bus == link.bus]))
    for resource, draws in shared:
        left = device.capacity_bytes_per_s(resource)
        for k, draw in enumerate(sorted(draws)):  # who asks for less than an equal share of what is left has it all
            if draw >= found or draw * (len(draws) - k) >= left:
                found = min(found, left / (len(draws) - k))
                break
            left -= draw
    return found
