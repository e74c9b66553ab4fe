"""Trained models of every kind, prompts for them, and what bardlet itself answers."""

from __future__ import annotations

import functools
import gzip
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bardlet import tokenizer as tk
from bardlet.cli import main
from bardlet.data import chat_template
from bardlet.export import export as exporting
from bardlet.inference import generate, translate
from bardlet.inference.answers import stop_ids

TOKENS, CONTEXT, CLOSE = 40, 128, 1e-4
DATA = os.environ.get("BARDLET_DATA")
KEPT = Path(os.environ["BARDLET_ENGINE_MODELS"]) if os.environ.get("BARDLET_ENGINE_MODELS") else None
"""A folder that keeps the trained models for the next time."""

SENTENCES = {
    "english": ["The bards of the village sang about rivers and kings.", "It's late, said 3 of them; they'll go home.",
                "A small bird sat on the old gate.", "Nobody knew the name of the river.", "Who opened the door?",
                "She gave 12 coins to the miller's son, and he laughed.", "Rain fell on the empty road until morning.",
                "\"We have seen the sea,\" they said, \"and it was grey.\""],
    "russian": ["Барды деревни пели о реках и королях.", "Уже поздно, сказали 3 из них; они пойдут домой.",
                "Маленькая птица сидела на старых воротах.", "Никто не знал имени этой реки.", "Кто открыл дверь?",
                "Она дала 12 монет сыну мельника, и он засмеялся.", "До утра на пустую дорогу падал дождь.",
                "«Мы видели море, — сказали они, — и оно было серым»."],
    "chinese": ["村裡的詩人唱著河流和國王。", "天色已晚,其中3人說:他們會回家。", "一隻小鳥停在舊門上。",
                "沒有人知道這條河的名字。", "誰開了門?", "她給了磨坊主的兒子12枚硬幣,他笑了。",
                "雨落在空路上,直到早晨。", "「我們看見了海,」他們說,「海是灰色的。」"],
}
QUESTIONS = {
    "english": ("How many birds on day {}?", "{} birds."), "russian": ("Сколько птиц в день {}?", "{} птиц."),
    "chinese": ("第{}天有幾隻鳥?", "{}隻鳥。"),
}
OTHERS = ["def f(x):\n    return x * 2  # twice\n", "😀 emoji 👩‍👩‍👧 and naïve café", "  \n\n \t x",
          "東京 Москва Αθήνα", "I'LL 12345 don't", "| < end > is text", "\u202eright to left\u202c \x00 nul",
          "</script>", "x = [1, 2, 3]; print(x[::-1])", "Grüße, Ελλάδα, שלום, नमस्ते"]
"""Texts with characters that the training texts do not have."""

LANGUAGES, KINDS = ("english", "russian", "chinese"), ("char", "byte", "bpe")
TUNED = ("gpt2-char-english", "gpt2-byte-russian", "gpt2-bpe-chinese", "qwen3-char-russian", "qwen3-byte-chinese",
         "qwen3-bpe-english")
BASES = [f"{family}-{kind}-{language}" for family in ("gpt2", "qwen3") for kind in KINDS for language in LANGUAGES]
CHATS = [f"{base}-{stage}" for base in TUNED for stage in ("sft", "lora")]
REWARDS = [f"{base}-reward" for base in TUNED]
TRANSLATORS = [f"encdec-bpe-{language}" for language in LANGUAGES]  # translation has no other tokenizer


@dataclass
class Case:
    """A trained model, texts and prompts for it, and bardlet's own answers."""

    name: str
    folder: Path
    model: Any
    tokenizer: tk.Tokenizer
    texts: list[str]
    """Texts to tokenize. A tokenizer of characters gets none that it has no character for."""
    prompts: list[list[int]]
    """Ids to continue; for an encoder-decoder, ids of sources, with their end token."""
    stops: list[int]
    """Ids that end a completion, also by the folder's generation_config.json."""
    chats: list[list[dict[str, str]]] = field(default_factory=list)
    """Conversations; the prompts of a chat model are theirs."""
    ids: list[list[int]] = field(default_factory=list)
    completions: list[list[int]] = field(default_factory=list)

    def request(self) -> dict[str, Any]:
        """Return what a program that runs an engine reads as JSON."""
        return {"texts": self.texts, "prompts": self.prompts, "tokens": TOKENS, "context": CONTEXT,
                "stop": self.stops, "chats": self.chats}


