"""A trained model from Python: `model = bardlet.load("runs/my-qwen3")`, then generate, stream, chat, translate."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from bardlet.api import arguments
from bardlet.api.arguments import names_keywords
from bardlet.config import toml
from bardlet.config.inference import SamplingOptions
from bardlet.config.pretraining import TranslationConfig
from bardlet.data import chat_template
from bardlet.errors import BardletError, quoted
from bardlet.inference import text_generation
from bardlet.inference import translate as translation
from bardlet.inference.chat_session import ChatSession
from bardlet.run import folder as run_folder
from bardlet.run import hf, hub
from bardlet.runtime import device as runtime_device
from bardlet.tokenizer import Tokenizer

log = logging.getLogger("bardlet")

DType = Literal["auto", "fp32", "bf16", "int8"]


class Model:
    """A model with its tokenizer, on its device.

    folder: where it was loaded from. module: the `torch.nn.Module`. tokenizer: text to token ids and back.
    documents: how many documents its training text had; a model of one document knows no separator. starts_documents:
    a prompt begins a document, as nearly all windows of the training text did, in a list of names or short stories.
    """

    starts_documents = False

    def __init__(self, folder: Path, module: Any, tokenizer: Tokenizer, dtype: DType, documents: int,
                 prefix_lm: bool | None) -> None:
        self.folder, self.module, self.tokenizer, self.dtype = folder, module, tokenizer, dtype
        self.documents, self._prefix_lm = documents, prefix_lm

    @property
    def translates(self) -> bool:
        """True if it was trained on sentence pairs."""
        return self._prefix_lm is not None

    @names_keywords
    def generate(self, prompt: str = "", max_new_tokens: int = 500, *, temperature: float = 0.8,
                 top_k: int | None = 50, top_p: float | None = None, seed: int | None = None) -> str:
        """Return the text that follows `prompt`, without the prompt. For the answers of a chat model, see `chat`.

        Args:
            prompt: the text to continue; empty: start a new document.
            max_new_tokens: at most this many tokens; a document may end sooner.
            temperature: below 1 is more careful, above 1 wilder; 0: always the likeliest token.
            top_k: sample from the k likeliest tokens; top_p: from the likeliest tokens that together have this
                probability. None: from all.
            seed: the same seed gives the same text; None: a different text each time.

        Raises:
            BardletError: a character that the tokenizer does not know, or a value out of range.
        """
        return "".join(self.stream(prompt, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                                   seed=seed))

    @names_keywords
    def stream(self, prompt: str = "", max_new_tokens: int = 500, *, temperature: float = 0.8,
               top_k: int | None = 50, top_p: float | None = None, seed: int | None = None) -> Iterator[str]:
        """Yield the pieces of the text of `generate` as they are written; every character is whole, no piece empty."""
        ids = self.prompt_ids(prompt)
        tokens, options = self.options(max_new_tokens, temperature, top_k, top_p, seed)
        pieces = text_generation.stream(self.module, self.tokenizer, ids, tokens, **options)
        return (piece for piece in pieces if piece)

    @names_keywords
    def complete(self, prompts: Sequence[str], max_new_tokens: int = 500, *, temperature: float = 0.8,
                 top_k: int | None = 50, top_p: float | None = None, seed: int | None = None) -> tuple[list[str], int]:
        """Return the text that follows each prompt, generated as one batch.

        Args:
            prompts: the texts to continue; a string counts as a list of one.
            max_new_tokens: at most this many tokens for each prompt. The other keywords are those of `generate`.

        Returns:
            (texts, tokens): the text for each prompt, and the number of new tokens of all texts together.

        Raises:
            BardletError: a character that the tokenizer does not know, or a value out of range.
        """
        tokens, options = self.options(max_new_tokens, temperature, top_k, top_p, seed)
        prompts = _strings(prompts, "complete: prompts")
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        rows = text_generation.complete(self.module, self.tokenizer, ids, tokens, **options)
        texts = [self.tokenizer.decode(ids, skip_special=True, continues=bool(prompt))
                 for prompt, ids in zip(prompts, rows, strict=True)]
        return texts, sum(map(len, rows))

    @names_keywords
    def chat(self, message: str, *, system: str = "", max_new_tokens: int = 256, temperature: float = 0.7,
             top_k: int | None = 50, top_p: float | None = None, seed: int | None = None) -> str:
        """Return the answer to one message; for a conversation use `session`. For models of `bardlet sft` and after."""
        message = toml.typed(message, str, "chat: message")
        session = self.session(system=system, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                               top_p=top_p, seed=seed)
        return "".join(session.ask(message))

    @names_keywords
    def session(self, *, system: str = "", max_new_tokens: int = 256, temperature: float = 0.7,
                top_k: int | None = 50, top_p: float | None = None, seed: int | None = None) -> ChatSession:
        """Return a conversation: `session.ask(text)` yields the answer piece by piece."""
        self._refuse_translator()
        system = toml.typed(system, str, "session: system")
        tokens, options = self.options(max_new_tokens, temperature, top_k, top_p, seed)
        return ChatSession(self.module, self.tokenizer, system, tokens, documents=self.documents, **options)

    @names_keywords
    def translate(self, lines: Sequence[str], *, beam: int = 1, length_penalty: float = 1.0,
                  batch_size: int = 64) -> list[str]:
        """Return the translation of each line; a string counts as one line. For models trained on sentence pairs."""
        options = self.translate_options(toml.typed(beam, int, "translate: beam"),
                                         toml.typed(length_penalty, float, "translate: length_penalty"),
                                         toml.typed(batch_size, int, "translate: batch_size"))
        return translation.translate_lines(self.module, self.tokenizer, _strings(lines, "translate: lines"), options)

    # ---------------------------------------------------------------- for the commands

    @property
    def answers(self) -> bool:
        """True if the model was fine-tuned with bardlet's chat template."""
        return chat_template.reason_against(self.tokenizer) is None

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt. BardletError for a character that the tokenizer does not know."""
        self._refuse_translator()
        prompt = toml.typed(prompt, str, "generate: prompt")
        ids = text_generation.prompt_ids(self.tokenizer, prompt, self.documents)
        start = text_generation.prompt_ids(self.tokenizer, "", self.documents) if self.starts_documents else []
        return ids if not prompt or ids[: len(start)] == start else start + ids

    def options(self, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None,
                seed: int | None) -> tuple[int, dict[str, Any]]:
        """Return (max_new_tokens, keywords of `generate.stream`), checked; without a seed, draw one."""
        tokens = toml.typed(max_new_tokens, int, "generate: max_new_tokens")
        values = {"tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        checked = toml.options(SamplingOptions, values, "generate")
        options: dict[str, Any] = {"temperature": checked.temperature, "top_k": checked.top_k, "top_p": checked.top_p,
                                   "seed": int(torch.seed() % 2**31) if checked.seed is None else checked.seed}
        return checked.tokens, {**options, "dtype": torch.int8} if self.dtype == "int8" else options

    def translate_options(self, beam: int, length_penalty: float, batch_size: int) -> translation.TranslateOptions:
        """Return checked options of a translation. BardletError for a model that does not translate."""
        if self._prefix_lm is None:
            raise BardletError(f"{self.folder}: this {self.module.config.model} model was not trained to translate; "
                               "train one with `bardlet train --pair de-en`, or with "
                               "`bardlet train --source FILE --target FILE`")
        options = translation.TranslateOptions(beam, length_penalty, batch_size, self._prefix_lm)
        translation.check(self.module, self.tokenizer, options)
        return options

    def _refuse_translator(self) -> None:
        if self.module.config.model == "encdec":
            raise BardletError(f"{self.folder}: an encoder-decoder translates; use "
                               f"`bardlet translate {quoted(self.folder)} < LINES`")

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        return f"Model({str(self.folder)!r})"


def _strings(values: Sequence[str], where: str) -> list[str]:
    """Return strings as a list; a single string is a list of one."""
    return list(toml.typed([values] if isinstance(values, str) else values, tuple[str, ...], where))


def load(folder: str | os.PathLike[str], *, device: str = "auto", dtype: DType = "auto") -> Model:
    """Load a run folder, or a gpt2, Llama-like or pegasus model of Hugging Face.

    Args:
        folder: the folder, a `Run`, or OWNER/NAME on the Hugging Face Hub.
        device: cpu, cuda, mps; auto takes a GPU if there is one.
        dtype: precision of the weights; auto: bf16 if they are stored so, otherwise fp32. int8 is fastest on a CPU.

    Returns:
        The model with its tokenizer.

    Raises:
        BardletError: no such folder, a damaged file, or a model of another kind.
    """
    dtype = toml.typed(dtype, DType, "bardlet.load: dtype")
    device = toml.typed(device, str, "bardlet.load: device")
    folder = hub.folder(arguments.path(folder, "bardlet.load: folder"))
    runtime_device.tune_malloc()
    module, tokenizer = hf.read_folder(folder, dtype=None if dtype == "auto" else torch.float32)
    if dtype == "auto":
        dtype = "bf16" if next(module.parameters()).dtype == torch.bfloat16 else "fp32"
    prompts: dict[str, Any] = {"documents": 2}
    prefix_lm = False if module.config.model == "encdec" else None
    if (folder / "run.toml").exists():
        try:
            config, record = run_folder.settings(folder, use_edited=True)
            prompts = run_folder.prompt_facts(config, record, module.config.block_size)
            prefix_lm = config.prefix_lm if isinstance(config, TranslationConfig) else prefix_lm
        except BardletError as error:  # the weights are intact all the same
            log.warning("%s", error)
    runtime_device.place(module, device, dtype)
    model = Model(folder, module, tokenizer, dtype, prompts["documents"], prefix_lm)
    model.starts_documents = prompts.get("starts_documents", False)
    return model
