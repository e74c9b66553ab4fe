"""Count the lines of src/, and what the design limits: long files and functions, many parameters, files at the root.

    python tools/counts.py [FOLDER]        # a checkout; default: this one
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

LINES, BODY, PARAMETERS = 400, 60, 6


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return every function and method in `tree`."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of parameters without self and cls."""
    args = function.args
    names = [x.arg for x in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def main() -> None:
    """Print the counts, and each file and function over a limit."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    source = root / "src" / "bardlet"
    texts = {path.relative_to(source): path.read_text(encoding="utf-8") for path in sorted(source.rglob("*.py"))}
    lengths = {path: text.count("\n") for path, text in texts.items()}
    all_functions = [(path, f) for path, text in texts.items() for f in functions(ast.parse(text))]
    long_files = [f"{path}: {n} lines" for path, n in lengths.items() if n > LINES]
    long_bodies = [f"{path}:{f.name}: {(f.end_lineno or 0) - f.lineno + 1} lines" for path, f in all_functions
                   if (f.end_lineno or 0) - f.lineno + 1 > BODY]
    long_signatures = [f"{path}:{f.name}: {parameters(f)} parameters" for path, f in all_functions
                       if parameters(f) > PARAMETERS]
    print(f"lines of src/: {sum(lengths.values()):,} in {len(lengths)} files; functions: {len(all_functions):,}")
    print(f"files at the root: {len([path for path in lengths if len(path.parts) == 1])}")
    for title, items in ((f"files over {LINES} lines", long_files), (f"functions over {BODY} lines", long_bodies),
                         (f"functions over {PARAMETERS} parameters", long_signatures)):
        print(f"{title}: {len(items)}")
        for item in items:
            print(f"  {item}")


if __name__ == "__main__":
    main()
