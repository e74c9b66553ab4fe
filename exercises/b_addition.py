"""A GPT that adds. Sums as text, and a loss on the answer alone.

Write write_sum and make_batch. Then run, in the folder above this file:

    bardlet check exercises/b_addition.py  # with --hint: a hint

Explained in the lecture's exercises, and in docs/exercises/addition.md.
"""
# exercise: addition

import torch

ALPHABET = "0123456789+="  # the id of a character is its index


def write_sum(a, b):
    """Return a + b as text, the answer in reverse order: write_sum(123, 456) is "123+456=9750", write_sum(7, 5) is
    "007+005=2100". Both numbers have three digits, the answer has four.
    """
    raise NotImplementedError("write write_sum")


def make_batch(sums):
    """Return idx and targets, both (B, 11): the first 11 characters of each sum, and the character after each.

    sums: texts of 12 characters. The loss covers the answer alone: every other target is -100.
    """
    raise NotImplementedError("write make_batch")


if __name__ == "__main__":
    print(write_sum(123, 456), make_batch([write_sum(123, 456)]))
