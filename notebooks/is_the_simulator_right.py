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
# # Is the simulator right?
#
# A prediction is worth what it has been held to. Two things are looked at here: plans that were run on a real
# machine, with predictions written down first, and results that others published. Nothing is chosen to look well:
# every record and every row of the sets that are named is in the pictures, with what misses.

# %%
import json

import pandas as pd
from IPython.display import Markdown

import simmem
from simmem.spec.library import data_folder
from simmem.validation.reference import reproduce

RECORDS = sorted((data_folder() / "validate" / "measured").glob("*/*/validate.json"))
SETS = ["mixtral-offloading", "moe-infinity"]  # quick to work out; `simmem reproduce` runs all of them

# %% [markdown]
# ## Plans that were run here
#
# `simmem validate` calibrates a machine, writes its predictions down, runs the plans and compares. A row that is too
# noisy to judge is left out of the means, and the share of such rows is in the table. `inside` is the share of rows
# whose measured time lies inside the predicted 90 % interval: nine in ten would be right.

# %%
found = []
for path in RECORDS:
    record = json.loads(path.read_text(encoding="utf-8"))
    for row in record["rows"]:
        found.append({
            "record": path.parent.name, "storage": row["storage"], "status": row["status"], "policy": row["policy"],
            "predicted_s": row["predicted_s"], "measured_s": row["measured_s"]["median"], "error": row["error"],
            "inside": row["interval_s"][0] <= row["measured_s"]["median"] <= row["interval_s"][1],
            "exact_bytes": row["bytes"]["predicted"] == row["bytes"]["measured"]})
runs = pd.DataFrame(found)
judged = runs[runs.status != "inconclusive"]
table = judged.groupby(["record", "storage"]).agg(
    rows=("error", "size"), mean_error=("error", lambda e: e.abs().mean()), worst=("error", lambda e: e.abs().max()),
    bias=("error", "mean"), inside=("inside", "mean"), exact_bytes=("exact_bytes", "mean"))
table["conclusive"] = table.rows / runs.groupby(["record", "storage"]).size()
table.drop(columns="rows").map("{:.0%}".format).assign(rows=table.rows)

# %%
def written(path):
    return json.loads(path.with_name("predictions.json").read_text(encoding="utf-8"))["written"]


last = max(RECORDS, key=written)
simmem.pictures.predicted_and_measured(last);

# %%
furthest = judged.loc[judged.error.abs().idxmax()]
storage = judged.groupby("storage").error.agg(rows="size", mean=lambda e: e.abs().mean())
Markdown(
    f"Over all {len(RECORDS)} records, {len(judged)} of {len(runs)} rows can be judged. Their mean error is "
    + " and ".join(f"**{row['mean']:.1%}** on {name} storage ({row['rows']:.0f} rows)"
                   for name, row in storage.iterrows())
    + f"; {judged.inside.mean():.0%} lie inside their interval, and {judged.exact_bytes.mean():.0%} moved exactly the "
    f"bytes that were planned. The row furthest off is {furthest.policy} in {furthest.record}, {furthest.error:+.0%}.")

# %% [markdown]
# All of these are of one machine. What those records are, what went wrong in them and why, is in `validate/measured`.

# %% [markdown]
# ## Results that others published
#
# A reference row names a system, a device, a model and a figure from a paper. Figures of the device come from the
# device's own sources. A row that a figure was taken from is an *anchor*: shown, and never counted.

# %%
document = reproduce(SETS)
simmem.pictures.published(document);

# %%
s = document.summary
misses = [row for row in document.rows if row.status in ("fail", "xfail", "infeasible", "error")]
Markdown(
    f"{s.n} rows of {', '.join(SETS)} are judged: mean error **{s.mape:.1%}**, median {s.median:.1%}, largest "
    f"{s.max:.1%}. "
    + (f"Outside what they may be, or known to be: {', '.join(row.id for row in misses)}." if misses else
       "None is outside what it may be."))

# %%
pd.DataFrame([{"row": row.id, "published": row.published, "predicted": row.predicted, "unit": row.unit,
               "error": row.error, "status": row.status} for row in document.rows]).round(3)

# %% [markdown]
# `simmem reproduce` judges every set, and `simmem reproduce --reference FILE` your own rows, by the same code.
