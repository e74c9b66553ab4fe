"""EleutherAI's lm-evaluation-harness on a run folder: its tasks, by any model that bardlet reads, rungs included.

    pip install 'lm_eval>=0.4.13'
    python -m bardlet.harness run --model bardlet --model_args run=runs/my-qwen3 --tasks arc_easy,hellaswag

It takes what `lm-eval` takes. The harness makes the texts and the figures (and downloads its data, unless a task of
your own names a file); bardlet computes log p and writes. Nothing else of bardlet imports this file, or `lm_eval`.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bardlet.errors import BardletError
from bardlet.evaluation import likelihood
from bardlet.inference.text_generation import prompt_ids
from bardlet.run import hf
from bardlet.runtime import device as runtime_device

try:
    import lm_eval.models  # noqa: F401  (the harness' own models stay known beside this one)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    MISSING = "lm-evaluation-harness is not installed; pip install 'lm_eval>=0.4.13'"
    if __name__ == "__main__":
        sys.exit(f"bardlet: {MISSING}")
    raise BardletError(MISSING) from None

log = logging.getLogger("bardlet")

TOKENS = 256
"""Tokens of an answer where a task does not say how many, as the harness' own models have it."""


@register_model("bardlet")
class Bardlet(LM):
    """A run folder, or a Hugging Face folder with a gpt2 or qwen3 model, as the harness asks a model.

    The harness asks in plain text; `--apply_chat_template` is not for it, since nothing that a text says becomes a
    special token here. Characters that a tokenizer does not know are left out of what the model is given, with a
    notice; a continuation that has one has probability 0.
    """

    def __init__(self, run: str, device: str = "auto", dtype: str = "fp32", batch_size: Any = None,
                 max_batch_size: Any = None) -> None:
        """run: the folder. dtype: fp32 or bf16, of the matrix products. The harness always gives a batch_size; here
        batches are as large as memory allows. BardletError as `hf.read_folder` raises it."""
        super().__init__()
        if dtype not in ("fp32", "bf16"):
            raise BardletError(f"dtype={dtype}: it must be fp32 or bf16")
        self.model, self.words = hf.read_folder(Path(run))
        if self.model.config.model == "encdec":
            raise BardletError(f"{run}: this model translates; `bardlet eval {run}` measures it")
        # cuda:0 is what the harness says where nobody said anything
        self._device = runtime_device.pick_device("auto" if device == "cuda:0" else device)
        runtime_device.set_threads_and_determinism(None, False, self._device)
        self.model.to(self._device)
        self.window, self.dtype = self.model.config.block_size, runtime_device.pick_dtype(dtype, self._device)
        self.told = False

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p in nats, whether it is what the model itself would write) of each (context, continuation)."""
        made, pairs = [(-math.inf, False)] * len(requests), {}
        for number, (context, continuation) in enumerate(request.args for request in requests):
            if not self.words.drop_unseen(continuation)[1]:
                pairs[number] = likelihood.encode_pair(self.words, self.known(context), continuation)
                if (long := len(pairs[number][1])) > self.window:
                    raise BardletError(f"a continuation has {long} tokens, and the model's window {self.window}; "
                                       "leave this task out, or take a model with a larger --block-size")
        for number, one in zip(pairs, self.likelihoods(list(pairs.values())), strict=True):
            made[number] = one
        return made

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p in nats of each whole text, in windows side by side, the first behind what a text begins with."""
        windows = []
        for request in requests:
            ids = self.words.encode(self.known(request.args[0])).tolist()
            several = get_rolling_token_windows(ids, prompt_ids(self.words, None)[0], self.window, context_len=1)
            windows.append([make_disjoint_window(pair) for pair in several])
        found = iter(self.likelihoods([pair for several in windows for pair in several]))
        return [sum(next(found)[0] for _ in several) for several in windows]

    def likelihoods(self, pairs: Sequence[tuple[likelihood.Ids, likelihood.Ids]]) -> list[tuple[float, bool]]:
        """`likelihood.log_likelihoods` by this model."""
        return likelihood.log_likelihoods(self.model, pairs, self._device, self.dtype)

    def known(self, text: str) -> str:
        """`text` without the characters that the tokenizer does not know, which is said once."""
        kept, unseen = self.words.drop_unseen(text)
        if unseen and not self.told:
            log.warning("characters that the model's tokenizer has never seen are left out of its texts")
            self.told = True
        return kept

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to the first text of `until`; see `likelihood.generate_answers`."""
        made = [""] * len(requests)
        alike: dict[str, list[int]] = {}  # the requests that want the same are written together
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        for numbers in alike.values():
            wanted = requests[numbers[0]].args[1]
            options: dict[str, Any] = {}
            if wanted.get("do_sample"):
                options = {"temperature": wanted.get("temperature", 1.0), "top_k": wanted.get("top_k"),
                           "top_p": wanted.get("top_p"), "seed": 0}  # fmt: skip
            texts = [self.known(requests[number].args[0]) for number in numbers]
            stop_ids = [] if self.words.eos_id is None else [self.words.eos_id]
            written = likelihood.generate_answers(self.model, self.words, [prompt_ids(self.words, text) for text in texts],
                                       wanted.get("max_gen_toks", TOKENS), dtype=self.dtype, stop_ids=stop_ids,
                                       **options)
            until = wanted.get("until") or []
            for number, text in zip(numbers, written, strict=True):
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0]
                made[number] = text
        return made


def main() -> None:
    """`lm-eval`, to which the model `bardlet` is known."""
    try:
        cli_evaluate()
    except BardletError as error:
        sys.exit(f"bardlet: {error}")


if __name__ == "__main__":
    main()
