"""Where do the probes read from? A file without a name, so that nothing is left behind however the run ends.

It is filled once, with random bytes that no drive can compress, and that is all that is ever written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simmem.errors import MachineError
from simmem.runtime.probe.machine import Volume, volume
from simmem.units import format_quantity

__all__ = ["BLOCK_BYTES", "Scratch", "open_file", "open_scratch"]

BLOCK_BYTES = 4096
"""Offsets, sizes and addresses of direct reads are whole blocks of this."""
_CHUNK_BYTES = 16 << 20
_LEAST_BYTES = 64 << 20
_SHARE_OF_FREE = 0.5


@dataclass(frozen=True)
class Scratch:
    """A filled file that has no name."""

    fd: int
    """Reads through the page cache."""
    direct_fd: int | None
    """Reads past it; None where the file system cannot."""
    size_bytes: int
    volume: Volume
    why_not_direct: str | None
    """Why there is no `direct_fd`, or why what it reads is not storage."""

    def forget(self) -> None:
        """Ask the system to drop what its page cache holds of the file."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def held_share(self) -> float:
        """Share of the file's pages that the page cache holds; 0 where the system does not say."""
        import ctypes
        import mmap

        try:
            ask = ctypes.CDLL(None, use_errno=True).mincore
        except (OSError, AttributeError, TypeError):
            return 0.0
        pages = -(-self.size_bytes // mmap.PAGESIZE)
        held = (ctypes.c_ubyte * pages)()
        with mmap.mmap(self.fd, self.size_bytes, access=mmap.ACCESS_COPY) as view:
            start = ctypes.c_char.from_buffer(view)
            failed = ask(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(self.size_bytes), held)
            del start
        return 0.0 if failed else float((np.ctypeslib.as_array(held) & 1).mean())


@contextmanager
def open_scratch(folder: Path, size_bytes: int, progress: Callable[[str], None] = lambda _: None) -> Iterator[Scratch]:
    """A scratch file in a folder, gone afterwards. At most half of what is free there is taken.

    Raises MachineError where the folder cannot be written or has no room.
    """
    fd = direct = None
    try:
        where = volume(folder)
        size = int(min(size_bytes, where.free_bytes * _SHARE_OF_FREE)) // _CHUNK_BYTES * _CHUNK_BYTES
        if size < min(_LEAST_BYTES, size_bytes):
            raise MachineError(f"has {format_quantity(where.free_bytes, 'bytes')} free; the probes need at least "
                               f"{format_quantity(_LEAST_BYTES / _SHARE_OF_FREE, 'bytes')} (--scratch DIR puts their "
                               "file elsewhere)", file=str(folder))
        fd = _nameless(folder)
        progress(f"writing {format_quantity(size, 'bytes')} to a nameless file in {folder}")
        _fill(fd, size)
        direct, why = _open_direct(fd)
        if where.in_memory:
            why = f"{folder} is in memory ({where.filesystem}): there is no storage to measure"
        yield Scratch(fd, None if why else direct, size, where, why)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise MachineError(f"cannot hold the probes' scratch file: {error.strerror or error}"
                           + ("; nothing was left there" if full else "") + " (--scratch DIR puts it elsewhere)",
                           file=str(folder)) from None
    finally:
        for one in (fd, direct):
            if one is not None:
                with contextlib.suppress(OSError):
                    os.close(one)


@contextmanager
def open_file(path: Path) -> Iterator[Scratch]:
    """A file that is there already, only read, in the place of one that is written for the probes.

    Raises MachineError where it cannot be read.
    """
    with ExitStack() as stack:
        try:
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            stack.callback(os.close, fd)
            where, size = volume(path.parent), os.fstat(fd).st_size // BLOCK_BYTES * BLOCK_BYTES
        except OSError as error:
            raise MachineError(f"cannot be read: {error.strerror or error}", file=str(path)) from None
        direct, why = _open_direct(fd)
        if direct is not None:
            stack.callback(os.close, direct)
        if where.in_memory:
            why = f"{path.parent} is in memory ({where.filesystem}): there is no storage to measure"
        yield Scratch(fd, None if why else direct, size, where, why)


def _nameless(folder: Path) -> int:
    if hasattr(os, "O_TMPFILE"):
        with contextlib.suppress(OSError):  # not every file system has it
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fd, name = tempfile.mkstemp(dir=folder, prefix=".simmem-scratch-")
    Path(name).unlink()
    return fd


def _fill(fd: int, size: int) -> None:
    random = np.random.default_rng(os.getpid())
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)  # a disk without room says so before anything is worn
    for start in range(0, size, _CHUNK_BYTES):
        data = memoryview(random.bytes(min(_CHUNK_BYTES, size - start)))
        written = 0
        while written < len(data):
            written += os.pwrite(fd, data[written:], start + written)
    os.fsync(fd)


def _open_direct(fd: int) -> tuple[int | None, str | None]:
    """The same file past the page cache, and why not."""
    import mmap

    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None, "this system has no direct I/O"
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | flag | os.O_CLOEXEC)
    except OSError as error:
        return None, f"the file system has no direct I/O: {error.strerror}"
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as page:
            os.preadv(direct, [page], 0)
    except OSError as error:
        os.close(direct)
        return None, f"the file system has no direct I/O: {error.strerror}"
    return direct, None
