"""Runs CUDA C++ of csrc on the host, without a GPU and without nvcc: what it models stands in cuda_on_host.h.

library = build('#include "x_cuda.cu"\\nCUDA_ON_HOST_EXPORT int run(float* x) { return launch(x); }')
library.call("run", tensor, seed=3)   # tensors go by pointer, integers as int64, floats as double, None as null
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
OFF = os.environ.get("CUDA_ON_HOST") == "0"  # where the tests that need a GPU are all that is asked for
COMPILER = None if OFF else next(filter(None, map(shutil.which, ("g++", "c++"))), None)
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"]
FLAGS += ["-DAUDIOKERNELS_ISA=host"]  # torch-free, as *_simd.cpp are
FLAGS += ["-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"]


class LaunchError(RuntimeError):
    """A kernel failed on the host: a deadlock, a wrong access, diverged lanes."""


class Library:
    """A compiled source; `call` runs one of its exported functions, which returns a cudaError_t."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        self._library.cuda_on_host_error.restype = ctypes.c_char_p

    def call(self, name: str, *arguments, seed: int = 0, timeouts: bool = False) -> None:
        """Raise LaunchError unless it returns 0. `seed` picks the order of threads and of asynchronous writes."""
        self._library.cuda_on_host_configure(ctypes.c_uint64(seed), int(timeouts))
        error = getattr(self._library, name)(*map(_argument, arguments))
        if error:
            text = self._library.cuda_on_host_error().decode()
            raise LaunchError(f"{name} returned {error} under seed {seed}: {text}")


def _argument(value):
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, torch.Tensor):
        if not value.is_contiguous():
            raise ValueError("a tensor for a kernel on the host must be contiguous")
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(int(value))


@cache
def build(source: str) -> Library:
    """Compile `source`, which may include headers and .cu files of csrc; compiled once a content in this process."""
    folder = Path(tempfile.mkdtemp(prefix="cuda_on_host_"))
    name = hashlib.sha256(source.encode()).hexdigest()[:16]
    file, library = folder / f"{name}.cpp", folder / f"{name}.so"
    file.write_text(source)
    command = [COMPILER, *FLAGS, f"-I{HERE}", f"-I{CSRC}", str(file), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    loaded = Library(library)
    shutil.rmtree(folder)
    return loaded
