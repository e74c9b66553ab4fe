"""The server's side of the studio: files, training jobs, runs and their curves, and a look inside a model."""
