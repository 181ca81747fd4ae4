"""Runs CMake for audiokernels._C. What is compiled: CMakeLists.txt. Metadata: pyproject.toml.

Environment: AUDIOKERNELS_CUDA=0|1|auto (default auto), TORCH_CUDA_ARCH_LIST, DEBUG=1.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))
from build_backend import why_not_compiled  # noqa: E402

ROOT = Path(__file__).resolve().parent
NOT_COMPILED = why_not_compiled()
CUDA = os.environ.get("AUDIOKERNELS_CUDA", "auto")
DEBUG = os.environ.get("DEBUG", "0") == "1"

if CUDA not in ("0", "1", "auto"):
    sys.exit(f"AUDIOKERNELS_CUDA must be 0, 1 or auto, got {CUDA!r}")
if NOT_COMPILED and CUDA == "1":
    sys.exit(f"AUDIOKERNELS_CUDA=1, but {NOT_COMPILED}")


def run(*command: object) -> None:
    try:
        subprocess.run([str(part) for part in command], check=True)
    except FileNotFoundError:
        sys.exit(f"{command[0]} was not found: pip install cmake ninja pybind11 (or install with build isolation)")
    except subprocess.CalledProcessError as error:
        sys.exit(f"the compiled part of audiokernels failed to build (exit {error.returncode}); the reason is above")


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import fcntl  # nothing is compiled where there is none

        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # pip may run with its bin/ not on PATH
        ninja = shutil.which("ninja")  # named each time: pip's isolated one is gone at the next build
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
        tag = sys.implementation.cache_tag + ("" if ninja else "-make") + ("-debug" if DEBUG else "")
        folder = ROOT / "build" / f"cmake-{tag}"
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")  # held until this function returns: one build at a time in a folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("cmake", "-S", ROOT, "-B", folder, *generator, f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if DEBUG else 'Release'}", f"-DAUDIOKERNELS_CUDA={CUDA}")  # fmt: skip
        run("cmake", "--build", folder, "--parallel")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(folder / target.name, target)


class CleanBuild(build):
    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)  # or a module removed from the sources would still ship
        super().run()


class NoteBuild(build_py):
    """Leaves the reason for a pure-Python install where `python -m audiokernels` finds it."""

    def run(self):
        super().run()
        package = ROOT if self.editable_mode else Path(self.build_lib)
        note = package / "audiokernels" / "not_compiled.txt"
        note.unlink(missing_ok=True)
        if NOT_COMPILED:
            print(f"\n*** audiokernels: PURE-PYTHON INSTALL, no kernel is compiled: {NOT_COMPILED}\n", file=sys.stderr)
            note.write_text(NOT_COMPILED)
            for stale in package.glob("audiokernels/_C.*.so"):
                stale.unlink()


setup(
    ext_modules=[] if NOT_COMPILED else [Extension("audiokernels._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild, "build_py": NoteBuild},
)
