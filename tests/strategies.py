"""Which devices, models, traces, workloads, knobs and schedules must the laws hold for? Random ones.

Structure is drawn by Hypothesis, so that a failure shrinks to a small device and a short schedule;
amounts come from a generator seeded by it, so that an example stays cheap. Figures range over what
is sold and a little beyond; models are small, so that reads smaller than a block, layers smaller
than a request and constants larger than the work all occur.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import reject, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.planner.candidate import Candidate, contention_of
from simmem.policy.base import Block, KnobValue, Policy, one_value, policies, why_not_plan
from simmem.policy.context import Context, Replayed
from simmem.schedule import DemandClass, Durations, OpKind, Schedule, ScheduleBuilder
from simmem.sim.events import Contention
from simmem.spec.device import Device
from simmem.spec.model import Model, load_model
from simmem.spec.precision import PRECISIONS
from simmem.spec.workload import Workload
from simmem.trace.predictors import judge
from simmem.trace.trace import Predictor, Quality, Trace, TraceHeader, digest_of

Array = NDArray[np.float64]

MANY = settings(max_examples=max(150, settings.default.max_examples if settings.default else 0))
"""For laws whose examples are cheap."""

UNITS = {"capacity": "B", "reserved": "B", "rate": "B/s", "request_rate": "B/s", "single_rate": "B/s", "block": "B",
         "latency": "s", "request_time": "s", "op_overhead": "s", "step_overhead": "s", "graph_overhead": "s",
         "cache": "B", "cache_rate": "B/s", "attention_rate": "B/s", "energy_per_byte": "J/B",
         "energy_per_flop": "J/FLOP", "idle": "W", "flop": "FLOP/s"}


def figure(name: str, value: float) -> dict[str, Any]:
    """A figure of a device file; shares and counts are bare numbers."""
    unit = UNITS.get(name)
    return {"value": f"{value!r} {unit}" if unit else value, "kind": "measured", "source": "drawn at random"}


def seeds() -> st.SearchStrategy[np.random.Generator]:
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


@st.composite
def devices(draw: st.DrawFn, *, energy: bool = False, two_sided: bool = False) -> Device:
    """Graphs of memories, agents and links.

    Unified or not, one to four agents, a GPU of its own memory or two, links back from it and to storage or none, a bus
    that links share, measured interference, and every figure that is optional. With `two_sided` a GPU with memory of
    its own and a CPU, with links both ways.
    """
    rng = draw(seeds())
    unified = not two_sided and draw(st.booleans())
    both = two_sided or draw(st.booleans())
    shared = draw(st.booleans())

    def some(name: str, low: float, high: float) -> dict[str, Any]:
        return {name: figure(name, log_uniform(rng, low, high))}

    def maybe(name: str, low: float, high: float, chance: float = 0.5) -> dict[str, Any]:
        return some(name, low, high) if rng.random() < chance else {}

    def memory(kind: str, capacity: float) -> dict[str, Any]:
        found = {"kind": kind, "capacity": figure("capacity", capacity)}
        if shared and kind != "storage":
            found |= some("rate", 1e9, 1e12)
        return found | (some("energy_per_byte", 1e-12, 1e-9) if energy else {})

    def agent(memory_name: str) -> dict[str, Any]:
        found = {"memory": memory_name, "flop_per_s": {"fp32": figure("flop", log_uniform(rng, 1e9, 1e13))},
                 "flop_share": figure("flop_share", float(rng.uniform(0.1, 1))),
                 "rate_share": figure("rate_share", float(rng.uniform(0.1, 1)))}
        found |= some("rate", 1e9, 1e12) | some("op_overhead", 1e-7, 1e-4) | maybe("step_overhead", 1e-7, 1e-2)
        found |= maybe("graph_overhead", 1e-7, 1e-4) | maybe("attention_rate", 1e9, 1e12, 0.3)
        if rng.random() < 0.5:
            found["flop_per_s"]["fp16"] = figure("flop", log_uniform(rng, 1e9, 1e14))
        if rng.random() < 0.3:
            found["processors"] = figure("processors", int(rng.integers(1, 200)))
        if rng.random() < 0.3:
            found |= some("cache", 1e3, 1e7) | some("cache_rate", 1e9, 1e13)
        if rng.random() < 0.3:
            found["dequantise_bytes"] = figure("dequantise_bytes", float(rng.uniform(0, 20)))
        if rng.random() < 0.5:
            found["launch"] = str(rng.choice(["stream", "graph"]))
        if memory_name == "dram" and rng.random() < 0.5:
            found["h2d_overlaps_cpu"] = bool(rng.random() < 0.5)
        return found | (some("energy_per_flop", 1e-14, 1e-10) if energy else {})

    def copy(source: str, target: str) -> dict[str, Any]:
        return {"kind": "copy", "source": source, "target": target, **some("rate", 1e9, 1e11),
                **some("latency", 1e-6, 1e-4), **(some("energy_per_byte", 1e-12, 1e-9) if energy else {})}

    storage = {"kind": "storage", "source": "flash", "target": "dram"}
    storage |= some("rate", 1e8, 2e10) | some("latency", 5e-6, 1e-3) | some("request_time", 1e-7, 5e-5)
    storage |= some("request_rate", 1e8, 3e10) | {"block": figure("block", float(2 ** rng.integers(9, 15)))}
    if rng.random() < 0.7:
        storage |= {"best_depth": figure("best_depth", int(rng.integers(1, 128))),
                    "overload_exponent": figure("overload_exponent", float(rng.choice([0.0, 0.2, 1.0])))}
    storage |= maybe("single_rate", 1e7, 3e10)
    if energy:
        storage |= some("energy_per_byte", 1e-11, 1e-8)
    memories, links = {"flash": memory("storage", 1e12)}, {"flash": storage}
    memories["dram"] = memory("unified" if unified else "host", 1e11)
    agents = {"cpu": agent("dram")} if both or unified else {}
    if unified:
        agents |= {"gpu": agent("dram")} if both else {}
    else:
        for n in ("", "2") if draw(st.integers(0, 7)) == 7 else ("",):
            memories[f"vram{n}"], agents[f"gpu{n}"] = memory("device", 1e11), agent(f"vram{n}")
            links[f"h2d{n}"] = copy("dram", f"vram{n}")
            if two_sided or rng.random() < 0.8:
                links[f"d2h{n}"] = copy(f"vram{n}", "dram")
    if draw(st.integers(0, 4)) == 4:
        agents["npu"] = agent("dram")
    if draw(st.booleans()):
        links["write"] = copy("dram", "flash")
    buses = {}
    on_bus = [name for name in links if name.startswith(("h2d", "d2h"))]
    if len(on_bus) > 1 and draw(st.booleans()):
        rates = [float(links[name]["rate"]["value"].split()[0]) for name in on_bus]
        buses["pcie"] = {"rate": figure("rate", float(rng.uniform(max(rates), sum(rates))))}
        for name in on_bus:
            links[name]["bus"] = "pcie"
    rules = []
    if both and unified and draw(st.booleans()):
        rules = [{"victim": a, "aggressor": b, "memory": "dram", "share": figure("share", float(rng.uniform(0.2, 1)))}
                 for a, b in (("cpu", "gpu"), ("gpu", "cpu"))]
    return Device.model_validate({
        "schema": "simmem.device/1", "name": "random", "title": "drawn at random", "memory": memories,
        "agent": agents, "link": links, "bus": buses, "interference": rules,
        **({"idle": figure("idle", log_uniform(rng, 0.1, 100))} if energy else {})})


@st.composite
def models(draw: st.DrawFn) -> Model:
    """One to four layers; gated or not, tied or not, with and without biases and narrow embeddings."""
    rng = draw(seeds())
    gated, tied, biased = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    kv_heads = int(rng.integers(1, 3))
    d_head = int(rng.choice([4, 8, 16]))
    heads = kv_heads * int(rng.integers(1, 3))
    d = heads * d_head
    narrow = int(rng.integers(2, d)) if rng.random() < 0.2 and d > 3 else None
    return Model.model_validate({
        "schema": "simmem.model/1", "name": "random", "title": "drawn at random", "family": "random",
        "source": "drawn at random", "native_precision": draw(st.sampled_from(["fp16", "fp32", "bf16"])),
        "architecture": {
            "d_model": d, "n_layers": draw(st.integers(1, 4)), "n_heads": heads, "n_kv_heads": kv_heads,
            "d_head": d_head, "d_ff": int(rng.integers(4, 200)) * int(rng.choice([1, 1, 20])),
            "vocab": int(rng.integers(10, 2000)), "max_positions": 4096, "gated": gated, "activation": "relu",
            "learned_position_rows": int(rng.choice([0, 64])), "embedding_dim": narrow, "tied_head": tied,
            "head_bias": biased and not tied, "qkv_bias": biased, "attention_output_bias": biased, "ffn_bias": biased,
            "norm": str(rng.choice(["layernorm", "rmsnorm"])), "norms_per_layer": int(rng.integers(1, 5)),
            "final_norm": bool(rng.random() < 0.8), "qk_norm": bool(rng.random() < 0.2)}})


@st.composite
def other_models(draw: st.DrawFn, kind: str | None = None) -> Model:
    """Mixtures of experts, latent attention, sliding windows, state spaces, and weights at a file's own precisions."""
    model, rng = draw(models()), draw(seeds())
    parts = model.architecture.model_dump()
    what = kind or draw(st.sampled_from(["experts", "window", "state space", "file"]))
    d, layers = parts["d_model"], int(rng.integers(1, 6))
    parts["n_layers"] = layers
    if what == "experts":
        count = int(rng.integers(1, 12))
        parts["experts"] = {
            "count": count, "per_token": int(rng.integers(1, count + 1)), "d_expert": int(rng.integers(1, 60)),
            "d_shared": int(rng.integers(0, 2) * rng.integers(1, 60)), "first_layer": int(rng.integers(0, layers)),
            "every": int(rng.integers(1, 3)), "router_bias": bool(rng.random() < 0.5), "bias": bool(rng.random() < 0.5)}
        if rng.random() < 0.5:
            parts.update(qk_norm=False, latent_attention={
                "q_rank": None if rng.random() < 0.5 else int(rng.integers(1, d + 1)),
                "kv_rank": int(rng.integers(1, d + 1)), "d_rope": 4, "d_nope": 8, "d_value": 8})
    elif what == "window":
        parts.update(window=int(rng.integers(1, 300)), n_window_layers=int(rng.integers(1, layers + 1)))
    elif what == "state space":
        parts.update(n_heads=0, n_kv_heads=0, d_head=0, d_ff=0, norms_per_layer=1, ffn_bias=False, qk_norm=False,
                     state_space={"d_inner": 2 * d, "d_state": 16, "d_conv": 4, "dt_rank": max(d // 16, 1)})
    changed = Model.model_validate({**model.model_dump(by_alias=True), "architecture": parts})
    if what == "file":
        held = {g.name: g.params * float(rng.uniform(0.3, 4.0)) for g in changed.groups()}
        changed = changed.model_copy(update={"file_bytes": held})
    return changed


@st.composite
def traces(draw: st.DrawFn, model: Model) -> Trace:
    """Skewed and local, as captured ones are: units fire at very unequal rates, and again after they fired."""
    a = model.architecture
    rng = draw(seeds())
    n_tokens = draw(st.integers(1, 16))
    share, stays = draw(st.sampled_from([0.02, 0.1, 0.4, 0.9])), draw(st.sampled_from([0.0, 0.5, 0.9]))
    rate = np.clip(share * rng.gamma(0.3, 1 / 0.3, (a.n_layers, a.d_ff)), 0, 1)
    bits = np.empty((n_tokens, a.n_layers, a.d_ff), np.bool_)
    bits[0] = rng.random(rate.shape) < rate
    for token in range(1, n_tokens):
        again = rng.random(rate.shape) < stays
        bits[token] = np.where(again, bits[token - 1], rng.random(rate.shape) < rate)
    active = np.packbits(bits, axis=2, bitorder="little")
    predictor = draw(st.sampled_from(["low-rank", "gate", "oracle", "none"]))
    quality = Quality(text="random", tokens=10, dense_perplexity=10.0, sparse_perplexity=11.0)
    held = draw(st.sampled_from([(), (("low-rank", 0),), (("gate", 0), ("low-rank", 0), ("low-rank", 1))]))
    return with_predictors(rng, held, Trace(TraceHeader(
        name="random", kind="captured", model=model.name, n_tokens=n_tokens, n_layers=a.n_layers, n_units=a.d_ff,
        unit_bytes=model.unit_bytes("fp16"), criterion="random", threshold="none", records="active",
        predictor=predictor, predictor_params_share=0.03 if predictor == "low-rank" else 0.0,
        quality=quality if rng.random() < 0.5 else None, text="none", digest=digest_of(active)), active))


@st.composite
def routing_traces(draw: st.DrawFn, model: Model) -> Trace:
    """Which experts each token uses in each layer that has some: few are used much, and again after they were used."""
    rng, x = draw(seeds()), model.architecture.experts
    assert x is not None
    n_tokens, n_layers = draw(st.integers(4, 16)), model.architecture.n_expert_layers
    likes = np.log(rng.gamma(0.5, 2.0, (n_layers, x.count)) + 1e-9) + rng.gumbel(size=(n_tokens, n_layers, x.count))
    chosen = np.argsort(-likes, axis=2)[..., : x.per_token]
    bits = np.zeros((n_tokens, n_layers, x.count), np.bool_)
    np.put_along_axis(bits, chosen, True, axis=2)
    active = np.packbits(bits, axis=2, bitorder="little")
    each = model.group_bytes("fp16")["experts"] / (n_layers * x.count)
    return Trace(TraceHeader(
        name="random", kind="captured", model=model.name, n_tokens=n_tokens, n_layers=n_layers, n_units=x.count,
        unit="expert", unit_bytes=each, criterion="router", threshold="none", records="active", predictor="none",
        text="none", digest=digest_of(active)), active)


def with_predictors(rng: np.random.Generator, held: Sequence[tuple[str, int]], trace: Trace) -> Trace:
    """A trace that holds what predictors asked for, each with its own misses and false alarms."""
    h = trace.header
    rows, asked = [], []
    for name, ahead in held:
        miss, alarm = rng.choice([0.0, 0.3, 1.0]), rng.choice([0.0, 0.2])
        bits = np.unpackbits(trace.active, axis=2, count=h.n_units, bitorder="little").astype(np.bool_)
        bits = (bits & (rng.random(bits.shape) >= miss)) | (rng.random(bits.shape) < alarm)
        asked.append(np.packbits(bits, axis=2, bitorder="little"))
        unit_bytes = h.unit_bytes
        found = judge(trace.active, asked[-1], n_units=h.n_units, unit_bytes=unit_bytes)
        rows.append(Predictor.model_validate({
            "name": name, "asks": "at random", "layers_ahead": ahead, "unit_bytes": unit_bytes,
            "params_share": 0.02 * (1 + ahead), "held": True, **found._asdict(),
            "quality": Quality(text="random", tokens=10, dense_perplexity=10.0, sparse_perplexity=12.0 + ahead)}))
    extras = {"asked": np.stack(asked)} if asked else {}
    return Trace.with_extras(h.model_copy(update={"predictors": tuple(rows)}), trace.active, extras)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    return Workload(draw(st.integers(1, 200)), draw(st.integers(1, 100)), draw(st.integers(1, 4)),
                    draw(st.sampled_from(PRECISIONS)), draw(st.sampled_from(["fp16", "int8", "int4"])))


KINDS = ("neurons", "routing", "other")


@st.composite
def contexts(draw: st.DrawFn, *, trace: bool = True, energy: bool = False, other: bool = False,
             routing: bool = False, two_sided: bool = False) -> Context:
    """Everything a policy is asked with; the budgets range from nothing to everything.

    With `other` the model is one of `other_models`, with `routing` a mixture of experts whose routing was traced: both
    only for policies that need no trace of neurons.
    """
    model = draw(other_models("experts") if routing else other_models() if other else models())
    if routing and not model.architecture.n_expert_layers:
        reject()
    device, workload = draw(devices(energy=energy, two_sided=two_sided)), draw(workloads())
    if model.file_bytes:
        workload = workload.at("file")
    elif routing and draw(st.booleans()):
        workload = replace(workload, mixed=(("attention", "int4"), ("experts", "int2")))
    replayed = Replayed(draw(traces(model))) if trace and not other and not routing else None
    routed = Replayed(draw(routing_traces(model))) if routing else None
    whole = Context(device, model, workload, replayed, {})
    most = 4 * (whole.total_bytes + whole.kv_bytes + whole.working_bytes) + 1e6
    tightness = draw(st.sampled_from([0.02, 0.1, 0.3, 1.0]))
    budget = {name: memory.capacity.value if memory.kind == "storage" else float(np.floor(tightness * most))
              for name, memory in device.memory.items()}
    return Context(device, model, workload, replayed, budget, routed)


def rich(context: Context) -> Context:
    """The same with room for everything."""
    return Context(context.device, context.model, context.workload, context.replayed,
                   dict.fromkeys(context.budget_bytes, 1e15))


@st.composite
def policy_blocks(draw: st.DrawFn, policy: Policy, context: Context, n: int = 6) -> Block:
    """`n` candidates that share their structure: grid values, and values that only `--set` reaches.

    What a policy refuses where all its knobs are given (`refine`) is drawn again, so far as there is something else.
    """
    rng = draw(seeds())
    structural: dict[str, KnobValue] = {}
    columns: dict[str, NDArray[Any]] = {}
    refine = getattr(policy, "refine", None)
    many = n if refine is None else 8 * n
    for knob in policy.knobs(context):
        allowed = (*knob.values, *knob.unsearched)
        if knob.kind == "structural":
            structural[knob.name] = one_value(draw(st.sampled_from(allowed)))
        else:
            values = [allowed[i] for i in rng.integers(0, len(allowed), many)]
            if isinstance(values[0], float) and knob.low is not None and knob.high is not None:
                values = [v if rng.random() < 0.5 else float(rng.uniform(knob.low, knob.high)) for v in values]
            columns[knob.name] = np.array(values)
    block = Block(structural, columns)
    if refine is None or not columns:
        return block
    try:
        kept: Block = refine(context, block, {**structural, **{k: v[0] for k, v in columns.items()}})
    except SpecError:
        reject()
    return kept.only(np.resize(np.arange(kept.n_candidates), n))


@st.composite
def plans(draw: st.DrawFn, names: Sequence[str] = (), n: int = 4) -> tuple[Context, Policy, Block]:
    """Any policy (or one of those named), a context it applies to, and candidates of it."""
    policy = policies()[draw(st.sampled_from(list(names) or sorted(policies())))]
    for kind, two_sided in draw(st.permutations([(k, t) for k in KINDS for t in (False, True)])):
        context = draw(contexts(other=kind == "other", routing=kind == "routing", two_sided=two_sided))
        if why_not_plan(policy, context) is None:
            break
    else:
        reject()
    return context, policy, draw(policy_blocks(policy, context, n))


@st.composite
def candidates(draw: st.DrawFn, policy: Policy, *, energy: bool = False) -> Candidate:
    context = draw(contexts(energy=energy))
    return Candidate(context, policy, draw(policy_blocks(policy, context, 1)))


def rows_of(context: Context, policy: Policy) -> NDArray[np.int64]:
    """Every token that the policy can be asked about; of those that choose their own, as many as they would."""
    own = getattr(policy, "rows", None)
    if own is not None:
        return np.asarray(own(context, 8), np.int64)
    if not policy.uses_trace or context.trace is None:
        return np.zeros(1, np.int64)
    return np.arange(len(context.table.tokens))


# ------------------------------------------------------------------------------------- schedules of any shape


@st.composite
def schedules(draw: st.DrawFn, device: Device, *, max_ops: int = 30, max_candidates: int = 6) -> Schedule:
    """Ops in program order over all streams of a device, any dependencies, some classes absent in some candidates."""
    rng = draw(seeds())
    n, n_ops = draw(st.integers(1, max_candidates)), draw(st.integers(1, max_ops))
    streams = [f"link.{name}" for name in device.link] + list(device.agent)
    builder = ScheduleBuilder(n, streams)
    classes: list[tuple[int, str]] = []
    absent = draw(st.sampled_from([0.0, 0.3, 0.8]))
    for k in range(draw(st.integers(1, 8))):
        here = rng.random(n) >= absent
        size = np.exp(rng.uniform(np.log(1e2), np.log(1e8), n)) * here
        where = streams[int(rng.integers(len(streams)))]
        if where.startswith("link."):
            link = device.link[where[5:]]
            moved = {where: size, f"memory.{link.target}": size, f"memory.{link.source}": size}
            if link.kind == "storage":
                del moved[f"memory.{link.source}"]
            if link.bus is not None:
                moved[f"bus.{link.bus}"] = size
            what = DemandClass(f"move {k}", OpKind.IO if link.kind == "storage" else OpKind.TRANSFER, link=where[5:])
            demand = builder.demand(what, requests=np.ceil(size / rng.choice([4096, 65536, 1 << 22])),
                                    depth=rng.integers(1, 64, n).astype(float), bytes=moved)
        else:
            memory = device.agent[where].memory
            kind = OpKind(str(rng.choice(["compute", "memory", "predictor", "sync"])))
            what = DemandClass(f"compute {k}", kind, agent=where, launch="graph" if rng.random() < 0.5 else "stream",
                               rate="attention" if rng.random() < 0.2 else None)
            demand = builder.demand(
                what, flop=size * rng.choice([0.0, 1.0, 100.0]), bytes={f"memory.{memory}": size},
                requests=np.where(here, rng.integers(0, 9, n), 0))
        classes.append((demand, where))
    n_tokens = draw(st.integers(1, 3))
    ends = set(np.sort(rng.choice(n_ops, min(n_tokens, n_ops), replace=False)).tolist()[:-1]) | {n_ops - 1}
    token, ended = 0, None
    for op in range(n_ops):
        near = rng.random() < 0.7
        low = max(0, op - 4) if near else 0
        deps = rng.integers(low, op, int(rng.integers(0, 4))).tolist() if op else []
        demand, stream = classes[int(rng.integers(len(classes)))]
        last = op in ends
        builder.op(demand, stream, deps=[*deps, ended] if last else deps, token=token, layer=op)
        if last:  # tokens end one after the other
            builder.end_token(op)
            token, ended = token + 1, op
    return builder.build()


@st.composite
def any_durations(draw: st.DrawFn, schedule: Schedule) -> Durations:
    """Seconds that no cost model made: over eight decades, some zero, latencies on any class."""
    rng = draw(seeds())
    shape = schedule.flop.shape
    occupancy = np.exp(rng.uniform(np.log(1e-6), np.log(1e2), shape)) * (rng.random(shape) < 0.9)
    latency = np.exp(rng.uniform(np.log(1e-6), np.log(1e2), shape)) * (rng.random(shape) < 0.4)
    present = schedule.present
    return Durations(np.where(present, occupancy, 0.0), np.where(present, latency, 0.0))


@st.composite
def contentions(draw: st.DrawFn, schedule: Schedule, device: Device) -> Contention:
    """What the device shares, and sometimes background load and short queues."""
    base = contention_of(Context(device, load_model("opt-125m"), Workload(), None, {}))
    rng = draw(seeds())
    background: dict[str, float] = {}
    queues: dict[str, int] = {}
    if draw(st.booleans()):
        background = {r: float(rng.uniform(0, 0.9)) for r in base.capacity_bytes_per_s if rng.random() < 0.5}
    if draw(st.booleans()):
        queues = {s: int(rng.integers(1, 4)) for s in schedule.streams if rng.random() < 0.5}
    return Contention(base.capacity_bytes_per_s, base.interference, background, queues)


def column_of(took: Durations, index: int) -> Durations:
    """The durations of one candidate."""
    return Durations(took.occupancy_s[:, index: index + 1], took.latency_s[:, index: index + 1])


def same_knobs(policy: Policy, context: Context, knobs: Mapping[str, KnobValue]) -> Block:
    """A block of one candidate from plain knob values."""
    kinds = {k.name: k.kind for k in policy.knobs(context)}
    return Block({k: v for k, v in knobs.items() if kinds[k] == "structural"},
                 {k: np.array([v]) for k, v in knobs.items() if kinds[k] == "demand"})
