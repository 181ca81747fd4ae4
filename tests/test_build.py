"""The build: what the binary holds and needs, the fallbacks, and that each is reported."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import audiokernels
from audiokernels import backends, explain
from audiokernels._library import C, C_error

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
build_backend = pytest.importorskip("build_backend")  # needs setuptools

compiled = pytest.mark.skipif(C is None, reason=f"pure-Python install: {C_error}")


def run(*command, **environment):
    env = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd="/")


def test_compiled_wherever_it_can_be():
    if C is None:
        assert build_backend.why_not_compiled(), f"a compiler is here, but: {C_error}"


@compiled
def test_cuda_is_compiled_where_nvcc_is():
    if shutil.which("nvcc") is None or os.environ.get("AUDIOKERNELS_CUDA") == "0":
        assert bool(C.cuda_archs) != bool(C.cuda_note)
        return
    wanted = {"sm_80", "sm_90a", "sm_100", "sm_120", "compute_120"}
    assert set(C.cuda_archs) == wanted or "TORCH_CUDA_ARCH_LIST" in os.environ
    assert backends()["dilated_conv_update"]["cuda"].startswith("CUDA C++ (sm_")
    assert ".nv_fatbin" in run("readelf", "-S", "-W", C.__file__).stdout


@compiled
def test_instruction_sets():
    supported = C.supported_isas()
    best = supported[-1]
    if best == "avx512_bf16" and "GenuineIntel" in Path("/proc/cpuinfo").read_text():
        best = "avx512_vnni"  # whose pairs are slow
    assert supported[0] == "generic" and C.isa() == best
    with pytest.raises(ValueError, match="name must be an instruction set.*generic.*got 'sse9'"):
        C.set_isa("sse9")
    assert C.isa() == best


@compiled
def test_objects_of_instruction_sets_share_no_code():
    """A weak symbol compiled for AVX-512 could be the copy that the linker keeps for every processor."""
    folder = next(iter(sorted(ROOT.glob("build/cmake-*/CMakeFiles/simd_avx512.dir/csrc"))), None)
    if folder is None:
        pytest.skip("not built in this tree on x86-64")
    objects = [path for isa in folder.parents[1].glob("simd_*.dir") for path in isa.rglob("*.o")]
    sources = list((ROOT / "csrc").glob("*_simd.cpp"))  # beyond AVX-512: those of packed weights; see float_isa()
    packed = sum(path.stem.endswith("_generate_simd") for path in sources)
    paired = packed + 2  # of avx512_bf16, and of avx512_amx where the assembler knows it: attention, both passes
    tiles = "AUDIOKERNELS_ASSEMBLES_TILES:INTERNAL=1" in (folder.parents[2] / "CMakeCache.txt").read_text()
    assert len(objects) == 3 * len(sources) + packed + (1 + tiles) * paired
    for path in objects:
        symbols = run("nm", "-C", path).stdout
        isa = re.search("simd_(.*)[.]dir", str(path))[1]
        assert f"audiokernels::{isa}::" in symbols
        assert not re.search(r" [WVu] ", symbols), f"{path.name} in {path.parent.parent.name} has weak symbols"


@compiled
def test_binary_needs_only_libtorch_cpu():
    """Found by its soname beside any torch, CUDA or not: no path, no libtorch_cuda, no shared cudart."""
    dynamic = run("readelf", "-d", C.__file__).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search("cuda|c10|torch_python|python", name)]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    text = Path(C.__file__).read_bytes()
    assert str(ROOT).encode() not in text and str(Path.home() / ".").encode() not in text


@compiled
def test_binary_uses_only_the_stable_abi():
    undefined = set(re.findall(r" U (\S+)", run("nm", "-D", C.__file__).stdout))
    assert not [name for name in undefined if re.match(r"_ZN?K?(2at|3c10|5torch)", name)]
    shims = {name for name in undefined if name.startswith(("aoti_torch_", "torch_"))}
    assert "torch_library_impl" in shims
    headers = Path(torch.__file__).parent / "include/torch/csrc"
    declared = "".join(
        (headers / name).read_text() for name in ("inductor/aoti_torch/c/shim.h", "stable/c/shim.h")
    )  # fmt: skip
    assert not [name for name in shims if not re.search(rf"\b{name}\(", declared) and "_dtype_" not in name]


@compiled
def test_stub_lists_what_the_module_has():
    tree = ast.parse((ROOT / "audiokernels/_C.pyi").read_text())
    stub = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    stub |= {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert stub == {name for name in dir(C) if not name.startswith("_")}


def test_version_stands_in_one_place():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert audiokernels.__version__ == version
    for path in [ROOT / "CMakeLists.txt", ROOT / "setup.py", *(ROOT / "audiokernels").glob("*.py")]:
        assert f'"{version}"' not in path.read_text()


def test_module_prints_the_table():
    out = run(sys.executable, "-m", "audiokernels").stdout
    for op, devices in backends().items():
        for device, implementation in devices.items():
            assert re.search(rf"^{op} +{device} +{re.escape(implementation)}$", out, re.MULTILINE)
    for fact in ("compiled module", "torch running", torch.__version__):
        assert fact in out


def test_explain_knows_its_ops():
    with pytest.raises(ValueError, match="op must be one of .*dilated_conv_update.*got nothing"):
        explain("nothing")


# ---- fallbacks

STEP = """
import importlib.metadata, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]  # would find the installed _C
import torch
def none(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = none  # a folder that was copied has no metadata
import audiokernels
assert audiokernels.__version__ == "unknown"
out = audiokernels.dilated_conv_update(
    torch.ones(1, 3), torch.ones(1, 2, 3), torch.ones(4, 3, 2), None, torch.zeros(1, dtype=torch.int32), dilation=2)
assert out.tolist() == [[6.0] * 4], out
print(audiokernels.backends()["dilated_conv_update"]["cpu"])
"""


@pytest.mark.parametrize("case", ["absent", "noted", "broken"])
def test_without_the_compiled_module(case, tmp_path):
    """The ops run through their reference, with a warning at import; backends() tells why."""
    package = shutil.copytree(ROOT / "audiokernels", tmp_path / "audiokernels", ignore=shutil.ignore_patterns("_C.*"))
    expected = "without being built"
    if case == "noted":
        (package / "not_compiled.txt").write_text(expected := "no C++ compiler was found (c++)")
    if case == "broken":
        (package / "_C.abi3.so").write_bytes(b"not a library")
        expected = "was found but could not be loaded"
    result = run(sys.executable, "-c", STEP, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("reference (plain torch): ") and expected in result.stdout
    assert "RuntimeWarning: audiokernels runs on its slow plain-torch reference" in result.stderr


def test_backend_asks_for_torch_only_where_there_is_none(monkeypatch):
    monkeypatch.setattr(build_backend, "why_not_compiled", lambda: "")
    assert build_backend.find_torch_include() == Path(torch.__file__).parent / "include"
    assert not [r for r in build_backend.get_requires_for_build_wheel() if r.startswith("torch")]
    monkeypatch.setattr(build_backend, "find_torch_include", lambda: None)
    assert "torch>=2.11" in build_backend.get_requires_for_build_wheel()
    assert "torch>=2.11" in build_backend.get_requires_for_build_editable()
    monkeypatch.setattr(build_backend, "why_not_compiled", lambda: "no C++ compiler")
    assert not [r for r in build_backend.get_requires_for_build_wheel() if re.match("torch|cmake|ninja", r)]


def test_reasons_for_a_pure_python_install(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler was found (c++, g++ or clang++)" in build_backend.why_not_compiled()
    monkeypatch.setenv("CXX", "my-cxx -O2")
    assert "no C++ compiler was found (my-cxx)" in build_backend.why_not_compiled()


def test_environment_is_checked():
    result = run(sys.executable, ROOT / "setup.py", "--version", AUDIOKERNELS_CUDA="yes")
    assert result.returncode != 0 and "AUDIOKERNELS_CUDA must be 0, 1 or auto, got 'yes'" in result.stderr
    result = run(sys.executable, ROOT / "setup.py", "--version", AUDIOKERNELS_CUDA="1", PATH="/nowhere", CXX=None)
    assert result.returncode != 0 and "AUDIOKERNELS_CUDA=1, but no C++ compiler was found" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["80", "90a", "100", "120"])
@pytest.mark.parametrize("path", sorted((ROOT / "csrc").glob("*_cuda.cu")), ids=lambda path: path.stem)
def test_cuda_kernels_spill_no_registers(path, arch, tmp_path):
    target = ["-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v", "-o", tmp_path / "x.cubin"]
    done = subprocess.run(["nvcc", "-std=c++17", "-O3", *target, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills and set(spills) == {("0", "0")}, done.stderr