@dataclass
class Outcome:
    """How an engine's answers compare. ties: gaps between bardlet's two best logits at first differences."""

    texts: int = 0
    prompts: int = 0
    ties: list[float] = field(default_factory=list)


def compare(case: Case, answer: dict[str, Any], completions: str = "completions", close: float = CLOSE) -> Outcome:
    """Assert that ids and completions are bardlet's; close: a smaller gap of the two best logits is a near tie."""
    outcome = Outcome(len(case.texts), len(case.prompts))
    if "ids" in answer:
        assert answer["ids"] == case.ids
    if case.chats and "chat_ids" in answer:
        assert answer["chat_ids"] == case.prompts
    for prompt, ours, theirs in zip(case.prompts, case.completions, answer[completions], strict=True):
        if ours == theirs:
            continue
        at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        assert at is not None, f"another length: {prompt} {ours} {theirs}"
        with torch.inference_mode():
            if case.model.config.model == "encdec":
                start = [case.tokenizer.pad_id, *ours[:at]]
                logits = case.model(torch.tensor([prompt]), torch.tensor([start]))
            else:
                logits = case.model(torch.tensor([[*prompt, *ours[:at]]]))
        best = logits[0, -1].topk(2).values
        gap = float(best[0] - best[1])
        assert gap < close, f"{prompt} differs at token {at}: {ours} {theirs}, where the gap is {gap}"
        outcome.ties.append(gap)
    return outcome


# ---------------------------------------------------------------------------- texts


def training_text(language: str) -> list[str]:
    """Return documents: real ones from BARDLET_DATA if there are any in the language, and sentences of ours."""
    rng = np.random.default_rng(0)
    ours = [" ".join(SENTENCES[language][n] for n in rng.integers(0, len(SENTENCES[language]), 5)) + "\n"
            for _ in range(120)]
    if DATA and language == "english":
        return [(Path(DATA) / "tinyshakespeare/input.txt").read_text(encoding="utf-8")[:200_000], *ours]
    if DATA and language == "chinese":
        lines = (Path(DATA) / "chinese-poetry/tang300.jsonl").read_text(encoding="utf-8").splitlines()
        return [*(json.loads(line)["text"] + "\n" for line in lines), *ours]
    return ours


def pieces(documents: list[str], number: int, shortest: int, longest: int) -> list[str]:
    """Return pieces of the documents, of `shortest` to `longest` characters."""
    text, rng = "".join(documents), np.random.default_rng(1)
    starts, lengths = rng.integers(0, len(text) - longest, number), rng.integers(shortest, longest + 1, number)
    return [text[start:start + length] for start, length in zip(starts, lengths, strict=True)]


