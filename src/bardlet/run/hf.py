"""A model and its tokenizer as a Hugging Face folder, written and read. Nothing here runs code from a file.

    config.json model.safetensors tokenizer.json tokenizer_config.json generation_config.json

`transformers` loads such a folder as it is. Reading trusts nothing: only JSON and safetensors are opened, the shapes
come from config.json, and a tensor that is missing, left over or of another shape is named.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bardlet import models, tokenizer
from bardlet.config.model import ModelConfig
from bardlet.errors import BardletError, one_line, printable
from bardlet.models.layers import on_meta_device
from bardlet.runtime import atomic, manifest

log = logging.getLogger("bardlet")

MAX_NAME = 2**24
"""Tokens of the longest context that is believed of a config.json."""
MAX_HEADER_BYTES = 2**22
"""Bytes of the longest safetensors header that is read: enough for 30,000 tensors."""


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """`tensors` as safetensors at `path`, not yet flushed; they are copied to the CPU and made contiguous."""
    ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # what the user's umask asks for; the library lets only the owner read
    save_file(ready, path, metadata={"format": "pt"})
    path.chmod(mode)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU; the format's own checks bound the header and every offset."""
    manifest.inside(path.parent, path.name)
    try:
        with open(path, "rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
        if header > MAX_HEADER_BYTES:
            raise BardletError(f"{path}: damaged: a header of {header:,} bytes; copy it again")
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise BardletError(f"{path}: damaged or cut short ({one_line(error)}); copy it again, "
                           "or take another checkpoint") from None


TOKENIZER_AND_CONFIG = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""The files of a folder beside its weights."""


def write_folder(folder: Path, model: Any, words: tokenizer.Tokenizer) -> None:
    """Everything but the weights (WORDS_AND_SHAPE), and a manifest of it."""
    config: ModelConfig = model.config
    ids: dict[str, Any] = {"bos_token_id": words.eos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id}
    # explicit nulls: transformers would put GPT-2's 50256 where the key is missing, outside a small vocabulary
    if config.model == "encdec":  # its decoder begins with padding, as those of Hugging Face do
        ids = {**ids, "decoder_start_token_id": words.pad_id, "forced_eos_token_id": None}
    atomic.write_json(folder / "config.json", {**model.to_hf(config), **ids, "dtype": "float32"})
    if config.model == "encdec":
        ids = {**ids, "max_length": config.block_size}  # transformers would stop after 20 tokens
    if words.chat_template and tokenizer.END in words.vocab:  # a chat model stops behind its answer
        ids = {**ids, "eos_token_id": sorted(set(words.special) - {words.pad_id})}
    atomic.write_json(folder / "generation_config.json", ids)
    with atomic.explain_write_errors(folder / "tokenizer.json", len(words.json.encode())):
        words.save(folder, model_max_length=config.block_size)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            atomic.flush(folder / name)
    manifest.write_manifest(folder, TOKENIZER_AND_CONFIG)


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """model.safetensors, from a model's `hf_state_dict()`: a kill leaves the old weights or the new ones."""
    needed = sum(t.nbytes for t in tensors.values())
    manifest.replace_file(folder, "model.safetensors", lambda path: write_tensors(path, tensors), needed)


def read_model_config(folder: Path) -> ModelConfig:
    """The shape that a folder's config.json describes; what bardlet cannot compute is an error that says so."""
    values = manifest.read_json(folder / "config.json")
    family = str(values.get("model_type", "")).removeprefix("bardlet-")
    family = models.MODEL_TYPES.get(family, family)
    if family not in models.FAMILIES:
        raise BardletError(f"{folder / 'config.json'}: model_type {printable(values.get('model_type'))} is not one that "
                           f"bardlet computes ({', '.join(models.FAMILIES)}): use transformers for it")
    try:
        config = models.load_class(family).from_hf(values)
        kinds = [str(kind) for kind in values.get("architectures") or []]
        if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
            return config
        if family not in models.SCALAR or len(values.get("id2label", ("LABEL_0", "LABEL_1"))) != 1:
            raise BardletError("config.json: it tells labels apart; bardlet reads a scalar head, of one label, on gpt2 "
                               "or qwen3: use transformers for this model")
        return replace(config, scores=True, tie_embeddings=True)
    except BardletError as error:
        raise BardletError(str(error).replace("config.json", str(folder / "config.json"), 1)) from None
    except KeyError as error:
        raise BardletError(f"{folder / 'config.json'}: damaged: {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise BardletError(f"{folder / 'config.json'}: damaged: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the parts that model.safetensors.index.json lists where there is only that."""
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        listed = manifest.read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise BardletError(f"{index}: damaged: it has no weight_map; copy it again")
        return sorted({manifest.inside(folder, str(name)) for name in listed.values()})
    return [manifest.inside(folder, "model.safetensors")]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder's weights, in float32."""
    return {name: t.float() for path in weight_files(folder) for name, t in read_tensors(path).items()}


def weights_hash(folder: Path) -> str:
    """sha256 (hex) of a folder's weights, as their files have them; of one file just that of its bytes."""
    each = [manifest.sha256(path) for path in weight_files(folder)]
    return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()


def verify(folder: Path) -> None:
    """BardletError where a file of `folder` is not the one that its manifest knows; without a manifest, nothing."""
    is_run = (folder / "run.toml").exists()
    if os.path.lexists(folder / manifest.MANIFEST):
        if (damage := manifest.damaged_files(folder)) and (is_run or not _of_another_tool(folder / manifest.MANIFEST)):
            weights = damage.startswith(str(folder / "model.safetensors")) and (folder / "checkpoints").is_dir()
            remedy = f"`bardlet resume {folder}` makes it anew from a checkpoint" if weights else "copy it again"
            raise BardletError(f"{damage}; {remedy}, or, where you changed it yourself, remove "
                               f"{folder / manifest.MANIFEST}")
    elif is_run:
        log.warning("%s: has lost its %s, so damage to its files would not be seen", folder, manifest.MANIFEST)


def _of_another_tool(path: Path) -> bool:
    """Whether a manifest.json was never one of bardlet's: the name is a common one."""
    try:
        return not manifest.read_json(path).keys() & {"version", "digest", "files"}
    except BardletError:
        return False


def read_folder(folder: Path, dropout: float = 0.0, scores: bool = False) -> tuple[Any, tokenizer.Tokenizer]:
    """The model (float32, on the CPU, in eval mode) and the tokenizer of a run or Hugging Face folder.

    scores: it has to be a reward model; without that it must not be one.
    """
    if folder.is_file():
        raise BardletError(f"{folder}: is a file, where a model should be: name a run folder or a Hugging Face folder "
                           "first, and files behind it")
    if not folder.is_dir():
        raise BardletError(f"{folder}: there is no such folder; a run folder is what `bardlet train` prints at its end")
    verify(folder)
    config = read_model_config(folder)
    if config.scores != scores:
        raise BardletError(f"{folder}: is no reward model; `bardlet reward` makes one of it" if scores else
                           f"{folder}: is a reward model: it says how good an answer is, and cannot write one; "
                           "name the model that it judges")
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
    layers = max(config.n_layer, config.n_encoder_layer)
    if config.model != "bigram" and layers > len(weights):
        raise BardletError(f"{folder / 'config.json'}: damaged: it asks for {layers} layers, and {where.name} "
                           f"has {len(weights)} tensors; copy both again")
    if config.block_size > MAX_NAME:
        raise BardletError(f"{folder / 'config.json'}: damaged: a context of {config.block_size} tokens; copy it again")
    try:
        with on_meta_device(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that nothing is copied into a sketch
            models.build(config).load_hf_state_dict(weights)
    except BardletError as error:
        raise BardletError(f"{where}: {error}; copy both again") from None
    except (RuntimeError, TypeError, OverflowError):
        raise BardletError(f"{folder / 'config.json'}: damaged: its sizes are too large for any machine; "
                           "copy it again") from None
    return models.build(config)
