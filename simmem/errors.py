"""Every error that simmem raises on purpose, and the exit code each one ends in.

SimmemError
├── SpecError              a file, key or argument is wrong                      exit 2
│   ├── UnitError          a quantity without, or with the wrong, unit           exit 2
│   └── UnknownNameError   no device, model, trace or policy of that name        exit 2
├── TraceError             a trace that is damaged, hostile or of another model  exit 2
├── InfeasiblePlanError    nothing fits: the binding tier and the missing bytes  exit 3
├── CalibrationError       too few measurements, or too noisy to judge           exit 4
├── MachineError           I/O failed, disk full, out of memory, extra missing   exit 4
└── ToleranceExceeded      a gate or a reference row failed                      exit 1

Anything else that escapes is a bug and keeps its traceback (exit 70).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CalibrationError",
    "InfeasiblePlanError",
    "MachineError",
    "SimmemError",
    "SpecError",
    "ToleranceExceeded",
    "TraceError",
    "UnitError",
    "UnknownNameError",
]


class SimmemError(Exception):
    """An expected failure: one clear line, no traceback."""

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        key: str | None = None,
        tier: str | None = None,
        missing_bytes: float | None = None,
    ) -> None:
        self.message = message
        self.file = file
        self.key = key
        self.tier = tier
        self.missing_bytes = missing_bytes
        super().__init__(message)

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.key) if part)
        return f"{where}: {self.message}" if where else self.message


class SpecError(SimmemError):
    """A file, key or argument says something that cannot be."""


class UnitError(SpecError):
    """A quantity without a unit, or with one of another dimension."""


class UnknownNameError(SpecError):
    """A name that is not known, with the closest ones that are."""

    def __init__(self, what: str, name: str, known: Iterable[str], *, aliases: Iterable[str] = (),
                 file: str | None = None, key: str | None = None) -> None:
        known = sorted(set(known))
        close = difflib.get_close_matches(name.lower(), sorted({*known, *aliases}), n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known)}"
        super().__init__(f"no {what} named {name!r}; {hint}", file=file, key=key)


class TraceError(SimmemError):
    """A trace that is truncated, hostile, or does not belong to this model."""


class InfeasiblePlanError(SimmemError):
    """No candidate fits: names the binding tier and by how many bytes."""

    exit_code = 3


class CalibrationError(SimmemError):
    """Too few or too noisy measurements to say anything."""

    exit_code = 4


class MachineError(SimmemError):
    """The machine failed: I/O error, disk full, out of memory, optional package missing."""

    exit_code = 4


class ToleranceExceeded(SimmemError):
    """A gate or a reference row is outside its tolerance."""

    exit_code = 1
