import torch, torch.nn as nn, torch.nn.functional as F
n_embd=32; block_size=8
class AverageLM(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.tok = nn.Embedding(vocab_size, n_embd); self.pos = nn.Embedding(block_size, n_embd); self.out = nn.Linear(n_embd, vocab_size)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))
    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.tok(idx) + self.pos(torch.arange(T))
        wei = torch.zeros(T, T).masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        x = F.softmax(wei, dim=-1) @ x
        logits = self.out(x)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
