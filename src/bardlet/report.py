"""What a run says about itself: the loss curve, the model card, and lines for TensorBoard or Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bardlet import checkpoint, files
from bardlet.config import TrainConfig
from bardlet.errors import BardletError
from bardlet.toml import changed


def loss_curve(run: Path, title: str, what: str = "loss (nats per token)") -> None:
    """Draw loss.png from metrics.jsonl: training and validation loss over steps; what: the loss is called."""
    import matplotlib

    matplotlib.use("Agg")  # a file, not a window: the machine may have no screen
    import matplotlib.pyplot as plt

    lines = checkpoint.read_metrics(run)
    train = [(line["step"], line["train_loss"]) for line in lines if line.get("train_loss") is not None]
    val = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=110, layout="constrained")
    if train:
        axes.plot(*zip(*train, strict=True), color="#9db4c8", linewidth=1, label="training")
    if val:
        axes.plot(*zip(*val, strict=True), color="#c0392b", linewidth=2, marker="o", markersize=3, label="validation")
        step, low = min(val, key=lambda point: point[1])
        axes.annotate(f"{low:.4f}", (step, low), xytext=(0, 8), textcoords="offset points", ha="center")
    axes.set(xlabel="step", ylabel=what, title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if train or val:
        axes.legend(frameon=False)
    figure.savefig(run / "loss.png")
    plt.close(figure)


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


def margins(run: Path, title: str, margins: Any, sure: Any, right: Any, number: Any) -> None:
    """Draw margins.png: by how much more the chosen answers of held-out pairs got, and how far a reward model's
    certainty is to be trusted.

    Args:
        margins: (N,), one for each pair.
        sure, right, number: (K,): how sure it was, how often it was right, and of how many pairs, of each bin.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, axes) = plt.subplots(1, 2, figsize=(9, 4), dpi=110, layout="constrained")
    left.hist(margins, bins=40, color="#9db4c8")
    left.axvline(0, color="#c0392b", linewidth=1)
    left.set(xlabel="reward of the chosen answer - of the rejected one", ylabel="held-out pairs", title=title)
    axes.plot((0.5, 1), (0.5, 1), color="#999999", linewidth=1, linestyle="--", label="as sure as it should be")
    axes.scatter(sure, right, s=[10 + 200 * n / max(number) for n in number], color="#c0392b", alpha=0.7)
    axes.set(xlabel="how sure it is (area: how many pairs)", ylabel="how often it is right", xlim=(0.48, 1.02))
    axes.legend(frameon=False)
    for one in (left, axes):
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(run / "margins.png")
    plt.close(figure)


def reward_curve(run: Path, title: str) -> None:
    """Draw loss.png of a run that learned from rewards: the mean reward, and how far it went from where it began."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = checkpoint.read_metrics(run)
    train = [(line["step"], line["reward"], line["kl"]) for line in lines if "reward" in line]
    val = [(line["step"], -line["val_loss"]) for line in lines if "val_loss" in line]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=110, layout="constrained")
    if train:
        steps, reward, kl = zip(*train, strict=True)
        left.plot(steps, reward, color="#9db4c8", linewidth=1, label="rollouts")
        right.plot(steps, kl, color="#9db4c8", linewidth=1)
    if val:
        left.plot(*zip(*val, strict=True), color="#c0392b", linewidth=2, marker="o", markersize=3, label="held out")
    left.set(xlabel="step", ylabel="mean reward", title=title)
    right.set(xlabel="step", ylabel="KL to the reference (nats of an answer)")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(run / "loss.png")
    plt.close(figure)


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


def trackers(config: TrainConfig, run: Path) -> list[Callable[[int, dict[str, float]], None]]:
    """What TensorBoard and Weights & Biases are told of a step: functions of (step, values), for those asked for."""
    tell: list[Callable[[int, dict[str, float]], None]] = []
    if config.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BardletError("--tensorboard: not installed; `pip install 'bardlet[tensorboard]'`") from None
        writer = SummaryWriter(str(run / "tensorboard"))

        def to_tensorboard(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        tell.append(to_tensorboard)
    if config.wandb:
        try:
            import wandb
        except ImportError:
            raise BardletError("--wandb: not installed; `pip install 'bardlet[wandb]'`") from None
        wandb.init(project=config.wandb, name=run.name, dir=str(run))
        tell.append(lambda step, values: wandb.log(values, step=step))
    return tell


DOTS, MOST_PIXELS = 110, 100_000_000
"""Dots per inch of the pictures of attention, and pixels of the largest: each takes four bytes while it is drawn."""


def attention_maps(path: Path, maps: Any, source: list[str], target: list[str]) -> None:
    """Draw cross-attention as a PNG: a panel for each layer and head, a row for each target token.

    Args:
        maps: (L, H, T, S), each row with the sum 1.
        source, target: the S and T tokens as text.

    Raises BardletError where the picture would be too large to be drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers, heads, T, S = maps.shape
    size = (heads * (0.6 + 0.16 * S) + 1, layers * (0.7 + 0.16 * T) + 1)
    width, height = (DOTS * inches for inches in size)
    if max(width, height) >= 2**16 or width * height > MOST_PIXELS:
        raise BardletError(f"--attention {path}: {S} source and {T} target tokens in {layers} layers of {heads} heads "
                           f"make a picture of {width:,.0f} by {height:,.0f} pixels; give a shorter first line")
    figure, grid = plt.subplots(layers, heads, figsize=size, dpi=DOTS, layout="constrained", squeeze=False)
    for layer in range(layers):
        for head in range(heads):
            axes = grid[layer][head]
            axes.imshow(maps[layer, head], cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
            axes.set_xticks(range(S), [shown_token(t) for t in source], rotation=90, fontsize=6)
            axes.set_yticks(range(T), [shown_token(t) for t in target] if head == 0 else [""] * T, fontsize=6)
    figure.supxlabel("source token that is looked at", fontsize=9)
    figure.supylabel("target token that is being written", fontsize=9)
    with files.writing(path):
        figure.savefig(path)
    plt.close(figure)


def shown_token(text: str) -> str:
    """A token as a label: its spaces seen, and no sign that matplotlib takes for mathematics."""
    return (text.strip("\n").replace(" ", "\u00b7").replace("$", r"\$") or "\u00b7")[:16]
