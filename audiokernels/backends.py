"""Which kernel serves which op on which device, and why: a silent fallback cannot hide."""

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from audiokernels._library import C, C_error

REFERENCE = "reference (plain torch)"
ASKED = "use_reference asks for it"


@dataclass(frozen=True)
class Explanation:
    """What one call takes: the kernel, why that one, its floating-point operations and the bytes it must move."""

    kernel: str
    why: str
    flops: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.kernel}: {self.why}; {self.flops:,} FLOPs, {self.bytes:,} bytes"


_describers: dict[str, Callable[..., Explanation]] = {}


def describe(op: str, fn: Callable[..., Explanation]) -> None:
    """Register what explain(op, ...) answers; fn takes the op's own arguments."""
    _describers[op] = fn


def explain(op: str | Callable, *args, **kwargs) -> Explanation:
    """The kernel that `op(*args, **kwargs)` would take, without running it.

    Args:
        op: a public function of audiokernels or its name.

    Raises:
        TypeError: these arguments are not those of op.
        ValueError: op is none of those that can be explained.
    """
    name = _known(op)
    try:
        inspect.signature(getattr(sys.modules[_describers[name].__module__], name)).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"explain({name}, ...): {error}") from None
    answer = _describers[name](*args, **kwargs)
    if any(implementation(name, device).endswith(ASKED) for device in ("cpu", "cuda")):
        return replace(answer, kernel=REFERENCE, why=ASKED)
    return answer


@contextmanager
def use_reference(*ops: str | Callable) -> Iterator[None]:
    """Serve ops by plain torch for a while, in all threads: is it the kernel, or is it my model?

        with audiokernels.use_reference():  # or use_reference("causal_attention", "haar_pool")
            loss = model(x)

    On CPU and CUDA, also in compiled graphs. A backward pass takes what serves its op when it runs. Slow, and
    causal_attention needs memory of O(seqlen^2) then. What `backends()` does not list, WaveNetStream, stays as it is.

    Args:
        ops: public functions of audiokernels or their names, those that `backends()` lists; none: all of them. An op's
            backward op goes with it.

    Raises:
        ValueError: an op is none of those.
    """
    names = {_known(op) for op in ops} or set(_describers)
    names |= {f"{name}_backward" for name in names} & set(_describers)
    override = torch.library.Library("audiokernels", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that a kernel is overridden
            for name in names:
                reference = getattr(sys.modules[_describers[name].__module__], f"{name}_ref")
                for device in ("CPU", "CUDA"):
                    if torch._C._dispatch_has_kernel_for_dispatch_key(f"audiokernels::{name}", device):
                        override.impl(name, reference, device, allow_override=True)  # torch 2.11 asks for it
        yield
    finally:
        override._destroy()


def _known(op: str | Callable) -> str:
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _describers:
        raise ValueError(f"op must be one of {', '.join(sorted(_describers))}, got {name}")
    return name


def backends() -> dict[str, dict[str, str]]:
    """{op: {device: implementation}} of this installation; where it is the reference, the reason stands beside it."""
    return {op: {device: implementation(op, device) for device in ("cpu", "cuda")} for op in sorted(_describers)}


def implementation(op: str, device: str) -> str:
    """What serves `op` on "cpu" or "cuda": asked of torch's dispatcher, not remembered."""
    dump = torch._C._dispatch_dump(f"audiokernels::{op}")
    kernel = re.search(rf"^{device.upper()}: registered at (.*?):\d+", dump, re.MULTILINE)
    if kernel is None:
        return f"{REFERENCE}: {_why_reference(device)}"
    if kernel[1] == __file__:  # use_reference's Library is made here
        return f"{REFERENCE}: {ASKED}"
    if not kernel[1].endswith(".cpp") and not _private(op, device):
        return "Triton"
    return f"C++ ({C.isa()})" if device == "cpu" else f"CUDA C++ ({', '.join(C.cuda_archs)})"


def _private(op: str, device: str) -> bool:
    """Whether a launcher in Python stands before a compiled op, named _<op>_<device>."""
    name = f"audiokernels::_{op}_{device}"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return torch._C._dispatch_has_kernel(name) and has_kernel(name, device.upper())


def _why_reference(device: str) -> str:
    if C is None:
        return C_error
    if device == "cuda" and C.cuda_note:
        return f"{C.cuda_note} when it was built"
    return f"no {device} kernel is written for it yet"


def facts() -> dict[str, str]:
    """The facts of this build and machine, as `python -m audiokernels` prints them."""
    cuda = "no GPU is visible" if torch.version.cuda else "this torch is a CPU build"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        cuda = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    result = {"torch running": torch.__version__, "GPU": cuda}
    if C is None:
        return {"compiled module": f"none: {C_error}", **result}
    return {
        "compiled module": f"{C.__file__}, g++ {C.compiler}",
        "torch built against": f"{C.torch_version} (stable ABI: any torch >= 2.11 will do)",
        **result,
        "instruction set in use": C.isa(),
        "instruction sets supported": ", ".join(C.supported_isas()),
        "CUDA architectures": ", ".join(C.cuda_archs) or f"none: {C.cuda_note} when it was built",
    }
