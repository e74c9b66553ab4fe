"""The stages of ChatGPT on sums: pretraining, supervised fine-tuning, a reward model, and PPO.

    python chatgpt.py                # needs no text: it writes its own
    python chatgpt.py wrong=0.1      # any of the settings below

On one of two CPU cores, both busy, it took 310 s. Right answers to sums that no stage saw, sampled:
    pretrained 0% (but after "12+34=" the likeliest are right in 98%), fine-tuned 62.2%, after PPO 78.0%
    likeliest answers: fine-tuned 89.4%, after PPO 92.4%; reward model: the right answer ahead in 98.0% of pairs
The course tells this in docs/stages/sft.md, reward.md and ppo.md.
"""

import copy
import random
import sys
import time

import torch
import torch.nn as nn
from torch.nn import functional as F

# ---- settings
n_embd = 64  # C, channels
n_head = 4  # H, heads of attention, each with D = C / H channels
n_layer = 3
batch_size = 128  # B, sequences in a batch
block_size = 16  # T, characters in a sequence of pretraining
lines = 60_000  # of the text
wrong = 0.3  # the share of wrong sums in it
pretrain_steps = 800
demonstrations = 100  # of questions and their answers
sft_steps = 120
comparisons = 4000  # questions with two answers each
reward_steps = 500
rollouts = 60
kl_weight = 0.02  # nats of reward for a nat away from the fine-tuned model
clip = 0.2  # PPO: how far the probability of a token may move in a rollout
seed = 1337
device = "cuda" if torch.cuda.is_available() else "cpu"

CHARS = "\n+=?.0123456789"
END = CHARS.index(".")
QUESTION, ANSWER = 6, 4  # characters of "12+34?", and of the longest answer, "198."


# ---------------------------------------------------------------- the data


def all_sums():
    """Return the sums for training, and the held-out ones: no stage sees a + b or b + a."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    held_out = [(a, b) for a, b in pairs if (min(a, b) * 31 + max(a, b) * 17) % 16 == 0]
    return sorted(set(pairs) - set(held_out)), held_out


def write_text(sums):
    """Return the lines of a text about sums: a third are exercises, the others have a result, often a wrong one."""
    text = []
    for _ in range(lines):
        a, b = random.choice(sums)
        mistake = random.choice((-10, -1, 1, 10)) if random.random() < wrong else 0
        text.append(random.choice((f"{a}+{b}?\n", *2 * [f"{a}+{b}={a + b + mistake}\n"])))
    return text


def encode(texts):
    return torch.tensor([[CHARS.index(c) for c in text] for text in texts], device=device)


def decode(row):
    return "".join(CHARS[i] for i in row.tolist())


def questions(sums, mark="?"):
    return encode([f"{a}+{b}{mark}" for a, b in sums])  # (B, 6)


# ---------------------------------------------------------------- the model


class Block(nn.Module):
    """The block of gpt.py; PyTorch computes the attention."""

    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd)
        self.net = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(out.transpose(1, 2).reshape(B, T, C))
        return x + self.net(self.ln2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token_embedding_table = nn.Embedding(len(CHARS), n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(Block() for _ in range(n_layer)))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, len(CHARS), bias=False)
        for table in (self.token_embedding_table, self.position_embedding_table, self.lm_head):
            nn.init.normal_(table.weight, std=0.02)

    def hidden(self, idx):
        position = torch.arange(idx.shape[1], device=idx.device)
        x = self.token_embedding_table(idx) + self.position_embedding_table(position)  # (B, T, C) + (T, C)
        return self.ln_f(self.blocks(x))

    def forward(self, idx):
        return self.lm_head(self.hidden(idx))  # (B, T) -> (B, T, V)


def small_net(n_in):
    """A net from n_in channels to one number."""
    return nn.Sequential(nn.Linear(n_in, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, 1)).to(device)


@torch.no_grad()
def generate(model, idx, length, greedy=False):
    for _ in range(length):
        logits = model(idx[:, -block_size:])[:, -1]  # (B, V)
        new = logits.argmax(-1, keepdim=True) if greedy else torch.multinomial(F.softmax(logits, dim=-1), 1)
        idx = torch.cat([idx, new], dim=1)
    return idx


# ---------------------------------------------------------------- answers: idx is (B, 10), a question and 4 characters


def answer_mask(idx):
    """Return True for the characters of the answer up to its end: (B, 4)."""
    end = (idx[:, QUESTION:] == END).int()
    return end.cumsum(1) - end == 0


def before_answer(model, idx):
    """Return the body's state before each character of the answer: (B, 4, C)."""
    return model.hidden(idx)[:, QUESTION - 1 : -1]


