"""Muon. The five steps that give every direction of a gradient the same length.

Write orthogonalize. Then run, in the folder above this file:

    bardlet check exercises/12_muon.py  # with --hint: a hint

Explained in the papers that the page names, and in docs/rungs/12-muon.md.
"""
# exercise: muon

import torch


def orthogonalize(gradient):
    """Return about U @ V.T for a matrix whose singular value decomposition is U @ S @ V.T: (R, C) -> (R, C).

    Divide by the norm, then five times: X becomes 3.4445 X - 4.7750 (X X.T) X + 2.0315 (X X.T)(X X.T) X.
    """
    raise NotImplementedError("write orthogonalize")


if __name__ == "__main__":  # what it does: the singular values before and after
    torch.manual_seed(1337)
    matrix = torch.randn(16, 32) @ torch.diag(torch.logspace(0, -2, 32))
    print(torch.linalg.svdvals(matrix), torch.linalg.svdvals(orthogonalize(matrix)))
