"""What a run learns: pretraining, translation, and the stages of a chat model."""
