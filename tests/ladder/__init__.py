"""Tests of the ladder. A package, because benchmarks/ has a module with the same name."""
