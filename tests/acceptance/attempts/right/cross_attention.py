"""After the video: what cross-attention would look like (the part about encoder-decoder near the end)."""
import torch
import torch.nn as nn
import torch.nn.functional as F


class CrossAttention(nn.Module):
    """queries come from x (decoder side), keys and values from context (encoder side)

    There's no triangular mask, because the decoder may look at the whole source sentence.
    """

    def __init__(self, n_embd, n_head, dropout=0.0):
        super().__init__()
        assert n_embd % n_head == 0
        self.n_head = n_head
        self.query = nn.Linear(n_embd, n_embd, bias=False)
        self.key = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_embd, n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, context):
        B, T, C = x.shape
        S = context.shape[1]
        hs = C // self.n_head
        q = self.query(x).view(B, T, self.n_head, hs).transpose(1, 2)        # (B, nh, T, hs)
        k = self.key(context).view(B, S, self.n_head, hs).transpose(1, 2)    # (B, nh, S, hs)
        v = self.value(context).view(B, S, self.n_head, hs).transpose(1, 2)  # (B, nh, S, hs)
        wei = q @ k.transpose(-2, -1) * hs**-0.5                             # (B, nh, T, S)
        wei = self.dropout(F.softmax(wei, dim=-1))
        out = (wei @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.proj(out)


x = torch.randn(2, 5, 32)
ctx = torch.randn(2, 9, 32)
print(CrossAttention(32, 4)(x, ctx).shape)
