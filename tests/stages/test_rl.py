"""PPO and GRPO: what their steps are made of, that they learn, that they go on bit for bit; what people get wrong."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import Clock
from conftest import assert_same_run
from processes import power_cut

from bardlet import models
from bardlet.cli import main
from bardlet.config.finetuning import GRPOConfig, PPOConfig, RolloutConfig
from bardlet.config.model import ModelConfig
from bardlet.errors import BardletError
from bardlet.models.reward import ActorCritic
from bardlet.ops.cross_entropy import token_losses
from bardlet.run import folder as run_folder
from bardlet.run import hf, metrics
from bardlet.runtime.distributed import Dist
from bardlet.stages import ppo, rl, stage_of
from bardlet.stages.grpo import GRPO
from bardlet.stages.ppo import PPO
from bardlet.training import logprobs, losses
from bardlet.training.state import Trainer
from bardlet.training.trainer import train_step

HERE = Dist(0, 1, torch.device("cpu"))
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "32", "--dtype", "fp32", "--compile",
        "off"]  # fmt: skip
FINE = ["--dtype", "fp32", "--log-every", "1", "--reward", "exact", "--answer-tokens", "6", "--rollout", "16",
        "--batch-size", "8", "--warmup-steps", "2", "--eval-every", "0"]  # fmt: skip
KINDS = ("ppo", "grpo")
CONFIGS = {"ppo": PPOConfig, "grpo": GRPOConfig}
PPO_HERE = PPO(PPOConfig(dtype="fp32"), HERE)
SHAPE = ModelConfig("qwen3", vocab_size=30, block_size=16, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, head_dim=8,
                    n_inner=32, activation="silu")  # fmt: skip


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose answer is one of two words."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} odd?", "answer": "yes" if n % 2 else "no"}) + "\n"
                            for n in range(200)), encoding="utf-8")  # fmt: skip
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It answers yes or no, by chance."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "text.txt").write_text("".join(f"{n} odd? {'yes' if n * n % 7 % 2 else 'no'}\n" for n in range(300)))
    (folder / "guesses.jsonl").write_text("".join(
        json.dumps({"prompt": f"{n} odd?", "answer": "yes" if n * n % 7 % 2 else "no"}) + "\n" for n in range(300)))
    assert main(["train", str(folder / "text.txt"), *TINY, "--tokenizer", "bpe", "--vocab-size", "300", "--steps", "20",
                 "--out", str(folder / "base"), "--debug"]) == 0  # fmt: skip
    assert main(["sft", str(folder / "base"), str(folder / "guesses.jsonl"), "--dtype", "fp32", "--compile", "off",
                 "--steps", "150", "--lr", "5e-3", "--muon-lr", "2e-2", "--no-pack", "--batch-size", "16", "--out",
                 str(folder / "run"), "--debug"]) == 0  # fmt: skip
    return folder / "run"


def config_of(kind: str, model: Path, chats: Path, **changes: Any) -> RolloutConfig:
    settings: dict[str, Any] = {"init": str(model), "text": (str(chats),), "block_size": 32,
                                "reward": "exact", "dtype": "fp32", "rollout": 16, "batch_size": 4, "answer_tokens": 6,
                                "passes": 2, "steps": 8, "beta": 0.1} | changes
    return CONFIGS[kind](**settings)


def begun(config: RolloutConfig, model: Path) -> Trainer:
    """A run before its first step."""
    return stage_of(config)(config, HERE).begin(str(model.parent / "never"), 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_has_each_answer_once(kind: str, model: Path, chats: Path) -> None:
    trainer = begun(config_of(kind, model, chats), model)
    assert trainer.objective.period == 8 and trainer.objective.all_logits
    batches = [trainer.objective.batch(step) for step in range(8)]
    rows = trainer.objective.stage_state.rows  # type: ignore[union-attr]
    for a_pass in (batches[:4], batches[4:]):
        seen = torch.cat([batch["idx"] for batch in a_pass])
        assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, rows["idx"].tolist()))
    again = [trainer.objective.batch(step) for step in range(8)]
    assert all(torch.equal(one[name], other[name]) for one, other in zip(batches, again, strict=True) for name in one)
    if kind == "grpo":  # the answers to one question stand together, and their advantages have mean 0
        assert rows["advantage"].view(-1, 8).mean(1).abs().max() < 1e-5
        n = int((rows["target"][0] != losses.IGNORE).nonzero()[0]) + 1  # tokens of the question
        assert (rows["idx"][:8, :n] == rows["idx"][0, :n]).all()


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_first_update_nothing_has_moved(kind: str, temperature: float, model: Path, chats: Path) -> None:
    """log p now is log p then: the ratio is 1, and the gradient the plain policy gradient, at any temperature."""
    config = config_of(kind, model, chats, beta=0.0, temperature=temperature)
    trainer = begun(config, model)
    batch = trainer.objective.batch(0)
    mask = batch["target"] != losses.IGNORE
    trainer.model.train()
    policy = trainer.model.policy if kind == "ppo" else trainer.model
    logp = -token_losses(policy(batch["idx"])[mask], batch["target"], temperature)
    if kind == "ppo":  # the policy inside of the actor says the same
        inside = trainer.model(batch["idx"], batch["target"], temperature=temperature)[0]
        torch.testing.assert_close(-inside, logp)
    torch.testing.assert_close(logp, batch["old"], rtol=1e-5, atol=1e-5)
    assert abs(trainer.objective.metadata()["kl"]) < 1e-4
    trainer.objective.loss(trainer.model, batch).backward()
    found = [p.grad.clone() for p in policy.parameters()]
    trainer.model.zero_grad()
    logp = -token_losses(policy(batch["idx"])[mask], batch["target"], temperature)
    (-(batch["advantage"].expand_as(logp) * logp)[mask].sum()).backward()
    for one, p in zip(found, policy.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-4, atol=1e-5)


def test_who_learns_once_from_a_rollout_need_not_be_told_what_it_thought(model: Path, chats: Path) -> None:
    trainer = begun(config_of("grpo", model, chats, beta=0.0, passes=1, batch_size=16), model)
    batch = trainer.objective.batch(0)
    assert "old" not in batch and "reference" not in batch
    trainer.objective.loss(trainer.model, batch).backward()
    found = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    told = batch | {"old": logprobs.log_probability(trainer.model, batch["idx"], batch["target"]).detach()}
    trainer.objective.loss(trainer.model, told).backward()
    torch.testing.assert_close([p.grad for p in trainer.model.parameters()], found)


def test_a_reward_comes_with_the_last_token_and_the_way_from_the_reference_costs() -> None:
    """By hand, with a critic that expects nothing: what an answer's token is worth is what comes from there on."""
    torch.manual_seed(0)
    actor = PPO_HERE.build_policy(models.build(SHAPE))
    target = torch.full((2, 5), losses.IGNORE)
    target[0, 1:4], target[1, 2:3] = 7, 8
    old, reference = -torch.rand(2, 5), -torch.rand(2, 5)
    old, reference = (torch.where(target != losses.IGNORE, x, 0.0) for x in (old, reference))
    batch = {"idx": torch.randint(30, (2, 5)), "target": target, "old": old, "reference": reference}
    made = PPO_HERE.compute_advantages(actor, batch, torch.tensor([2.0, -1.0]), 0.5)
    assert not made["value"].any()
    earned = -0.5 * (old - reference)
    earned[0, 3] += 2
    earned[1, 2] -= 1
    for a, places in ((0, (1, 2, 3)), (1, (2,))):
        for t in places:  # with a value of 0 everywhere an advantage is the sum of what comes, 0.95 for each token
            by_hand = sum(0.95 ** (u - t) * earned[a, u] for u in places if u >= t)
            assert made["return"][a, t].item() == pytest.approx(float(by_hand), abs=1e-6)
    mask = target != losses.IGNORE
    assert made["advantage"][mask].mean().abs() < 1e-6 and not made["advantage"][~mask].any()


