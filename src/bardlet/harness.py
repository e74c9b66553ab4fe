"""`python -m bardlet.harness`: lm-evaluation-harness on run folders, see evaluation/harness.py."""

from bardlet.evaluation.harness import main

if __name__ == "__main__":
    main()
