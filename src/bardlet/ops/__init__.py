"""Tensor functions and their CPU kernels."""
