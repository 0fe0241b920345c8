"""What users run today, timed beside the plans: weights mapped into memory, and disk offload of accelerate."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simmem.errors import MachineError, SpecError
from simmem.planner.candidate import Candidate
from simmem.runtime.execute.baselines import PageCache, accelerate_token_s, has_accelerate, mapped_token_s
from simmem.runtime.execute.rounds import LEAST_ROUNDS
from simmem.runtime.execute.task import Task, task_of
from simmem.validation.runs import Measured, noise_floor
from simmem.validation.verdict import BaselineRow, LadderRow

__all__ = ["time_today"]

BASELINE_TOKENS, BASELINE_S = 6, 8.0
"""Tokens of a round at most, and about the time that loading all weights for them may take. [s]"""


def time_today(resident: Sequence[tuple[Candidate, Task, Path | None]], rows: Sequence[LadderRow], folder: Path,
               left_out: dict[str, str], samples: dict[str, Any], *, threads: int | None = None
               ) -> list[BaselineRow]:
    """What users run today, for every model with a resident plan.

    Parameters
    ----------
    resident : such plans, and their weight files.
    rows : of the ladder, for the fastest of each model.
    folder : on the drive to be read.
    left_out, samples : why something was not run, and raw samples, are added.
    """
    found: list[BaselineRow] = []
    for model, (candidate, file) in {task.layout.model: (c, f) for c, task, f in resident}.items():
        mine = [r for r in rows if r.model == model and r.storage == "real" and r.budget_share < 1]
        fastest = min((r.measured_s.median for r in mine), default=None)
        context = candidate.context
        loading_s = context.total_bytes / context.storage_link[1].rate.value
        n = int(np.clip(BASELINE_S / loading_s, 1, BASELINE_TOKENS))
        for what in ("mapped", "accelerate-disk"):
            if what == "accelerate-disk" and not has_accelerate():
                left_out[f"{model}/{what}"] = "accelerate is not installed"
                continue
            for cache in ("kept", "dropped"):
                name = f"{model}/{what}/{cache}"
                print(f"running {name}", file=sys.stderr, flush=True)
                runs = []
                try:
                    for _ in range(LEAST_ROUNDS if what == "mapped" else 1):
                        if what == "mapped":
                            assert file is not None
                            task = task_of(candidate, n)
                            runs.append(mapped_token_s(task, file, cache, threads=threads))
                        else:
                            with tempfile.TemporaryDirectory(dir=folder) as offloaded:
                                runs += np.array_split(accelerate_token_s(
                                    context.model, context.workload.weights, Path(offloaded), cache,
                                    context=round(context.workload.mean_decode_context),
                                    n_tokens=LEAST_ROUNDS * -(-n // 2), threads=threads),
                                    LEAST_ROUNDS)
                except (SpecError, MachineError) as error:
                    left_out[name] = str(error)
                    continue
                samples[name] = [r.tolist() for r in runs]
                found.append(_baseline(name, model, context.workload.weights, what, cache, runs, fastest))
    return found


def _baseline(name: str, model: str, weights: str, what: str, cache: PageCache, runs: Sequence[np.ndarray[Any, Any]],
              fastest: float | None) -> BaselineRow:
    every = np.concatenate(runs)
    medians = [float(np.median(r)) for r in runs]
    middle = float(np.median(medians))
    return BaselineRow(
        id=name, model=model, weights=weights, what=what, page_cache=cache, noise_floor=noise_floor(medians),
        measured_s=Measured(median=middle, p10=float(np.quantile(every, 0.1)), p90=float(np.quantile(every, 0.9)),
                            n=len(every)),
        times_fastest=None if fastest is None else middle / fastest)
