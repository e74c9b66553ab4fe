"""`python -m bardlet.harness`: lm-evaluation-harness on run folders; see evaluation/harness.py."""

import runpy
import sys

HELP = """usage: python -m bardlet.harness run --model bardlet --model_args run=RUN --tasks NAMES

Evaluate a run folder with lm-evaluation-harness. The arguments are those of `lm-eval`,
which lists them here once it is installed: pip install '.[harness]'

example:
  python -m bardlet.harness run --model bardlet --model_args run=runs/my-qwen3 --tasks arc_easy
"""

if __name__ == "__main__":
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(HELP, end="")
            sys.exit(0)
        sys.exit("bardlet: lm-evaluation-harness is not installed; run `pip install '.[harness]'` in bardlet's folder, "
                 "or `pip install 'lm_eval>=0.4.13'`")
    runpy.run_module("bardlet.evaluation.harness", run_name="__main__", alter_sys=True)
