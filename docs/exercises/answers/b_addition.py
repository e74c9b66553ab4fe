"""The answer of an exercise; docs/starters.py makes exercises/b_addition.py from it."""
# exercise: addition

import torch

ALPHABET = "0123456789+="  # the id of a character is its index


def write_sum(a, b):
    """Return a + b as text, the answer in reverse order: write_sum(123, 456) is "123+456=9750", write_sum(7, 5) is
    "007+005=2100". Both numbers have three digits, the answer has four.
    """
    return f"{a:03}+{b:03}=" + f"{a + b:04}"[::-1]


def make_batch(sums):
    """Return idx and targets, both (B, 11): the first 11 characters of each sum, and the character after each.

    sums: texts of 12 characters. The loss covers the answer alone: every other target is -100.
    """
    ids = torch.tensor([[ALPHABET.index(character) for character in text] for text in sums])  # (B, 12)
    idx, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[:, :7] = -100  # the last character of the question predicts the first digit of the answer
    return idx, targets


if __name__ == "__main__":
    print(write_sum(123, 456), make_batch([write_sum(123, 456)]))
