"""From minutes to a model, steps and settings."""
