"""Does it matter into which memory a drive is read? Rates of direct reads into several stretches, each visited twice.

    python benchmarks/landing.py FILE [--stretches 12] [--out rates.json]

FILE is a large file on the drive, 4 GB or more. On hardware of its own all rates are alike. On a virtual machine they
may differ two- to threefold and come back the same at the second visit: then runs and calibrations compare only where
they land in the same memory (`simmem.runtime.landing`). One ratio says it: the spread between the stretches over the
spread between two visits of one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from simmem.runtime.landing import page_buffer
from simmem.runtime.reader import Reader, in_chunks, open_direct

BATCH_BYTES, CHUNK_BYTES, DEPTH, VISIT_S = 256 << 20, 4 << 20, 32, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--stretches", type=int, default=12)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    n_batches = asked.file.stat().st_size // BATCH_BYTES
    stretches = [page_buffer(BATCH_BYTES) for _ in range(asked.stretches)]
    visits: list[list[float]] = []
    at = 0
    with open_direct(asked.file) as fd, Reader(fd, str(asked.file), DEPTH) as reader:
        for _ in range(2):
            rates = []
            for buffer in stretches:
                begun, moved = time.perf_counter(), 0
                while (took := time.perf_counter() - begun) < VISIT_S:
                    reader.submit(in_chunks(at % n_batches * BATCH_BYTES, BATCH_BYTES, CHUNK_BYTES, buffer)).wait()
                    at, moved = at + 1, moved + BATCH_BYTES
                rates.append(moved / took)
            visits.append(rates)
    first, second = np.log(np.array(visits))
    between, within = float(np.std((first + second) / 2)), float(np.std(first - second) / np.sqrt(2))
    found = {"unit": "B/s", "visits": visits, "least_over_most": float(np.exp((first + second).min() / 2)
                                                                       / np.exp((first + second).max() / 2)),
             "spread_between_stretches_over_that_of_visits": between / max(within, 1e-9)}
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in found.items() if k != "visits"}))
    for number, pair in enumerate(zip(*visits, strict=True)):
        print(f"stretch {number:2}: " + ", ".join(f"{rate / 1e9:.2f} GB/s" for rate in pair))


if __name__ == "__main__":
    main()
