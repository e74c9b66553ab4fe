"""Median wall time, in seconds, of `bardlet --help` and of each command's help, each in its own process.

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
    parser.add_argument("--runs", type=int, default=11, help="timed runs per command")
    runs = parser.parse_args().runs
    for command in ([], *([name] for name in COMMANDS)):
        times = []
        for _ in range(runs + 1):  # the first run warms the disk cache
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "bardlet", *command, "--help"], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - started)
        print(f"bardlet {' '.join([*command, '--help']):16} {statistics.median(times[1:]):.3f} s")


if __name__ == "__main__":
    main()
