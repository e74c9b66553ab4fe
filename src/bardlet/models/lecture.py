"""The lecture, rung by rung: from a table of pairs to a GPT, and on to what GPTs have become.

*Let's build GPT: from scratch, in code, spelled out* grows a Transformer by one idea at a time. Each idea is a rung
here: a model that can be trained, written out in full, so that what differs from the one before is its idea, with what
must go with it (in rungs 6, 8 and 9 that is more than a line). Rungs 1 to 8 are the lecture's, 9 to 11 lead on to
`qwen3.py`; rungs 12 and 13 are rung 11 trained in another way (`bardlet/ladder/rungs.py`). Attention is by hand: no
fused kernels, no cache.

    B rows of a batch   T positions   C channels (n_embd)   H heads   D channels of a head   V vocabulary

Rungs 1 to 7 train with T 8, C 32, H 4, from rung 6 on 3 blocks (n_inner = 4 C), batches of 32, and AdamW at 1e-3 (the
bigram: 1e-2); `bardlet/ladder/rungs.py` has these settings, and those of the larger rungs.

Every model maps token ids (B, T), int64, to the logits of the token after each: (B, T, V).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.config.model import ModelConfig
from bardlet.models.base import LectureModel
from bardlet.models.layers import RMSNorm, apply_rope, init_weights, rope_cos_sin

# ============================================================================ 1: the bigram


class BigramModel(LectureModel):
    """A table: the row of a token holds the logits of the next one. Nothing before the current token is looked at."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.vocab_size)

    def logits(self, idx: Tensor) -> Tensor:
        return self.token_embedding_table(idx)  # (B, T) -> (B, T, V)


# ============================================================================ 2: an average of the past


def average_by_loop(x: Tensor) -> Tensor:
    """The mean of x (B, T, C) over each position and all before it, as one would say it."""
    B, T, C = x.shape
    out = torch.zeros_like(x)
    for b in range(B):
        for t in range(T):
            out[b, t] = x[b, : t + 1].mean(dim=0)  # (t + 1, C) -> (C)
    return out


def average_by_matrix(x: Tensor) -> Tensor:
    """The same as a product: row t of a triangular matrix has t + 1 equal weights that add up to 1."""
    B, T, C = x.shape
    weight = torch.tril(torch.ones(T, T, device=x.device))
    weight = weight / weight.sum(dim=1, keepdim=True)
    return weight @ x  # (T, T) @ (B, T, C) -> (B, T, C)


def average_by_softmax(x: Tensor) -> Tensor:
    """The same once more: all scores are 0, the future's are -inf. Attention is this with scores that are learned."""
    B, T, C = x.shape
    score = torch.zeros(T, T, device=x.device)
    score = score.masked_fill(torch.tril(torch.ones_like(score)) == 0, float("-inf"))
    return F.softmax(score, dim=-1) @ x  # (T, T) @ (B, T, C) -> (B, T, C)


