# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Bring your own device and model
#
# A device is a TOML file, a model is the `config.json` that comes with its weights. Both are written here from
# nothing, into a folder that goes away again, and planned with.

# %%
import json
import tempfile
from pathlib import Path

from IPython.display import Markdown

import simmem
from simmem.errors import SimmemError
from simmem.spec.device import load_device
from simmem.spec.model import load_model
from simmem.units import format_quantity

FOLDER = Path(tempfile.mkdtemp(prefix="simmem-notebook-"))

# %% [markdown]
# ## A device
#
# Memories, units that compute out of them, and links between memories. Every figure is a quantity with a unit, says
# where it comes from (`source`) and how well it is known (`kind`: measured, datasheet, derived, fitted or estimated).
# The kind decides how wide the range of an answer is. `simmem calibrate` measures such a file on a machine that you
# have.

# %%
DEVICE = FOLDER / "my-board.toml"
DEVICE.write_text('''
schema = "simmem.device/1"
name = "my-board"
title = "A small board with 4 GB and an NVMe drive"

[memory.nvme]
kind = "storage"
capacity = { value = "256 GB", kind = "datasheet", source = "the drive's data sheet" }

[memory.dram]
kind = "unified"
capacity = { value = "4 GB", kind = "datasheet", source = "the board's data sheet" }
reserved = { value = "600 MB", kind = "measured", source = "free memory after boot" }

[agent.cpu]
memory = "dram"
flop_share = { value = 0.6, kind = "estimated", source = "a guess until it is measured" }
rate = { value = "17 GB/s", kind = "measured", source = "a copy benchmark" }
rate_share = { value = 0.9, kind = "estimated", source = "a guess until it is measured" }
op_overhead = { value = "5 us", kind = "estimated", source = "as on other boards" }

[agent.cpu.flop_per_s]
fp32 = { value = "150 GFLOP/s", kind = "derived", source = "4 cores x 2.4 GHz x 16 FLOP/cycle" }
fp16 = { value = "300 GFLOP/s", kind = "derived", source = "twice fp32" }

[link.nvme]
kind = "storage"
source = "nvme"
target = "dram"
rate = { value = "1.7 GB/s", kind = "measured", source = "fio, 1 MiB reads" }
latency = { value = "80 us", kind = "measured", source = "fio, 4 KiB reads, one at a time" }
request_time = { value = "5 us", kind = "measured", source = "fio, 4 KiB reads, 64 in flight" }
request_rate = { value = "1.7 GB/s", kind = "estimated", source = "taken as the sequential rate" }
block = { value = "4 KiB", kind = "datasheet", source = "the drive's data sheet" }
''', encoding="utf-8")
device = load_device(str(DEVICE))
kinds = [figure.kind.value for figure in device.figures().values()]
counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
Markdown(f"{device.title}: {len(kinds)} figures, of which {counts}.")

# %% [markdown]
# ## A model
#
# The `config.json` of a published checkpoint is enough: shapes say how large everything is. A GGUF file works too.

# %%
MODEL = FOLDER / "my-model" / "config.json"
MODEL.parent.mkdir()
MODEL.write_text(json.dumps({
    "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu", "hidden_size": 3072,
    "intermediate_size": 8192, "num_attention_heads": 24, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "vocab_size": 64000}), encoding="utf-8")
model = load_model(str(MODEL))
Markdown(f"{model.name}: {sum(group.params for group in model.groups()) / 1e9:.2f} billion parameters in "
         f"{model.architecture.n_layers} layers, published in {model.own_precision}.")

# %% [markdown]
# ## The plan

# %%
plan = simmem.plan(str(DEVICE), str(MODEL))
plan

# %%
low, high = plan.predicted.token_latency_interval_s
Markdown(
    f"**{plan.policy.name}** at {plan.workload.label}: {plan.predicted.decode_tokens_per_s:.2g} tokens a second, "
    f"between {1 / high:.2g} and {1 / low:.2g}. No plan can take less than "
    f"{format_quantity(plan.bound.token_latency_s, 's')} a token ({plan.bound.resource}).")

# %% [markdown]
# ## How near is it to what the board could do?
#
# Each disc is a part of the model during one token; a roof is what a unit or a link can do. A disc on a sloping roof
# waits for memory.

# %%
simmem.pictures.roofline(plan);

# %% [markdown]
# ## Beside devices that are built in

# %%
frame = simmem.sweep([str(DEVICE), "pi5-nvme", "orin-nano"], str(MODEL), weights=["bf16", "int4"])
frame = frame.replace({str(DEVICE): "my-board", str(MODEL): "my-model"})
simmem.pictures.devices(frame, "decode_tokens_per_s");

# %% [markdown]
# ## When something is wrong
#
# One line says the file, the key, what was found and what was expected. Here the rate of the drive has lost its unit.

# %%
broken = FOLDER / "broken.toml"
without_unit = DEVICE.read_text(encoding="utf-8").replace('"1.7 GB/s", kind = "measured"', '"1.7", kind = "measured"')
broken.write_text(without_unit, encoding="utf-8")
try:
    simmem.plan(str(broken), str(MODEL))
except SimmemError as error:
    print(str(error).replace(str(FOLDER), "…"))
