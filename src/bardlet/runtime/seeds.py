"""Seeds of any size for PyTorch."""

from __future__ import annotations

import numpy as np


def torch_seed(seed: int) -> int:
    """Return a seed for PyTorch's CPU generator, which reads only the lowest 32 bits of a seed.

    Seeds below 2**32 stay as they are; larger ones are hashed, so that they differ from each other.
    """
    return seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])
