"""Where do results of a grid land, one by one, so that nothing finished is ever lost?

One SQLite file, a transaction for each cell. It says of which search it is (questions, inputs, version); limits and the
baseline are no part of that, for they are judged when all cells are there.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simmem.errors import MachineError, SpecError

__all__ = ["SCHEMA", "Results", "open_results"]

SCHEMA = "simmem.search-results/1"


class Results:
    """Outcomes by cell, each durable as soon as `add` returns."""

    def __init__(self, connection: sqlite3.Connection, file: str) -> None:
        self._connection, self._file = connection, file

    def done(self) -> dict[str, str]:
        """Cell → outcome, of all that is finished."""
        with _told(self._file):
            return dict(self._connection.execute("SELECT id, outcome FROM cell"))

    def add(self, cell: str, outcome: str) -> None:
        """Write one outcome, in a transaction of its own."""
        with _told(self._file), self._connection:
            self._connection.execute("INSERT OR REPLACE INTO cell (id, outcome) VALUES (?, ?)", (cell, outcome))


@contextmanager
def open_results(path: Path | None, about: dict[str, str], *, resume: bool) -> Iterator[Results]:
    """Results in a file, or in memory alone.

    about : what the results are of; a file that is gone on with must say the same.

    Raises
    ------
    SpecError
        The file is there and was not to be gone on with; it is of another search; it is no such file.
    MachineError
        It cannot be written, or another search is writing it.
    """
    file = ":memory:" if path is None else str(path)
    if path is not None and path.exists() and not resume:
        raise SpecError("is there already; --resume goes on with it, another name begins anew", file=file,
                        key="--results")
    if path is not None and not path.parent.is_dir():
        raise SpecError("the folder it should be written to does not exist", file=file, key="--results")
    with _told(file):
        connection = sqlite3.connect(file, timeout=1.0)
    try:
        with _told(file):
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            with connection:
                connection.execute("BEGIN EXCLUSIVE")  # one writer: a second search of this file stops here
                found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
                if not found:
                    connection.execute("CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
                    connection.execute("CREATE TABLE cell (id TEXT PRIMARY KEY, outcome TEXT NOT NULL)")
                    connection.executemany("INSERT INTO about VALUES (?, ?)",
                                           sorted({"schema": SCHEMA, **about}.items()))
            _check(connection, {"schema": SCHEMA, **about}, file, found)
        yield Results(connection, file)
    finally:
        connection.close()


def _check(connection: sqlite3.Connection, about: dict[str, str], file: str, tables: set[str]) -> None:
    if tables and tables != {"about", "cell"}:
        raise SpecError("is a database of something else, not results of a search", file=file, key="--results")
    said = dict(connection.execute("SELECT key, value FROM about"))
    if said.get("schema") != SCHEMA:
        raise SpecError(f"found {said.get('schema')!r}, expected {SCHEMA!r}", file=file, key="schema")
    for key, value in about.items():
        if said.get(key) != value:
            was, now = (str(one)[:12] for one in (said.get(key), value))
            raise SpecError(f"was made with another {key} ({was}, now {now}), so its results are not this search's; "
                            "begin anew in another file", file=file, key="--results")


@contextmanager
def _told(file: str) -> Iterator[None]:
    """What SQLite raises, as one clear line."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise MachineError("another search is writing it", file=file, key="--results") from None
        raise MachineError(f"cannot be read or written: {error}", file=file, key="--results") from None
    except sqlite3.DatabaseError as error:
        raise SpecError(f"is not a file of results: {error}", file=file, key="--results") from None
