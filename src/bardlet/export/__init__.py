"""Export a model: a clean folder for an upload, a GGUF file, or one HTML page that runs it."""
