"""The compiled module: importing it registers the kernels with torch; it also tells how it was built."""

torch_version: str
compiler: str
cuda_archs: tuple[str, ...]
cuda_note: str

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def supported_isas() -> tuple[str, ...]: ...
