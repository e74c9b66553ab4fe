"""The model card of a run: README.md of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bardlet.config.settings import TrainConfig
from bardlet.config.toml import changed


def title(run: Path, record: dict[str, Any]) -> str:
    """What a run is called: by its folder, or by its rung of the ladder, whose folders are called by their seeds."""
    return str(record.get("rung", run.name))


def model_card(run: Path, config: TrainConfig, record: dict[str, Any], sample: str) -> None:
    """README.md of the run folder: what the model is, how it was made, how good it is, how to use it."""
    card = f"""# {title(run, record)}

A {config.model} language model with {record["parameters"]:,} parameters, trained by
bardlet on {record["text"]}.

| | |
| --- | --- |
| validation loss | {loss_in_words(record)} |
| weights | {_selected(record)} |
| steps | {record["steps"]:,} in {record["seconds"]:.0f} s of training |
| tokenizer | {record["tokenizer"]} |
| context window | {config.block_size} tokens |
| machine | {record["machine"]["processor"]}, {record["machine"]["dtype"]}, torch {record["machine"]["torch"]} |

![loss](loss.png)

A sample (temperature 0.8, top-k 50, seed 0), not selected:

```
{sample.replace("```", "'''")}
```

{_how_to_use(run, config)}

{_settings(config)}
"""
    (run / "README.md").write_text(card, encoding="utf-8")


def chat_card(run: Path, config: TrainConfig, record: dict[str, Any], sample: str) -> None:
    """README.md of the run folder of a model that learned conversations."""
    ended = "not measured" if record.get("ended") is None else f"{record['ended']:.0%}"
    card = f"""# {title(run, record)}

A {config.model} model with {record["parameters"]:,} parameters that answers, fine-tuned by bardlet on the conversations
of {record["text"]}. It began as `{config.init}`.

| | |
| --- | --- |
| loss of the held-out answers | {loss_in_words(record)} |
| ... before, by the base | {record["val_loss_before"]:.4f} nats per token |
| of its answers to held-out questions end by themselves | {ended} |
| weights | {_selected(record)} |
| steps | {record["steps"]:,} in {record["seconds"]:.0f} s of training |
| conversations | {record["documents"]:,} |
| context window | {config.block_size} tokens |
| machine | {record["machine"]["processor"]}, {record["machine"]["dtype"]}, torch {record["machine"]["torch"]} |

![loss](loss.png)

Some held-out questions and its answers (temperature 0.8, top-k 50, seed 0), not selected:

```
{sample.replace("```", "'''")}
```

Load it anywhere; `apply_chat_template` writes a conversation as it was trained on:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{run}")
tokenizer = AutoTokenizer.from_pretrained("{run}")
ids = tokenizer.apply_chat_template([{{"role": "user", "content": "Who are you?"}}], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))
```

{_settings(config)}
"""
    (run / "README.md").write_text(card, encoding="utf-8")


def preference_card(run: Path, config: TrainConfig, record: dict[str, Any], sample: str) -> None:
    """README.md of the run folder of a model that learned preferences."""
    card = f"""# {title(run, record)}

A {config.model} model with {record["parameters"]:,} parameters that learned by direct preference optimization (beta
{config.beta:g}), by bardlet, which of two answers is preferred in {record["text"]}. It began as `{config.init}`.

| | |
| --- | --- |
| held-out pairs in which the chosen answer has the greater reward | {record["accuracy"]:.1%} |
| ... by how much, on average | {record["margin"]:.3f} |
| ... in which the chosen answer is the longer one | {record["longer"]:.1%} |
| loss of the held-out pairs | {loss_in_words(record)}; log 2 = 0.6931 where nothing is learned |
| weights | {_selected(record)} |
| steps | {record["steps"]:,} in {record["seconds"]:.0f} s of training |
| pairs | {record["documents"]:,} |
| machine | {record["machine"]["processor"]}, {record["machine"]["dtype"]}, torch {record["machine"]["torch"]} |

![loss](loss.png)

