"""Settings of a run: frozen dataclasses and their TOML. Nothing here imports torch."""
