"""Generation, translation and chat."""
