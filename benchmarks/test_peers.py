"""How far from what was measured are FlexGen's formulas, a plain roofline, GenZ and simmem, and how long do they take?

The rows are FlexGen's on its T4 node (validate/references/flexgen.toml), those that are judged at the nominal disk.
simmem predicts from sourced figures of the parts, with one of FlexGen's fitted constants (its CPU's attention);
FlexGen's formulas from constants all of which were fitted to whole runs. The roofline takes the same figures as simmem
and the best that anything could do: every stream at its full rate, all of them at once.

GenZ takes weights that do not fit for a blend of two bandwidths and knows no policy; it predicts decode and prompt by
themselves. It runs where SIMMEM_BENCH_GENZ names a Python that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.conftest import LINES
from benchmarks.peers.flexgen_formulas import Policy, tokens_per_s
from simmem.planner.api import answer
from simmem.planner.question import ask
from simmem.spec.device import load_device
from simmem.spec.model import load_model

ROWS = Path(__file__).parents[1] / "validate" / "references" / "flexgen.toml"
PEER_CALLS = 100
GENZ_SYSTEM = {"Flops": 65, "Memory_size": 16, "Memory_BW": 320, "ICN": 12, "real_values": True}


def judged() -> list[dict[str, Any]]:
    rows = tomllib.loads(ROWS.read_text(encoding="utf-8"))["row"]
    return [r for r in rows if r.get("expect", "judged") == "judged" and r["device"] == "flexgen-t4"]


def by_formulas(row: dict[str, Any]) -> float:
    a, knobs, work = load_model(row["model"]).architecture, row["knobs"], row["workload"]
    shares = [tuple(p / 100 for p in knobs[k]) for k in ("weights_percent", "kv_percent", "activations_percent")]
    return tokens_per_s(a.n_layers, a.d_model, a.d_ff, work["prompt_tokens"], work["new_tokens"],
                        Policy(*shares, knobs["gpu_batch"], knobs["n_gpu_batches"]))


def by_roofline(row: dict[str, Any]) -> float:
    """Arithmetic of all agents' peak, weights and states through every memory and link at once, at full rates."""
    device, model, knobs, work = load_device(row["device"]), load_model(row["model"]), row["knobs"], row["workload"]
    gpu, b, s, n = device.agent["gpu"], work["batch"], work["prompt_tokens"], work["new_tokens"]
    params = sum(g.matrix_params for g in model.groups() if g.name in ("attention", "ffn"))
    weights, peak = 2.0 * params, gpu.flop_per_s["fp16"].value
    states = b * model.kv_bytes("fp16", s + n / 2)
    (wg, wc), (cg, cc) = ((p / 100 for p in knobs[k]) for k in ("weights_percent", "kv_percent"))
    on_cpu = knobs["cpu_attention"]
    step = max(2.0 * b * params / peak, (weights + cg * states) / gpu.rate.value,
               ((1 - wg) * weights + (0 if on_cpu else 1 - cg) * states) / device.link["h2d"].rate.value,
               (1 - cg) * states / device.agent["cpu"].rate.value if on_cpu else 0.0,
               ((1 - wg - wc) * weights + (1 - cg - cc) * states) / device.link["flash"].rate.value)
    prompt = max(2.0 * b * s * params / peak, (1 - wg) * weights / device.link["h2d"].rate.value)
    return float(b * n / (prompt + (n - 1) * step))


def by_simmem(row: dict[str, Any]) -> float:
    work = row["workload"]
    question = ask(row["device"], row["model"], prompt=work["prompt_tokens"], new_tokens=work["new_tokens"],
                   batch=work["batch"], weights=work["weights"], kv=work["kv"], policy=row["policy"],
                   knobs=row["knobs"], engine="flexgen", defaults=True)
    return answer(question, brief=True).predicted.tokens_per_s


def by_genz(python: str) -> Callable[[dict[str, Any]], float]:
    script = Path(__file__).parent / "peers" / "genz_offload.py"

    def predict(row: dict[str, Any]) -> float:
        work = row["workload"]
        request = {"model": f"facebook/{row['model']}", "batch_size": work["batch"],
                   "input_tokens": work["prompt_tokens"], "new_tokens": work["new_tokens"], "system": GENZ_SYSTEM}
        done = subprocess.run([python, str(script)], input=json.dumps(request), capture_output=True, text=True,
                              check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            pytest.skip(f"{python} cannot run GenZ: {said[0]}; `pip install genz-llm` there (benchmarks/README.md)")
        return float(json.loads(done.stdout.splitlines()[-1])["tokens_per_s"])

    return predict


def timed(predict: Callable[[dict[str, Any]], float], row: dict[str, Any], calls: int) -> tuple[float, float]:
    started = time.perf_counter()
    for _ in range(calls):
        found = predict(row)
    return found, (time.perf_counter() - started) / calls


@pytest.mark.slow
def test_errors_and_times_on_flexgens_rows() -> None:
    peers: dict[str, tuple[Callable[[dict[str, Any]], float], int]] = {
        "FlexGen's formulas": (by_formulas, PEER_CALLS), "roofline": (by_roofline, PEER_CALLS),
        "simmem": (by_simmem, 1)}
    python = os.environ.get("SIMMEM_BENCH_GENZ")
    if python:
        peers["GenZ"] = (by_genz(python), 1)
    rows = judged()
    assert rows
    by_simmem(rows[0])  # what only the first call takes
    errors: dict[str, list[float]] = {name: [] for name in peers}
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    LINES.append(f"{'published, token/s':32s}{'':9s}" + "".join(f"{name:>21s}" for name in peers))
    for row in rows:
        cells = []
        for name, (predict, calls) in peers.items():
            found, took = timed(predict, row, calls)
            errors[name].append(found / row["published"] - 1.0)
            seconds[name].append(took)
            cells.append(f"{found:11.2f} ({errors[name][-1]:+7.1%})")
        LINES.append(f"{row['id']:32s}{row['published']:9.2f}" + "".join(f"{c:>21s}" for c in cells))
    for what, values in (("mean of the absolute errors", {k: f"{np.mean(np.abs(v)):.1%}" for k, v in errors.items()}),
                         ("largest", {k: f"{np.max(np.abs(v)):.1%}" for k, v in errors.items()}),
                         ("a prediction, median", {k: f"{np.median(v):.2g} s" for k, v in seconds.items()})):
        LINES.append(f"{what:41s}" + "".join(f"{values[name]:>21s}" for name in peers))
