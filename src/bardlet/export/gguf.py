"""Write a model as a GGUF file, for llama.cpp, Ollama, LM Studio and everything else built on ggml.

The names of tensors and metadata are llama.cpp's (gguf-py's `constants.py`). Its tokenizer is byte-level BPE; those of
characters and bytes become one whose merges rebuild exactly their tokens (`byte_level`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bardlet.config.model import LLAMA
from bardlet.data import chat_template
from bardlet.errors import BardletError, printable
from bardlet.models.layers import rope_frequencies
from bardlet.run import hf
from bardlet.runtime import atomic
from bardlet.tokenizer import END, SEPARATOR, Tokenizer
from bardlet.tokenizer.pipeline import BYTE_OF_CHAR, SPLITS, steps

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
WORDS = {"smollm": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
         "qwen2": [SPLITS[0], BYTES], "llama-bpe": [SPLITS[1], BYTES]}
"""llama.cpp's names of rules that split a text into words, as in tokenizer.json."""
DTYPES = ("f32", "f16", "bf16", "q8_0")
"""Formats of the matrices; vectors are always f32."""
MAX_F16 = torch.finfo(torch.float16).max
"""Largest weight of the format f16."""
BLOCK = 32
"""Numbers that share a scale in q8_0: each row of a matrix has a multiple of them."""
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}

GPT2 = {"wte": "token_embd", "wpe": "position_embd", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
        "ln_f": "output_norm", "lm_head": "output"}
LLAMA_NAMES = {"embed_tokens": "token_embd", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
               "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
               "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
               "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
               "mlp.down_proj": "ffn_down", "norm": "output_norm", "lm_head": "output"}
NAMES = {"gpt2": GPT2, **dict.fromkeys(LLAMA, LLAMA_NAMES)}
"""llama.cpp's names of the modules of each model."""
ARCHITECTURES = {"mistral": "llama"}
"""llama.cpp's name of an architecture, where it is not bardlet's."""
NEIGHBORS = ("llama", "mistral", "smollm3")
"""Families of which llama.cpp rotates neighboring channels in pairs, instead of channels i and i + D/2."""
SCALED = ("llama", "mistral")
"""Families for which llama.cpp reads `rope_freqs`, the scaled positions of Llama 3.1."""
WHOLE_WORDS = ("llama-bpe",)
"""Rules of WORDS for which llama.cpp looks up a word in the vocabulary before it merges (`ignore_merges`)."""


def write(path: Path, model: Any, tokenizer: Tokenizer, name: str, dtype: str = "f32",
          starts_documents: bool = False) -> None:  # fmt: skip
    """Write `model` and `tokenizer` to the file `path`.

    Args:
        name: the model's name.
        dtype: one of DTYPES.
        starts_documents: a prompt starts a document, so llama.cpp puts <|endoftext|> before it.

    Raises:
        BardletError: llama.cpp cannot run such a model, or the extra is not installed.
    """
    check(model.config, tokenizer, dtype)
    library()
    if dtype == "f16" and (largest := max(tensor.abs().max().item() for _, tensor in tensors(model))) > MAX_F16:
        raise BardletError(f"--dtype f16: a weight is {largest:.3g}, and f16 ends at 65504; use --dtype bf16 or f32")
    atomic.write_atomically(path, lambda new: _write(new, model, tokenizer, name, dtype, starts_documents))


