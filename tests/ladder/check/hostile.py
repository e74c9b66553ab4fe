"""Files that misbehave, and the line that check prints for each."""

from __future__ import annotations

HEAD = """import torch.nn as nn
class Head(nn.Module):
    def __init__(self, n_embd, head_size):
        super().__init__()
        {inside}
"""
CLASS = "import torch.nn as nn\nclass Head(nn.Module):\n    {inside}\n"

LIMIT, MEMORY = "it did not finish within 10 s", "it needs more than 2 GB of memory"
FILES = {
    "endless-loop": (HEAD, "while True: pass", LIMIT),
    "endless-output": (HEAD, 'while True: print("x" * 1_000_000)', LIMIT),
    "ignores-signals": (HEAD, "import signal, os; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                        "os.kill(os.getpid(), signal.SIGSTOP)", LIMIT),
    "a-hundred-gigabytes": (HEAD, "import torch; self.w = torch.ones(25_000_000_000)", MEMORY),
    "list-of-bytes": (CLASS, "x = [bytearray(10**8) for _ in range(1000)]", MEMORY),
    "exit": (HEAD, "import sys; sys.exit(0)", "its constructor calls exit"),
    "exit-at-once": (CLASS, "import os; os._exit(0)", "it ended the process"),
    "exit-code": (CLASS, "import os; os._exit(7)", "it ended the process with exit code 7"),
    "crash": (CLASS, "import ctypes; ctypes.string_at(0)", "it was ended by signal 11"),
    "recursion": (HEAD, "self.__init__(n_embd, head_size)", "RecursionError"),
    "pipe-as-report": (CLASS, 'import os; os.remove("../report.json"); os.mkfifo("../report.json"); os._exit(0)',
                       "it ended the process"),
    "huge-report": (CLASS, 'open("../report.json", "w").write("[" * 30_000_000); import os; os._exit(0)',
                    "it ended the process"),
}


def code(name: str) -> str:
    """Return a hostile file."""
    template, inside, _ = FILES[name]
    return template.replace("{inside}", inside)
