# A fragment: only the head, without imports.
class Head(nn.Module):
    def __init__(self, n_embd, head_size, block_size):
        super().__init__()
        self.q = nn.Linear(n_embd, head_size, bias=False)
        self.k = nn.Linear(n_embd, head_size, bias=False)
        self.v = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x):
        T = x.shape[1]
        scores = self.k(x) @ self.q(x).transpose(1, 2)  # keys by queries
        scores = scores.transpose(1, 2) / (self.q.weight.shape[0] ** 0.5)
        scores = torch.where(self.tril[:T, :T].bool(), scores, float("-inf"))
        return torch.bmm(torch.softmax(scores, -1), self.v(x))