def library() -> Any:
    """Return the package gguf. BardletError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise BardletError("--to gguf needs the package gguf; install it with: pip install 'bardlet[export]'") from None
    return gguf


def _write(path: Path, model: Any, tokenizer: Tokenizer, name: str, dtype: str, starts_documents: bool) -> None:
    gguf, config = library(), model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(config.model, config.model))
    writer.add_name(name)
    _add_shape(writer, config)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    writer.add_add_bos_token(bool(tokenizer.prefix_ids) or (starts_documents and tokenizer.eos_id is not None))
    matrix, vector = gguf.GGMLQuantizationType[dtype.upper()], gguf.GGMLQuantizationType.F32
    for tensor_name, tensor in tensors(model):
        kind = matrix if tensor.ndim == 2 and "position_embd" not in tensor_name else vector
        writer.add_tensor(tensor_name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(config: Any, tokenizer: Tokenizer, dtype: str) -> None:
    """Raise BardletError if llama.cpp cannot run a model with this config and tokenizer, or not in this format."""
    if config.model not in NAMES or config.scores:
        kind = "reward models" if config.scores else f"models of the family {config.model}"
        raise BardletError(f"--to gguf: llama.cpp does not run bardlet's {kind}; use --to hf"
                           f"{' or --to html' * (not config.scores)}")
    _check_shape(config)
    _check_tokenizer(tokenizer)
    _check_added(tokenizer)
    widths = {"n_embd": config.n_embd, "n_inner": config.n_inner, "n_head x head_dim": config.n_head * config.head_dim}
    if wrong := [f"{name} {width}" for name, width in widths.items() if width % BLOCK] * (dtype == "q8_0"):
        raise BardletError(f"--dtype q8_0 stores {BLOCK} numbers at a time, and {' and '.join(wrong)} cannot be "
                           f"divided by {BLOCK}; use --dtype f16")


def _check_shape(config: Any) -> None:
    """Raise BardletError for a variant of a family that llama.cpp cannot load, or computes in another way."""
    wide = config.n_head * config.head_dim
    reason = ""
    if config.model == "smollm3" and config.layers_without_positions != tuple(range(3, config.n_layer, 4)):
        reason = "runs a smollm3 only if every fourth layer has no positions"
    elif config.model == "gpt2" and config.activation != "gelu_new":
        reason = f"computes gpt2 with gelu_new, not {config.activation}"
    elif config.rope_scaling is not None and config.model not in SCALED:
        reason = f"does not scale the positions of {config.model} ('rope_scaling')"
    elif config.attention_bias and config.model != "llama":
        reason = f"has no bias for the attention output of {config.model} ('attention_bias')"
    elif config.model == "qwen2" and wide != config.n_embd:
        reason = f"runs a qwen2 only if n_head x head_dim is n_embd, and they are {wide} and {config.n_embd}"
    if reason:
        raise BardletError(f"--to gguf: llama.cpp {reason}; use --to hf")


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise BardletError for a tokenizer to which llama.cpp has no equal."""
    words = pre_tokenizer(tokenizer)
    if words is None:
        raise BardletError("--to gguf: this tokenizer splits words by a rule of its own; convert the original model "
                           "with llama.cpp's convert_hf_to_gguf.py")
    if tokenizer.lowercase:
        raise BardletError("--to gguf: this tokenizer lowercases what it reads, which a GGUF file cannot say; use --to "
                           "html or --to hf")
    if others := [name for name in normalizers(tokenizer) if name != "NFC"]:
        raise BardletError(f"--to gguf: this tokenizer changes what it reads ({printable(others[0])}), which a GGUF "
                           "file cannot say; use --to hf")
    merging = tokenizer.rules["model"]
    if merging.get("ignore_merges", False) is not (words in WHOLE_WORDS) and tokenizer.kind in ("bpe", "other"):
        looks, does = ("looks", "does not") if words in WHOLE_WORDS else ("does not look", "does")
        raise BardletError(f"--to gguf: llama.cpp {looks} up whole words before it merges, and this tokenizer {does} "
                           "('ignore_merges'); use --to hf")
    if marks := [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if merging.get(name)]:
        raise BardletError(f"--to gguf: this tokenizer has a '{marks[0]}', which a GGUF file cannot say; use --to hf")


def _check_added(tokenizer: Tokenizer) -> None:
    """Raise BardletError for an added token that llama.cpp would match in other places of a text.

    Special tokens have no say: a text has none of them.
    """
    added = [token for token in tokenizer.rules["added_tokens"] if not token["special"]]
    contents = [token["content"] for token in added]
    beginnings = {content[:n] for content in contents for n in range(1, len(content))}
    for token, content in zip(added, contents, strict=True):
        options = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        changes = tokenizer.inner.normalizer if token["normalized"] else None
        ends = (content[n:] for n in range(1, len(content)) if len(set(content)) > 1)
        if tokenizer.kind == "char":
            reason = "and in a GGUF file a tokenizer of characters has none"
        elif options:
            reason = f"with '{options[0]}', which a GGUF file cannot say"
        elif changes is not None and changes.normalize_str(content) != content:
            reason = f"which its normalizer changes ({', '.join(normalizers(tokenizer))})"
        elif any(end in beginnings for end in ends):
            reason = "whose end begins another one, so that llama.cpp may take the other one"
        else:
            continue
        raise BardletError(f"--to gguf: the tokenizer has the added token {printable(content)}, {reason}; use --to hf")


def tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield llama.cpp's name and the weights of each parameter; matrices are (outputs, inputs)."""
    names = NAMES[model.config.model]
    config = model.config
    for name, tensor in model.state_dict().items():
        module, _, kind = name.removeprefix("transformer.").removeprefix("model.").rpartition(".")
        layer = module.split(".")[:2] if module.startswith(("h.", "layers.")) else []
        inner = ".".join(module.split(".")[len(layer):])
        prefix = f"blk.{layer[1]}." if layer else ""
        tensor = tensor.detach().cpu()
        if config.model in NEIGHBORS and inner in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()
        yield f"{prefix}{names[inner]}.{kind}", tensor
    if config.rope_scaling is not None:
        plain, scaled = (rope_frequencies(config.head_dim, config.rope_theta, scaling)
                         for scaling in (None, config.rope_scaling))  # fmt: skip
        yield "rope_freqs.weight", plain / scaled


