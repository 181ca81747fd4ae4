"""Fast PyTorch ops for sequence models over raw audio. `python -m audiokernels` shows which kernel serves which op."""

from importlib.metadata import version as _version

from ._library import C as _C  # noqa: F401  (registers the compiled kernels)

__version__ = _version("audiokernels")
