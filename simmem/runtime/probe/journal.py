"""How is a long calibration kept on disk so that stopping it at any moment loses no finished visit?

`OUT.partial` is a text file: a line that says what was asked for, then one a finished visit, each a digest and JSON.
What follows a damaged line is measured again. Lines are handed to the system at once and flushed to the disk once a
second, so that the journal hardly disturbs what it records.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simmem.errors import MachineError, SpecError
from simmem.runtime.resuming import first_difference

__all__ = ["Journal", "Visit", "journal_path"]

_SCHEMA = "simmem.calibration-journal/1"
_MAX_BYTES = 256 << 20
_SYNC_S = 1.0


@dataclass(frozen=True)
class Visit:
    """Samples taken one after the other. Times since the start of the run. [s]"""

    case: str
    round: int
    at_s: tuple[float, ...]
    samples_s: tuple[float, ...]
    ended_s: float
    calls: int = 1
    own_clock: bool = False
    """The run told its seconds itself."""


def journal_path(out: Path) -> Path:
    """Where an unfinished calibration is kept: OUT.partial beside OUT."""
    return out.with_name(f"{out.name}.partial")


class Journal:
    """An unfinished calibration on disk.

    Parameters
    ----------
    path : the file; made if it does not exist.
    request : everything that decides what is measured, as JSON; compared with that of a file that exists.
    resume : go on with what the file holds.

    Raises
    ------
    SpecError
        The file holds an unfinished calibration and `resume` is not set, one of another request, or is none of ours.
    MachineError
        The operating system refused.
    """

    def __init__(self, path: Path, request: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = path
        self.visits: list[Visit] = []
        self.bytes_written = 0
        head = json.dumps({"schema": _SCHEMA, "request": dict(request)}, sort_keys=True)
        self._key = hashlib.sha256(head.encode()).hexdigest()
        self._synced = time.monotonic()
        end = 0
        try:
            if path.exists() and not path.is_file():
                raise SpecError("is in the way: a file of that name keeps the calibration while it runs",
                                file=str(path))
            if path.exists():
                end = self._read(head, resume)
            self._stream = path.open("r+b" if path.exists() else "x+b")
            self._stream.truncate(end)
            self._stream.seek(end)
            if end == 0:
                self._append(head)
            self._sync()
        except OSError as error:
            raise MachineError(f"cannot be written: {error.strerror or error}", file=str(path)) from None

    def keep(self, visit: Visit) -> None:
        """Append a finished visit."""
        try:
            self._append(json.dumps(asdict(visit)))
            self.visits.append(visit)
            if time.monotonic() - self._synced > _SYNC_S:
                self._sync()
        except OSError as error:
            raise MachineError(f"cannot be written: {error.strerror or error}; what was finished is kept, and --resume "
                               "goes on", file=str(self.path)) from None

    def wrote(self, n_bytes: int) -> None:
        """Note what a run wrote to storage, so that the wear of all of them together is known. [B]"""
        self.bytes_written += n_bytes
        self._append(json.dumps({"wrote": n_bytes}))

    def close(self) -> None:
        """Flush; the file stays where it holds a visit."""
        with contextlib.suppress(OSError, ValueError):
            self._sync()
            self._stream.close()
        if not self.visits:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Close and delete: what it held is safe elsewhere."""
        self.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _append(self, text: str) -> None:
        self._stream.write(f"{self._digest(text)} {text}\n".encode())
        self._stream.flush()

    def _sync(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._synced = time.monotonic()

    def _digest(self, text: str) -> str:
        return hashlib.sha256(f"{self._key} {text}".encode()).hexdigest()[:16]

    def _read(self, head: str, resume: bool) -> int:
        """Take over the undamaged visits; where in the file they end. [B]"""
        if self.path.stat().st_size > _MAX_BYTES:
            raise SpecError("is too long to be a calibration; remove it to begin anew", file=str(self.path))
        lines = self.path.read_bytes().splitlines(keepends=True)
        if not lines:
            return 0
        first = lines[0].decode("utf-8", "replace").rstrip("\n").partition(" ")[2]
        if _SCHEMA not in first:
            raise SpecError("is not an unfinished calibration; nothing there is touched", file=str(self.path))
        if not resume:
            raise SpecError("holds an unfinished calibration; --resume goes on with it, or remove it to begin anew",
                            file=str(self.path))
        if first != head:
            raise SpecError(f"holds an unfinished calibration of another request: {_difference(first, head)}",
                            file=str(self.path), key="--resume")
        end, found = 0, []
        for number, line in enumerate(lines):
            digest, _, text = line.decode("utf-8", "replace").rstrip("\n").partition(" ")
            if not line.endswith(b"\n") or digest != self._digest(text):
                break
            if number:
                row = json.loads(text)
                if "wrote" in row:
                    self.bytes_written += int(row["wrote"])
                    end += len(line)
                    continue
                found.append(Visit(**{**row, "at_s": tuple(row["at_s"]), "samples_s": tuple(row["samples_s"])}))
            end += len(line)
        self.visits = found
        return end


def _difference(found: str, asked: str) -> str:
    try:
        before = json.loads(found).get("request")
    except (ValueError, AttributeError, RecursionError):
        before = None
    return first_difference(before, json.loads(asked)["request"])
