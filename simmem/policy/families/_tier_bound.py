"""What is the least that a step or a prompt can take under the percentages of `tier-percent`?

Every row is a time that no schedule of `_tier_schedule` beats: how long a stream is busy, one way through the schedule
along which one op waits for the other, or how long the users of host memory are busy with it. All are linear in the
shares but for what an op takes at any share (its latency, its kernels), which is concave: a line through the corners is
below it. So the linear programme that places by the rows gives a bound for every other placement.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simmem.policy.context import Context
from simmem.policy.families._class_seconds import class_seconds, memory_rate, uncached
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
    beside = [what.name in ("attention", "unpack states") and what.agent == at.gpu for what in schedule.classes]
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
    arriving = dict(zip(schedule.streams, brought, strict=True))
    reads, copies = _weight_links(context, at)
    read, copied = (sum((arriving[name] for name in links), 0.0 * done) for links in (reads, copies))
    # Copies that go ahead while the CPU attends wait for no read: only what was read has to be copied after that.
    ahead = _copies_ahead(context, at, phase)
    behind = np.where(ahead, sum(_rate(context, reads[-1]) / _rate(context, name) for name in copies)
                      * arriving[reads[-1]], copied)
    waits = np.array(waited)[:, None] * whole
    rows += _sharing_host(context, schedule, seconds, waits, 0.0)
    if phase is Phase.DECODE:
        # The first layer's weights may be copied once the last layer of the step before is done, and a link brings
        # those of all layers from then until the last is done again.
        first = arriving[copies[-1]][0] - done[-1]
        rows += [done.sum(axis=0) + first, *_sharing_host(context, schedule, seconds, waits, first)]
        for links, onward in ((reads, behind), (copies, 0.0 * done)):
            rows += [arriving[name][:-1].sum(axis=0) + done[-2] + onward[-2]
                     + sum(arriving[k][-2] for k in links[i + 1:]) for i, name in enumerate(links)]
    rows.append(done.sum(axis=0))
    after, links_busy = took[ends].sum(axis=0), [each for each in brought if each.any()]
    for arrival in (read + behind, np.where(ahead, copied, read + copied)):
        rows += _ways_through(done, after, links_busy, arrival, phase)
    return list(np.unique(np.array(rows), axis=0))


def _weight_links(context: Context, at: Layout) -> tuple[list[str], list[str]]:
    """Streams of the links that weights take out of storage, and of those on to the GPU."""
    device = context.device
    ends = (device.storage, device.host), (device.host, context.memory_of(at.gpu))
    reads, copies = ([f"link.{name}" for name in device.path(*pair)] for pair in ends)
    return reads, copies


def _copies_ahead(context: Context, at: Layout, phase: Phase) -> NDArray[np.bool_]:
    """Whether copies of weights may be done while the CPU attends, (n,)."""
    cpu = context.host_agent
    may = phase is Phase.DECODE and cpu is not None and context.agent(cpu).h2d_overlaps_cpu is not False
    return np.asarray(at.cpu_attention & may, dtype=np.bool_)


def _rate(context: Context, stream: str) -> float:
    """Of a link's stream. [B/s]"""
    return context.device.link[stream.removeprefix("link.")].rate.value


def _sharing_host(context: Context, schedule: Schedule, seconds: Array, waited: Array, idle: Array | float
                  ) -> list[Array]:
    """Ways to share the host's memory between the CPU and copies, each (n,). [s]

    All users of it together get its `rate`. While other ops than the CPU's run, for `elsewhere` seconds of a step of T
    seconds one after another, only copies use it, at most at the rate `copied`: what moves in a step is at most
    copied · elsewhere + rate · (T - elsewhere).

    A link that is `busy` gets at least its fair `share` of the memory, whoever else uses it, and leaves the CPU
    rate - share. The CPU reads `read` bytes at its `own` rate or at that, and the link is busy for at least
    busy - elsewhere of the T - elsewhere seconds that are the CPU's:
    T - elsewhere ≥ read / own + (1 - (rate - share) / own) · (busy - elsewhere). With everything else that may use the
    memory the share is small; without some `others` it is larger, but not for the seconds that these take.

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
    own = memory_rate(device, cpu, "attention")
    helping = np.array([what.agent == cpu for what in schedule.classes])
    read = uses[helping] @ moved[helping] * uncached(schedule, cpu, agent, own)
    elsewhere = uses[~helping] @ waited[~helping] + idle
    copied = min(sum(k.rate.value for k in links), rate)
    rows = [(uses[~helping] @ moved[~helping] + read + (rate - copied) * elsewhere) / rate]
    busy = {name: uses @ (seconds * np.array([what.link == name for what in schedule.classes])[:, None])
            for name, link in device.link.items() if link in links}
    least = {name: fair_share(context, name, list(busy)) for name in busy}
    for name, mine in busy.items():
        if device.link[name].kind == "storage":
            continue  # reads may draw less than its rate
        beside, most = [name], fair_share(context, name, [name])
        for other in sorted(busy, key=lambda k: device.link[k].rate.value):
            if other != name and fair_share(context, name, [*beside, other]) >= most:
                beside.append(other)
        cases, others = [(least[name], mine)], [k for k in busy if k not in beside]
        if all(device.link[k].kind == "copy" for k in others):  # reads may take longer than their bytes at its rate
            away = sum((busy[k] * device.link[k].rate.value / least[k] for k in others), 0.0 * elsewhere)
            cases.append((most, mine - away))
        rows += [read / own + elsewhere + max(1.0 - (rate - share) / own, 0.0) * (alone - elsewhere)
                 for share, alone in cases]
    return rows


def _ways_through(done: Array, after: Array, brought: list[Array], arrival: Array, phase: Phase) -> list[Array]:
    """Ways through a step or prompt along which stages wait for their weights, each (n,). [s]

    Weights have two buffers: a stage's are asked for when the stage two before it is done.

    done : (n_stages, n) what a stage does one after another. [s]
    after : (n,) what of that follows the head of a step: its fixed cost and a draft. [s]
    brought : per link, (n_stages, n) what its weights take over it. [s]
    arrival : (n_stages, n) the least from asking for a stage's weights to their being there. [s]
    """
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
