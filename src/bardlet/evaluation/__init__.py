"""Metrics, benchmark tasks and an adapter for lm-evaluation-harness."""
