"""How long does one candidate take, and how many ops a second does the event engine run?

The analytic engine is timed on a decode step of OPT-6.7B (32 layers, one token, flash-window with its cache
and predictor), 4096 candidates in a block. Peers evaluate one configuration a call: GenZ runs in turns with
simmem where SIMMEM_BENCH_GENZ names a Python that has it. The event engine runs in turns with bare simpy:
a closed loop of 32 clients on 4 servers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simpy

from simmem.cost.roofline import durations
from simmem.planner.candidate import blocks, contention_of, stratified_rows
from simmem.planner.question import ask
from simmem.policy.base import Block, Policy, policy_named
from simmem.policy.context import Context
from simmem.schedule import Durations, Schedule
from simmem.sim.analytic import analytic
from simmem.sim.events import Contention, contends, events

CANDIDATES = 4096
EVENT_TOKENS = 8
REQUESTS, CLIENTS, SERVERS = 20_000, 32, 4
GENZ_FILES = Path("/tmp/genz")  # where GenZ leaves a file for each call; not its caller's choice
CLOSED_LOOP = f"simpy, {CLIENTS} clients"


@pytest.fixture(scope="module")
def case() -> tuple[Context, Policy, Block]:
    """A real policy on a real context, every demand knob varied; without prefetch the schedule is one token."""
    question = ask("iphone15", "opt-6.7b", weights="int4")
    context, policy = question.context("int4"), policy_named("flash-window")
    held = {"prefetch_layers": 0, "predictor": "low-rank"}
    block = next(b for b in blocks(policy, context, held))
    return context, policy, block.only(np.resize(np.arange(block.n_candidates), CANDIDATES))


@pytest.fixture(scope="module")
def schedule(case: tuple[Context, Policy, Block]) -> Schedule:
    context, policy, block = case
    found = policy.decode(context, block, stratified_rows(context, policy, 1))
    assert found.n_candidates == CANDIDATES
    assert len(found.token_ends) == 1
    assert context.model.architecture.n_layers == 32
    return found


@pytest.fixture(scope="module")
def genz() -> Iterator[Callable[[], float]]:
    """Ask GenZ for one decode prediction; returns the seconds the call took, its import left out."""
    python = os.environ.get("SIMMEM_BENCH_GENZ")
    if not python:
        pytest.skip("SIMMEM_BENCH_GENZ is not set; name a Python that has genz-llm (see benchmarks/README.md)")
    before = set(GENZ_FILES.rglob("*")) if GENZ_FILES.exists() else None
    with subprocess.Popen([python, str(Path(__file__).with_name("genz_call.py"))], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            process.kill()
            pytest.skip(f"GenZ cannot be imported by {python}")

        def call() -> float:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        yield call
        process.stdin.close()
    if before is None:
        shutil.rmtree(GENZ_FILES, ignore_errors=True)
    else:
        for path in set(GENZ_FILES.rglob("*")) - before:
            if path.is_file():
                path.unlink()


def microseconds(seconds: float) -> float:
    return seconds / CANDIDATES * 1e6


@pytest.mark.benchmark(group="one candidate, analytic")
def test_analytic(figures, case, schedule):
    """The engine: seconds of every class to the end of the token."""
    took = durations(schedule, case[0].device)
    figures.timed(f"analytic engine, a candidate in a block of {CANDIDATES}", "<= 2 us",
                  lambda: analytic(schedule, took), unit="us", convert=microseconds, rounds=21)


@pytest.mark.benchmark(group="one candidate, analytic")
def test_cost_and_analytic(figures, case, schedule):
    """A drawn or changed device figure costs this much."""
    figures.timed("  cost and analytic", "", lambda: analytic(schedule, durations(schedule, case[0].device)),
                  unit="us", convert=microseconds, rounds=21)


def whole(case: tuple[Context, Policy, Block]) -> Callable[[], object]:
    context, policy, block = case
    rows = stratified_rows(context, policy, 1)

    def evaluate() -> object:
        built = policy.decode(context, block, rows)
        return analytic(built, durations(built, context.device)).token_s

    return evaluate


@pytest.mark.benchmark(group="one candidate, analytic")
def test_policy_cost_and_analytic(figures, case):
    """Knobs in, seconds out: what a call of a peer does."""
    figures.timed("  knobs to seconds: policy, cost and analytic", "", whole(case), unit="us",
                  convert=microseconds, rounds=21)


@pytest.mark.benchmark(group="one candidate, analytic")
def test_beside_genz(figures, case, genz):
    figures.timed("  the same beside a call of GenZ (opt-6.7b, H100)", "", whole(case), unit="us",
                  convert=microseconds, beside=genz, beside_name="GenZ", convert_beside=lambda s: s * 1e6, rounds=15)


# ---------------------------------------------------------------------------------------------- events


def closed_loop() -> None:
    """Bare simpy: every client asks for a server, keeps it for a while, and asks again."""
    env = simpy.Environment()
    servers = simpy.Resource(env, SERVERS)

    def client(service_s: float) -> Iterator[simpy.Event]:
        for _ in range(REQUESTS // CLIENTS):
            with servers.request() as turn:
                yield turn
                yield env.timeout(service_s)

    for index in range(CLIENTS):
        env.process(client(1.0 + index / CLIENTS))
    env.run()


@pytest.fixture(scope="module")
def tokens(case: tuple[Context, Policy, Block]) -> tuple[list[tuple[Schedule, Durations]], Contention, int]:
    """Decode steps with reads two layers ahead, as the planner runs them; half the memory rate, so that reads and
    compute do contend; and how many ops they have."""
    context, policy, _ = case
    found = next(b for b in blocks(policy, context, {"prefetch_layers": 2, "predictor": "low-rank"}))
    rows = stratified_rows(context, policy, EVENT_TOKENS)
    built = policy.decode(context, found.only(np.array([found.n_candidates // 2])), rows)
    took = durations(built, context.device)
    steps = [(built.column(i), Durations(took.occupancy_s[:, i:i + 1], took.latency_s[:, i:i + 1]))
             for i in range(built.n_candidates)]
    sharing = contention_of(context)
    sharing = replace(sharing, capacity_bytes_per_s={
        k: v * (0.5 if k.startswith("memory.") else 1.0) for k, v in sharing.capacity_bytes_per_s.items()})
    assert all(contends(events(s, d), d, sharing) for s, d in steps)
    return steps, sharing, sum(int(s.present[s.op_class, 0].sum()) for s, _ in steps)


@pytest.mark.parametrize(("shared", "target"), [(False, ">= 100 k ops/s"), (True, ">= 25 k ops/s")],
                         ids=["dedicated", "shared"])
@pytest.mark.benchmark(group="events")
def test_events(figures, tokens, shared, target):
    steps, sharing, n_ops = tokens

    def run() -> None:
        for schedule, took in steps:
            events(schedule, took, sharing if shared else None)

    figures.timed(f"events, {'shared' if shared else 'dedicated'} ({n_ops} ops in {len(steps)} tokens)", target, run,
                  unit="k/s", convert=lambda s: n_ops / s / 1e3, beside=closed_loop, beside_name=CLOSED_LOOP,
                  convert_beside=lambda s: REQUESTS / s / 1e3, is_rate=True, rounds=21)
