"""Write and read a model and its tokenizer as a Hugging Face folder. No code from a file is ever executed.

    config.json model.safetensors tokenizer.json tokenizer_config.json generation_config.json

`transformers` loads such a folder as it is. Reading trusts nothing: it opens only JSON and safetensors, takes the
shapes from config.json, and names any tensor that is missing, unexpected or of the wrong shape.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bardlet import models
from bardlet import tokenizer as tokenization
from bardlet.config.model import ModelConfig
from bardlet.data import chat_template
from bardlet.errors import BardletError, Unsupported, printable
from bardlet.models.layers import on_meta_device
from bardlet.run import foreign, shares
from bardlet.run.stored import StoredTensors, opened, reading
from bardlet.runtime import atomic, manifest, parallelize
from bardlet.tokenizer import Tokenizer

log = logging.getLogger("bardlet")

MAX_CONTEXT = 2**24
"""Tokens of the longest context accepted from a config.json."""


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write `tensors` to `path` as safetensors, without flushing; they are copied to the CPU and made contiguous."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # as the user's umask says; the library makes the file readable by the owner only
    save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(mode)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file, on the CPU, as they are stored. Raises BardletError if it is damaged.
    """
    with reading(path), opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


TOKENIZER_AND_CONFIG = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""The files of a model folder besides its weights."""


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end what a model writes: in a chat, every special token but the padding."""
    if chat_template.is_own(tokenizer):
        return sorted(set(tokenizer.special) - {tokenizer.pad_id})
    if chat_template.is_foreign(tokenizer) and chat_template.reason_against(tokenizer) is None:
        return chat_template.end_ids(tokenizer)
    return list(tokenizer.stop_ids)


def temperature(tokenizer: Tokenizer) -> float:
    """Return the default temperature: of `bardlet chat` if there is a chat template, of `bardlet sample` if not."""
    return 0.8 if chat_template.reason_against(tokenizer) else 0.7


RESPONSE = {"defaults": {"role": "assistant"}, "start_anchor": "<|assistant|>",
            "fields": {"content": {"close": [tokenization.END, tokenization.SEPARATOR, tokenization.PAD],
                                   "content": "text"}}}
"""Position of the answer in a chat model's output. Without it, `transformers serve` reads qwen3 by Qwen's template."""


def write_folder(folder: Path, model: Any, tokenizer: Tokenizer) -> None:
    """Write everything but the weights (TOKENIZER_AND_CONFIG), and a manifest of these files."""
    config: ModelConfig = model.config
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
                           "pad_token_id": tokenizer.vocab.get(tokenizer.padding or "")}
    # explicit nulls: without the key, transformers uses GPT-2's 50256, which is outside a small vocabulary
    if config.model == "encdec":  # decoding starts with padding, as in T5
        ids = {**ids, "decoder_start_token_id": tokenizer.pad_id, "forced_eos_token_id": None}
    atomic.write_json(folder / "config.json", {**model.to_hf(config), **ids, "dtype": "float32"})
    if config.model == "encdec":
        ids = {**ids, "max_length": config.block_size}  # the default of transformers is 20 tokens
    else:  # greedy decoding of a small model repeats itself: "the the the"
        ids = {**ids, "do_sample": True, "temperature": temperature(tokenizer), "top_k": 50}
    if (stops := stop_ids(tokenizer)) != [tokenizer.eos_id]:
        ids = {**ids, "eos_token_id": stops or None}
    atomic.write_json(folder / "generation_config.json", ids)
    with atomic.explain_write_errors(folder / "tokenizer.json", len(tokenizer.json.encode())):
        side = "right" if config.model == "encdec" or config.scores else "left"
        answers = config.model == "qwen3" and chat_template.is_own(tokenizer)
        tokenizer.save(folder, model_max_length=config.block_size, padding_side=side,
                       **({"response_template": RESPONSE} if answers else {}))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            atomic.flush(folder / name)
    manifest.write_manifest(folder, TOKENIZER_AND_CONFIG)


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace model.safetensors with a model's `hf_state_dict()`; a kill leaves the old weights or the new ones."""
    needed = sum(t.nbytes for t in tensors.values())
    manifest.replace_file(folder, "model.safetensors", lambda path: write_tensors(path, tensors), needed)