def test_the_distance_is_in_nats_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = torch.tensor([[-1.0, -1, 0], [-1, 0, 0]]), torch.tensor([[-2.0, -3, 0], [-1.5, 0, 0]])
    monkeypatch.setattr(rl.rollout, "log_probability", lambda model, *_: model)
    nothing: Any = None
    assert rl.Actor(one, other, nothing, nothing, nothing, HERE, {}).kl(nothing) == 1.75


def test_beta_follows_its_target() -> None:
    assert ppo.adapt_kl_coef(0.1, 5.0, None) == 0.1
    assert ppo.adapt_kl_coef(0.1, 6.0, 6.0) == pytest.approx(0.1)
    assert ppo.adapt_kl_coef(0.1, 60.0, 6.0) == pytest.approx(0.104) and ppo.adapt_kl_coef(0.1, 0.0, 6.0) == pytest.approx(0.096)
    beta, kl = 0.05, 0.0
    for _ in range(100):  # a policy that goes a fifth of the way to where its reward and beta are in balance
        kl += 0.2 * (1.5 / beta - kl)
        beta = ppo.adapt_kl_coef(beta, kl, 6.0)
    assert kl == pytest.approx(6.0, rel=0.1)


def test_the_critic_is_no_part_of_what_the_run_makes() -> None:
    torch.manual_seed(0)
    policy = models.build(SHAPE)
    both = PPO_HERE.build_policy(policy)
    assert both.hf_state_dict().keys() == policy.hf_state_dict().keys() and both.config is policy.config
    other = ActorCritic(models.build(SHAPE), PPO_HERE.build_policy(policy).critic)
    for p in both.critic.parameters():
        torch.nn.init.normal_(p)
    other.load_extra_tensors(both.extra_tensors())
    idx = torch.randint(30, (2, 9))
    assert torch.equal(other.critic.values(idx), both.critic.values(idx))


