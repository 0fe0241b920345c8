"""How many seconds of the processor does `plan` take once Python and simmem are loaded, for each family and for all?

Every plan is searched, run and explained in full, its sensitivities included; nothing is kept from one to the next.
Processor time, as a busy machine leaves it almost alone. Of a family the line says what a plan with that family alone
takes; they add up to more than all together, as each is compared with the others. "Searched" is what finds the plan:
the trace, every family's grid and placement, and the simulations that prove which is best, without explaining it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest

from simmem.errors import SimmemError
from simmem.planner.api import plan
from simmem.planner.question import ask
from simmem.planner.ranking import choose, search
from simmem.policy.base import policies

ROUNDS = 3
CASES: dict[str, dict[str, Any]] = {
    "rtx4090-pc, llama-2-7b": {"device": "rtx4090-pc", "model": "llama-2-7b"},
    "rtx4090-pc, opt-30b": {"device": "rtx4090-pc", "model": "opt-30b"},
    "rtx4090-pc, mixtral-8x7b": {"device": "rtx4090-pc", "model": "mixtral-8x7b"},
    "PowerInfer's PC-High, opt-30b": {"device": "powerinfer-pc-high", "model": "opt-30b", "weights": "fp16",
                                      "prompt": 64, "new_tokens": 128},
    "FlexGen's T4, opt-30b, 144 sequences": {"device": "flexgen-t4", "model": "opt-30b", "weights": "fp16",
                                             "prompt": 512, "new_tokens": 32, "batch": 144,
                                             "objective": "throughput"},
    "FlexGen's T4, opt-175b, 256 sequences": {"device": "flexgen-t4", "model": "opt-175b", "weights": "fp16",
                                              "prompt": 512, "new_tokens": 32, "batch": 256,
                                              "objective": "throughput"},
    "PowerInfer's PC-High, opt-175b": {"device": "powerinfer-pc-high", "model": "opt-175b"},
    "rtx4090-pc, opt-66b": {"device": "rtx4090-pc", "model": "opt-66b"},
    "rtx4090-pc, deepseek-v3": {"device": "rtx4090-pc", "model": "deepseek-v3"},
    "rtx4090-pc, qwen3-235b-a22b": {"device": "rtx4090-pc", "model": "qwen3-235b-a22b"},
    "h100-sxm, llama-2-70b": {"device": "h100-sxm", "model": "llama-2-70b"},
    "iphone15, opt-6.7b": {"device": "iphone15", "model": "opt-6.7b"},
}
BATCHES = {name: {"device": device, "model": model, "objective": "throughput"} for name, device, model in (
    ("rtx4090-pc, llama-2-7b", "rtx4090-pc", "llama-2-7b"), ("rtx4090-pc, opt-30b", "rtx4090-pc", "opt-30b"),
    ("m1-max, opt-6.7b", "m1-max", "opt-6.7b"))}


def processor_s(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median processor time of a call; nan where there is no plan."""
    found = []
    for _ in range(rounds):
        started = time.process_time()
        try:
            work()
        except SimmemError:
            return float("nan")
        found.append(time.process_time() - started)
    return median(found)


def found(**asked: Any) -> object:
    """The best of all families, proved and not explained."""
    question = ask(**asked)
    return choose([c for p in question.precisions for c in search(question, p).ranked], question.objective)


@pytest.mark.parametrize("case", CASES)
def test_every_family(figures, case):
    """All families, and each alone."""
    asked = CASES[case]
    plan(**asked)  # imports, files
    figures.line(f"searched: {case}", "<= 2 s", f"{processor_s(lambda: found(**asked)):.2f} s")
    seconds = figures.benchmark.pedantic(lambda: processor_s(lambda: plan(**asked)), rounds=1)
    alone = {name: processor_s(lambda name=name: plan(**asked, policy=name), 1) for name in policies()}
    said = ", ".join(f"{name} {took:.2f}" for name, took in alone.items() if took == took)
    figures.line(f"plan: {case}", "<= 2 s", f"{seconds:.2f} s", said)


@pytest.mark.parametrize("case", BATCHES)
def test_number_of_sequences_searched(figures, case):
    plan(**BATCHES[case], batch=1)
    seconds = figures.benchmark.pedantic(lambda: processor_s(lambda: plan(**BATCHES[case]), 1), rounds=1)
    figures.line(f"plan, the batch searched: {case}", "", f"{seconds:.2f} s")
