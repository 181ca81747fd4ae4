"""The one place where an optional package is imported."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str = "models") -> ModuleType:
    """Import `module`, or say which extra of this distribution brings it.

    Errors: ImportError that names the package and the extra ("models", "train" or "dev").
    """
    try:
        return importlib.import_module(module)
    # OSError: a package whose shared library does not load (torchaudio beside another torch) fails this way.
    except (ImportError, OSError) as error:
        raise ImportError(f"{module} is needed here: pip install 'audiokernels[{extra}]' ({error})") from error
