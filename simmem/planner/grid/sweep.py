"""How is a whole grid answered, and gone on with after it was stopped?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from simmem import __version__
from simmem.errors import SimmemError
from simmem.planner.grid.cells import CellOutcome, check_question, forget, inputs_of
from simmem.planner.grid.fanout import opened, outcomes
from simmem.planner.grid.refine import Refinement
from simmem.planner.grid.spec import Cell, in_cell
from simmem.planner.grid.store import open_results

__all__ = ["answer_all"]


def answer_all(cells: Sequence[Cell], spec_file: Path, *, results: Path | None = None, resume: bool = False,
               jobs: int = 1, backend: str = "loky", scheduler: str | None = None, block: int = 1,
               refine: Refinement | None = None, progress: Callable[[int, int], None] | None = None
               ) -> list[tuple[Cell, CellOutcome]]:
    """Every cell with its outcome, in the order of the search file whatever was finished first or earlier.

    results : an SQLite file that each outcome is written to as soon as it is there; None: nothing is kept.
    resume : go on with what it holds.
    block : cells that a worker is sent at a time.
    refine : says which cells to add, given all that are answered; asked until there are none.
    progress : told (cells finished, cells in all) after each.

    Raises
    ------
    SpecError, TraceError
        A question is wrong; names, budgets and contexts of all cells are looked at before the first is planned.
    MachineError
        A worker died; the results cannot be written.
    """
    forget()
    folder, file = str(spec_file.parent.resolve()), str(spec_file)
    _check_all(cells, folder, file)
    about = _about(cells, folder)
    stamp = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    asked, answered = list(cells), list[tuple[Cell, CellOutcome]]()
    with open_results(results, about, resume=resume) as kept, opened(jobs, backend, scheduler):
        done = kept.done()
        while True:
            rest = [cell for cell in asked[len(answered):] if cell.id not in done]
            n = len(asked) - len(rest)
            # Where a result cannot be written, the workers stop.
            with closing(outcomes(rest, spec_file.parent, file, stamp, jobs=jobs, backend=backend, block=block)) \
                    as found:
                for cell, text in found:
                    kept.add(cell.id, text)
                    done[cell.id] = text
                    n += 1
                    if progress is not None:
                        progress(n, len(asked))
            answered += [(cell, CellOutcome.model_validate_json(done[cell.id])) for cell in asked[len(answered):]]
            more = refine.next(answered) if refine else []
            if not more:
                return answered
            _check_all(more, folder, file)
            asked += more


def _check_all(cells: Sequence[Cell], folder: str, file: str) -> None:
    for cell in cells:
        try:
            check_question(cell.question, folder)
        except SimmemError as error:
            raise in_cell(error, cell.id, file) from None


def _about(cells: Sequence[Cell], folder: str) -> dict[str, str]:
    """What results are of: questions, what they rest on, and who answers them. Limits and baseline are not in it."""
    questions = [[cell.id, cell.question.model_dump(mode="json")] for cell in cells]
    inputs = sorted({(cell.question.device, cell.question.model, *sorted(inputs_of(cell.question, folder).items()))
                     for cell in cells}, key=str)
    return {"spec": hashlib.sha256(json.dumps(questions, sort_keys=True).encode()).hexdigest(),
            "inputs": hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(),
            "version": __version__}
