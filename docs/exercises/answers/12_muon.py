"""The answer of an exercise; docs/starters.py makes exercises/12_muon.py from it."""
# exercise: muon

import torch


def orthogonalize(gradient):
    """Return about U @ V.T for a matrix whose singular value decomposition is U @ S @ V.T: (R, C) -> (R, C).

    Divide by the norm, then five times: X becomes 3.4445 X - 4.7750 (X X.T) X + 2.0315 (X X.T)(X X.T) X.
    """
    x = gradient / gradient.norm()
    for _ in range(5):
        a = x @ x.T  # (R, R)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


if __name__ == "__main__":  # what it does: the singular values before and after
    torch.manual_seed(1337)
    matrix = torch.randn(16, 32) @ torch.diag(torch.logspace(0, -2, 32))
    print(torch.linalg.svdvals(matrix), torch.linalg.svdvals(orthogonalize(matrix)))