def write_pieces(folder: Path, tensors: Mapping[str, torch.Tensor], pieces: Iterable[torch.Tensor]) -> None:
    """Replace model.safetensors with tensors whose numbers come in pieces, as `shares.write_whole` describes."""
    needed = sum(t.numel() * t.itemsize for t in tensors.values())
    manifest.replace_file(folder, "model.safetensors", lambda path: shares.write_whole(path, tensors, pieces), needed)


def read_model_config(folder: Path) -> ModelConfig:
    """Return the model config of a folder's config.json. Raise BardletError if bardlet cannot run that model."""
    foreign.check_folder(folder)
    values = manifest.read_json(folder / "config.json")
    family = str(values.get("model_type", "")).removeprefix("bardlet-")
    family = models.MODEL_TYPES.get(family, family)
    if family not in models.FAMILIES:
        raise Unsupported(f"{folder / 'config.json'}: model_type {printable(values.get('model_type'))} is not "
                          f"supported (only {', '.join(models.FAMILIES)}); use transformers for this model")
    try:
        config = models.load_class(family).from_hf(values)
        kinds = [str(kind) for kind in values.get("architectures") or []]
        if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
            return config
        if family not in models.SCALAR or len(values.get("id2label", ("LABEL_0", "LABEL_1"))) != 1:
            raise Unsupported("config.json: this classification head is not supported (only one label, on gpt2 or a "
                              "Llama-like model); use transformers for this model")
        return replace(config, scores=True, tie_embeddings=True)
    except BardletError as error:
        raise type(error)(str(error).replace("config.json", str(folder / "config.json"), 1)) from None
    except KeyError as error:
        raise BardletError(f"{folder / 'config.json'}: damaged: {error} is missing; copy it again") from None
    except (TypeError, ValueError) as error:
        raise BardletError(f"{folder / 'config.json'}: damaged: {error}; copy it again") from None


def weight_files(folder: Path) -> list[Path]:
    """Return model.safetensors, or the shards in model.safetensors.index.json if only the index exists."""
    if (folder / "model.safetensors.index.json").exists() and not (folder / "model.safetensors").exists():
        return [manifest.inside(folder, name) for name in shard_names(folder)]
    return [manifest.inside(folder, "model.safetensors")]


def shard_names(folder: Path) -> list[str]:
    """Return the names of the shards in model.safetensors.index.json. Raise BardletError if one is not a plain name."""
    index = folder / "model.safetensors.index.json"
    weight_map = manifest.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BardletError(f"{index}: damaged: no weight_map; copy it again")
    return sorted({manifest.plain_name(folder, str(name)) for name in weight_map.values()})


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder's weights, in float32."""
    return dict(StoredTensors(weight_files(folder)))


def weights_hash(folder: Path) -> str:
    """Return the sha256 (hex) of a folder's weight file, or a sha256 over the hashes of its shards."""
    each = [manifest.sha256(path) for path in weight_files(folder)]
    return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()


def verify(folder: Path) -> None:
    """Raise BardletError if a file of `folder` does not match its manifest; without a manifest, check nothing."""
    is_run = (folder / "run.toml").exists()
    if os.path.lexists(folder / manifest.MANIFEST):
        if (damage := manifest.damaged_files(folder)) and (is_run or not _of_another_tool(folder / manifest.MANIFEST)):
            restorable = damage.startswith(str(folder / "model.safetensors")) and (folder / "checkpoints").is_dir()
            remedy = (f"`bardlet resume {shlex.quote(str(folder))}` restores it from a checkpoint" if restorable
                      else "copy it again")
            raise BardletError(f"{damage}; {remedy}; if you changed it yourself, remove {folder / manifest.MANIFEST}")
    elif is_run:
        log.warning("%s: its %s is missing, so damage to its files cannot be detected", folder, manifest.MANIFEST)


