"""What was measured on a machine, sample by sample, so that anyone can fit it again?

A file of measurements is raw: times as they came off the clock, when each was taken, and what was run. Medians,
noise floors, device figures and fitted cost models are derived from it and can always be derived anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from simmem.spec.base import Frozen, validate
from simmem.spec.jsonfile import read_json

__all__ = ["CALIBRATED", "Condition", "Measurement", "Measurements", "load_measurements", "measured_by",
           "versions_said"]

CALIBRATED = "simmem calibrate"
"""How the source of a figure begins that was measured on the machine itself by this program."""

_MADE = re.compile(rf"Measured by {CALIBRATED} \(.*\) on \S+; (.*)\.")

MAX_FILE_BYTES = 64 << 20

Condition = bool | int | float | str


class Measurement(Frozen):
    """One thing that was run, and every time it took."""

    probe: str
    """Which probe ran it, e.g. "storage-read", "memory-read", "gemv", "gemm", "gather", "host-to-device"."""
    conditions: dict[str, Condition]
    """What was run: shapes, precision, agent, threads, request size, depth, pattern, and the like."""
    flop: float = Field(default=0.0, ge=0)
    """Of one sample. [FLOP]"""
    bytes: float = Field(default=0.0, ge=0)
    """Moved by one sample, each byte counted once for each side that has to move it. [B]"""
    requests: float = Field(default=0.0, ge=0)
    """Reads, copies or kernel launches of one sample."""
    samples_s: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    """How long each sample took. [s]"""
    at_s: tuple[float, ...] = ()
    """When each was begun, since the start of the run: what drifts can be seen to drift. [s]"""
    runs: tuple[int, ...] = ()
    """How many samples each visit took, in order; empty: each sample is one. Between visits other probes ran."""
    refused: str | None = None
    """Why no figure may rest on it: a page-cache hit, two modes, a clock too coarse."""


class Measurements(Frozen):
    """Everything that one run of the probes brought back."""

    schema_: Literal["simmem.measurements/1"] = Field(default="simmem.measurements/1", alias="schema")
    name: str
    """Of the device."""
    date: str
    machine: dict[str, Condition]
    """Processor, cores, caches, memory, storage and its file system, GPU, power limits: what makes it this machine."""
    versions: dict[str, str]
    mode: str
    """quick or full."""
    points: tuple[Measurement, ...]
    bytes_written: float = Field(default=0.0, ge=0)
    """What the run wrote to storage in all. [B]"""


def load_measurements(path: Path) -> Measurements:
    """Read a file of measurements of at most 64 MiB; every failure is one clear `SpecError`."""
    data = read_json(path, what="a file of measurements", max_bytes=MAX_FILE_BYTES)
    return validate(Measurements, data, file=str(path))


def measured_by(measured: Measurements) -> str:
    """When and with which programs a machine was measured, as the first note of its device file says it."""
    made = ", ".join(f"{name} {version}" for name, version in sorted(measured.versions.items()))
    return f"Measured by {CALIBRATED} ({measured.mode}) on {measured.date}; {made}."


def versions_said(notes: Iterable[str]) -> dict[str, str]:
    """What `measured_by` said of versions, name → version, read back from a device's notes; empty where none did."""
    found = next((match for match in map(_MADE.fullmatch, notes) if match), None)
    pairs = [part.partition(" ") for part in found[1].split(", ")] if found else []
    return {name: version for name, _, version in pairs if version}
