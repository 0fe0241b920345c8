"""Which machine is this? What the system says of processor, memory, storage and GPU, as far as it says anything.

Every reader returns what it found and leaves out what it did not: a container hides, another system has no /proc.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from simmem.spec.measurement import Condition

__all__ = ["Memory", "Volume", "cache_bytes", "describe", "memory", "usable_cores", "versions", "volume"]

_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "rootfs")
_USUAL_CACHE_BYTES = 32 << 20
_SATA_BYTES_PER_S = 600_000_000
# Payload of one lane after line coding [B/s], by the speed that sysfs prints.
_PCIE_LANE = {"2.5": 250_000_000, "5.0": 500_000_000, "8.0": 984_600_000, "16.0": 1_969_000_000, "32.0": 3_938_000_000,
              "64.0": 7_563_000_000}


def usable_cores() -> int:
    """Cores this process may run on: its affinity, and the whole part of a container's quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
        cores = min(cores, max(int(quota[0]) // int(quota[1]), 1))
    return max(cores, 1)


def cache_bytes() -> int:
    """Last-level cache that one core sees; 32 MiB where nothing says. [B]"""
    return max((size for _, size in _caches()), default=_USUAL_CACHE_BYTES)


@dataclass(frozen=True)
class Memory:
    """Of the machine, or of the container where that has less. [B]"""

    total_bytes: int
    available_bytes: int


def memory() -> Memory:
    """How much there is, and how much a process could have of it now."""
    found: dict[str, str] = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE))
    if "MemTotal" in found:
        total = int(found["MemTotal"]) << 10
        available = int(found.get("MemAvailable", found.get("MemFree", 0))) << 10
    else:
        total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, used in (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
                        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes")):
        most = _read(limit).strip()
        if most.isdigit() and int(most) < total:
            total = int(most)
            available = min(available, max(total - int(_read(used).strip() or 0), 0))
    return Memory(total, available)


@dataclass(frozen=True)
class Volume:
    """The file system that holds a folder, and the drive under it."""

    filesystem: str
    drive: str
    model: str
    total_bytes: int
    free_bytes: int
    block_bytes: int
    """Physical block of the drive, or else what the file system calls its block. [B]"""
    link_bytes_per_s: float | None
    """What the drive's link can carry at most, where the system says; no read of the drive is faster."""

    @property
    def in_memory(self) -> bool:
        """True where the folder is in memory, and there is no storage to measure."""
        return self.filesystem in _IN_MEMORY


def volume(folder: Path) -> Volume:
    """Raises OSError where the folder cannot be looked at."""
    state = os.statvfs(folder)
    filesystem, drive = _mount(folder)
    block = Path("/sys/class/block") / Path(drive).name
    parent = block.resolve().parent if (block / "partition").exists() else block
    physical = _read(parent / "queue" / "physical_block_size").strip()
    model = _read(parent / "device" / "model").strip()
    return Volume(filesystem, Path(drive).name, model, state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize,
                  int(physical) if physical.isdigit() else state.f_bsize, _link(parent))


def describe(scratch: Volume | None, *, threads: int, device: str) -> dict[str, Condition]:
    """What makes it this machine, for the head of a file of measurements."""
    mem = memory()
    found: dict[str, Condition] = {
        "system": f"{platform.system()} {platform.release()}", "architecture": platform.machine(),
        "processor": _processor(), "cores": os.cpu_count() or 1, "usable_cores": usable_cores(), "threads": threads,
        "memory_bytes": mem.total_bytes, "available_bytes": mem.available_bytes, "cache_bytes": cache_bytes(),
        "virtual": _is_virtual(),
    }
    found |= {f"{name}_cache_bytes": size for name, size in _caches()}
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    clock = _read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
    if governor:
        found["governor"] = governor
    if clock.isdigit():
        found["clock_max_hz"] = int(clock) * 1000
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None:
        found["load_at_start"] = round(load, 2)
    if scratch is not None:
        found |= {"filesystem": scratch.filesystem, "drive": scratch.drive, "volume_bytes": scratch.total_bytes,
                  "block_bytes": scratch.block_bytes}
        if scratch.model:
            found["drive_model"] = scratch.model
        if scratch.link_bytes_per_s is not None:
            found["drive_link_bytes_per_s"] = scratch.link_bytes_per_s
    return found | (_gpu() if device == "cuda" else {})


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("simmem", "torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _gpu() -> dict[str, Condition]:
    import torch

    if not torch.cuda.is_available():
        return {}
    what = torch.cuda.get_device_properties(0)
    found: dict[str, Condition] = {
        "gpu": what.name, "gpu_memory_bytes": what.total_memory, "gpu_sms": what.multi_processor_count,
        "gpu_capability": f"{what.major}.{what.minor}", "cuda": str(torch.version.cuda),
        "gpu_cache_bytes": getattr(what, "L2_cache_size", 0)}
    for name, ask in (("gpu_clock_mhz", "clock_rate"), ("gpu_power_mw", "power_draw"), ("gpu_celsius", "temperature")):
        try:
            found[name] = getattr(torch.cuda, ask)(0)
        except (RuntimeError, ImportError, AttributeError):  # these ask a library of the driver, which may be absent
            continue
    return found


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return " ".join((found.group(1) if found else platform.processor() or platform.machine()).split())[:100]


def _is_virtual() -> bool:
    return bool(re.search(r"^flags\s*:.*\bhypervisor\b", _read("/proc/cpuinfo"), re.MULTILINE))


def _caches() -> list[tuple[str, int]]:
    """("l1", bytes) and so on of core 0, without instruction caches."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        size = re.fullmatch(r"(\d+)([KM]?)", _read(folder / "size").strip())
        if size and _read(folder / "type").strip() != "Instruction":
            scale = {"": 1, "K": 1 << 10, "M": 1 << 20}[size.group(2)]
            found.append((f"l{_read(folder / 'level').strip()}", int(size.group(1)) * scale))
    return found


def _mount(folder: Path) -> tuple[str, str]:
    """File system and drive of the mount that holds a folder."""
    number = folder.stat().st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    inside, best = str(folder.resolve()), ("unknown", "unknown", "")
    for line in _read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, rest = left.split(), right.split()
        if len(fields) < 5 or len(rest) < 2:
            continue
        where = fields[4].replace("\\040", " ")
        under = inside == where or inside.startswith(where.rstrip("/") + "/")
        if (fields[2] == wanted or under) and under and len(where) >= len(best[2]):
            best = rest[0], rest[1], where
    return best[0], best[1]


def _link(block: Path) -> float | None:
    for folder in [block.resolve(), *block.resolve().parents][:8]:
        speed, width = _read(folder / "current_link_speed").split(), _read(folder / "current_link_width").strip()
        if speed and width.isdigit() and speed[0] in _PCIE_LANE:
            return float(_PCIE_LANE[speed[0]] * int(width)) if int(width) else None
        if re.fullmatch(r"ata\d+", folder.name):
            return float(_SATA_BYTES_PER_S)
    return None


def _read(path: Path | str) -> str:
    try:
        with Path(path).open("rb") as stream:
            return stream.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return ""
