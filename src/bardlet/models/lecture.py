"""The lecture, rung by rung: from a bigram table to a GPT, and on to today's GPTs.

*Let's build GPT: from scratch, in code, spelled out* grows a Transformer one idea at a time. Here each idea is a rung:
a trainable model, written out in full, that differs from the rung before only by its idea. Rungs 6, 8 and 9 add several
parts at once, which the idea needs. Rungs 1 to 8 are the lecture's, 9 to 11 lead on to `llama.py`; rungs 12 and 13
train rung 11 differently (`bardlet/ladder/rungs.py`). Attention is plain PyTorch: no fused kernels, no cache.

Shapes: B rows of a batch, T positions, C channels (n_embd), H heads, D channels of a head, V tokens of the vocabulary.

Rungs 1 to 7 train with T 8, C 32, H 4, batches of 32 and AdamW at 1e-3 (the bigram: 1e-2); rungs 6 and 7 have 3 blocks
(n_inner = 4 C). `bardlet/ladder/rungs.py` has these settings and those of the larger rungs.

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
    """A table: the row of a token holds the logits of the next one. The model ignores all earlier tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.vocab_size)

    def logits(self, idx: Tensor) -> Tensor:
        return self.token_embedding_table(idx)  # (B, T) -> (B, T, V)


# ============================================================================ 2: an average of the past


def average_by_loop(x: Tensor) -> Tensor:
    """Return the mean of x (B, T, C) over each position and all before it, computed literally."""
    B, T, C = x.shape
    out = torch.zeros_like(x)
    for b in range(B):
        for t in range(T):
            out[b, t] = x[b, : t + 1].mean(dim=0)  # (t + 1, C) -> (C)
    return out


def average_by_matrix(x: Tensor) -> Tensor:
    """Compute the same as a matrix product: row t of a triangular matrix has t + 1 equal weights that sum to 1."""
    B, T, C = x.shape
    weight = torch.tril(torch.ones(T, T, device=x.device))
    weight = weight / weight.sum(dim=1, keepdim=True)
    return weight @ x  # (T, T) @ (B, T, C) -> (B, T, C)


def average_by_softmax(x: Tensor) -> Tensor:
    """Compute the same with a softmax: all scores are 0, the future's are -inf. Attention learns these scores."""
    B, T, C = x.shape
    score = torch.zeros(T, T, device=x.device)
    score = score.masked_fill(torch.tril(torch.ones_like(score)) == 0, float("-inf"))
    return F.softmax(score, dim=-1) @ x  # (T, T) @ (B, T, C) -> (B, T, C)


class AveragingModel(LectureModel):
    """Each position becomes the average of itself and all before it, with equal weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)  # where it is
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def logits(self, idx: Tensor) -> Tensor:
        B, T = idx.shape
        position = torch.arange(T, device=idx.device)
        x = self.token_embedding_table(idx) + self.position_embedding_table(position)  # (B, T, C) + (T, C)
        x = average_by_softmax(x)
        return self.lm_head(x)  # (B, T, C) -> (B, T, V)


# ============================================================================ 3: one head of self-attention


class Head(nn.Module):
    """Causal self-attention: a query is what a position seeks, a key what it contains, a value what it passes on."""

    def __init__(self, config: ModelConfig, head_size: int) -> None:
        super().__init__()
        T, C = config.block_size, config.n_embd
        self.key = nn.Linear(C, head_size, bias=False)
        self.query = nn.Linear(C, head_size, bias=False)
        self.value = nn.Linear(C, head_size, bias=False)
        self.tril = nn.Buffer(torch.tril(torch.ones(T, T)), persistent=False)  # not a parameter, not saved

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights of each position: (B, T, T), rows sum to 1, the future gets 0."""
        B, T, C = x.shape
        q, k = self.query(x), self.key(x)  # (B, T, C) -> (B, T, D)
        score = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, T, D) @ (B, D, T) -> (B, T, T)
        score = score.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(score, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x) @ self.value(x)  # (B, T, T) @ (B, T, D) -> (B, T, D)


class OneHeadModel(LectureModel):
    """The average becomes a choice: the text itself decides which earlier tokens matter."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)  # where it is
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
    """Several small heads in parallel: each can look for something different."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.n_embd // config.n_head
        self.heads = nn.ModuleList(Head(config, head_size=D) for _ in range(config.n_head))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], dim=-1)  # H times (B, T, D) -> (B, T, C)


class MultiHeadModel(LectureModel):
    """One head of C channels becomes H heads of C / H: the same number of parameters, several conversations."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)  # where it is
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
    """Each position thinks on its own about what it has gathered."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(config.n_embd, config.n_embd), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (B, T, C) -> (B, T, C)


