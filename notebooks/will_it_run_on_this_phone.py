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
# # Will it run on this phone?
#
# A phone has a few GB of memory, of which an app may use a part, and flash that is much larger and much slower. A
# model that does not fit can still run if parts of it stay in flash and are read when a token needs them. Whether
# that is fast enough is a question of numbers, and this notebook works them out. Change the next cell and run
# everything again.

# %%
from IPython.display import Markdown

import simmem
from simmem.units import format_quantity

DEVICE, MODEL = "iphone15", "opt-6.7b"
WANTED_TOKENS_PER_S = 5.0  # what you would call usable


def size(n_bytes):
    return format_quantity(n_bytes, "bytes")


def seconds(s):
    return format_quantity(s, "s")


# %% [markdown]
# ## The plan
#
# `simmem.plan` tries every way that it knows of keeping and moving weights, at the model's own precision, in 8 and in
# 4 bits, and answers with the fastest that fits.

# %%
plan = simmem.plan(DEVICE, MODEL)
plan

# %%
fit = plan.fit
Markdown(
    f"At {fit.weights} {MODEL} needs **{size(fit.needed_bytes)}** with its keys and values, and an app may use "
    f"**{size(fit.budget_bytes)}** of {fit.tier}: "
    + (f"**{size(fit.missing_bytes)} too much**. " if fit.missing_bytes else "it fits. ")
    + (f"Reading all of it from flash for each token would take {seconds(fit.stream_token_latency_s)}."
       if fit.missing_bytes and fit.stream_token_latency_s else ""))

# %% [markdown]
# ## The answer
#
# Most figures of a phone are not published, so the plan comes with a range: nine times in ten the true time should
# lie inside it. The answer is *yes* only if the slow end of that range is still fast enough.

# %%
low, high = plan.predicted.token_latency_interval_s
slow, fast = 1 / high, 1 / low
verdict = ("**Yes**: even the slow end of the range is fast enough." if slow >= WANTED_TOKENS_PER_S else
           "**Perhaps**: only the fast end of the range is fast enough, so measure before you promise it."
           if fast >= WANTED_TOKENS_PER_S else "**No**: even the fast end of the range is too slow.")
Markdown(
    f"{verdict}\n\n{MODEL} on {DEVICE} with {plan.policy.name} at {plan.workload.label}: "
    f"**{plan.predicted.decode_tokens_per_s:.1f} tokens a second**, between {slow:.1f} and {fast:.1f}; wanted were "
    f"{WANTED_TOKENS_PER_S:g}. The first token comes after {seconds(plan.predicted.first_token_s)}, once the app has "
    f"loaded for {seconds(plan.predicted.load_s)}. Quality: {plan.quality.source}.")

# %% [markdown]
# ## What lives where

# %%
simmem.pictures.residency(plan);

# %% [markdown]
# ## What happens during a token
#
# A row for each thing that works on its own: the flash, the GPU, the CPU. Where the GPU has gaps, it waits for the
# flash.

# %%
simmem.pictures.timeline(plan);

# %%
share = plan.predicted.breakdown_s["io"] / plan.predicted.token_latency_s
flash = sum(plan.predicted.bytes_per_token.values())
Markdown(f"A token reads {size(flash)} from flash, and {share:.0%} of its time is spent waiting for that.")

# %% [markdown]
# ## What would help
#
# Each bar: how much a token's time changes if one figure of the phone is ten per cent larger. These are also the
# figures that are worth measuring on a real phone before anyone relies on the answer.

# %%
simmem.pictures.sensitivity(plan);

# %% [markdown]
# ## Other phones
#
# The same model in 4 bits, on other phones, with what each leaves to one app.

# %%
phones = simmem.sweep([DEVICE, "iphone15-pro", "iphone16", "pixel8", "oneplus12"], MODEL, weights="int4")
simmem.pictures.devices(phones, "decode_tokens_per_s");

# %%
usable = phones[(phones.status == "ok") & (phones.batch / phones.token_latency_high_s >= WANTED_TOKENS_PER_S)]
Markdown(f"Of {len(phones)} phones **{len(usable)}** reach {WANTED_TOKENS_PER_S:g} tokens a second at the slow end of "
         "their range" + (f": {', '.join(usable.sort_values('token_latency_s').device)}." if len(usable) else "."))
