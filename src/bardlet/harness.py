"""`python -m bardlet.harness`: lm-evaluation-harness on run folders, see evaluation/harness.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("bardlet.evaluation.harness", run_name="__main__", alter_sys=True)
