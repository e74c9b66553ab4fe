"""The answer of an exercise; docs/starters.py makes exercises/13_average.py from it."""
# exercise: average

import torch
import torch.nn as nn


@torch.no_grad()
def add_to_average(average, model, n):
    """Change `average` in place, so that it is the mean of the weights of all n models so far, `model` included.

    average: name -> tensor, the mean of the n - 1 models before. For n = 1 its values do not count.
    """
    for name, weight in model.named_parameters():
        average[name].lerp_(weight, 1 / n)


if __name__ == "__main__":  # the mean of three models; training calls it after each of the last steps
    layer = nn.Linear(2, 1)
    mean = {name: torch.zeros_like(weight) for name, weight in layer.named_parameters()}
    for n in (1, 2, 3):
        nn.init.constant_(layer.weight, n)
        add_to_average(mean, layer, n)
    print(mean["weight"])  # 2 and 2
