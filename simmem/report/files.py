"""How is a file written so that nothing half-written is ever left behind?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from simmem.errors import MachineError, SpecError

__all__ = ["check_writable", "write_bytes", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary file beside `path`, then rename it into place.

    Raises SpecError where the folder does not exist, MachineError where it cannot be written.
    """
    check_writable(path)
    folder = path.parent
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise MachineError(f"cannot be written: {error.strerror or error}", file=str(path)) from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def check_writable(path: Path, *, inputs: Iterable[str | Path | None] = (), suffix: str | None = None) -> None:
    """Raise now rather than after a long run if `path` could not, or should not, be written.

    inputs : what the command reads; none of it is overwritten, of a folder no file that is there.
    suffix : what the name has to end in to be read back.
    """
    for one in inputs:
        if one is not None and path.exists() and Path(one).exists() and path.samefile(one):
            raise SpecError("is also what is read; write to another file", file=str(path))
        if one and path.is_file() and Path(one).is_dir() and path.parent.samefile(one):
            raise SpecError("is a file of the folder that is read; write to another file", file=str(path))
    if not path.parent.is_dir():
        raise SpecError("the folder it should be written to does not exist", file=str(path))
    if path.is_dir():
        raise SpecError("is a folder, expected a file to write", file=str(path))
    if path.exists() and not path.is_file():  # a rename would put a file in the place of, say, /dev/stdout
        raise SpecError("is not a regular file, so nothing is written to it", file=str(path))
    if suffix is not None and path.suffix != suffix:
        raise SpecError(f"found a name that ends in {path.suffix!r}, expected {suffix}", file=str(path), key="--out")
    try:  # permission bits do not tell: not to root, not of a read-only or full disk
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        Path(temporary).unlink()
    except OSError as error:
        raise MachineError(f"cannot be written: {error.strerror or error}", file=str(path)) from None
