"""Triton kernels without a GPU: run by Triton's interpreter, or compiled ahead of time for a GPU that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}


def interpret(request: pytest.FixtureRequest, cases: str, at_least: int) -> None:
    """Run tests/`cases` in a process of its own: whether Triton interprets is settled when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    options = ["-q", "-p", "no:cacheprovider", "--durations=5", "-m", request.config.option.markexpr]
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__).with_name(cases))]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least, done.stdout


def kind(value):
    """Triton's type of an argument."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, tuple):
        return tuple(map(kind, value))
    return "fp32" if isinstance(value, float) else "i64" if abs(value) >= 1 << 31 else "i32"


def compiled(launch, arch):
    """What `launch` would run on a GPU of that architecture, with the specialisations that its arguments bring."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.constants.get(name, launch.arguments.get(name))
        whole = type(value) is int and not parameter.do_not_specialize
        if name in launch.constants or value is None or (whole and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = kind(value)
        if isinstance(value, torch.Tensor) or (whole and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def spilled(made, folder):
    """Bytes of stack and local memory of a thread, by cuobjdump."""
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    assert found, usage
    return sum(map(int, found))
