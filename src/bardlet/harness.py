"""`python -m bardlet.harness`: lm-evaluation-harness on run folders; see evaluation/harness.py."""

import runpy
import sys

if __name__ == "__main__":
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        sys.exit("bardlet: lm-evaluation-harness is not installed; run `pip install 'lm_eval>=0.4.13'`")
    runpy.run_module("bardlet.evaluation.harness", run_name="__main__", alter_sys=True)
