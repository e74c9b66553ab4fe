"""Model folders in a form that bardlet does not read, each with the one command that converts it.

Pickles (.bin, .pt, .ckpt) can run code when they are opened, so bardlet never opens one. transformers does, restricted
to tensors, and writes safetensors.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from bardlet import models
from bardlet.errors import BardletError, printable
from bardlet.runtime import manifest

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""Suffixes of weights that PyTorch pickles."""
TOKENIZERS = ("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
"""Files of tokenizers that transformers can write as a tokenizer.json."""
NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")
"""Files that the Trainer of transformers leaves beside the weights."""


def check_folder(folder: Path) -> None:
    """Raise BardletError if `folder` does not exist, or is no run and no model folder that bardlet reads.

    The error names the command that converts a folder of another form.
    """
    if folder.is_file() and folder.suffix == ".gguf":
        raise BardletError(f"{folder}: a GGUF file, which bardlet does not read; {_convert_gguf(folder)}")
    if folder.is_dir() and not os.path.lexists(folder / "run.toml") and (advice := _advice(folder)):
        raise BardletError(f"{folder}: {advice}")
    manifest.check_folder(folder)


def _advice(folder: Path) -> str | None:
    """Describe a folder of another form, and name the command that converts it; None for a folder that may be read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:  # the error of the file that is read next is more specific
        return None
    if {"model.safetensors", "model.safetensors.index.json"} & set(names) and "config.json" in names:
        return _without_tokenizer(folder, names)
    if "adapter_config.json" in names:
        return _adapter(folder, names)
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"{gguf[0]} is in GGUF, which bardlet does not read; {_convert_gguf(folder / gguf[0])}"
    if pickles := [name for name in names if name.endswith(PICKLES) and name not in NOT_WEIGHTS]:
        return _pickled(folder, pickles, "config.json" in names)
    if not set(names) & set(manifest.OF_A_MODEL):
        return _models_below(folder)
    return None


def _without_tokenizer(folder: Path, names: list[str]) -> str | None:
    """Describe a model whose tokenizer bardlet does not read."""
    from bardlet.tokenizer.files import is_gpt2

    present = [name for name in TOKENIZERS if name in names]
    if "tokenizer.json" in names or not present or not _is_supported(folder) or is_gpt2(folder):
        return None
    install = " (pip install transformers sentencepiece protobuf)" * any(name.endswith(".model") for name in present)
    return (f"{' and '.join(present)} without a tokenizer.json, which bardlet needs; write it{install}: "
            + _python(f"from transformers import AutoTokenizer as T; T.from_pretrained({_literal(folder)})"
                      f".save_pretrained({_literal(folder)})"))


def _adapter(folder: Path, names: list[str]) -> str:
    """Describe a folder with the factors of LoRA, or another adapter of peft."""
    base = None
    if (folder / "adapter_config.json").is_file():
        base = manifest.read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else None
    tokenizer = str(folder) if base is None or "tokenizer_config.json" in names else base
    of = f" of {printable(base)}" if base else ""
    return (f"an adapter{of}, not a model; merge it into the model (pip install peft): "
            + merge_command(str(folder), tokenizer, _beside(folder, "merged")))


def merge_command(source: str, tokenizer: str, target: str) -> str:
    """Return the command that merges an adapter into its base model, and writes the result and a tokenizer."""
    target = _literal(target)
    return _python("from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; "
                   f"M.from_pretrained({_literal(source)}).merge_and_unload().save_pretrained({target}); "
                   f"T.from_pretrained({_literal(tokenizer)}).save_pretrained({target})")


def convert_command(source: str, target: str, kind: str = "AutoModelForCausalLM", **options: str) -> str:
    """Return the command with which transformers reads a model and writes it as safetensors and tokenizer.json.

    kind: the class that reads it. options: keywords of `from_pretrained`.
    """
    arguments = ", ".join([_literal(source), *(f"{name}={_literal(value)}" for name, value in options.items())])
    load, save = f"from_pretrained({arguments})", f"save_pretrained({_literal(target)})"
    model = f"M.{load}.{save}"
    if "gguf_file" in options:  # transformers 5 counts it as quantized, and refuses to save it, even if it is no longer
        model = f'm = M.{load}; m.hf_quantizer = None; vars(m.config).pop("quantization_config", None); m.{save}'
    return _python(f"from transformers import {kind} as M, AutoTokenizer as T; {model}; T.{load}.{save}")


def _convert_gguf(path: Path) -> str:
    """Return the command that converts a GGUF file."""
    target = _beside(path.with_suffix(""), "safetensors")
    return ("convert it (pip install transformers gguf accelerate): "
            + convert_command(str(path.parent), target, gguf_file=path.name))


def _pickled(folder: Path, names: list[str], has_config: bool) -> str | None:
    """Describe a folder whose weights are pickles."""
    if has_config and not _is_supported(folder):
        return None  # the error about the model is more specific
    whole = [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
    if has_config and whole:
        kind = "AutoModelForSeq2SeqLM" if _model_type(folder) == "pegasus" else "AutoModelForCausalLM"
        return (f"{whole[0]} is a pickle, which bardlet never opens; convert it (pip install transformers): "
                + convert_command(str(folder), _beside(folder, "safetensors"), kind))
    if has_config:
        return (f"{names[0]} is a pickle, which bardlet never opens; convert it: " + _python(
            f"import torch; from safetensors.torch import save_file; t = torch.load({_literal(folder / names[0])}, "
            'map_location="cpu", weights_only=True); t = t.get("state_dict", t); '
            "save_file({k: v.clone() for k, v in t.items()}, "
            f"{_literal(folder / 'model.safetensors')}, {{\"format\": \"pt\"}})"))
    return (f"{names[0]} is a checkpoint of another program, a pickle without a config.json, which bardlet does not "
            "read; save it with save_pretrained(DIR) in that program")


def _models_below(folder: Path) -> str | None:
    """Describe a folder whose subfolders are models, as a model's folder in the Hub's cache."""
    below = [path.parent for pattern in ("*", "snapshots/*", "models--*/snapshots/*")
             for file in ("config.json", "adapter_config.json", "*.gguf") for path in folder.glob(f"{pattern}/{file}")]
    below = sorted({path for path in below if not (path / "run.toml").exists()}, key=str)
    newest = max(below, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return None
    count = f"{len(below)} models" if len(below) > 1 else "a model in a subfolder"
    return f"not a model, but a folder with {count}; name one, for example {shlex.quote(str(newest))}"


def _is_supported(folder: Path) -> bool:
    """Return True if bardlet has the model of a folder's config.json."""
    kind = str(_model_type(folder)).removeprefix("bardlet-")
    return kind in models.MODEL_TYPES or kind in models.FAMILIES


def _model_type(folder: Path) -> Any:
    return manifest.read_json(folder / "config.json").get("model_type")


def _beside(path: Path, suffix: str) -> str:
    """Return the path of a new folder beside `path`, for what a command converts it to."""
    path = Path(os.path.abspath(path)) if path.name in ("", "..") else path
    return str(path.with_name(f"{path.name}-{suffix}"))


def _literal(value: Path | str) -> str:
    """Return a string as Python writes it, in double quotes; a name from a file cannot end it."""
    return json.dumps(str(value), ensure_ascii=False)


def _python(code: str) -> str:
    """Return the command that runs a line of Python."""
    return f"`python -c {shlex.quote(code)}`"
