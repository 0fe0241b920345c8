"""What do people run today where a model does not fit, and how long does a token of that take here?

Everything resident, naive loading and layer streaming are plans, which the executor runs. Here is what other programs
leave to the kernel: a weight file mapped into memory, whose pages fault in as they are used (llama.cpp's way), and
`accelerate`'s disk offload, which copies every layer out of files for every token. Their time is taken; what they move
goes through the page cache, so their bytes are not counted. A model larger than memory finds nothing in that cache
when it comes round again: that is had by emptying it before each token.
"""

from __future__ import annotations

import contextlib
import importlib.util
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from simmem.errors import MachineError, SpecError
from simmem.runtime.execute.kernels import rotary_tables
from simmem.runtime.execute.memory import Memory
from simmem.runtime.execute.session import How, Session
from simmem.runtime.execute.task import Task
from simmem.runtime.execute.weights import RandomWeights, weight_file
from simmem.runtime.models import machine_failures, require
from simmem.runtime.reader import Reader, Store
from simmem.spec.model import Model

if TYPE_CHECKING:
    import torch

__all__ = ["PageCache", "accelerate_token_s", "has_accelerate", "mapped_token_s"]

Array = NDArray[np.float64]
PageCache = Literal["kept", "dropped"]
"""Whether the pages of the weight files stay cached between tokens."""


class _MappedMemory(Memory):
    """Weights that are pages of the file rather than copies of them."""

    def __init__(self, task: Task, store: Store, device: torch.device, mapped: NDArray[np.uint8]) -> None:
        self._mapped = mapped
        super().__init__(task, store, device, apart=False)

    def _load(self, offset: int, n_bytes: int) -> torch.Tensor:
        import torch

        return torch.from_numpy(self._mapped[offset : offset + n_bytes])


def mapped_token_s(task: Task, file: Path, page_cache: PageCache, *, threads: int | None = None) -> Array:
    """Seconds of each token of a `resident` plan whose weights are mapped from `file`, (n_tokens,). [s]

    Raises SpecError for a plan that streams, MachineError where the file cannot be written or read.
    """
    if task.by_neuron or any(task.streamed):
        raise SpecError("only a plan with everything resident can have its weights mapped", key="policy.name")
    require("torch")
    import torch

    device = torch.device("cpu")
    with (weight_file(task.layout, RandomWeights(task.layout.precision), file=file) as weights, _threads(threads),
          _mapping(file) as (mapping, fd), Reader(weights.fd, weights.name, 1) as store,
          machine_failures("running out of a mapped file")):
        memory = _MappedMemory(task, store, device, np.frombuffer(mapping, np.uint8))
        session = Session(task, How(), store, memory, device, weights)
        a = task.layout.architecture
        seen = max(round(task.candidate.context.workload.mean_decode_context), 1)
        decoder = session.decoder(seen, rotary=None if a.learned_position_rows else rotary_tables(seen, a.d_head))
        decoder.fill_context()
        begun: list[float] = []
        ended: list[float] = []

        def after(number: int) -> None:
            del number
            ended.append(time.perf_counter())
            if page_cache == "dropped":
                mapping.madvise(mmap.MADV_DONTNEED)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            begun.append(time.perf_counter())

        session.drive(decoder, task.lead + task.n_tokens, position=seen - 1, after=after)
        del session, memory, decoder  # the mapping can be closed only when nothing points into it
    took: Array = np.array(ended[task.lead:]) - np.array(begun[task.lead - 1:-1])
    return took


@contextlib.contextmanager
def _mapping(file: Path) -> Iterator[tuple[mmap.mmap, int]]:
    if not hasattr(os, "posix_fadvise") or not hasattr(mmap, "MADV_DONTNEED"):
        raise MachineError("this system has no way to empty the page cache of a file", file=str(file))
    fd = os.open(file, os.O_RDONLY)
    try:
        # Private, so that torch may have memory it could write to; nothing does.
        mapping = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        try:
            yield mapping, fd
        finally:
            with contextlib.suppress(BufferError):  # an error on its way holds on to what it came from
                mapping.close()
    finally:
        os.close(fd)


# --- accelerate -----------------------------------------------------------------------------------


def has_accelerate() -> bool:
    """Can its disk offload be run here?"""
    return all(importlib.util.find_spec(p) is not None for p in ("torch", "transformers", "accelerate"))


def accelerate_token_s(model: Model, precision: str, folder: Path, page_cache: PageCache, *, context: int,
                       n_tokens: int, threads: int | None = None) -> Array:
    """Seconds of each decoded token with all weights offloaded to `folder` by `accelerate`, (n_tokens,). [s]

    The network has the model's shapes and random weights; transformers runs it with its own kernels and cache.

    Parameters
    ----------
    folder : existing and empty, on the drive to be read; the caller removes it.
    context : tokens of the prompt before the first one that is timed.

    Raises
    ------
    SpecError
        No network of transformers has these shapes here.
    MachineError
        A package is missing.
    """
    if not has_accelerate():
        raise MachineError("disk offload needs accelerate; install with: pip install accelerate")
    import torch
    import transformers
    from accelerate import disk_offload, init_empty_weights

    config = _config(transformers, model)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    with torch.inference_mode(), _threads(threads), machine_failures("running accelerate's disk offload"):
        with init_empty_weights(include_buffers=False):
            network: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                drawn = torch.empty(parameter.shape, dtype=dtype).uniform_(-0.01, 0.01)
                setattr(module, name, torch.nn.Parameter(drawn, requires_grad=False))
        network.tie_weights()
        disk_offload(network.eval(), offload_dir=str(folder), execution_device=torch.device("cpu"))
        ids = torch.randint(0, model.architecture.vocab, (1, context), generator=torch.Generator().manual_seed(0))
        out = network(ids, use_cache=True)
        took = []
        for number in range(n_tokens + 1):
            if page_cache == "dropped":
                _drop(sorted(folder.iterdir()))
            begun = time.perf_counter()
            out = network(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
            if number:  # the first one finds the kernels cold
                took.append(time.perf_counter() - begun)
    return np.array(took)


def _config(transformers: Any, model: Model) -> Any:
    """The configuration of a network of transformers with a model's shapes."""
    a = model.architecture
    common = {"vocab_size": a.vocab, "hidden_size": a.d_model, "num_hidden_layers": a.n_layers,
              "num_attention_heads": a.n_heads, "max_position_embeddings": a.max_positions,
              "tie_word_embeddings": a.tied_head}
    if a.gated and a.norm == "rmsnorm" and a.activation == "silu" and not a.experts and not a.learned_position_rows:
        return transformers.LlamaConfig(intermediate_size=a.d_ff, num_key_value_heads=a.n_kv_heads, head_dim=a.d_head,
                                        **common)
    if not a.gated and a.learned_position_rows and a.norm == "layernorm" and a.embedding_dim is None:
        return transformers.OPTConfig(ffn_dim=a.d_ff, word_embed_proj_dim=a.d_model, activation_function=a.activation,
                                      **common)
    raise SpecError("is neither built like Llama nor like OPT, whose networks the offload is timed with",
                    key=model.name)


def _drop(files: Sequence[Path]) -> None:
    """Empty the page cache of files."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # what is not written yet would stay
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _threads(n: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    restore: Callable[[int], None] = torch.set_num_threads
    if n is not None:
        restore(n)
    try:
        yield
    finally:
        restore(before)