The reward of an answer is beta log(p by this model / p by the one that it began as). Some held-out questions and its
answers (temperature 0.8, top-k 50, seed 0), not selected:

```
{sample.replace("```", "'''")}
```

Talk to it with `bardlet chat {run}`; in transformers it loads as the model does that it began as.

{_settings(config)}
"""
    (run / "README.md").write_text(card, encoding="utf-8")


def policy_card(run: Path, config: TrainConfig, record: dict[str, Any], sample: str) -> None:
    """README.md of the run folder of a model that learned from rewards."""
    r = record
    # answers of one word have no pairs
    pairs = f"| different pairs of words | {r['distinct_before']:.1%} | {r['distinct']:.1%} |\n" * bool(r["distinct"])
    card = f"""# {title(run, r)}

A {config.model} model with {r["parameters"]:,} parameters that learned by {config.stage.upper()}, by bardlet, to write
answers of greater reward (`{config.reward}`) to the questions of {r["text"]}. It began as `{config.init}`.

| | before | after |
| --- | --- | --- |
| mean reward of the answers to held-out questions | {r["reward_before"]:.4f} | {r["reward_after"]:.4f} |
| ... of answers drawn at temperature {config.temperature:g} | {r["sampled_before"]:.4f} | {r["sampled_after"]:.4f} |
| different answers among them | {r["different_before"]:.1%} | {r["different"]:.1%} |
{pairs}
| | |
| --- | --- |
| nats of an answer between it and the model that it began as (KL) | {r["kl"]:.2f} |
| answers that end by themselves | {r["ended"]:.1%} |
| tokens of an answer | {r["answer_length"]:.1f} |
| weights | {_selected(r)} |
| steps | {r["steps"]:,} in {r["seconds"]:.0f} s, of rollouts of {config.rollout} answers |
| questions | {r["documents"]:,} |
| machine | {r["machine"]["processor"]}, {r["machine"]["dtype"]}, torch {r["machine"]["torch"]} |

![rewards](loss.png)

Some held-out questions and answers, not selected:

```
{sample.replace("```", "'''")}
```

Talk to it with `bardlet chat {run}`; in transformers it loads as the model does that it began as.

{_settings(config)}
"""
    (run / "README.md").write_text(card, encoding="utf-8")


def reward_card(run: Path, config: TrainConfig, record: dict[str, Any], sample: str) -> None:
    """README.md of the run folder of a reward model."""
    rows = "\n".join(f"| ... where that is {what} | {record[name]:.1%} |" for name, what in
                     (("accuracy_longer", "the longer one"), ("accuracy_shorter", "the shorter one"))
                     if record.get(name) is not None)
    card = f"""# {title(run, record)}

A {config.model} reward model with {record["parameters"]:,} parameters, trained by bardlet on the preferences of
{record["text"]}: it says with one number how good an answer is. It began as `{config.init}`.

| | |
| --- | --- |
| held-out pairs in which the chosen answer has the greater reward | {record["accuracy"]:.1%} |
{rows}
| ... by how much, on average | {record["margin"]:.3f} |
| held-out pairs in which the chosen answer is the longer one | {record["longer"]:.1%} |
| correlation of margin and difference in length | {record["likes_length"]:.2f} |
| expected calibration error | {record["calibration_error"]:.3f} |
| loss of the held-out pairs | {loss_in_words(record)}; log 2 = 0.6931 where nothing is learned |
| weights | {_selected(record)} |
| steps | {record["steps"]:,} in {record["seconds"]:.0f} s of training |
| pairs | {record["documents"]:,} |
| machine | {record["machine"]["processor"]}, {record["machine"]["dtype"]}, torch {record["machine"]["torch"]} |

![loss](loss.png)

![margins](margins.png)

Some held-out questions with both answers, the chosen one first, and their rewards, not selected:

```
{sample.replace("```", "'''")}
```

The reward is read at the last token of a conversation. Load it anywhere:

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{run}")
tokenizer = AutoTokenizer.from_pretrained("{run}")
talk = [{{"role": "user", "content": "Who are you?"}}, {{"role": "assistant", "content": "A model."}}]
print(model(**tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)).logits)
```

