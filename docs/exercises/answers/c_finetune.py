"""The answer of an exercise; docs/starters.py makes exercises/c_finetune.py from it."""
# exercise: finetune

import torch
import torch.nn as nn


@torch.no_grad()
def start_from(model, weights):
    """Copy pretrained weights into a model; return the names of its weights that stay as they are, in their order.

    weights: name -> tensor, as state_dict() returns them. A weight fits if the model has its name and its shape.
    (Another text may have another vocabulary: then the embedding and the head do not fit.)
    """
    new = []
    for name, weight in model.named_parameters():
        if name in weights and weights[name].shape == weight.shape:
            weight.copy_(weights[name])
        else:
            new.append(name)
    return new


if __name__ == "__main__":  # the second layer has another size
    print(start_from(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 7)),
                     nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)).state_dict()))
