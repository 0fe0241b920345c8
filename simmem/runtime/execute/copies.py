"""How does what was read get to the computing device? Copies on their own thread and stream, in order of handing in."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Any

from simmem.runtime.cores import run_anywhere
from simmem.runtime.execute.measured import Clock, Key
from simmem.runtime.reader import Ticket

if TYPE_CHECKING:
    import torch

__all__ = ["Copier", "Move"]


class Move:
    """Bytes on their way over one link or two: a read, a copy, or a read and the copy behind it."""

    def __init__(self, ticket: Ticket | None) -> None:
        self.ticket = ticket
        self.read_key: Key | None = None
        self.copy_key: Key | None = None
        self.copied = threading.Event()
        self.span: tuple[Any, Any] = (0.0, 0.0)
        """Of the copy: seconds, or the events of a GPU."""
        self.error: BaseException | None = None

    def wait(self) -> None:
        """Return when it is there, or (GPU) when its copy was launched. Raises what went wrong."""
        if self.copy_key is None:
            if self.ticket is not None:
                self.ticket.wait()
            return
        self.copied.wait()
        if self.error is not None:
            raise self.error


class Copier:
    """Copies to the computing device behind reads; `close` ends its thread."""

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self._device, self._clock = device, clock
        self._queue: queue.SimpleQueue[tuple[Move, torch.Tensor, torch.Tensor] | None] = queue.SimpleQueue()
        self._stream: Any = None
        if device.type == "cuda":
            import torch

            self._stream = torch.cuda.Stream(device)
        self._thread = threading.Thread(target=self._run, name="simmem-copier", daemon=True)
        self._thread.start()

    def submit(self, move: Move, source: torch.Tensor, into: torch.Tensor) -> None:
        """Copy once what the move reads is there."""
        self._queue.put((move, source, into))

    def arrive(self, move: Move) -> None:
        """Let what is launched next on the device wait for a copy, and note its times."""
        assert move.copy_key is not None
        if self._stream is None:
            self._clock.times[move.copy_key] = move.span
        else:
            import torch

            torch.cuda.current_stream(self._device).wait_event(move.span[1])
            self._clock.note(move.copy_key, move.span)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        run_anywhere()
        while (task := self._queue.get()) is not None:
            move, source, into = task
            try:
                if move.ticket is not None:
                    move.ticket.wait()
                self._copy(move, source, into)
            except BaseException as error:  # noqa: BLE001 - goes to whoever waits for it
                move.error = error
            move.copied.set()

    def _copy(self, move: Move, source: torch.Tensor, into: torch.Tensor) -> None:
        if self._stream is None:
            began = time.perf_counter()
            into.copy_(source)
            move.span = (began, time.perf_counter())
            return
        import torch

        with torch.cuda.stream(self._stream):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            into.copy_(source, non_blocking=True)
            last.record()
            move.span = (first, last)
