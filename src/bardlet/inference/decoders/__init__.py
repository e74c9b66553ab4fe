"""Fast decoders and their caches."""
