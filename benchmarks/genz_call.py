"""Run by the interpreter that has GenZ, not by simmem's: a decode prediction for every line read, its seconds back."""

import sys
import time

from GenZ import decode_moddeling

REQUEST = {"model": "facebook/opt-6.7b", "batch_size": 1, "input_tokens": 512, "output_tokens": 0, "Bb": 1,
           "system_name": "H100_GPU", "bits": "bf16"}

answers = sys.stdout
sys.stdout = sys.stderr  # GenZ prints
decode_moddeling(**REQUEST)
print("ready", file=answers, flush=True)
for _ in sys.stdin:
    started = time.perf_counter()
    decode_moddeling(**REQUEST)
    print(time.perf_counter() - started, file=answers, flush=True)
