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
# # How much DRAM buys how many tokens/s?
#
# More memory means that less has to be read for each token. How much faster that is depends on the model, on the
# storage and on what is kept, so the curve is rarely a straight line. This notebook draws it, finds where it levels
# off, and says what a faster drive would do instead.

# %%
import numpy as np
from IPython.display import Markdown

import simmem
from simmem.units import format_quantity

DEVICE, MODEL, WEIGHTS = "iphone15", "opt-6.7b", "int4"
BUDGETS = np.array([0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0]) * 1e9  # [B]
NEAR_THE_BEST = 0.9  # where the curve counts as level


def gigabytes(n_bytes):
    return format_quantity(n_bytes, "bytes")


# %% [markdown]
# ## The curve
#
# Two lines: the best of all policies, and plain streaming, which keeps what fits and reads the rest of the weights
# for every token. A cross on the lower edge means that nothing fits.

# %%
frame = simmem.sweep(DEVICE, MODEL, weights=WEIGHTS, dram=BUDGETS, policy=["any", "stream"])
simmem.pictures.by_budget(frame, "decode_tokens_per_s");

# %%
best = frame[(frame.asked_policy == "any") & (frame.status == "ok")].sort_values("dram_bytes")
best[["dram_bytes", "policy", "dram_used_bytes", "storage_bytes_per_token", "decode_tokens_per_s",
      "token_latency_low_s", "token_latency_high_s", "bound_resource"]]

# %% [markdown]
# ## What a further GB is worth

# %%
steps = best[["dram_bytes", "decode_tokens_per_s", "policy"]].assign(
    tokens_per_s_per_gb=best.decode_tokens_per_s.diff() / (best.dram_bytes.diff() / 1e9))
most = best.decode_tokens_per_s.max()
enough = best[best.decode_tokens_per_s >= NEAR_THE_BEST * most].iloc[0]
steepest = steps.loc[steps.tokens_per_s_per_gb.idxmax()]
Markdown(
    f"The smallest budget that anything fits in is **{gigabytes(best.dram_bytes.min())}**, with "
    f"{best.decode_tokens_per_s.iloc[0]:.2g} tokens a second. The steepest step ends at "
    f"{gigabytes(steepest.dram_bytes)}: there a further GB brings {steepest.tokens_per_s_per_gb:.2g} tokens a "
    f"second. **{gigabytes(enough.dram_bytes)}** bring "
    f"{enough.decode_tokens_per_s:.3g} tokens a second, {enough.decode_tokens_per_s / most:.0%} of "
    f"the most that was found ({most:.3g}).")

# %%
steps

# %% [markdown]
# ## What streaming alone would do
#
# The gap between the lines is what choosing well is worth at the same memory.

# %%
works = frame[frame.status == "ok"]
both = works.pivot_table(index="dram_bytes", columns="asked_policy", values="decode_tokens_per_s").dropna()
gain = both["any"] / both["stream"]
Markdown(f"At the same memory the best policy is {gain.min():.3g} to {gain.max():.3g} times as fast as plain "
         f"streaming; the most at {gigabytes(gain.idxmax())}.")

# %% [markdown]
# ## Memory, or a faster drive?
#
# The middle of the curve, taken apart: by how much a token's time changes if one figure is ten per cent larger.
# "replanned" is memory, where a plan with more room was looked for.

# %%
middle = best.iloc[len(best) // 2]
plan = simmem.plan(DEVICE, MODEL, weights=WEIGHTS, dram=middle.dram_bytes)
simmem.pictures.sensitivity(plan);

# %%
changes = {s.figure: s.token_latency_change for s in plan.sensitivity}
memory = min((c for f, c in changes.items() if f.startswith("memory.")), default=0.0)
storage = min((c for f, c in changes.items() if f.startswith("link.flash.")), default=0.0)
Markdown(
    f"At {gigabytes(middle.dram_bytes)}, a tenth more memory changes a token's time by **{memory:+.1%}**, a tenth "
    f"faster flash by **{storage:+.1%}**: {'more memory' if memory < storage else 'faster flash'} is the better buy.")

# %% [markdown]
# ## What it costs to use less
#
# The front of the same plan: no plan that was found is better in both time and memory.

# %%
simmem.pictures.pareto_front(plan);
