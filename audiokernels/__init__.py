"""Fast PyTorch ops for sequence models over raw audio. `python -m audiokernels` shows which kernel serves which op."""

from importlib.metadata import version as _version

from audiokernels.backends import Explanation, backends, explain
from audiokernels.dilated_conv_update import dilated_conv_update

__all__ = ["Explanation", "backends", "dilated_conv_update", "explain"]
__version__ = _version("audiokernels")