{_settings(config)}
"""
    (run / "README.md").write_text(card, encoding="utf-8")


def translation_card(run: Path, config: TrainConfig, record: dict[str, Any], sample: str) -> None:
    """README.md of the run folder of a model that translates."""
    kind = "An encoder-decoder" if config.model == "encdec" else f"A decoder-only {config.model} model"
    auto = "Seq2SeqLM" if config.model == "encdec" else "CausalLM"
    use = """
made = model.generate(**tokenizer(["a line"], return_tensors="pt"), max_new_tokens=100)
print(tokenizer.batch_decode(made, skip_special_tokens=True))"""
    if config.prefix_lm:
        load = f"""Translate lines with `bardlet translate {run} < LINES`. It learned to see its source both ways, which
run.toml says and no config.json can: elsewhere the same weights would see it one way only, and translate badly."""
    else:
        load = f"""Translate lines with `bardlet translate {run} < LINES`, or load it anywhere:

```python
from transformers import AutoModelFor{auto}, AutoTokenizer

model = AutoModelFor{auto}.from_pretrained("{run}")
tokenizer = AutoTokenizer.from_pretrained("{run}"){use if config.model == "encdec" else ""}
```"""
    card = f"""# {title(run, record)}

{kind} with {record["parameters"]:,} parameters that translates, trained by bardlet on the pairs of {record["text"]}.

| | |
| --- | --- |
| BLEU, chrF of the held-out pairs, greedy | {record["bleu"]:.1f}, {record["chrf"]:.1f} |
| sacreBLEU's signature | `{record["bleu_signature"].replace("|", chr(92) + "|")}` |
| validation loss | {loss_in_words(record)} |
| weights | {_selected(record)} |
| steps | {record["steps"]:,} in {record["seconds"]:.0f} s of training |
| pairs | {record["documents"]:,} |
| machine | {record["machine"]["processor"]}, {record["machine"]["dtype"]}, torch {record["machine"]["torch"]} |

![loss](loss.png)

Some held-out sentences (greedy, not selected; in brackets the reference):

```
{sample.replace("```", "'''")}
```

{load}

{_settings(config)}
"""
    (run / "README.md").write_text(card, encoding="utf-8")


def _settings(config: TrainConfig) -> str:
    return f"""Settings that differ from bardlet's defaults (all of them are in run.toml):

```
{chr(10).join(f"{name} = {value}" for name, value in changed(config).items() if name != "replans")}
```"""


def loss_in_words(record: dict[str, Any]) -> str:
    """The validation loss with its units, and over how much of the validation text where it is not all of it."""
    if "reward_before" in record:
        return f"{record['val_loss']:.4f}, which is minus the mean reward of held-out answers"
    if "accuracy" in record:
        return f"{record['val_loss']:.4f} nats per pair"
    part = "" if record["val_tokens"] == record["val_tokens_of"] else (
        f", over {record['val_tokens']:,} of {record['val_tokens_of']:,} tokens")
    return f"{record['val_loss']:.4f} nats per token, {record['bits_per_byte']:.4f} bits per byte{part}"


def _how_to_use(run: Path, config: TrainConfig) -> str:
    if config.model not in ("gpt2", "qwen3"):  # no Hugging Face layout can hold it
        return f"Go on writing with `bardlet sample {run}`."
    return f"""Go on writing with `bardlet sample {run}`, or load it anywhere:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{run}")
tokenizer = AutoTokenizer.from_pretrained("{run}")
```"""


def _selected(record: dict[str, Any]) -> str:
    by, step = record["selected_by"], record["selected_step"]
    which = f"of step {step:,}" if not record.get("averaged") else "mean over the last fifth of the steps"
    if by == "best":
        return f"{which}, **selected by the validation loss above**, which is therefore a little optimistic"
    return f"of the last step, {step:,}" if by == "last" else f"{which}, a fixed rule"


