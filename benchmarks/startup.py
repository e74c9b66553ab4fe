"""How long `bardlet --help` and the help of each command take: median of whole processes, in seconds.

    python benchmarks/startup.py [--runs 11]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def main() -> None:
    """Print a line per command."""
    from bardlet.cli import COMMANDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    runs = parser.parse_args().runs
    for words in ([], *([name] for name in COMMANDS)):
        times = []
        for _ in range(runs + 1):  # the first one warms the disk's cache
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-m", "bardlet", *words, "--help"], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - begun)
        print(f"bardlet {' '.join([*words, '--help']):16} {statistics.median(times[1:]):.3f} s")


if __name__ == "__main__":
    main()