def answer_logp(model, idx):
    """Return log p of each character of the answer: (B, 4)."""
    logits = model.lm_head(before_answer(model, idx))  # (B, 4, V)
    return logits.log_softmax(-1).gather(2, idx[:, QUESTION:, None])[..., 0]


def right(idx, sums, end="."):
    """Return whether each answer is the sum, and nothing else: (B), boolean."""
    answers = [decode(row[QUESTION:]) for row in idx]
    return torch.tensor([a.split(end)[0] == str(x + y) and end in a for a, (x, y) in zip(answers, sums, strict=True)])


def report(name, model, sums, judge=None):
    """Print how the model answers held-out questions, and an example."""
    sampled, greedy = (generate(model, questions(sums), ANSWER, greedy) for greedy in (False, True))
    in_form = sum("." in (a := decode(row[QUESTION:])) and a.split(".")[0].isdecimal() for row in sampled) / len(sums)
    line = (f"{name}: {in_form:.1%} answer in form, {right(sampled, sums).float().mean():.1%} right "
            f"(always the likeliest character: {right(greedy, sums).float().mean():.1%})")
    if judge is not None:
        line += f", reward {judge(sampled).mean():.2f}"
    print(line, flush=True)


# ---------------------------------------------------------------- the stages


def optimize(parameters, lr):
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), fused=True)

    def step(loss, share=1.0):
        """Move against the gradient of the loss, at a share of the learning rate."""
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def pretrain(model, text):
    """Predict the next character of the text, in sequences that begin with a line."""
    data = encode(["".join(text)])[0]
    starts = torch.tensor([0, *map(len, text)]).cumsum(0)
    starts = starts[starts < len(data) - block_size]
    update = optimize(model.parameters(), lr=3e-3)
    for step in range(pretrain_steps):
        position = starts[torch.randint(len(starts), (batch_size, 1))] + torch.arange(block_size)  # (B, T)
        loss = F.cross_entropy(model(data[position]).flatten(0, 1), data[position + 1].flatten())
        update(loss, share=min(1, (step + 1) / 50, 3 * (1 - step / pretrain_steps)))  # rises, stays, falls
        if step % 200 == 0:
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)


def fine_tune(model, sums):
    """Predict the answers, and only the answers, of a few questions that somebody answered well."""
    shown = random.sample(sums, demonstrations)
    idx = encode([f"{a}+{b}?" + f"{a + b}.".ljust(ANSWER, ".") for a, b in shown])
    update = optimize(model.parameters(), lr=5e-4)
    for step in range(sft_steps):
        rows = idx[torch.randint(len(idx), (32,), device=device)]
        loss = -answer_logp(model, rows)[answer_mask(rows)].mean()
        update(loss, share=1 - step / sft_steps)


def compare(model, sums):
    """Return pairs of answers by the model, the better first: two (B, 10). A labeler who can add chose."""
    first, second = (generate(model, questions(sums), ANSWER) for _ in range(2))
    good, other = right(first, sums), right(second, sums)
    chosen = torch.cat([first[good & ~other], second[other & ~good]])
    return chosen, torch.cat([second[good & ~other], first[other & ~good]])


class RewardModel:
    """The body of the fine-tuned model, and a head that reads each character and what the body expected there.

    The score of an answer is the sum over its characters. Only the head learns, so the body runs once per answer.
    """

    def __init__(self, model):
        self.body, self.head, self.middle = copy.deepcopy(model), small_net(n_embd + len(CHARS)), 0

    @torch.no_grad()
    def features(self, idx):
        character = F.one_hot(idx[:, QUESTION:], len(CHARS)).float()  # (B, 4, V)
        return torch.cat([before_answer(self.body, idx), character], dim=-1)  # (B, 4, C + V)

    def score(self, features, mask):
        return (self.head(features)[..., 0] * mask).sum(1)  # (B, 4, C + V) -> (B, 4) -> (B)

    @torch.no_grad()
    def __call__(self, idx):
        """Return the probability that each answer beats a middling one: (B)."""
        return torch.sigmoid(self.score(self.features(idx), answer_mask(idx)) - self.middle)


def train_reward_model(judge, chosen, rejected):
    """Score the chosen answer above the rejected one: -log p(chosen beats rejected), by Bradley and Terry (1952)."""
    better, worse = ((judge.features(idx), answer_mask(idx)) for idx in (chosen, rejected))
    update = optimize(judge.head.parameters(), lr=3e-3)
    for step in range(reward_steps):
        rows = torch.randint(len(chosen), (batch_size,), device=device)
        first, second = (judge.score(features[rows], mask[rows]) for features, mask in (better, worse))
        update(-F.logsigmoid(first - second).mean(), share=1 - step / reward_steps)
    with torch.no_grad():  # comparisons leave the zero of the scores open
        judge.middle = sum(judge.score(features, mask).mean() for features, mask in (better, worse)) / 2


