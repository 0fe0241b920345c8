"""Does it matter how the memory lies that a drive is read into? Direct reads into small pages and into huge ones.

    python benchmarks/read_memory.py FILE [--buffers 6] [--out rates.json]

FILE is a large file on the drive, 1 GB or more. Buffers of both kinds are allocated by turns and read into by turns;
for each the rate is said and, to root, how many stretches of physical memory it is made of. The ratio of the medians
says what huge pages bring; the spread among the small ones says how far two runs may differ that do not use them.
"""

from __future__ import annotations

import argparse
import json
import mmap
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmem.runtime.reader import Reader, in_chunks, open_direct, page_buffer

BATCH_BYTES, CHUNK_BYTES, DEPTH, VISIT_S, VISITS = 256 << 20, 4 << 20, 32, 1.0, 2

Bytes = NDArray[np.uint8]


def small_pages(n_bytes: int) -> Bytes:
    memory = np.frombuffer(mmap.mmap(-1, n_bytes), np.uint8)  # shareable, so without huge pages
    memory[:: mmap.PAGESIZE] = 0
    return memory


def physical_stretches(buffer: Bytes) -> int | None:
    """Runs of neighbouring physical pages; None where this user is not shown them."""
    try:
        with Path("/proc/self/pagemap").open("rb") as table:
            table.seek(buffer.ctypes.data // mmap.PAGESIZE * 8)
            entries = np.frombuffer(table.read(len(buffer) // mmap.PAGESIZE * 8), np.uint64)
    except OSError:
        return None
    pages = (entries & np.uint64((1 << 55) - 1)).astype(np.int64)
    return int(np.count_nonzero(np.diff(pages) != 1)) + 1 if pages.any() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--buffers", type=int, default=6)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    n_batches = asked.file.stat().st_size // BATCH_BYTES
    buffers = [(kind, make(BATCH_BYTES)) for _ in range(asked.buffers)
               for kind, make in (("small", small_pages), ("huge", page_buffer))]
    rates: list[list[float]] = [[] for _ in buffers]
    at = 0
    with open_direct(asked.file) as fd, Reader(fd, str(asked.file), DEPTH) as reader:
        for _ in range(VISITS):
            for (_kind, buffer), seen in zip(buffers, rates, strict=True):
                begun, moved = time.perf_counter(), 0
                while (took := time.perf_counter() - begun) < VISIT_S:
                    reader.submit(in_chunks(at % n_batches * BATCH_BYTES, BATCH_BYTES, CHUNK_BYTES, buffer)).wait()
                    at, moved = at + 1, moved + BATCH_BYTES
                seen.append(moved / took)
    rows = [{"pages": kind, "physical_stretches": physical_stretches(buffer), "bytes_per_s": seen}
            for (kind, buffer), seen in zip(buffers, rates, strict=True)]
    medians = {kind: [float(np.median(seen)) for (k, _), seen in zip(buffers, rates, strict=True) if k == kind]
               for kind in ("small", "huge")}
    said = {"huge_over_small": float(np.median(medians["huge"]) / np.median(medians["small"])),
            **{f"{kind}_most_over_least": max(found) / min(found) for kind, found in medians.items()}}
    if asked.out:
        asked.out.write_text(json.dumps({**said, "buffers": rows}, indent=1) + "\n", encoding="utf-8")
    for (kind, buffer), seen in zip(buffers, rates, strict=True):
        print(kind, physical_stretches(buffer), *(f"{rate / 1e9:.2f} GB/s" for rate in seen))
    print(json.dumps(said))


if __name__ == "__main__":
    main()
