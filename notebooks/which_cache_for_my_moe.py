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
# # Which cache for my MoE on my SSD?
#
# A mixture of experts uses a few of its experts for each token. If they do not all fit, some are kept in a cache and
# the others are read from the SSD when a token asks for them. Two questions: how large must the cache be, and which
# expert should give way to another?

# %%
from IPython.display import Markdown

import simmem
from simmem.report.replay import replay_answer
from simmem.units import format_quantity

DEVICE, MODEL, WEIGHTS = "nvme-gen4-pc", "qwen3-30b-a3b", "int4"
DRAM = ["6 GB", "8 GB", "10 GB", "12 GB", "14 GB", "16 GB"]
TRACE, SMALL_MODEL = "moe-8x3m-router", "moe-8x3m"  # routing that was captured; put your own here


def size(n_bytes):
    return format_quantity(n_bytes, "bytes")


# %% [markdown]
# ## How large?
#
# Without a trace of what its router chooses, a model's experts are taken to be used equally often and independently.
# That is the worst case for a cache: n of E experts kept hit n/E, whichever they are. So this part answers how much
# memory helps, and cannot tell policies apart.

# %%
frame = simmem.sweep(DEVICE, MODEL, weights=WEIGHTS, dram=DRAM, policy=["expert-cache", "stream"])
simmem.pictures.by_budget(frame, "decode_tokens_per_s");

# %%
cached = frame[(frame.asked_policy == "expert-cache") & (frame.status == "ok")]
cached[["dram_bytes", "cache_hit_ratio", "storage_bytes_per_token", "decode_tokens_per_s", "token_latency_low_s",
        "token_latency_high_s"]]

# %%
small, large = cached.iloc[0], cached.iloc[-1]
Markdown(
    f"{MODEL} at {WEIGHTS} on {DEVICE}: from {size(small.dram_bytes)} to {size(large.dram_bytes)} of memory, hits "
    f"rise from {small.cache_hit_ratio:.0%} to {large.cache_hit_ratio:.0%}, what a token reads falls from "
    f"{size(small.storage_bytes_per_token)} to {size(large.storage_bytes_per_token)}, and the rate rises from "
    f"{small.decode_tokens_per_s:.2g} to **{large.decode_tokens_per_s:.3g} tokens a second**.")

# %% [markdown]
# ## Which expert gives way?
#
# Real routers have favourites, and they change with the text. Only a trace knows. This one was captured from a small
# mixture of experts; `simmem capture` records one from a real model, and `simmem import` reads the routing log of
# another program. Replaying it says what each policy would have missed at every size, without running anything.
# Belady's policy knows the future: nothing misses less.

# %%
document = replay_answer(TRACE, policies=["lru", "lfu", "slru", "pin-hot", "belady"])
simmem.pictures.miss_ratio(document);

# %%
curves = {c["policy"]: c for c in document["curves"]}
sizes = curves["lru"]["sizes_bytes"]
half = min(range(len(sizes)), key=lambda i: abs(sizes[i] - document["unit_bytes"] * document["n_units"] / 2))
hits = {name: c["hit_ratio"][half] for name, c in curves.items()}
real = {name: h for name, h in hits.items() if name != "belady"}
first = max(real, key=real.get)
uniform = sizes[half] / (document["unit_bytes"] * document["n_units"])
Markdown(
    f"With room for half of the experts of each layer, **{first}** hits most, {real[first]:.1%}; "
    + ", ".join(f"{name} {h:.1%}" for name, h in sorted(real.items(), key=lambda item: -item[1]) if name != first)
    + f". Knowing the future would bring {hits['belady']:.1%}, and a router without favourites {uniform:.0%} with any "
    f"policy. So here the policy is worth up to {100 * (real[first] - min(real.values())):.1f} points of the hits, and "
    f"the favourites of the router {100 * (real[first] - uniform):.1f}.")

# %% [markdown]
# ## What that means in tokens a second
#
# The planner uses the same replay. The small model with its own trace, half of its experts cached, each policy once:

# %%
policies = ["lru", "lfu", "slru", "pin-hot"]
held = {"experts_per_layer": 4, "prefetch": "none"}
by_policy = simmem.sweep(DEVICE, SMALL_MODEL, trace=TRACE, prompt=16, new_tokens=16, weights="fp32", policy=[
    {"policy": "expert-cache", "knobs": {**held, "cache_policy": name}} for name in policies])
by_policy = by_policy.assign(cache_policy=policies)
by_policy[["cache_policy", "status", "cache_hit_ratio", "storage_bytes_per_token", "decode_tokens_per_s"]]

# %%
works = by_policy[by_policy.status == "ok"].sort_values("decode_tokens_per_s", ascending=False)
fastest, slowest = works.iloc[0], works.iloc[-1]
gain = fastest.decode_tokens_per_s / slowest.decode_tokens_per_s - 1
Markdown(f"**{fastest.cache_policy}** is the fastest, {gain:.1%} faster than {slowest.cache_policy}. The times are of "
         "a model of a few megabytes: what carries over to a large one is the method, and not the figures.")
