"""How is a long capture kept on disk so that stopping it at any moment loses nothing that was finished?

`OUT.partial/` holds a manifest that says what was asked for, notes (fitted thresholds, perplexities) and one
file per finished pass. Each file appears whole: written beside, flushed to the disk, renamed. A chunk names
the request that it belongs to and carries a digest of its values, so that what is read back is what was
recorded, or is recorded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.errors import MachineError, SpecError
from simmem.runtime.resuming import first_difference
from simmem.trace.trace import digest_of

__all__ = ["Arrays", "Partial", "discard", "partial_folder"]

Arrays = dict[str, NDArray[Any]]

_SCHEMA = "simmem.capture/1"
_MANIFEST = "manifest.json"
_OWN_FILES = re.compile(
    r"\.?(manifest\.json|note-[a-z0-9-]+\.json|(arrays-[a-z0-9-]+|chunk-\d{6,})\.safetensors)(\.tmp)?")
_MAX_NOTE_BYTES = 16 << 20


def partial_folder(out: Path) -> Path:
    """Where the unfinished capture of a trace is kept: OUT.partial beside OUT."""
    return out.with_name(f"{out.name}.partial")


class Partial:
    """An unfinished capture on disk.

    Parameters
    ----------
    folder : where it is kept; made if it does not exist.
    request : everything that decides the bits, as JSON; compared with that of a folder that exists.
    resume : go on with what the folder holds.

    Raises
    ------
    SpecError
        The folder holds an unfinished capture and `resume` is not set, one of another request, or is none of ours.
    MachineError
        The operating system refused.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any], *, resume: bool = False) -> None:
        self.folder = folder
        document = {"schema": _SCHEMA, "request": dict(request)}
        self._request = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        try:
            folder.mkdir(exist_ok=True)
            names = sorted(path.name for path in folder.iterdir())
        except FileExistsError:
            raise SpecError("is in the way: a folder of that name keeps the capture while it runs",
                            file=str(folder)) from None
        except OSError as error:
            raise MachineError(f"cannot be written: {error.strerror or error}", file=str(folder)) from None
        foreign = [name for name in names if not _OWN_FILES.fullmatch(name)]
        if foreign:
            raise SpecError(f"holds {foreign[0]!r}, which is not of a capture; nothing there is touched",
                            file=str(folder))
        begun = any(name.startswith(("note-", "arrays-", "chunk-")) for name in names)
        found = self._read_json(_MANIFEST) if begun else None
        if found is None:
            self._write(_MANIFEST, json.dumps(document, indent=2, sort_keys=True).encode())
        elif not resume:
            raise SpecError("holds an unfinished capture; --resume goes on with it, or remove the folder to begin anew",
                            file=str(folder))
        elif found != json.loads(json.dumps(document)):
            difference = first_difference(found.get("request"), request)
            raise SpecError(f"holds an unfinished capture of another request: {difference}",
                            file=str(folder), key="--resume")

    def note(self, name: str, document: dict[str, Any]) -> None:
        """Keep a small result under a name."""
        text = json.dumps(document, sort_keys=True)
        self._write(f"note-{name}.json", json.dumps({"digest": self._digest(text), "note": text}).encode())

    def noted(self, name: str) -> dict[str, Any] | None:
        """What `note` kept; None where it is missing, damaged or of another request."""
        try:
            found = self._read_json(f"note-{name}.json") or {}
        except SpecError:
            return None
        text = found.get("note")
        if not isinstance(text, str) or found.get("digest") != self._digest(text):
            return None
        document: dict[str, Any] = json.loads(text)
        return document

    def save_chunk(self, index: int, arrays: Arrays) -> None:
        """Keep what pass `index` recorded."""
        self._save(_chunk(index), str(index), arrays)

    def load_chunk(self, index: int) -> Arrays | None:
        """What `save_chunk` kept; None where it is missing, damaged or of another request."""
        return self._load(_chunk(index), str(index))

    def save_arrays(self, name: str, arrays: Arrays) -> None:
        """Keep a larger result under a name."""
        self._save(f"arrays-{name}.safetensors", name, arrays)

    def load_arrays(self, name: str) -> Arrays | None:
        """What `save_arrays` kept; None where it is missing, damaged or of another request."""
        return self._load(f"arrays-{name}.safetensors", name)

    def _save(self, file: str, index: str, arrays: Arrays) -> None:
        from safetensors.numpy import save

        tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self._write(file, save(tensors, metadata={
            "request": self._request, "index": index, "digests": json.dumps(_digests(tensors), sort_keys=True)}))

    def _load(self, name: str, index: str) -> Arrays | None:
        from safetensors import SafetensorError, safe_open

        path = self.folder / name
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                said = file.metadata() or {}
                arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  it is no dict
        except (OSError, SafetensorError, ValueError):
            return None
        ours = (self._request, index, json.dumps(_digests(arrays), sort_keys=True))
        return arrays if (said.get("request"), said.get("index"), said.get("digests")) == ours else None

    def _digest(self, text: str) -> str:
        return hashlib.sha256(f"{self._request} {text}".encode()).hexdigest()

    def _write(self, name: str, data: bytes) -> None:
        path, temporary = self.folder / name, self.folder / f".{name}.tmp"
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise MachineError(f"cannot be written: {error.strerror or error}; what was finished is kept, and --resume "
                               "goes on", file=str(path)) from None

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        try:
            if not path.is_file():
                return None
            with path.open("rb") as stream:
                raw = stream.read(_MAX_NOTE_BYTES + 1)
        except OSError as error:
            raise MachineError(f"cannot be read: {error.strerror or error}", file=str(path)) from None
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise SpecError("is damaged: not a JSON object; remove the folder to begin anew", file=str(path))
        return found


def discard(folder: Path) -> None:
    """Delete what a finished capture kept in its folder, and the folder when nothing else is in it."""
    if not folder.is_dir():
        return
    with contextlib.suppress(OSError):  # the trace is safe: what cannot be deleted only takes room
        for path in folder.iterdir():
            if _OWN_FILES.fullmatch(path.name):
                path.unlink(missing_ok=True)
        folder.rmdir()


def _chunk(index: int) -> str:
    return f"chunk-{index:06d}.safetensors"


def _digests(arrays: Arrays) -> dict[str, str]:
    return {name: f"{array.dtype.str} {digest_of(array)}" for name, array in arrays.items()}