def _add_shape(writer: Any, config: Any) -> None:
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_vocab_size(config.vocab_size)
    if config.model == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)


# ---------------------------------------------------------------- the tokenizer


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, size: int) -> None:
    """Add the tokenizer; rows of the embedding that have no token become unused ones."""
    gguf = library()
    tokens, merges = byte_level(tokenizer)
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    for token in tokenizer.rules["added_tokens"]:  # llama.cpp matches those that are not special in every text
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    missing = size - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list([*tokens, *(f"[unused {len(tokens) + n}]" for n in range(missing))])
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * missing])
    writer.add_token_merges(merges)
    writer.add_add_space_prefix(False)
    if (bos := tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id) is not None:
        writer.add_bos_token_id(bos)
    if tokenizer.eos_id is not None:
        writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
        if chat_template.is_own(tokenizer):
            writer.add_eot_token_id(tokenizer.vocab[END])
        elif ends := [i for i in hf.stop_ids(tokenizer) if i != tokenizer.eos_id]:
            writer.add_eot_token_id(ends[0])


def pre_tokenizer(tokenizer: Tokenizer) -> str | None:
    """Return llama.cpp's name of the rule that splits a text into words; None if it has none for this tokenizer."""
    if tokenizer.kind != "other":
        return "gpt-2"
    if tokenizer.rules["model"]["type"] != "BPE":
        return None
    rules = [{name: value for name, value in step.items() if name != "trim_offsets"}
             for step in steps(tokenizer.rules["pre_tokenizer"], "pretokenizers")]
    return next((name for name, known in WORDS.items() if rules == known), None)


def normalizers(tokenizer: Tokenizer) -> list[str]:
    """Return the names of the steps by which the tokenizer changes a text before it splits it."""
    return [step["type"] for step in steps(tokenizer.rules.get("normalizer"), "normalizers")]


def byte_level(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Return (tokens by id, merges by rank) of a byte-level BPE with the same ids for every text.

    Tokens are written as GPT-2 writes bytes. A character of several bytes is merged from left to right. No other merge
    can apply to it: only the first byte of a character begins a merge, and never follows one. A tokenizer without
    merges gets one that never applies, since llama.cpp wants a list: its parts begin no character of UTF-8.
    """
    if tokenizer.kind in ("bpe", "other"):
        pairs = json.loads(tokenizer.json)["model"]["merges"]  # a pair is a list, in older files a string
        tokens = {i: token for token, i in tokenizer.vocab.items()}
        return ([tokens.get(i, f"[unused {i}]") for i in range(tokenizer.vocab_size)],
                [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs])
    tokens_by_id, merges = [], []
    for i in range(tokenizer.vocab_size):
        if i in tokenizer.special:
            tokens_by_id.append(tokenizer.special[i])
            continue
        written = "".join(CHAR_OF_BYTE[byte] for byte in tokenizer.bytes_of(i))
        tokens_by_id.append(written)
        merges += [f"{written[:n]} {written[n]}" for n in range(1, len(written))]
    never = f"{CHAR_OF_BYTE[0xff]} {CHAR_OF_BYTE[0xfe]}"
    return tokens_by_id, list(dict.fromkeys(merges)) or [never]


# ---------------------------------------------------------------- Ollama


def modelfile(file: str, tokenizer: Tokenizer, context: int, translates: bool = False) -> str:
    """Return an Ollama Modelfile for a GGUF file in the same folder (https://docs.ollama.com/modelfile).

    A chat model gets the template of its conversations, another model the bare prompt, and one that translates the
    separator after it. Ollama knows some other chat templates by the GGUF file. Its own penalties are switched off.
    """
    lines = [f"FROM ./{file}"]
    if chat_template.is_own(tokenizer):
        lines.append('TEMPLATE """{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"""')
    elif not chat_template.is_foreign(tokenizer):
        lines.append(f'TEMPLATE """{{{{ .Prompt }}}}{SEPARATOR * translates}"""')
    stops = [tokenizer.special.get(i, "") for i in hf.stop_ids(tokenizer)]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop.isprintable() and stop and '"' not in stop]
    settings = {"temperature": hf.temperature(tokenizer), "top_k": 50, "top_p": 1, "min_p": 0, "repeat_penalty": 1,
                "num_ctx": context}
    return "\n".join([*lines, *(f"PARAMETER {name} {value}" for name, value in settings.items()), ""])
