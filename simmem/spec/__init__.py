"""Devices and models: frozen, sourced, strictly read."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simmem.spec.base import Figure, Kind
    from simmem.spec.device import Device, load_device
    from simmem.spec.model import Model, load_model

__all__ = ["Device", "Figure", "Kind", "Model", "load_device", "load_model"]

_HOMES = {"Figure": "base", "Kind": "base", "Device": "device", "load_device": "device", "Model": "model",
          "load_model": "model"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # lazily, so that a list of names (`simmem.spec.library`) imports no pydantic
        return getattr(import_module(f"simmem.spec.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'simmem.spec' has no attribute {name!r}")