def beginning(ids: list[int], n: int) -> list[int]:
    """Return at most 40 ids of text n; of every second text fewer, so that prompts have all lengths from 1 to 40."""
    return ids[:40 if n % 2 else 1 + 7 * (n // 2) % 40]


# ---------------------------------------------------------------------------- models


def run(*arguments: object) -> None:
    """Run a command of bardlet."""
    assert main([str(argument) for argument in arguments]) == 0, arguments


@functools.cache
def trained(name: str, parent: Path) -> Path:
    """Train the model of a case, and return its folder."""
    family, kind, language, stage = [*name.split("-"), "base"][:4]
    out = parent / name
    if out.exists():
        return out
    common = ("--compile", "off", "--dtype", "fp32", "--out", out)
    if stage != "base":
        # the first fine-tuning adds the tokens of the conversation
        base = trained(name.rpartition("-")[0] + ("-sft" if stage != "sft" else ""), parent)
        question, answer = QUESTIONS[language]
        rows = [{"prompt": question.format(n), "response": answer.format(n)} for n in range(1, 100)]
        if stage == "reward":
            rows = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": OTHERS[n % 2][:12]}
                    for n, row in enumerate(rows)]
        data = _write(parent / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        lora = ("--lora", "8", "--lr", "0.01") if stage == "lora" else ()
        run("reward" if stage == "reward" else "sft", base, data, "--steps", "60" if stage == "reward" else "200",
            "--batch-size", "16", *lora, *common)
        return out
    shape = ("--n-layer", "2", "--n-head", "4", "--n-embd", "64", "--block-size", CONTEXT)
    vocabulary = ("--vocab-size", "500") if kind == "bpe" else ()
    if family == "encdec":
        sources, targets = _pairs(language)
        run("train", "--source", _write(parent / f"{name}.src", "".join(sources)),
            "--target", _write(parent / f"{name}.tgt", "".join(targets)), "--model", "encdec", "--tokenizer", kind,
            "--steps", "150", *vocabulary, *shape, *common)
        return out
    grouped = ("--n-kv-head", "2") if family == "qwen3" else ()
    text = _write(parent / f"{name}.jsonl", "".join(json.dumps({"text": d}) + "\n" for d in training_text(language)))
    run("train", text, "--model", family, "--tokenizer", kind, "--steps", "80", "--batch-size", "16",
        *vocabulary, *shape, *grouped, *common)
    return out


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _pairs(language: str) -> tuple[list[str], list[str]]:
    """Return lines and their translations: German from BARDLET_DATA for English, sentences of ours for the others."""
    if DATA and language == "english":
        sides = []
        for end in ("de", "en"):
            with gzip.open(Path(DATA) / f"multi30k/train.{end}.gz", "rt", encoding="utf-8") as file:
                sides.append([line for _, line in zip(range(2000), file, strict=False)])
        return sides[0], sides[1]
    rng = np.random.default_rng(2)
    picks = [rng.integers(0, 8, 2) for _ in range(600)]
    sources, targets = ([" ".join(SENTENCES[side][n] for n in pick) + "\n" for pick in picks]
                        for side in ("russian" if language == "english" else "english", language))
    return sources, targets


def build(name: str, parent: Path) -> Case:
    """Return a case with bardlet's own answers."""
    folder = trained(name, parent)
    source = exporting.read(folder)
    tokenizer, (family, kind, language) = source.tokenizer, name.split("-")[:3]
    documents = _pairs(language)[0] if family == "encdec" else training_text(language)
    texts = [*OTHERS, *pieces(documents, 250, 1, 150 if kind == "bpe" else 60)]
    if family == "encdec":
        texts = [*OTHERS, *dict.fromkeys(documents[:40]), *pieces(documents, 250, 20, 100)]  # whole lines, and parts
    if kind == "char":
        texts = [text for text in texts if set(text) <= set(tokenizer.vocab)]
    encoded = {text: ids for text in texts if len(ids := tokenizer.encode(text).tolist()) <= CONTEXT}
    texts = list(encoded)[:100]
    assert len(texts) == 100
    generation = json.loads((folder / "generation_config.json").read_text())
    stops = generation.get("eos_token_id")
    case = Case(name, folder, source.model, tokenizer, texts, [],
                stops if isinstance(stops, list) else [] if stops is None else [stops])
    case.ids = [encoded[text] for text in texts]
    if family == "encdec":
        case.prompts = [[*ids[:40], tokenizer.eos_id] for ids in encoded.values() if len(ids) >= 10][:100]
        assert len(case.prompts) == 100
        case.completions = answers(case)
    elif name in CHATS:
        assert set(case.stops) == set(stop_ids(tokenizer)) - {tokenizer.pad_id}
        question = QUESTIONS[language][0]
        case.chats = [[{"role": "user", "content": question.format(n)}] for n in range(1, 21)]
        case.prompts = [chat_template.encode(tokenizer, chat, add_generation_prompt=True)[0].tolist()
                        for chat in case.chats]
        case.completions = answers(case)
        ended = sum(row[-1] in case.stops for row in case.completions)
        assert ended >= 15, f"{name}: only {ended} of 20 answers end"
    elif name not in REWARDS:
        case.prompts = [beginning(ids, n) for n, ids in enumerate(case.ids)]
        lengths = {len(prompt) for prompt in case.prompts}
        assert len(case.prompts) == 100 and len(lengths) >= 30 and min(lengths) <= 2 and max(lengths) >= 35, lengths
        case.completions = answers(case)
    return case


def answers(case: Case) -> list[list[int]]:
    """Return what bardlet writes greedily after each prompt, one at a time, in at most TOKENS with the end token."""
    if case.model.config.model != "encdec":
        return [generate.generate(case.model, [prompt], TOKENS, temperature=0, stop_ids=case.stops)[0]
                for prompt in case.prompts]
    stop, start = case.tokenizer.eos_id, case.tokenizer.pad_id
    assert stop is not None and start is not None
    # a source of 10 tokens may have a translation of TOKENS
    return [[*translate.translate(case.model, [prompt], stop, start)[0], stop][:TOKENS] for prompt in case.prompts]
