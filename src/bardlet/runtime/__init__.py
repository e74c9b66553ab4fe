"""Devices, processes, threads, the compiler, and files."""
