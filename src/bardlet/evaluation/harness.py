"""EleutherAI's lm-evaluation-harness on a run folder: its tasks with any model that bardlet reads, rungs included.

    pip install 'lm_eval>=0.4.13'
    python -m bardlet.harness run --model bardlet --model_args run=runs/my-qwen3 --tasks arc_easy,hellaswag

It accepts the arguments of `lm-eval`. The harness builds the prompts, computes the metrics and downloads its data
(unless your own task names a file); bardlet computes log p and generates. No other module imports `lm_eval`.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from typing import Any

from bardlet.errors import BardletError, quoted
from bardlet.evaluation import likelihood
from bardlet.inference.drawing import Sampling
from bardlet.inference.text_generation import prompt_ids
from bardlet.run import hf, hub
from bardlet.runtime import device as runtime_device

try:
    import lm_eval.models  # noqa: F401  (registers the harness's own models)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    MISSING = "lm-evaluation-harness is not installed; run `pip install 'lm_eval>=0.4.13'`"
    if __name__ == "__main__":
        sys.exit(f"bardlet: {MISSING}")
    raise BardletError(MISSING) from None

log = logging.getLogger("bardlet")

TOKENS = 256
"""Default length of an answer in tokens, that of the harness's own models."""


@register_model("bardlet")
class Bardlet(LM):
    """A run folder, or a Hugging Face folder with a gpt2 or Llama-like model, as a model of the harness.

    The harness asks in plain text. `--apply_chat_template` is not supported, since bardlet never parses special tokens
    from text. Characters that the tokenizer does not know are dropped from contexts, with a warning; a continuation
    with such a character has probability 0.
    """

    def __init__(self, run: str, device: str = "auto", dtype: str = "fp32", batch_size: Any = None,
                 max_batch_size: Any = None) -> None:
        """run: the folder. dtype: fp32 or bf16, precision of the matrix products. The harness always passes batch
        sizes; they are ignored, since batches are as large as memory allows. Raises BardletError like
        `hf.read_folder`."""
        super().__init__()
        if dtype not in ("fp32", "bf16"):
            raise BardletError(f"dtype={dtype}: must be fp32 or bf16")
        self.model, self._tokenizer = hf.read_folder(hub.folder(run))
        if self.model.config.model == "encdec":
            raise BardletError(f"{run}: this model translates; use `bardlet eval {quoted(run)}`")
        # cuda:0 is the harness's default
        self._device = runtime_device.pick_device("auto" if device == "cuda:0" else device)
        runtime_device.set_threads_and_determinism(None, False, self._device)
        self.model.to(self._device)
        self.window, self.dtype = self.model.config.block_size, runtime_device.pick_dtype(dtype, self._device)
        self.warned = False

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log p in nats, True if greedy decoding would produce it) for each (context, continuation)."""
        results, pairs = [(-math.inf, False)] * len(requests), {}
        for number, (context, continuation) in enumerate(request.args for request in requests):
            if not self._tokenizer.drop_unseen(continuation)[1]:
                pairs[number] = likelihood.encode_pair(self._tokenizer, self.drop_unseen(context), continuation)
                if (length := len(pairs[number][1])) > self.window:
                    raise BardletError(f"a continuation has {length} tokens, but the model's window is {self.window}; "
                                       "drop this task, or train a model with a larger --block-size")
        for number, result in zip(pairs, self.likelihoods(list(pairs.values())), strict=True):
            results[number] = result
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log p in nats of each whole text, in disjoint windows, conditioned on the start of a document."""
        windows = []
        for request in requests:
            ids = self._tokenizer.encode(self.drop_unseen(request.args[0])).tolist()
            rolling = get_rolling_token_windows(ids, prompt_ids(self._tokenizer, None)[0], self.window, context_len=1)
            windows.append([make_disjoint_window(pair) for pair in rolling])
        results = iter(self.likelihoods([pair for pairs in windows for pair in pairs]))
        return [sum(next(results)[0] for _ in pairs) for pairs in windows]

    def likelihoods(self, pairs: Sequence[tuple[likelihood.Ids, likelihood.Ids]]) -> list[tuple[float, bool]]:
        """Call `likelihood.log_likelihoods` with this model."""
        return likelihood.log_likelihoods(self.model, pairs, self._device, self.dtype)

    def drop_unseen(self, text: str) -> str:
        """Return `text` without the characters that the tokenizer does not know; warn the first time."""
        kept, unseen = self._tokenizer.drop_unseen(text)
        if unseen and not self.warned:
            log.warning("dropping characters that the tokenizer does not know")
            self.warned = True
        return kept

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the completion of each context, up to the first occurrence of a string in `until`."""
        results = [""] * len(requests)
        by_options: dict[str, list[int]] = {}  # requests with equal options are batched
        for number, request in enumerate(requests):
            by_options.setdefault(repr(request.args[1]), []).append(number)
        for numbers in by_options.values():
            given = requests[numbers[0]].args[1]
            sampling = None
            if given.get("do_sample"):
                sampling = Sampling(temperature=given.get("temperature", 1.0), top_k=given.get("top_k"),
                                    top_p=given.get("top_p"))
            texts = [self.drop_unseen(requests[number].args[0]) for number in numbers]
            prompts = [prompt_ids(self._tokenizer, text) for text in texts]
            completions = likelihood.generate_answers(self.model, self._tokenizer, prompts,
                                                      given.get("max_gen_toks", TOKENS), dtype=self.dtype,
                                                      stop_ids=self._tokenizer.stop_ids, sampling=sampling)  # fmt: skip
            until = given.get("until") or []
            for number, text in zip(numbers, completions, strict=True):
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0]
                results[number] = text
        return results


def main() -> None:
    """Run `lm-eval` with the model `bardlet` registered."""
    try:
        cli_evaluate()
    except BardletError as error:
        sys.exit(f"bardlet: {error}")


if __name__ == "__main__":
    main()
