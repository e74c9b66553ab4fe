"""Pretrain, then fine-tune. A model that starts from the weights of another.

Write start_from. Then run, in the folder above this file:

    bardlet check exercises/c_finetune.py  # with --hint: a hint

Explained in the lecture's exercises, and in docs/exercises/finetune.md.
"""
# exercise: finetune

import torch
import torch.nn as nn


@torch.no_grad()
def start_from(model, weights):
    """Copy pretrained weights into a model; return the names of its weights that stay as they are, in their order.

    weights: name -> tensor, as state_dict() returns them. A weight fits if the model has its name and its shape.
    (Another text may have another vocabulary: then the embedding and the head do not fit.)
    """
    raise NotImplementedError("write start_from")


if __name__ == "__main__":  # the second layer has another size
    print(start_from(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 7)),
                     nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)).state_dict()))
