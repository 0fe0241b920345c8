"""The executor: what a plan decided, with real bytes, real threads and real torch kernels."""
