"""Metrics, benchmark tasks and lm-evaluation-harness."""
