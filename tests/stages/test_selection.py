"""The weights of a fine-tuned model: by default, the held-out data of the quoted figures do not choose them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import power_cut

from bardlet.cli import main
from bardlet.config import toml
from bardlet.config.finetuning import DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from bardlet.config.kto import KTOConfig
from bardlet.config.pretraining import TrainConfig, TranslationConfig
from bardlet.run import folder as run_folder

FINE = ["--batch-size", "4", "--compile", "off", "--dtype", "fp32", "--threads", "1", "--warmup-steps", "1"]
STAGES = ("sft", "reward", "dpo", "kto")
NOTICE = "the held-out data chose these weights (--keep best), so the held-out figures are optimistic; --keep last"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small base model and records of every stage, STAGE.jsonl."""
    folder = tmp_path_factory.mktemp("selection")
    words = ("yes", "no")
    (folder / "base.txt").write_text("".join(f"say {n} {word}.\n" for n in range(200) for word in words), "utf-8")
    records: dict[str, list[dict[str, Any]]] = {stage: [] for stage in STAGES}
    for n in range(40):
        question = {"role": "user", "content": f"say {n}"}
        records["sft"].append({"messages": [question, {"role": "assistant", "content": f"{n} yes"}]})
        for stage in ("reward", "dpo"):
            records[stage].append({"prompt": f"say {n}", "chosen": f"{n} yes", "rejected": f"{n} no"})
        records["kto"] += [{"prompt": f"say {n}", "completion": f"{n} {w}", "label": w == "yes"} for w in words]
    for stage, rows in records.items():
        (folder / f"{stage}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert main(["train", str(folder / "base.txt"), "--tokenizer", "bpe", "--vocab-size", "280", "--n-layer", "1",
                 "--n-head", "2", "--n-embd", "32", "--block-size", "32", "--steps", "10", *FINE, "--out",
                 str(folder / "base")]) == 0  # fmt: skip
    return folder


def test_defaults() -> None:
    for config in (SFTConfig, RewardConfig, DPOConfig, KTOConfig, PPOConfig, GRPOConfig):
        assert config.keep == "last", config
    for config in (TrainConfig, TranslationConfig):
        assert config.keep == "best", config


@pytest.mark.parametrize("stage", STAGES)
def test_only_a_run_with_keep_best_says_that_the_held_out_data_chose(
    stage: str, folder: Path, bardlet: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [stage, folder / "base", folder / f"{stage}.jsonl", *FINE, "--steps", "2", "--eval-every", "1"]
    for keep, words in (("last", []), ("best", ["--keep", "best"])):
        capsys.readouterr()
        out = folder / f"{stage}-{keep}"
        assert main([str(word) for word in (*command, *words, "--out", out)]) == 0
        said, card = capsys.readouterr(), (out / "README.md").read_text(encoding="utf-8")
        record = run_folder.settings(out)[1]
        assert record["selected_by"] == keep
        assert (NOTICE in said.out + said.err) == (keep == "best")
        assert ("therefore slightly optimistic" in card) == (keep == "best")
        assert ("of the last step, 2" in card) == (keep == "last")
        assert ("as is the accuracy on the same data" in card) == (keep == "best" and stage != "sft")


@pytest.mark.parametrize("stage", STAGES)
def test_settings_of_an_older_version_keep_their_own_default(stage: str, tmp_path: Path) -> None:
    """Its run.toml names every setting, also keep = "best", which was the default."""
    old = tmp_path / "run.toml"
    lines = (f'stage = "{stage}"', 'text = ["a.jsonl"]', 'init = "base"', 'keep = "best"', "[record]", "steps = 9")
    old.write_text("\n".join(lines), encoding="utf-8")
    assert toml.read_toml(old)[0].keep == "best"


def test_a_run_of_an_older_version_resumes_with_its_own_default(
    folder: Path, bardlet: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    power_cut(["dpo", folder / "base", folder / "dpo.jsonl", *FINE, "--steps", "8", "--eval-every", "3",
               "--save-every", "5", "--keep", "best", "--out", tmp_path / "run"])  # fmt: skip
    assert 'keep = "best"' in (tmp_path / "run" / "run.toml").read_text(encoding="utf-8")
    assert bardlet("resume", tmp_path / "run")["selected_by"] == "best"
