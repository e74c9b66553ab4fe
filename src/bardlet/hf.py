"""A model and its tokenizer as a Hugging Face folder, written and read. Nothing here runs code from a file.

    config.json model.safetensors tokenizer.json tokenizer_config.json generation_config.json

`transformers` loads such a folder as it is. Reading trusts nothing: only JSON and safetensors are opened, the shapes
come from config.json, and a tensor that is missing, left over or of another shape is named.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bardlet import models, tokenizer
from bardlet.config import ModelConfig
from bardlet.errors import BardletError
from bardlet.models.layers import sketching

LONGEST = 2**24
"""Tokens of the longest context that is believed of a config.json."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`, flush it, then rename it: `path` is the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "r+b") as f:  # Windows flushes only what may be written to
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk, where the system can (Windows cannot)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON at `path`, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; an error names the file, the line and the column."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BardletError(f"{path}: there is no such file, so {path.parent} is not a whole model folder; "
                           "copy it there, or name a run folder") from None
    except json.JSONDecodeError as error:
        raise BardletError(f"{path}: damaged at line {error.lineno}, column {error.colno}: {error.msg}; "
                           "copy it again, or take another checkpoint") from None
    except OSError as error:
        raise BardletError(f"{path}: cannot be read ({error.strerror}); change its permissions, "
                           "or copy it again") from None
    except (ValueError, RecursionError) as error:
        raise BardletError(f"{path}: damaged: {error}; copy it again, or take another checkpoint") from None
    if not isinstance(value, dict):
        raise BardletError(f"{path}: damaged: it holds a {type(value).__name__}, not an object; copy it again, "
                           "or take another checkpoint")
    return value


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """`tensors` as safetensors at `path`, atomically; they are copied to the CPU and made contiguous."""
    ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}

    def write(p: Path) -> None:
        p.touch()
        mode = p.stat().st_mode  # what the user's umask asks for; the library lets only the owner read
        save_file(ready, p, metadata={"format": "pt"})
        p.chmod(mode)

    try:
        write_atomically(path, write)
    except SafetensorError as error:  # how the library says that the disk is full
        raise BardletError(f"{path}: cannot be written ({error}); free some space, or choose another --out") from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU; the format's own checks bound the header and every offset."""
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except FileNotFoundError:
        raise BardletError(f"{path}: there is no such file, so {path.parent} is not a whole model folder; "
                           "copy it there, or name a run folder") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise BardletError(f"{path}: damaged or cut short ({error}); copy it again, "
                           "or take another checkpoint") from None


def write_folder(folder: Path, model: Any, words: tokenizer.Tokenizer) -> None:
    """Everything but the weights: config.json, tokenizer.json, tokenizer_config.json, generation_config.json."""
    config: ModelConfig = model.config
    ids = {"bos_token_id": words.eos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id}
    # explicit nulls: transformers would put GPT-2's 50256 where the key is missing, outside a small vocabulary
    write_json(folder / "config.json", {**type(model).to_hf(config), **ids, "dtype": "float32"})
    write_json(folder / "generation_config.json", ids)
    words.save(folder, model_max_length=config.block_size)


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """model.safetensors, from a model's `hf_state_dict()`."""
    write_tensors(folder / "model.safetensors", tensors)


def read_model_config(folder: Path) -> ModelConfig:
    """The shape that a folder's config.json describes; what bardlet cannot compute is an error that says so."""
    values = read_json(folder / "config.json")
    family = str(values.get("model_type", "")).removeprefix("bardlet-")
    if family not in models.FAMILIES:
        raise BardletError(f"{folder / 'config.json'}: model_type {values.get('model_type')!r} is not one that bardlet "
                           f"computes ({', '.join(models.FAMILIES)}): use transformers for it")
    try:
        return models.load_class(family).from_hf(values)
    except BardletError as error:
        raise BardletError(str(error).replace("config.json", str(folder / "config.json"), 1)) from None
    except KeyError as error:
        raise BardletError(f"{folder / 'config.json'}: damaged: {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise BardletError(f"{folder / 'config.json'}: damaged: {error}") from None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors, or of the parts that model.safetensors.index.json lists, in float32."""
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise BardletError(f"{index}: damaged: it has no weight_map; copy it again")
        parts = sorted({Path(str(name)).name for name in listed.values()})
    else:
        parts = ["model.safetensors"]
    return {name: t.float() for part in parts for name, t in read_tensors(folder / part).items()}


def read_folder(folder: Path, dropout: float = 0.0) -> tuple[Any, tokenizer.Tokenizer]:
    """The model (float32, on the CPU, in eval mode) and the tokenizer of a run or Hugging Face folder."""
    if not folder.is_dir():
        raise BardletError(f"{folder}: there is no such folder; a run folder is what `bardlet train` prints at its end")
    config = read_model_config(folder)
    words = tokenizer.load(folder)
    if words.vocab_size > config.vocab_size:  # fewer is well: some models have rows to spare
        raise BardletError(f"{folder}: its tokenizer has {words.vocab_size} tokens, its config.json "
                           f"{config.vocab_size}: they do not belong together; copy both from the same run")
    weights = read_weights(folder)
    model = build(replace(config, dropout=dropout), weights, folder)
    model.load_hf_state_dict(weights)
    return model.eval(), words


def build(config: ModelConfig, weights: dict[str, torch.Tensor], folder: Path) -> Any:
    """A model of `config`, once a sketch that takes no memory has shown that `weights` fit into it.

    So a config.json that asks for a million layers is an error, not a machine without memory.
    """
    where = folder / "model.safetensors"
    if config.model != "bigram" and config.n_layer > len(weights):
        raise BardletError(f"{folder / 'config.json'}: damaged: it asks for {config.n_layer} layers, and {where.name} "
                           f"has {len(weights)} tensors; copy both again")
    if config.block_size > LONGEST:
        raise BardletError(f"{folder / 'config.json'}: damaged: a context of {config.block_size} tokens; copy it again")
    try:
        with sketching(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that nothing is copied into a sketch
            models.build(config).load_hf_state_dict(weights)
    except BardletError as error:
        raise BardletError(f"{where}: {error}; copy both again") from None
    except (RuntimeError, TypeError, OverflowError):
        raise BardletError(f"{folder / 'config.json'}: damaged: its sizes are too large for any machine; "
                           "copy it again") from None
    return models.build(config)
