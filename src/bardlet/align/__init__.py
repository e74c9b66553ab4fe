"""ChatGPT's stages, each a run folder that starts from another: fine-tuning, reward model, reinforcement."""
