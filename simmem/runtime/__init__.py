"""The real machine: the only place that imports torch, and only inside functions."""
