"""What is the least that a step or a prompt can take under the percentages of `tier-percent`?

Every row is a time that no schedule of `_tier_schedule` beats, at full rates and without latencies: how long a stream
is busy, or one way through the schedule along which one op waits for the other. All are linear in the shares, so that
the linear programme that places by them gives a bound for every other placement.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simmem.policy.context import Context
from simmem.policy.families._class_seconds import class_seconds, uncached
from simmem.policy.families._fair_share import fair_share
from simmem.policy.families._tier_bytes import Layout
from simmem.policy.families._tier_schedule import IN_SERIES, tier_schedule
from simmem.schedule import OpKind, Phase, Schedule

__all__ = ["least_rows"]

Array = NDArray[np.float64]


def least_rows(context: Context, at: Layout, phase: Phase) -> list[Array]:
    """Times that a step or a prompt at a layout does not beat, each (n,). [s]"""
    schedule = tier_schedule(context, at, phase, 1)
    seconds = class_seconds(context, schedule)
    ops = np.flatnonzero(schedule.timed)
    took, place = seconds[schedule.op_class[ops]], schedule.op_layer[ops]
    names = [what.name for what in schedule.classes]
    # The GPU's part of attention runs beside the CPU's, everything else that computes one after another.
    beside = [what.name == "attention" and what.agent == at.gpu for what in schedule.classes]
    waited = [(what.agent is not None and not aside) or what.name.startswith(IN_SERIES)
              for what, aside in zip(schedule.classes, beside, strict=True)]
    n_stages = context.model.architecture.n_layers + 1

    def by_stage(mine: NDArray[np.bool_], amounts: Array) -> Array:
        found = np.zeros((n_stages, seconds.shape[1]))
        np.add.at(found, place[mine], amounts[mine])
        return found

    of_weights = np.array([name.startswith("weights.") for name in names])[schedule.op_class[ops]]
    # What waits for a copy waits for its latency too; the link does not.
    late = np.array([context.device.link[what.link].latency.value if what.link else 0.0 for what in schedule.classes])
    whole = seconds + late[:, None] * schedule.present
    done = by_stage(np.array(waited)[schedule.op_class[ops]], whole[schedule.op_class[ops]])
    streams = range(len(schedule.streams))
    rows = [took[schedule.op_stream[ops] == stream].sum(axis=0) for stream in streams]
    brought = [by_stage(of_weights & (schedule.op_stream[ops] == stream), took) for stream in streams]
    ends = np.array([what.kind in (OpKind.SYNC, OpKind.DRAFT) for what in schedule.classes])[schedule.op_class[ops]]
    arriving = {name: each for name, each in zip(schedule.streams, brought, strict=True) if each.any()}
    waits = np.array(waited)[:, None] * whole
    rows += _sharing_host(context, schedule, seconds, waits, 0.0)
    if phase is Phase.DECODE and arriving:
        # The first layer's weights may be copied once the last layer of the step before is done, and a link brings
        # those of all layers from then until the last is done again.
        fast, host = context.memory_of(at.gpu), context.device.host
        path = [f"link.{name}" for name in (*context.device.path(context.device.storage, host),
                                            *context.device.path(host, fast))]
        first = arriving.get(path[-1], 0.0 * done)[0] - done[-1]
        rows += [done.sum(axis=0) + first, *_sharing_host(context, schedule, seconds, waits, first)]
        onward = [sum((arriving[k][-2] for k in path[i + 1:] if k in arriving), done[-2]) for i in range(len(path))]
        rows += [arriving[name][:-1].sum(axis=0) + onward[i] for i, name in enumerate(path) if name in arriving]
    rows += [done.sum(axis=0), *_ways_through(done, took[ends].sum(axis=0), list(arriving.values()), phase)]
    return list(np.unique(np.array(rows), axis=0))


def _sharing_host(context: Context, schedule: Schedule, seconds: Array, waited: Array, idle: Array | float
                  ) -> list[Array]:
    """Ways to share the host's memory between the CPU and copies, each (n,). [s]

    All users of it together get its rate C. While other ops than the CPU's run, S seconds one after another, only
    copies use it, at L bytes a second at most: of B bytes in a step of T seconds B ≤ L·S + C·(T - S).

    A link that is busy for W seconds gets at least its fair share F of the memory, whoever else uses it, and leaves the
    CPU R = C - F. The CPU needs D seconds at its own rate r, and the link is busy for at least W - S of T - S: so
    T - S ≥ D + (1 - R/r)·(W - S). With everything else that may use the memory F is small; without some links it is
    larger, but for the V seconds only that these take: W - S - V.

    seconds : (n_classes, n) least of each class. [s]
    waited : (n_classes, n) the same of those whose ops run one after another, latencies with them; 0 of others. [s]
    idle : in which none of these runs. [s]
    """
    device, cpu = context.device, context.host_agent
    moved = schedule.bytes.get(f"memory.{device.host}")
    if cpu is None or moved is None or device.interference:
        return []
    uses = np.bincount(schedule.op_class[schedule.timed], minlength=len(schedule.classes))
    agent, links = device.agent[cpu], [k for k in device.link.values() if device.host in (k.source, k.target)]
    rate = device.capacity_bytes_per_s(f"memory.{device.host}")
    own = agent.rate.value * (1.0 if device.cost_model else agent.rate_share.value)
    if agent.attention_rate is not None:
        own = agent.attention_rate.value
    helping = np.array([what.agent == cpu for what in schedule.classes])
    read = uses[helping] @ moved[helping] * uncached(schedule, cpu, agent, own)
    elsewhere = uses[~helping] @ waited[~helping] + idle
    copied = min(sum(k.rate.value for k in links), rate)
    rows = [(uses[~helping] @ moved[~helping] + read + (rate - copied) * elsewhere) / rate]
    busy = {name: uses @ (seconds * np.array([what.link == name for what in schedule.classes])[:, None])
            for name, link in device.link.items() if link in links}
    least = {name: fair_share(context, name, list(busy)) for name in busy}
    for name, mine in busy.items():
        beside, most = [name], fair_share(context, name, [name])
        for other in sorted(busy, key=lambda k: device.link[k].rate.value):
            if other != name and fair_share(context, name, [*beside, other]) >= most:
                beside.append(other)
        away = sum((busy[k] * device.link[k].rate.value / least[k] for k in busy if k not in beside), 0.0 * elsewhere)
        for share, alone in ((least[name], mine), (most, mine - away)):
            rows.append(read / own + elsewhere + max(1.0 - (rate - share) / own, 0.0) * (alone - elsewhere))
    return rows


def _ways_through(done: Array, after: Array, brought: list[Array], phase: Phase) -> list[Array]:
    """Ways through a step or prompt along which stages wait for their weights, each (n,). [s]

    Weights have two buffers: a stage's are asked for when the stage two before it is done.

    done : (n_stages, n) what a stage does one after another. [s]
    after : (n,) what of that follows the head of a step: its fixed cost and a draft. [s]
    brought : per link, (n_stages, n) what its weights take over it. [s]
    """
    arrival = sum(brought, np.zeros_like(done))
    if phase is Phase.PREFILL:  # nothing has come before
        return [done.sum(axis=0) + arrival[0]]
    # A step lasts from the end of the one before to its own. One of its stages waits for its weights, meanwhile only
    # the stage before it is done; the second one's are on their way when the step before has its head done.
    rows = list(done.sum(axis=0) - done[:-1] + arrival[1:])
    rows[0] = rows[0] - after
    # Every other stage waits for its weights.
    every = np.arange(len(done) - 1, 0, -2)
    rows.append((done + arrival)[every].sum(axis=0) + (done[0] if len(done) % 2 else -after))
    # A link brings the weights of one stage after the other, from the second one's on, which the head's end makes room
    # for, to the head's.
    return [*rows, *(each[1:].sum(axis=0) + done[-1] - after for each in brought)]
