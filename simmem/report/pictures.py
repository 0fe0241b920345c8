"""Where are the pictures for notebooks? Here, all of them: each takes a plan, a frame or a record and returns its axes.

    import simmem
    simmem.pictures.timeline(simmem.plan("iphone15", "opt-6.7b"))

Without `ax` a picture makes a figure of its own, which a notebook shows by itself; with it, it draws into those axes.
Axes have units, colours are those of Okabe and Ito, and nothing needs to be added. They need the extra `notebook`.
"""

from __future__ import annotations

from simmem.report.plots.bars import residency, sensitivity
from simmem.report.plots.plan import pareto_front, timeline
from simmem.report.plots.replay import miss_ratio
from simmem.report.plots.roofline import roofline
from simmem.report.plots.sweeps import by_budget, devices
from simmem.report.plots.truth import predicted_and_measured, published

__all__ = ["by_budget", "devices", "miss_ratio", "pareto_front", "predicted_and_measured", "published", "residency",
           "roofline", "sensitivity", "timeline"]
