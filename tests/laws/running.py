"""What must hold of a run, in the words of `simmem.schedule`; shared by the laws over schedules and over policies."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simmem.planner.bound import agents_bound, lower_bound
from simmem.policy.base import Block, Policy, agents_of
from simmem.policy.context import Context
from simmem.schedule import Schedule
from simmem.sim.events import Contention
from simmem.sim.timeline import Timeline
from simmem.spec.device import Device

__all__ = ["alone_s", "assert_bounded", "assert_in_order", "shared_s", "slowed"]


def assert_in_order(run: Timeline) -> None:
    """One op at a time on a stream, in program order, after all that it waits for; absent ops take no time."""
    schedule = run.schedule
    present = schedule.present[schedule.op_class, 0]
    for stream in range(len(schedule.streams)):
        ops = np.flatnonzero(present & (schedule.op_stream == stream))
        assert (run.start_s[ops][1:] >= run.free_s[ops][:-1]).all(), "in program order, none before the last"
        assert (run.free_s[ops] >= run.start_s[ops]).all()
    for op, deps in enumerate(schedule.deps):
        assert all(run.end_s[d] <= run.start_s[op] for d in deps)
        if not present[op]:
            assert run.start_s[op] == run.end_s[op] == max((run.end_s[d] for d in deps), default=0.0)


def alone_s(schedule: Schedule, device: Device, column: int) -> float:
    """What the busiest link or agent takes at its full rate, whatever else goes on. [s]"""
    least = 0.0
    for name, link in device.link.items():
        of = [k for k in schedule.op_class if schedule.classes[k].link == name]
        moved = schedule.bytes.get(f"link.{name}", np.zeros_like(schedule.flop))
        least = max(least, moved[of, column].sum() / link.rate.value)
    for name, agent in device.agent.items():
        of = [k for k in schedule.op_class if schedule.classes[k].agent == name]
        peak = max(f.value for f in agent.flop_per_s.values())
        fastest = max(f.value for f in (agent.rate, agent.cache_rate, agent.attention_rate) if f is not None)
        moved = schedule.bytes.get(f"memory.{agent.memory}", np.zeros_like(schedule.flop))
        least = max(least, moved[of, column].sum() / fastest, schedule.flop[of, column].sum() / peak)
    return float(least)


def shared_s(schedule: Schedule, contention: Contention, column: int) -> float:
    """What the busiest of the shared resources takes for all its users together. [s]"""
    return max((schedule.bytes[name][schedule.op_class, column].sum() / contention.available(name)
                for name in contention.capacity_bytes_per_s if name in schedule.bytes), default=0.0)


def slowed(given: Contention, c: float) -> Contention:
    """The same, with everything that is shared `c` times slower."""
    return Contention({k: v / c for k, v in given.capacity_bytes_per_s.items()}, given.interference,
                      given.background, given.queue_limit)


def assert_bounded(context: Context, policy: Policy, block: Block, took: NDArray[np.float64]) -> None:
    """No candidate that fits is faster than its agents can be, nor in the mean than all of the device together.

    took : token seconds, (candidates, trace tokens). [s]
    """
    fits = np.ones(block.n_candidates, np.bool_)
    for tier, used in policy.footprint(context, block).items():
        fits &= used <= context.budget_bytes[tier]
    mine = agents_bound(context, agents_of(policy, context, block), any_token=True)
    assert (took[fits] >= mine.token_latency_s * (1 - 1e-9)).all()
    assert (took[fits].mean(axis=1) >= lower_bound(context).token_latency_s * (1 - 1e-9)).all()
