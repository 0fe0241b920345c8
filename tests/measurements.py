"""Measurements of a machine that does not exist, so that what is derived from them can be held to the truth."""

from __future__ import annotations

import numpy as np

from simmem.cost.surface import Surface
from simmem.spec.measurement import Condition, Measurement, Measurements

__all__ = ["BATCH_S", "COPY_RATE", "PEAKS", "PRODUCT_RATE", "READER_S", "READ_RATE", "SURFACE", "WAKE_S",
           "measurements"]

SURFACE = Surface(latency_s=80e-6, single_rate=1.6e9, request_time_s=2.5e-6, request_rate=4.2e9, rate=3.4e9)
READ_RATE, COPY_RATE, PRODUCT_RATE = 20e9, 23e9, 17e9
PEAKS = {"fp32": 120e9, "bf16": 480e9}
WAKE_S, READER_S, BATCH_S = 400e-6, 40e-6, 200e-6


def measurements(noise: float = 0.03, seed: int = 0, *, surface: Surface = SURFACE, without: str = "") -> Measurements:
    """Five visits of four samples of every probe; log-normal noise within and between visits."""
    rng = np.random.default_rng(seed)
    points = []

    def add(probe: str, seconds: float, *, n_bytes: float = 0.0, flop: float = 0.0, requests: float = 1.0,
            **said: Condition) -> None:
        if probe == without:
            return
        runs = (4,) * 5
        samples = seconds * np.repeat(rng.lognormal(0, noise, 5), 4) * rng.lognormal(0, noise, 20)
        points.append(Measurement(probe=probe, conditions=dict(said), bytes=n_bytes, flop=flop, requests=requests,
                                  runs=runs, samples_s=tuple(samples.tolist()), at_s=tuple(range(20))))

    for size in (4096 << 2 * k for k in range(7)):
        for depth in (1, 2, 4, 8, 16, 32, 64):
            for pattern in ("random", "sequential"):
                regime = "random" if pattern == "random" else "sequential"
                add("storage-read", size / float(surface.throughput(size, depth, regime)), n_bytes=size,  # type: ignore[arg-type]
                    size_bytes=size, depth=depth, pattern=pattern, how="direct")
        add("storage-read", size / 9e9, n_bytes=size, size_bytes=size, depth=4, pattern="random", how="cached")
    for n in (1, 2):
        for probe, rate in (("memory-read", READ_RATE), ("memory-copy", COPY_RATE)):
            add(probe, 1e8 / (rate * (0.7 if n == 1 else 1.0)), n_bytes=1e8, agent="cpu", level="dram", threads=n)
        add("memory-read", 8e6 / 90e9, n_bytes=8e6, agent="cpu", level="cache", threads=n)
    for rows in (1024, 2048, 4096):
        for dtype, width in (("fp32", 4), ("bf16", 2)):
            add("gemv", width * rows**2 / PRODUCT_RATE, n_bytes=width * rows**2, flop=2.0 * rows**2, agent="cpu",
                level="dram", threads=2, dtype=dtype, rows=rows, cols=rows, batch=1)
            add("gemm", 512.0 * rows**2 / PEAKS[dtype] / 0.9 ** (rows < 4096), flop=512.0 * rows**2, agent="cpu",
                level="dram", threads=2, dtype=dtype, rows=rows, cols=rows, batch=256)
    add("op-call", 1e-6, agent="cpu", threads=2)
    add("op-parallel", 6e-6, agent="cpu", threads=1)
    add("op-parallel", 9e-6, agent="cpu", threads=2)
    add("token-choice", 30e-6, agent="cpu", threads=2)
    add("hand-off", 10e-6, agent="cpu")
    for decoder in ("opt-125m", "smollm2-135m"):
        for op, kernels, each in (("attention", 8, 20e-6), ("ffn", 6, 9e-6), ("head", 3, 15e-6), ("layer", 14, 15e-6)):
            add("decoder-op", kernels * each, agent="cpu", op=op, decoder=decoder, dtype="bf16", threads=2, pause_s=0.0,
                requests=kernels)
        add("decoder-op", 14 * 15e-6 + WAKE_S, agent="cpu", op="layer", decoder=decoder, dtype="bf16", threads=2,
            pause_s=3e-3, requests=14)
    for size in (8192, 1 << 16, 1 << 20):
        for n in (2, 8, 32, 256):
            readers = min(n, 32)
            steady = n * size / float(surface.throughput(size, readers))
            add("batch-read", steady + readers * READER_S + BATCH_S, n_bytes=n * size, requests=n, size_bytes=size,
                depth=readers, how="direct", behind_bytes=64 << 20)
    add("storage-sustained", (4 << 20) / 2.1e9, n_bytes=4 << 20, size_bytes=4 << 20, depth=4, how="direct",
        pattern="sequential")
    return Measurements(
        name="made-up", date="2026-11-21", mode="full", points=tuple(points), bytes_written=2e9,
        versions={"torch": "2.13"}, machine={
            "processor": "Paper 9000", "threads": 2, "cores": 2, "memory_bytes": 32 * 10**9,
            "available_bytes": 30 * 10**9, "volume_bytes": 10**12, "block_bytes": 4096, "filesystem": "ext4",
            "drive_model": "Paper SSD", "direct_io": "yes"})