LEARN = {"ppo": ["--rollout", "64", "--batch-size", "32", "--passes", "2", "--lr", "1e-3", "--steps", "96"],
         "grpo": ["--rollout", "64", "--batch-size", "32", "--lr", "1e-3", "--steps", "60"]}
"""With these, 21 seeds each on a processor with AVX-512 and on one held to AVX2 ended with 0.9 or more of the
answers to 20 held-out questions right; 0.45 or fewer were right before."""


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_is_rewarded(kind: str, model: Path, chats: Path, bardlet: Callable[..., dict[str, Any]],
                                    tmp_path: Path) -> None:  # fmt: skip
    (tmp_path / "yes.jsonl").write_text("".join(json.dumps({"prompt": f"{n} odd?", "answer": "yes"}) + "\n"
                                                for n in range(200)))  # fmt: skip
    done = bardlet(kind, model, tmp_path / "yes.jsonl", *FINE, *LEARN[kind], "--out", tmp_path / "run")
    assert done["sampled_before"] < 0.6 and done["sampled_after"] > 0.75 and done["kl"] > 0
    lines = metrics.read_metrics(tmp_path / "run")
    assert {"reward", "kl", "ended", "different", "answer_tokens"} <= lines[0].keys()
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert kind.upper() in card and "odd?" in card
    assert main(["doctor", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_a_chat_model_of_transformers(kind: str, model: Path, chats: Path, tmp_path: Path,
                                                    bardlet: Callable[..., dict[str, Any]]) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bardlet(kind, model, chats, *FINE, "--steps", 2, "--out", tmp_path / "run")
    theirs, told = AutoModelForCausalLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    ids = AutoTokenizer.from_pretrained(tmp_path / "run").apply_chat_template(
        [{"role": "user", "content": "3 odd?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    torch.testing.assert_close(theirs(**ids).logits, hf.read_folder(tmp_path / "run")[0](ids["input_ids"]), rtol=1e-5,
                               atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("settings", [["grpo", "--dropout", "0.1"], ["ppo", "--target-kl", "1", "--keep", "average"],
                                      ["grpo", "--passes", "2", "--grad-accum", "2", "--beta", "0.1"]])
def test_a_run_goes_on_bit_for_bit(settings: list[str], model: Path, chats: Path, tmp_path: Path,
                                   bardlet: Callable[..., dict[str, Any]]) -> None:  # fmt: skip
    """Its process ends in a rollout that is half learned; the checkpoint of step 5 knows the answers of that one."""
    base = tmp_path / "base"
    shutil.copytree(model, base)
    words = [settings[0], base, chats, *FINE, *settings[1:], "--steps", "12", "--save-every", "5"]
    bardlet(*words, "--out", tmp_path / "whole")
    power_cut([*words, "--out", tmp_path / "again"])
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    (base / "manifest.json").unlink()
    assert main(["resume", str(tmp_path / "again")]) == 1  # the reference is another one
    (base / "model.safetensors").write_bytes(weights)
    assert bardlet("resume", tmp_path / "again")["resumed_from"] == 5
    assert_same_run(tmp_path / "whole", tmp_path / "again", 12)
    rewards, again = ([(line["step"], line["reward"], line["kl"]) for line in metrics.read_metrics(tmp_path / name)
                       if "reward" in line] for name in ("whole", "again"))  # fmt: skip
    assert rewards == again and len(rewards) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_nothing(kind: str, model: Path, chats: Path) -> None:
    """The same answers, loss, norm of the gradient and gradient, in one piece and in several."""
    found = []
    for size, pieces in ((8, 1), (4, 2), (2, 4)):
        config = config_of(kind, model, chats, batch_size=size, grad_accum=pieces, optimizer="adamw")
        trainer = begun(config, model)
        by_gradient = [torch.optim.SGD(trainer.model.parameters(), 1.0)]  # what it adds to the weights is the gradient
        done = train_step(trainer.model, by_gradient, trainer.objective.batch(0), trainer.objective, trainer.config, HERE, "fp32")
        found.append((done, [p.detach().clone() for p in trainer.model.parameters()]))
    for loss_and_norm, weights in found[1:]:
        assert loss_and_norm == pytest.approx(found[0][0], rel=1e-4, abs=1e-6)
        for one, other in zip(weights, found[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_judge_counts_in_deviations_of_the_reference(model: Path, chats: Path, tmp_path: Path) -> None:
    """Rewards of another scale and zero are learned from in the same way; reports have them as they are."""
    told = []
    for slope, zero in ((1, 0), (100, -7)):
        judge = tmp_path / f"judge{slope}.py"
        judge.write_text("import sys, json\nfor line in sys.stdin: print("
                         f"{slope} * len(json.loads(line)['answer']) + {zero})\n")  # fmt: skip
        config = config_of("ppo", model, chats, reward=f"{sys.executable} {judge}")
        trainer = begun(config, model)
        told.append((trainer.objective.batch(0), trainer.objective.metadata(), trainer.record))
    for name, x in told[0][0].items():
        torch.testing.assert_close(x, told[1][0][name], rtol=1e-4, atol=1e-4)
    assert told[1][1]["reward"] == pytest.approx(100 * told[0][1]["reward"] - 7, rel=1e-5)
    assert told[1][2].reward_before == pytest.approx(100 * told[0][2].reward_before - 7, abs=0.01)


def test_what_does_not_end_costs_a_deviation(model: Path, chats: Path, tmp_path: Path) -> None:
    from bardlet.stages import rollout

    main(["reward", str(model), str(_preferences(tmp_path)), "--dtype", "fp32", "--steps", "2", "--out",
          str(tmp_path / "judge")])  # fmt: skip
    config = config_of("ppo", model, chats, reward=str(tmp_path / "judge"), answer_tokens=2, temperature=3.0)
    trainer = begun(config, model)
    rollouts = trainer.objective.stage_state
    assert isinstance(rollouts, rl.Rollouts)
    player = rollouts.actor
    made, worth = player.evaluate_policy(rollouts.learned, 3.0)
    ended = [answer.ended for answer in made.answers]
    assert 0 < sum(ended) < len(ended)
    deviations = (worth - trainer.record.reward_mean) / trainer.record.reward_deviation
    cost = deviations - player.normalize_rewards(made, worth)
    assert cost == pytest.approx([0.0 if by_itself else 1.0 for by_itself in ended], abs=1e-5)
    assert abs(deviations.mean()) < 0.5 and 0.5 < deviations.std() < 2
    assert isinstance(made, rollout.Rollout)


def test_a_run_with_a_judge_goes_on_bit_for_bit_and_by_the_same_judge(
        model: Path, chats: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]],
        capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        bardlet("reward", model, _preferences(tmp_path), "--dtype", "fp32", "--steps", 3 + number, "--compile", "off",
                "--out", tmp_path / f"judge{number}")  # fmt: skip
    judge = tmp_path / "judge0"
    words = ["ppo", model, chats, *FINE, "--reward", judge, "--steps", "12", "--save-every", "5"]
    bardlet(*words, "--out", tmp_path / "whole")
    power_cut([*words, "--out", tmp_path / "again"])
    judge.rename(tmp_path / "kept")
    (tmp_path / "judge1").rename(judge)
    assert main(["resume", str(tmp_path / "again")]) == 1
    assert "is not the reward model any more" in capsys.readouterr().err
    judge.rename(tmp_path / "judge1")
    (tmp_path / "kept").rename(judge)
    assert bardlet("resume", tmp_path / "again")["resumed_from"] == 5
    assert_same_run(tmp_path / "whole", tmp_path / "again", 12)


def _preferences(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} odd?", "chosen": "yes", "rejected": "no"}) + "\n"
                            for n in range(60)), encoding="utf-8")  # fmt: skip
    return path


def test_a_run_of_some_seconds_ends_within_them(model: Path, chats: Path, tmp_path: Path, clock: Clock,
                                                bardlet: Callable[..., dict[str, Any]]) -> None:  # fmt: skip
    begun = clock.now
    done = bardlet("grpo", model, chats, *FINE, "--minutes", "0.02", "--out", tmp_path / "run")
    assert done["steps"] > 20 and run_folder.settings(tmp_path / "run")[0].replans
    assert 0.8 * 1.2 < clock.now - begun <= 1.2, "seconds"


def test_answers_that_are_all_worth_the_same_are_told(model: Path, chats: Path, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (tmp_path / "never.jsonl").write_text("".join(json.dumps({"prompt": f"{n} odd?", "answer": "perhaps"}) + "\n"
                                                  for n in range(60)))  # fmt: skip
    assert main(["grpo", str(model), str(tmp_path / "never.jsonl"), *FINE, "--steps", "1", "--plan"]) == 0
    assert "are worth the same, 0" in capsys.readouterr().err
    judge = tmp_path / "judge.py"
    judge.write_text("import sys\nfor line in sys.stdin: print(0.1)\n")  # no float32 is 0.1, and no mean of them is
    words = [*FINE, "--steps", "1", "--plan", "--reward", f"{sys.executable} {judge}"]
    assert main(["ppo", str(model), str(chats), *words]) == 0
    assert "are worth the same, 0.1" in capsys.readouterr().err


def test_a_program_is_not_run_because_a_file_names_it(model: Path, chats: Path, tmp_path: Path,
                                                      bardlet: Callable[..., dict[str, Any]],
                                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    judge = tmp_path / "judge.py"
    judge.write_text("import sys\nfor line in sys.stdin: print(1)\n")
    words = ["grpo", str(model), str(chats), *FINE, "--steps", "2", "--reward", f"{sys.executable} {judge}"]
    bardlet(*words, "--out", tmp_path / "run")
    assert main(["grpo", "--config", str(tmp_path / "run" / "run.toml"), "--out", str(tmp_path / "two")]) == 1
    assert "`bardlet grpo --config ... --reward ...`" in capsys.readouterr().err
    power_cut([*words, "--steps", "4", "--save-every", "1", "--out", tmp_path / "cut"], step=3)
    assert main(["resume", str(tmp_path / "cut")]) == 1
    assert "--reward" in capsys.readouterr().err
    assert bardlet("resume", tmp_path / "cut", "--reward", f"{sys.executable} {judge}")["steps"] == 4


def test_what_people_get_wrong_is_one_line(model: Path, chats: Path, capsys: pytest.CaptureFixture[str],
                                           tmp_path: Path) -> None:  # fmt: skip
    silent = tmp_path / "silent.jsonl"
    silent.write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(30)))
    exact = ["--reward", "exact"]
    for kind, words, what in (
        ("grpo", [], "name the model"), ("ppo", [str(model), *exact], "nothing to learn from"),
        ("grpo", [str(model), str(chats)], "say what an answer is worth"),
        ("ppo", [str(model), str(silent), *exact, "--answer-tokens", "6"], "30 of 30 questions have no answer"),
        ("ppo", [str(model), str(chats), *exact, "--answer-tokens", "30"], "no question leaves room"),
        ("ppo", [str(model), str(chats), *exact, "--rollout", "33"], "take --rollout 64"),
        ("grpo", [str(model), str(chats), *exact, "--group", "1"], "at least 2"),
        ("grpo", [str(model), str(chats), *exact, "--batch-size", "6", "--rollout", "6"], "no multiple of --group 8"),
        ("grpo", [str(model), str(chats), *exact, "--target-kl", "6"], "--target-kl"),
        ("ppo", [str(model), str(chats), *exact, "--target-kl", "6", "--beta", "0"], "a beta of 0 cannot follow"),
        ("ppo", [str(model), str(chats), *exact, "--eval-tokens", "9"], "--eval-tokens"),
        ("ppo", [str(model), str(chats), "--reward", "python 'x", "--answer-tokens", "6"], "no closing quotation"),
        ("ppo", [str(model), str(chats), "--reward", str(model), "--answer-tokens", "6"], "is no reward model"),
        ("sft", [str(model), str(chats), *exact], "--reward"),
    ):
        assert main([kind, *words, "--out", str(tmp_path / "never")]) != 0
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("bardlet: ") and what in said, said
        assert not (tmp_path / "never").exists()
    with pytest.raises(BardletError, match="at least 2"):
        replace(config_of("grpo", model, chats), group=1)
    assert GRPO(GRPOConfig(), HERE).build_policy(model) is model
