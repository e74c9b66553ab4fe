"""Compile a C++ file of this package, once for each machine, and load it."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from bardlet.runtime.compiler import cxx

log = logging.getLogger("bardlet")

PROCESSORS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""Instructions of the processors that PyTorch tells apart on x86."""
OPENMP = ("-fopenmp",) if sys.platform == "linux" else ()
"""On Linux, GCC's OpenMP uses the threads that PyTorch started; Clang's starts its own. Elsewhere, one thread."""
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", *OPENMP)


@cache
def library(source: Path, folder: Path) -> ctypes.CDLL | None:
    """Return the compiled file `source`, from `folder` if it is there; None if this machine cannot compile it.

    The name of the compiled file is a digest of the source, the compiler and the processor.
    """
    flags, compiler = processor_flags(), shlex.split(cxx())  # as in CXX="ccache g++"
    if sys.platform == "win32" or not compiler or shutil.which(compiler[0]) is None or flags is None:
        return None
    command = [*compiler, *FLAGS, *flags]
    try:
        text = source.read_bytes()
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
        digest = hashlib.sha256(b"\0".join([text, version, " ".join(command).encode()])).hexdigest()
        path = folder / f"{source.stem}-{digest[:24]}.so"
        if not path.exists():
            _compile(command, source, path)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged
            _compile(command, source, path)
            return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        output = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").strip().splitlines()
        log.debug("%s was not compiled: %s", source.name, output[0] if output else error)
        return None


def processor_flags() -> tuple[str, ...] | None:
    """Return the compiler's flags for this processor; None for one of x86 without AVX2."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in PROCESSORS:
        return None if platform.machine().lower() in ("x86_64", "i386", "i686", "amd64") else ()
    vnni = capability == "AVX512" and torch.cpu._is_vnni_supported()
    return (*PROCESSORS[capability], *("-mavx512vnni",) * vnni)


def _compile(command: list[str], source: Path, path: Path) -> None:
    """Compile `source` to `path`, which appears as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        try:
            subprocess.run([*command, str(source), "-o", str(new)], capture_output=True, check=True)
        except subprocess.CalledProcessError:  # perhaps Clang without its OpenMP
            command = [word for word in command if word not in OPENMP]
            subprocess.run([*command, str(source), "-o", str(new)], capture_output=True, check=True)
        new.replace(path)
