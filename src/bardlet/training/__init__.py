"""The training step, the loop, losses and optimizers."""