class FeedForwardModel(LectureModel):
    """First the positions communicate, then each computes on its own, in a layer without communication."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)  # where it is
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
    """The heads in parallel, then a projection that mixes them back into the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.n_embd // config.n_head
        self.heads = nn.ModuleList(Head(config, head_size=D) for _ in range(config.n_head))
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.cat([head(x) for head in self.heads], dim=-1)  # H times (B, T, D) -> (B, T, C)
        return self.proj(out)


class WideFeedForward(nn.Module):
    """Four times as wide inside, as in the paper, then projected back."""

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
    """Communication, then computation; each only adds to x, which gives the gradient a direct path back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sa = ProjectedAttention(config)
        self.ffwd = WideFeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(x)
        return x + self.ffwd(x)


class ResidualModel(LectureModel):
    """Deep at last: a stack of blocks, which residual connections make trainable."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)  # where it is
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
    """A LayerNorm before each part: whatever has accumulated in x, each part sees rows of mean 0 and variance 1."""

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
    """A norm before each part of a block (the 2017 paper puts it after), and a final one before the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)  # where it is
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
    """ProjectedAttention with all heads in one tensor, and dropout on the weights and on the output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        T, C = config.block_size, config.n_embd
        self.n_head = config.n_head
        self.key = nn.Linear(C, C, bias=False)
        self.query = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.proj = nn.Linear(C, C)
        self.dropout = nn.Dropout(config.dropout)
        self.tril = nn.Buffer(torch.tril(torch.ones(T, T)), persistent=False)  # not a parameter, not saved

    def heads(self, x: Tensor) -> Tensor:
        """Split the channels of x into heads: (B, T, C) -> (B, H, T, D)."""
        B, T, C = x.shape
        return x.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights of every head: (B, H, T, T)."""
        B, T, C = x.shape
        q, k = self.heads(self.query(x)), self.heads(self.key(x))  # (B, T, C) -> (B, H, T, D)
        score = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, H, T, D) @ (B, H, D, T) -> (B, H, T, T)
        score = score.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(score, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        out = self.dropout(self.weights(x)) @ self.heads(self.value(x))  # (B, H, T, T) @ (B, H, T, D) -> (B, H, T, D)
        out = out.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C): concatenate the heads
        return self.dropout(self.proj(out))


class DropoutFeedForward(nn.Module):
    """The feed-forward layer, with dropout on its output in training."""

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
    """The block of rung 7 with dropout: training sets random values to 0, so the model cannot rely on a single one."""

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
    """The lecture's GPT, made to scale: dropout, careful initialization, and a head without a bias.

    Initial weights are from N(0, 0.02²). They are smaller in layers that add to the residual stream: `proj` and the
    second linear layer of the feed-forward net (`net.2`). With the same weights `gpt2.py` computes the same (ReLU, an
    untied head, query, key and value biases of 0).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)  # where it is
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
    """A token's position rotates its query and key, so a score depends on the distance between two tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        T, C = config.block_size, config.n_embd
        self.n_head, self.theta = config.n_head, config.rope_theta
        self.key = nn.Linear(C, C, bias=False)
        self.query = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.tril = nn.Buffer(torch.tril(torch.ones(T, T)), persistent=False)  # not a parameter, not saved

    def heads(self, x: Tensor) -> Tensor:
        """Split the channels of x into heads: (B, T, C) -> (B, T, H, D)."""
        B, T, C = x.shape
        return x.view(B, T, self.n_head, C // self.n_head)

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights of every head: (B, H, T, T)."""
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
        out = out.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C): concatenate the heads
        return self.dropout(self.proj(out))


class BiaslessFeedForward(nn.Module):
    """The feed-forward layer without biases; today's models have none in any linear layer."""

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
    """RMSNorm instead of LayerNorm: it scales rows to a mean square of 1 and no longer centers them."""

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
    """Rotations instead of a position table, RMSNorm instead of LayerNorm, and no biases anywhere."""

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
    """One half of the inner layer gates the other (Shazeer 2020); it is narrower, so it costs about the same."""

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
    """Only the gate in each block is new."""

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
    """A norm on queries and keys (Dehghani et al. 2023, section 2): scores stay bounded as the matrices grow."""

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
        self.tril = nn.Buffer(torch.tril(torch.ones(T, T)), persistent=False)  # not a parameter, not saved

    def heads(self, x: Tensor) -> Tensor:
        """Split the channels of x into heads: (B, T, C) -> (B, T, H, D)."""
        B, T, C = x.shape
        return x.view(B, T, self.n_head, C // self.n_head)

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights of every head: (B, H, T, T)."""
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
        out = out.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C): concatenate the heads
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
    """Only the norms in attention are new. With the same weights, a qwen3 with an untied head computes the same."""

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
