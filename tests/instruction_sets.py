"""Which instruction sets serve an op on the CPU here, and each of them in use."""

from collections.abc import Iterator
from contextlib import contextmanager

from audiokernels._library import C
from audiokernels.backends import implementation

UNCOMPILED = ["reference"]


def instruction_sets(op: str) -> list[str]:
    """Those of this processor if `op` has a compiled CPU kernel, else UNCOMPILED."""
    return C.supported_isas() if implementation(op, "cpu").startswith("C++") else UNCOMPILED


def distinct_instruction_sets(op: str) -> list[str]:
    """The same for an op without products of integers or bfloat16: what extends AVX-512 changes nothing there."""
    return [name for name in instruction_sets(op) if not name.startswith("avx512_")]


@contextmanager
def in_use(name: str) -> Iterator[str]:
    """Within the block the CPU kernels are those of that instruction set; "reference" and "cuda..." change nothing."""
    if name in UNCOMPILED or name.startswith("cuda"):
        yield name
        return
    before = C.isa()
    C.set_isa(name)
    try:
        yield name
    finally:
        C.set_isa(before)
