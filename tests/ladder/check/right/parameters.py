# Weights as parameters, an additive mask, queries scaled first, a dict of settings, positions that start at zero.
import torch
import torch.nn as nn

cfg = {"embed_dim": 128, "num_heads": 4, "num_layers": 2, "context_length": 64, "dropout": 0.1}


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.h, self.d = cfg["num_heads"], cfg["embed_dim"] // cfg["num_heads"]
        self.W_qkv = nn.Parameter(torch.randn(cfg["embed_dim"], 3 * cfg["embed_dim"]) * 0.05)
        self.W_out = nn.Parameter(torch.randn(cfg["embed_dim"], cfg["embed_dim"]) * 0.05)
        self.attn_drop = nn.Dropout(cfg["dropout"])

    def forward(self, x):
        B, T, C = x.shape
        qkv = (x @ self.W_qkv).view(B, T, 3, self.h, self.d).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = q * self.d ** -0.5
        mask = torch.full((T, T), float("-inf")).triu(1)
        att = torch.softmax(q @ k.mT + mask, dim=-1)
        out = (self.attn_drop(att) @ v).permute(0, 2, 1, 3).flatten(2)
        return out @ self.W_out


class DecoderLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n1 = nn.RMSNorm(cfg["embed_dim"])
        self.n2 = nn.RMSNorm(cfg["embed_dim"])
        self.attn = Attention(cfg)
        self.fc1 = nn.Linear(cfg["embed_dim"], 4 * cfg["embed_dim"])
        self.fc2 = nn.Linear(4 * cfg["embed_dim"], cfg["embed_dim"])

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        return x + self.fc2(torch.relu(self.fc1(self.n2(x))))


class MyTransformer(nn.Module):
    def __init__(self, vocab_size, cfg=cfg):
        super().__init__()
        self.tok = nn.Embedding(vocab_size, cfg["embed_dim"])
        self.pos = nn.Parameter(torch.zeros(1, cfg["context_length"], cfg["embed_dim"]))
        self.layers = nn.ModuleList([DecoderLayer(cfg) for _ in range(cfg["num_layers"])])
        self.norm = nn.RMSNorm(cfg["embed_dim"])
        self.head = nn.Linear(cfg["embed_dim"], vocab_size, bias=False)
        self.loss_fn = nn.CrossEntropyLoss()

    def forward(self, x, y=None):
        h = self.tok(x) + self.pos[:, : x.size(1)]
        for layer in self.layers:
            h = layer(h)
        logits = self.head(self.norm(h))
        if y is None:
            return logits
        return logits, self.loss_fn(logits.flatten(0, 1), y.flatten())

    def sample(self, context, n):
        self.eval()
        with torch.no_grad():
            for _ in range(n):
                logits = self(context[:, -self.pos.size(1):])
                context = torch.cat([context, logits[:, -1].argmax(-1, keepdim=True)], 1)
        return context
