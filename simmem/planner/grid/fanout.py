"""How are cells answered on many cores or machines? One by one in this process, or through joblib.

Whoever answers, the outcome of a cell is the same, and it is handed over as soon as it is there.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from simmem import __version__
from simmem.errors import MachineError, SimmemError, SpecError, TraceError
from simmem.planner.grid.cells import CellOutcome, answer_cell, inputs_of
from simmem.planner.grid.spec import Cell

__all__ = ["BACKENDS", "check_backend", "opened", "outcomes"]

BACKENDS = ("loky", "dask", "ray")
_NEEDED = {"dask": "distributed", "ray": "ray"}
"""Backend → what it needs beside joblib; its extra is called as it is."""
WAVE = 4
"""Blocks for each worker that ray is sent at a time: what is not yet back is lost where a search is killed."""
IDLE_S = 20
"""How long a worker waits for work: one whose search was killed must not stay. [s]"""
Task = tuple[int, tuple[str, str, str, str, str]]
"""A cell's place and what `answer_cell` is told."""
Numbered = Generator[tuple[int, str], None, None]
_KINDS = {kind.__name__: kind for kind in (SpecError, TraceError, MachineError)}


def check_backend(jobs: int, backend: str, scheduler: str | None) -> None:
    """Raise now where what a backend needs is not installed."""
    if scheduler is not None and backend != "dask":
        raise SpecError("is an address for --backend dask", key="--scheduler")
    if jobs == 1 and backend == "loky":
        return
    if importlib.util.find_spec("joblib") is None:
        raise MachineError("more than one job needs joblib; install with: pip install 'simmem[search]'", key="--jobs")
    needed = _NEEDED.get(backend)
    if needed is not None and importlib.util.find_spec(needed) is None:
        raise MachineError(f"the {backend} backend needs {needed}; install with: pip install 'simmem[{backend}]'",
                           key="--backend")


@contextmanager
def opened(jobs: int = 1, backend: str = "loky", scheduler: str | None = None) -> Iterator[None]:
    """Workers for all `outcomes` asked for meanwhile: a cluster is started or connected to once.

    Raises
    ------
    MachineError
        No scheduler answers.
    """
    with ExitStack() as stack:
        if jobs > 1 or backend != "loky":
            from joblib import parallel_config

            stack.enter_context(warnings.catch_warnings())
            # loky replaces a worker whose memory grew, as it should: nothing is lost by it.
            warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
            if backend == "dask":
                stack.enter_context(parallel_config("dask", client=_client(jobs, scheduler, stack)))
            elif backend == "ray":
                from ray.util.joblib import register_ray

                register_ray()
                stack.enter_context(parallel_config("ray"))
            else:
                # One thread each: processes are the parallelism, and sums keep their order.
                stack.enter_context(parallel_config("loky", inner_max_num_threads=1, idle_worker_timeout=IDLE_S))
        yield


def outcomes(cells: Sequence[Cell], folder: Path, file: str, stamp: str, *, jobs: int = 1, backend: str = "loky",
             block: int = 1) -> Generator[tuple[Cell, str], None, None]:
    """Each cell with its outcome as JSON, in the order in which they are finished; inside `opened`.

    Cells of one model and device are asked one after the other, so that a process finds what they share.

    block : cells that a worker is sent at a time, and sends back together.

    Raises
    ------
    SpecError, TraceError
        A cell's question is wrong.
    MachineError
        A worker died, runs another simmem or reads other files.
    """
    ordered = sorted(cells, key=lambda c: (c.question.model, c.question.prompt_tokens, c.question.new_tokens,
                                           str(c.question.weights), c.question.device))
    where = str(folder.resolve())
    tasks = [(index, (c.question.model_dump_json(), where, c.id, file, stamp)) for index, c in enumerate(ordered)]
    alone = jobs == 1 and backend == "loky"
    with closing(_here(tasks) if alone else _joblib(tasks, jobs, backend, block)) as found:
        for index, text in found:
            cell, theirs = ordered[index], json.loads(text)["simmem"]
            if theirs != __version__:
                raise MachineError(f"a worker runs simmem {theirs}, and this is {__version__}: install the same one",
                                   key="--backend")
            _check(cell, CellOutcome.model_validate_json(text), where)
            yield cell, text


def _here(tasks: list[Task]) -> Numbered:
    for index, task in tasks:
        yield _numbered(index, task)


