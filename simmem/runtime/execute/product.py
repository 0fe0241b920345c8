"""How fast does the processor multiply just now? One product of the kind that decoding is made of, between runs."""

from __future__ import annotations

import time

from simmem.runtime.execute.kernels import torch_dtype
from simmem.runtime.probe.agents import torch_threads

__all__ = ["ProductControl"]

_MATRICES, _PASSES = 8, 3


class ProductControl:
    """A product of one token with matrices of 16 M weights, so many in turn that no cache holds them.

    Parameters
    ----------
    precision : of weights and activations.
    threads : that torch multiplies with; as it is set when None.
    """

    rows = cols = 4096

    def __init__(self, precision: str, threads: int | None) -> None:
        import torch

        dtype = torch_dtype(precision)
        self._threads = threads or torch.get_num_threads()
        self._matrices = [torch.ones(self.rows, self.cols, dtype=dtype) for _ in range(_MATRICES)]
        self._input = torch.rand(1, self.cols).to(dtype)
        self._output = torch.empty(1, self.rows, dtype=dtype)

    def seconds(self) -> float:
        """Of one product: the mean over three times all matrices, after one that wakes the threads. [s]"""
        import torch

        with torch_threads(self._threads):
            torch.mm(self._input, self._matrices[0].t(), out=self._output)
            begun = time.perf_counter()
            for _ in range(_PASSES):
                for matrix in self._matrices:
                    torch.mm(self._input, matrix.t(), out=self._output)
            return (time.perf_counter() - begun) / (_PASSES * _MATRICES)
