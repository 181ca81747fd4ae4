"""The build backend: setuptools, plus what a compiled install needs and where torch's headers are.

torch is never a static build requirement: pip would fetch a second one of several gigabytes into its isolated
environment. The headers of the torch that is already installed serve; it is asked for only where there is none.
Run as a program, it prints the folder of those headers (CMakeLists.txt asks so).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (a PEP 517 backend is this module's functions)

MINIMUM_TORCH = (2, 11)


def find_torch_include() -> Path | None:
    """The include folder of an installed torch >= 2.11, found without importing it; None where there is none.

    Under pip's isolation torch cannot be imported, but sysconfig still names the environment being installed into.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent.parent] if spec and spec.origin else []
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    for scheme in (sysconfig.get_paths(), sysconfig.get_paths(vars=base)):
        folders += [Path(scheme["purelib"]), Path(scheme["platlib"])]
    folders.append(Path(site.getusersitepackages()))
    for folder in folders:
        include = folder / "torch" / "include"
        version_header = include / "torch" / "headeronly" / "version.h"
        if not version_header.is_file():
            continue
        found = dict(re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR) (\d+)", version_header.read_text()))
        if (int(found["MAJOR"]), int(found["MINOR"])) >= MINIMUM_TORCH:
            return include
    return None


def why_not_compiled() -> str:
    """Why nothing can be compiled on this machine; "" where it can."""
    if not sys.platform.startswith("linux"):
        return f"the kernels are compiled on Linux only, this is {sys.platform}"
    compiler = os.environ.get("CXX", "").split()
    if not any(shutil.which(name) for name in compiler[:1] or ("c++", "g++", "clang++")):
        return f"no C++ compiler was found ({compiler[0] if compiler else 'c++, g++ or clang++'})"
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").is_file():
        return f"Python's headers were not found ({include}/Python.h; Debian: python3-dev)"
    return ""


def _compile_requires() -> list[str]:
    if why_not_compiled():
        return []
    tools = ["cmake>=3.25", "ninja", "pybind11>=3"]
    return tools if find_torch_include() else [*tools, "torch>={}.{}".format(*MINIMUM_TORCH)]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _compile_requires()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _compile_requires()


if __name__ == "__main__":
    print(find_torch_include() or "")
