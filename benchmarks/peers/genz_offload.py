"""Run by the interpreter that has GenZ, not by simmem's: throughput of a batch whose weights are offloaded."""

import json
import sys
from pathlib import Path

from GenZ import decode_moddeling, prefill_moddeling

request = json.loads(sys.stdin.read())
answers, sys.stdout = sys.stdout, sys.stderr  # GenZ prints
before = set(Path("/tmp/genz").rglob("*")) if Path("/tmp/genz").exists() else set()
shared = {"model": request["model"], "batch_size": request["batch_size"], "system_name": request["system"],
          "bits": "bf16", "model_offload": True}
prompt = prefill_moddeling(input_tokens=request["input_tokens"], **shared)
step = decode_moddeling(input_tokens=request["input_tokens"], output_tokens=request["new_tokens"] // 2, Bb=1, **shared)
for path in set(Path("/tmp/genz").rglob("*")) - before:
    if path.is_file():
        path.unlink()
new, batch = request["new_tokens"], request["batch_size"]
seconds = (prompt["Latency"] + (new - 1) * step["Latency"]) / 1e3
print(json.dumps({"tokens_per_s": batch * new / seconds}), file=answers)