def advantages(reward, value, mask, lam=0.95):
    """How much better than expected each character was, by generalized advantage estimation: (B, 4)."""
    advantage, later, next_value = torch.zeros_like(value), torch.zeros_like(value[:, 0]), torch.zeros_like(value[:, 0])
    for t in reversed(range(ANSWER)):
        surprise = reward[:, t] + next_value - value[:, t]  # after the end, the value is 0
        later = (surprise + lam * later) * mask[:, t]
        next_value = value[:, t] * mask[:, t]
        advantage[:, t] = later
    return advantage


def ppo(policy, judge, sums, held_out):
    """Answer, let the reward model judge, make good answers likelier, and stay near the fine-tuned model."""
    reference, critic = copy.deepcopy(policy), small_net(n_embd)  # the critic predicts the reward from the states
    update, learn = optimize(policy.parameters(), lr=4e-4), optimize(critic.parameters(), lr=3e-3)
    for rollout in range(1, rollouts + 1):
        idx = generate(policy, questions(random.sample(sums, 256)), ANSWER)
        mask, score = answer_mask(idx), judge(idx)
        with torch.no_grad():
            old, state = answer_logp(policy, idx), before_answer(reference, idx)
            kl = (old - answer_logp(reference, idx)) * mask
            value = critic(state)[..., 0]  # (B, 4, C) -> (B, 4)
            reward = -kl_weight * kl  # each character has a price for leaving the reference,
            reward[torch.arange(len(idx)), mask.sum(1) - 1] += score  # the last one gets the judgment
            advantage = advantages(reward, value, mask)
            target = value + advantage
            advantage = (advantage - advantage[mask].mean()) / (advantage[mask].std() + 1e-6)
        for _ in range(4):  # epochs over the rollout, in two batches
            for rows in torch.randperm(len(idx), device=device).split(128):
                m = mask[rows]
                ratio = (answer_logp(policy, idx[rows]) - old[rows])[m].exp()
                gain = advantage[rows][m]
                loss = -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain).mean()
                update(loss, share=1 - (rollout - 1) / rollouts)
                learn((critic(state[rows])[..., 0] - target[rows])[m].square().mean())
        if rollout % 10 == 0:
            report(f"  rollout {rollout}, KL {kl.sum(1).mean():.2f}", policy, held_out, judge)


def configure(arguments):
    """Replace the settings at the top by name=value."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        try:
            globals()[name] = {int: int, float: float, str: str}[type(globals()[name])](value)
        except (KeyError, ValueError):
            sys.exit(f"{argument}: not a setting and its value; usage and settings are at the top of this file")


def main():
    torch.manual_seed(seed)
    random.seed(seed)
    started = time.time()
    sums, held_out = all_sums()
    text = write_text(sums)
    model = GPT().to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}; {len(sums):,} sums, "
          f"{len(held_out)} held out")

    print("1. pretraining", flush=True)
    report("  before", model, held_out)
    pretrain(model, text)
    known = right(generate(model, questions(held_out, "="), ANSWER, greedy=True), held_out, end="\n")
    print(f'  it knows sums: after "12+34=" the likeliest characters are right in {known.float().mean():.1%}')
    report("  after", model, held_out)
    print(f"  {time.time() - started:.0f} s")

    print("2. supervised fine-tuning", flush=True)
    fine_tune(model, sums)
    report("  after", model, held_out)
    print(f"  {time.time() - started:.0f} s")

    print("3. the reward model", flush=True)
    judge = RewardModel(model)
    pairs, held_out_pairs = compare(model, random.sample(sums, comparisons)), compare(model, held_out)
    if not len(pairs[0]):
        sys.exit("the fine-tuned model is never right, so there is nothing to compare; use more pretrain_steps")
    train_reward_model(judge, *pairs)
    first = (judge(held_out_pairs[0]) > judge(held_out_pairs[1])).float().mean()
    print(f"  {len(pairs[0])} pairs; the right answer scores higher in {first:.1%} of {len(held_out_pairs[0])} others")
    print(f"  {time.time() - started:.0f} s")

    print("4. PPO", flush=True)
    report("  before", model, held_out, judge)
    ppo(model, judge, sums, held_out)
    report("  after", model, held_out, judge)
    print(f"  {time.time() - started:.0f} s")


if __name__ == "__main__":
    configure(sys.argv[1:])
    main()
