"""Turn a time budget into a model, steps and settings."""
