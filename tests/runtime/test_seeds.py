"""Seeds of any size."""

from __future__ import annotations

import pytest
import torch

from bardlet.runtime.seeds import torch_seed


@pytest.mark.parametrize("seed", [0, 1, 1337, 2**31, 2**32 - 1])
def test_a_seed_of_32_bits_stays(seed: int) -> None:
    assert torch_seed(seed) == seed


@pytest.mark.parametrize("seed", [0, 1, 1337, 2**32 - 1])
def test_seeds_with_the_same_lowest_32_bits_differ(seed: int) -> None:
    """In numbers that PyTorch's generator draws, which reads no other bits."""
    seeds = [seed, *(seed + (high << 32) for high in (1, 2, 3, 2**15, 2**31 - 1))]
    drawn = {tuple(torch.rand(4, generator=torch.Generator().manual_seed(torch_seed(each))).tolist()) for each in seeds}
    assert len(drawn) == len(seeds)
