"""Devices and models: frozen, sourced, strictly read."""

from simmem.spec.base import Figure, Kind
from simmem.spec.device import Device, load_device
from simmem.spec.model import Model, load_model

__all__ = ["Device", "Figure", "Kind", "Model", "load_device", "load_model"]
