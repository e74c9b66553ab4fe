"""Device, processes, threads, compiler, files."""