class AveragingModel(LectureModel):
    """Each position becomes the average of itself and all before it: everything equally, so little of anything."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)  # where it stands
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def logits(self, idx: Tensor) -> Tensor:
        B, T = idx.shape
        position = torch.arange(T, device=idx.device)
        x = self.token_embedding_table(idx) + self.position_embedding_table(position)  # (B, T, C) + (T, C)
        x = average_by_softmax(x)
        return self.lm_head(x)  # (B, T, C) -> (B, T, V)


# ============================================================================ 3: one head of self-attention


class Head(nn.Module):
    """Self-attention: each position asks (query), it and those before it offer (key), and it takes in (value)."""

    tril: Tensor  # ones where a position may look: (T, T); declared for the type checker

    def __init__(self, config: ModelConfig, head_size: int) -> None:
        super().__init__()
        T, C = config.block_size, config.n_embd
        self.key = nn.Linear(C, head_size, bias=False)
        self.query = nn.Linear(C, head_size, bias=False)
        self.value = nn.Linear(C, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(T, T)), persistent=False)  # no weight; not saved

    def weights(self, x: Tensor) -> Tensor:
        """How much each position takes from each: (B, T, T), rows add up to 1, and the future gets nothing."""
        B, T, C = x.shape
        q, k = self.query(x), self.key(x)  # (B, T, C) -> (B, T, D)
        score = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, T, D) @ (B, D, T) -> (B, T, T)
        score = score.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(score, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x) @ self.value(x)  # (B, T, T) @ (B, T, D) -> (B, T, D)


class OneHeadModel(LectureModel):
    """The average becomes a choice: which of the past matters is computed from the text itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)  # where it stands
        self.sa_head = Head(config, head_size=config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def logits(self, idx: Tensor) -> Tensor:
        B, T = idx.shape
        position = torch.arange(T, device=idx.device)
        x = self.token_embedding_table(idx) + self.position_embedding_table(position)  # (B, T, C) + (T, C)
        x = self.sa_head(x)
        return self.lm_head(x)  # (B, T, C) -> (B, T, V)


# ============================================================================ 4: several heads


class MultiHeadAttention(nn.Module):
    """Several small heads side by side: each can look for something else."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.n_embd // config.n_head
        self.heads = nn.ModuleList(Head(config, head_size=D) for _ in range(config.n_head))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], dim=-1)  # H times (B, T, D) -> (B, T, C)


class MultiHeadModel(LectureModel):
    """One head of C channels becomes H heads of C / H: as many parameters, several conversations."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)  # where it stands
        self.sa_heads = MultiHeadAttention(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def logits(self, idx: Tensor) -> Tensor:
        B, T = idx.shape
        position = torch.arange(T, device=idx.device)
        x = self.token_embedding_table(idx) + self.position_embedding_table(position)  # (B, T, C) + (T, C)
        x = self.sa_heads(x)
        return self.lm_head(x)  # (B, T, C) -> (B, T, V)


# ============================================================================ 5: feed-forward


class FeedForward(nn.Module):
    """Each position for itself thinks over what it has heard."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(config.n_embd, config.n_embd), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (B, T, C) -> (B, T, C)


class FeedForwardModel(LectureModel):
    """First the positions talk, then each thinks: a layer without any exchange between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)  # where it stands
        self.sa_heads = MultiHeadAttention(config)
        self.ffwd = FeedForward(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def logits(self, idx: Tensor) -> Tensor:
        B, T = idx.shape
        position = torch.arange(T, device=idx.device)
        x = self.token_embedding_table(idx) + self.position_embedding_table(position)  # (B, T, C) + (T, C)
        x = self.sa_heads(x)
        x = self.ffwd(x)
        return self.lm_head(x)  # (B, T, C) -> (B, T, V)


# ============================================================================ 6: blocks, residual connections


class ProjectedAttention(nn.Module):
    """The heads side by side, then a projection that mixes them on their way back into the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.n_embd // config.n_head
        self.heads = nn.ModuleList(Head(config, head_size=D) for _ in range(config.n_head))
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.cat([head(x) for head in self.heads], dim=-1)  # H times (B, T, D) -> (B, T, C)
        return self.proj(out)


class WideFeedForward(nn.Module):
    """Four times as wide inside, as in the paper, and projected back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(config.n_embd, config.n_inner),
            nn.ReLU(),
            nn.Linear(config.n_inner, config.n_embd),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class ResidualBlock(nn.Module):
    """Communication, then computation; each only adds to x, so the gradient has a straight way back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sa = ProjectedAttention(config)
        self.ffwd = WideFeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(x)
        return x + self.ffwd(x)


class ResidualModel(LectureModel):
    """Deep at last: blocks one after the other, which residual connections make trainable."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)  # where it stands
        self.blocks = nn.ModuleList(ResidualBlock(config) for _ in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def logits(self, idx: Tensor) -> Tensor:
        B, T = idx.shape
        position = torch.arange(T, device=idx.device)
        x = self.token_embedding_table(idx) + self.position_embedding_table(position)  # (B, T, C) + (T, C)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)  # (B, T, C) -> (B, T, V)


# ============================================================================ 7: LayerNorm


class LayerNormBlock(nn.Module):
    """A LayerNorm before each part: whatever has piled up in x, each part sees rows of mean 0 and variance 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.sa = ProjectedAttention(config)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.ffwd = WideFeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class LayerNormModel(LectureModel):
    """A norm before each part of a block (the paper of 2017 puts it after), and a last one before the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)  # where it stands
        self.blocks = nn.ModuleList(LayerNormBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def logits(self, idx: Tensor) -> Tensor:
        B, T = idx.shape
        position = torch.arange(T, device=idx.device)
        x = self.token_embedding_table(idx) + self.position_embedding_table(position)  # (B, T, C) + (T, C)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        return self.lm_head(x)  # (B, T, C) -> (B, T, V)


# ============================================================================ 8: dropout and scale


class DropoutAttention(nn.Module):
    """What ProjectedAttention computes, all heads in one tensor; and dropout, on the weights and on what comes out."""

    tril: Tensor  # ones where a position may look: (T, T); declared for the type checker

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        T, C = config.block_size, config.n_embd
        self.n_head = config.n_head
        self.key = nn.Linear(C, C, bias=False)
        self.query = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.proj = nn.Linear(C, C)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("tril", torch.tril(torch.ones(T, T)), persistent=False)  # no weight; not saved

    def heads(self, x: Tensor) -> Tensor:
        """Each head's channels of x: (B, T, C) -> (B, H, T, D)."""
        B, T, C = x.shape
        return x.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)

    def weights(self, x: Tensor) -> Tensor:
        """How much each position takes from each, for every head: (B, H, T, T)."""
        B, T, C = x.shape
        q, k = self.heads(self.query(x)), self.heads(self.key(x))  # (B, T, C) -> (B, H, T, D)
        score = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, H, T, D) @ (B, H, D, T) -> (B, H, T, T)
        score = score.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(score, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        out = self.dropout(self.weights(x)) @ self.heads(self.value(x))  # (B, H, T, T) @ (B, H, T, D) -> (B, H, T, D)
        out = out.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C): the heads side by side again
        return self.dropout(self.proj(out))


class DropoutFeedForward(nn.Module):
    """The feed-forward layer, with some of what it says left out in training."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(config.n_embd, config.n_inner),
            nn.ReLU(),
            nn.Linear(config.n_inner, config.n_embd),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class DropoutBlock(nn.Module):
    """The block of rung 7; its parts drop some of their numbers while they train, so that none is relied upon."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.sa = DropoutAttention(config)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.ffwd = DropoutFeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class DropoutModel(LectureModel):
    """The lecture's GPT, ready to be made large: dropout, careful first weights, and a head without a bias.

    First weights are from N(0, 0.02²), smaller where a layer (`proj`, the net's entry 2) adds to the residual stream.
    With the same weights `gpt2.py` computes the same (ReLU, an untied head, query, key and value biases of 0).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)  # where it stands
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(DropoutBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        init_weights(self, residual=("proj", "net.2"), n_layer=config.n_layer)

    def logits(self, idx: Tensor) -> Tensor:
        B, T = idx.shape
        position = torch.arange(T, device=idx.device)
        x = self.token_embedding_table(idx) + self.position_embedding_table(position)  # (B, T, C) + (T, C)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        return self.lm_head(x)  # (B, T, C) -> (B, T, V)


# ============================================================================ 9: RMSNorm and rotary positions


class RotaryAttention(nn.Module):
    """Where a token stands is a turn of its queries and keys: a score then depends on how far apart two tokens are."""

    tril: Tensor  # ones where a position may look: (T, T); declared for the type checker

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        T, C = config.block_size, config.n_embd
        self.n_head, self.theta = config.n_head, config.rope_theta
        self.key = nn.Linear(C, C, bias=False)
        self.query = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("tril", torch.tril(torch.ones(T, T)), persistent=False)  # no weight; not saved

    def heads(self, x: Tensor) -> Tensor:
        """Each head's channels of x: (B, T, C) -> (B, T, H, D)."""
        B, T, C = x.shape
        return x.view(B, T, self.n_head, C // self.n_head)

    def weights(self, x: Tensor) -> Tensor:
        """How much each position takes from each, for every head: (B, H, T, T)."""
        B, T, C = x.shape
        position = torch.arange(T, device=x.device)[None]
        cos, sin = rope_cos_sin(position, C // self.n_head, self.theta)  # (1, T, 1, D)
        q, k = apply_rope(self.heads(self.query(x)), cos, sin), apply_rope(self.heads(self.key(x)), cos, sin)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, T, H, D) -> (B, H, T, D)
        score = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, H, T, D) @ (B, H, D, T) -> (B, H, T, T)
        score = score.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(score, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        v = self.heads(self.value(x)).transpose(1, 2)  # (B, T, H, D) -> (B, H, T, D)
        out = self.dropout(self.weights(x)) @ v  # (B, H, T, T) @ (B, H, T, D) -> (B, H, T, D)
        out = out.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C): the heads side by side again
        return self.dropout(self.proj(out))


class BiaslessFeedForward(nn.Module):
    """The feed-forward layer without biases, which models of today leave out of all their linear layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(config.n_embd, config.n_inner, bias=False),
            nn.ReLU(),
            nn.Linear(config.n_inner, config.n_embd, bias=False),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class RotaryBlock(nn.Module):
    """RMSNorm in place of LayerNorm: rows are scaled to a mean square of 1, and no longer centred."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln1 = RMSNorm(config.n_embd, config.norm_eps)
        self.sa = RotaryAttention(config)
        self.ln2 = RMSNorm(config.n_embd, config.norm_eps)
        self.ffwd = BiaslessFeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class RotaryModel(LectureModel):
    """No table of positions: rotations know them. RMSNorm for LayerNorm, and no biases anywhere."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(RotaryBlock(config) for _ in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        init_weights(self, residual=("proj", "net.2"), n_layer=config.n_layer)

    def logits(self, idx: Tensor) -> Tensor:
        x = self.token_embedding_table(idx)  # (B, T) -> (B, T, C)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        return self.lm_head(x)  # (B, T, C) -> (B, T, V)


# ============================================================================ 10: SwiGLU


class SwiGLU(nn.Module):
    """One half of the inner layer opens a gate for the other (Shazeer 2020); narrower, so about as costly."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.gate(x)) * self.up(x)  # (B, T, C) -> (B, T, n_inner), twice
        return self.dropout(self.down(x))  # (B, T, n_inner) -> (B, T, C)


class SwiGLUBlock(nn.Module):
    """The block of rung 9 with a gate in its feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln1 = RMSNorm(config.n_embd, config.norm_eps)
        self.sa = RotaryAttention(config)
        self.ln2 = RMSNorm(config.n_embd, config.norm_eps)
        self.ffwd = SwiGLU(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class SwiGLUModel(LectureModel):
    """Nothing new but the gate in each block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(SwiGLUBlock(config) for _ in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        init_weights(self, residual=("proj", "down"), n_layer=config.n_layer)

    def logits(self, idx: Tensor) -> Tensor:
        x = self.token_embedding_table(idx)  # (B, T) -> (B, T, C)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        return self.lm_head(x)  # (B, T, C) -> (B, T, V)


# ============================================================================ 11: QK-norm


class QKNormAttention(nn.Module):
    """A norm on queries and keys (Dehghani et al. 2023, section 2): scores stay bounded as matrices grow."""

    tril: Tensor  # ones where a position may look: (T, T); declared for the type checker

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        T, C = config.block_size, config.n_embd
        self.n_head, self.theta = config.n_head, config.rope_theta
        self.key = nn.Linear(C, C, bias=False)
        self.query = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        self.key_norm = RMSNorm(C // config.n_head, config.norm_eps)
        self.query_norm = RMSNorm(C // config.n_head, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("tril", torch.tril(torch.ones(T, T)), persistent=False)  # no weight; not saved

    def heads(self, x: Tensor) -> Tensor:
        """Each head's channels of x: (B, T, C) -> (B, T, H, D)."""
        B, T, C = x.shape
        return x.view(B, T, self.n_head, C // self.n_head)

    def weights(self, x: Tensor) -> Tensor:
        """How much each position takes from each, for every head: (B, H, T, T)."""
        B, T, C = x.shape
        position = torch.arange(T, device=x.device)[None]
        cos, sin = rope_cos_sin(position, C // self.n_head, self.theta)  # (1, T, 1, D)
        q, k = self.query_norm(self.heads(self.query(x))), self.key_norm(self.heads(self.key(x)))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, T, H, D) -> (B, H, T, D)
        score = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, H, T, D) @ (B, H, D, T) -> (B, H, T, T)
        score = score.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(score, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        v = self.heads(self.value(x)).transpose(1, 2)  # (B, T, H, D) -> (B, H, T, D)
        out = self.dropout(self.weights(x)) @ v  # (B, H, T, T) @ (B, H, T, D) -> (B, H, T, D)
        out = out.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C): the heads side by side again
        return self.dropout(self.proj(out))


class QKNormBlock(nn.Module):
    """The block of rung 10 with norms on queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln1 = RMSNorm(config.n_embd, config.norm_eps)
        self.sa = QKNormAttention(config)
        self.ln2 = RMSNorm(config.n_embd, config.norm_eps)
        self.ffwd = SwiGLU(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class QKNormModel(LectureModel):
    """New are the norms in attention. With the same weights `qwen3.py`, its head untied, computes the same."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(QKNormBlock(config) for _ in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        init_weights(self, residual=("proj", "down"), n_layer=config.n_layer)

    def logits(self, idx: Tensor) -> Tensor:
        x = self.token_embedding_table(idx)  # (B, T) -> (B, T, C)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        return self.lm_head(x)  # (B, T, C) -> (B, T, V)