def _of_another_tool(path: Path) -> bool:
    """Return True if bardlet did not write this manifest.json; other tools use the same name."""
    try:
        return not manifest.read_json(path).keys() & {"version", "digest", "files"}
    except BardletError:
        return False


def read_folder(folder: Path, dropout: float = 0.0, scores: bool = False,
                dtype: torch.dtype | None = torch.float32,
                place: Callable[[Any], Any] = lambda empty: None) -> tuple[Any, Tokenizer]:
    """Return the model (on the CPU, in eval mode) and the tokenizer of a run or Hugging Face folder.

    It needs the memory of the weights, and of the largest one once more.

    Args:
        folder: the folder.
        dropout: dropout probability of the model.
        scores: require a reward model; otherwise require a language model.
        dtype: of the weights; None: bf16 if they are stored so, otherwise fp32.
        place: gets a model without memory, and may return it sharded; then this process reads only its share.

    Raises:
        BardletError: a file is missing, damaged or not supported, or the model is of the other kind.
    """
    foreign.check_folder(folder)
    verify(folder)
    config = read_model_config(folder)
    if config.scores != scores:
        raise BardletError(f"{folder}: not a reward model; train one with `bardlet reward`" if scores else
                           f"{folder}: a reward model, which cannot generate text; name a language model")
    tokenizer = tokenization.load(folder)
    if tokenizer.vocab_size > config.vocab_size:  # fewer tokens are fine: some models pad their embedding
        raise BardletError(f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its config.json "
                           f"{config.vocab_size}: they do not belong together; copy both from the same run")
    stored = StoredTensors(weight_files(folder), dtype)
    config = replace(config, dropout=dropout)
    model = _empty(config, stored.on_meta(), folder)
    if parallelize.has_unknown_buffers(model):
        model = models.build(config).to(stored.dtype)
    elif (placed := place(empty_model(config, stored.dtype))) is not None:
        placed.load_hf_state_dict(parallelize.on_all_ranks(stored, placed))
        return placed.eval(), tokenizer
    parallelize.fill_buffers(model)
    model.load_hf_state_dict(stored)
    return model.eval(), tokenizer


def empty_model(config: ModelConfig, dtype: torch.dtype) -> Any:
    """Return a model without memory, on the meta device."""
    with on_meta_device():
        return models.build(config).to(dtype)


def build(config: ModelConfig, weights: dict[str, torch.Tensor], folder: Path) -> Any:
    """Build a model of `config` after a check that `weights` fit: see `_empty`."""
    _empty(config, weights, folder)
    return models.build(config)


def _empty(config: ModelConfig, weights: dict[str, torch.Tensor], folder: Path) -> Any:
    """Return a model without memory (on the meta device) after checking that `weights` fit.

    A config.json that asks for a million layers then raises BardletError instead of exhausting the memory.
    """
    path = folder / "model.safetensors"
    layers = max(config.n_layer, config.n_encoder_layer)
    if config.model != "bigram" and layers > len(weights):
        raise BardletError(f"{folder / 'config.json'}: damaged: it asks for {layers} layers, but {path.name} "
                           f"has {len(weights)} tensors; copy both again")
    if config.block_size > MAX_CONTEXT:
        raise BardletError(f"{folder / 'config.json'}: damaged: it asks for a context of {config.block_size} tokens; "
                           "copy it again")
    try:
        with on_meta_device():
            model = models.build(config)
        model.load_hf_state_dict(weights)
    except BardletError as error:
        raise BardletError(f"{path}: {error}; copy both again") from None
    except (RuntimeError, TypeError, OverflowError):
        raise BardletError(f"{folder / 'config.json'}: damaged: its sizes are too large for any machine; "
                           "copy it again") from None
    return model