def _numbered(index: int, task: tuple[str, str, str, str, str]) -> tuple[int, str]:
    return index, answer_cell(*task)


def _block(version: str, tasks: list[Task]) -> list[tuple[int, str]]:
    """Several cells in a worker, which leaves Ctrl-C to who sent them."""
    if version != __version__:  # it may not even understand what it is asked
        return [(index, json.dumps({"simmem": __version__})) for index, _ in tasks]
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return [_numbered(index, task) for index, task in tasks]


def _joblib(tasks: list[Task], jobs: int, backend: str, block: int) -> Numbered:
    from joblib import delayed
    from joblib.externals.loky.process_executor import BrokenProcessPool

    lost = _lost_errors(backend)
    blocks = [delayed(_block)(__version__, tasks[i:i + block]) for i in range(0, len(tasks), block)]
    found = _waves(blocks, jobs) if backend == "ray" else _stream(blocks, jobs)
    try:
        for several in found:
            yield from several
    except BrokenProcessPool as error:
        raise MachineError(_died(str(error)), key="--jobs") from None
    except ImportError as error:
        raise MachineError(f"a worker could not load simmem ({error}); install {__version__} there",
                           key="--backend") from None
    except lost as error:
        raise MachineError(_died(str(error), "a worker or the scheduler is gone"), key="--backend") from None
    finally:
        with warnings.catch_warnings():  # joblib tells whoever stops early of tasks that are cancelled
            warnings.simplefilter("ignore")
            found.close()


def _stream(blocks: list[Any], jobs: int) -> Generator[list[tuple[int, str]], None, None]:
    """Blocks as they are finished."""
    from joblib import Parallel

    found: Generator[list[tuple[int, str]], None, None] = Parallel(
        n_jobs=jobs, batch_size=1, return_as="generator_unordered")(blocks)
    return found


def _waves(blocks: list[Any], jobs: int) -> Generator[list[tuple[int, str]], None, None]:
    """Some blocks for each worker at a time, where a backend hands over all results of a call together."""
    from joblib import Parallel

    with Parallel(n_jobs=jobs, batch_size=1) as parallel:
        for i in range(0, len(blocks), WAVE * jobs):
            yield from parallel(blocks[i:i + WAVE * jobs])


def _died(why: str, what: str = "a worker process died (killed, or out of memory)") -> str:
    return (f"{what}: {' '.join(why.split())[:160]}; with --results nothing that was finished is lost, and --resume "
            "goes on")


def _lost_errors(backend: str) -> tuple[type[BaseException], ...]:
    """What a cluster raises where workers or the scheduler are gone."""
    if backend == "ray":
        from ray.exceptions import RayError

        return (RayError,)
    if backend != "dask":
        return ()
    from distributed import KilledWorker
    from distributed.comm import CommClosedError

    return KilledWorker, CommClosedError, CancelledError  # the last where the scheduler is gone


def _client(jobs: int, scheduler: str | None, stack: ExitStack) -> Any:
    """A client of the scheduler that is named, else of `jobs` worker processes here, until the stack ends."""
    from distributed import Client, LocalCluster

    if scheduler is None:
        cluster = stack.enter_context(LocalCluster(n_workers=jobs, threads_per_worker=1, processes=True,
                                                   dashboard_address=None, scheduler_port=0, host="127.0.0.1"))
        return stack.enter_context(Client(cluster))
    try:
        return stack.enter_context(Client(scheduler, timeout=10))
    except (OSError, ValueError) as error:
        raise MachineError(f"no dask scheduler answers: {' '.join(str(error).split())[:160]}",
                           key="--scheduler") from None


def _check(cell: Cell, outcome: CellOutcome, folder: str) -> None:
    if outcome.error is not None:
        kind = _KINDS.get(outcome.error.kind, SpecError if outcome.error.exit_code == 2 else SimmemError)
        told = kind(outcome.error.message)
        told.exit_code = outcome.error.exit_code
        raise told
    mine = inputs_of(cell.question, folder)
    for what, digest in (("device", outcome.device_digest), ("model", outcome.model_digest),
                         ("draft", outcome.draft_digest)):
        if digest != mine.get(what, ""):
            raise MachineError(f"a worker read another {what} file for the cell {cell.id} than this process: was it "
                               "changed meanwhile?", key="--backend")
