"""The rules of the house (CONTRIBUTING.md) that a program can check.

A rule is a function from {path: text} to the violations it sees. Each runs twice: over the tracked files, where it must
see none, and over its planted samples, in each of which it must see the violation that the sample is named after.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import audiomodels
import pytest
from house import (
    MODELS,
    OPS,
    PROJECT,
    Files,
    Rules,
    calls,
    cpp,
    cpp_functions,
    dotted,
    functions,
    imports,
    lines,
    module_all,
    names_by_git,
    names_by_walking,
    ops,
    parameters,
    pyproject,
    python,
    tracked,
    unseen,
    violations,
)

import audiokernels

CODE = (".py", ".pyi", ".cpp", ".h", ".cu", ".txt", ".sh", ".md", ".toml")
SHARED = {"philox", "backends", "sampling"}  # modules that belong to no room, beside those with an underscore
SHARED_HEADERS = {
    "isa.h",
    "simd.h",
    "tiles.h",
    "dtype.h",
    "floats.h",
    "torch_stable.h",
    "cuda_stream.h",
    "generation.h",
    "generation_call.h",
    "generation_call_cuda.h",
    "generation_cuda.h",
    "generation_device.h",
    "packed_product.h",
    "sampling.h",
    "ptx.h",
    "ptx_on_host.h",
}
OPTIONAL_HELPERS = {f"{OPS}_library.py", f"{MODELS}_optional.py", "benchmarks/common.py"}
TORCHRUN = {"WORLD_SIZE", "RANK", "LOCAL_RANK"}  # it tells its processes nothing in another way
BUILD_VARIABLES = {"AUDIOKERNELS_CUDA", "TORCH_CUDA_ARCH_LIST", "DEBUG"} | {"CXX", "CUDACXX", "CUDA_HOME", "PATH"}
DISTRIBUTION = {  # where names differ
    "sklearn": "scikit-learn",
    "torch.utils.tensorboard": "tensorboard",
    "vector_quantize_pytorch": "vector-quantize-pytorch",
}

rule = Rules()


# ---- who may import what


def room(stem: str) -> str:
    """wavenet_pack and wavenet_generate are of the room "wavenet"; "" for what all rooms share."""
    return "" if stem in SHARED or stem.startswith("_") else stem.split("_")[0]


@rule(
    ("must not import audiomodels", {f"{OPS}x.py": "import audiomodels"}),
    ("must not import scipy", {f"{OPS}x.py": "def f():\n    from scipy.signal import lfilter"}),
    ("another room, haar_pool", {f"{OPS}wavenet_x.py": "from audiokernels.haar_pool import f"}),
    ("another room, causal_attention", {f"{OPS}wavenet_x.py": "from .causal_attention import f"}),
    ("another room, wavenet_pack", {f"{OPS}backends.py": "from audiokernels import wavenet_pack"}),
    ("", {f"{OPS}integrations/x.py": "import x\nfrom audiokernels import haar_pool"}),
    ("must not import audiomodels", {f"{OPS}integrations/x.py": "import audiomodels"}),
)
def audiokernels_imports_torch_triton_numpy_and_no_other_room(files):
    allowed = {*sys.stdlib_module_names, "torch", "triton", "numpy", "audiokernels"}
    for path, tree in python(files, OPS):
        stem = Path(path).stem
        for line, module, names in imports(path, tree):
            root, *rest = module.split(".")
            if root not in allowed and not (path.startswith(f"{OPS}integrations/") and root != "audiomodels"):
                yield f"{path}:{line}: must not import {root}"
            outside = stem in ("__init__", "__main__") or path.startswith(f"{OPS}integrations/")
            if root == "audiokernels" and not outside:
                for target in rest[:1] or names:
                    if room(target) not in ("", room(stem)):
                        yield f"{path}:{line}: imports another room, {target}"


@rule(
    (
        "not public: philox",
        {
            f"{OPS}__init__.py": "__all__ = ['explain']",
            f"{MODELS}x.py": "from audiokernels import philox",
        },
    ),
    ("from audiokernels itself", {f"{MODELS}x.py": "from audiokernels.philox import philox_uniform"}),
    (
        "not public: secret",
        {
            f"{OPS}__init__.py": "__all__ = []",
            f"{MODELS}x.py": "import audiokernels\naudiokernels.secret",
        },
    ),
    ("torch.ops", {f"{MODELS}x.py": "import torch\ntorch.ops.audiokernels.haar_pool(1)"}),
)
def audiomodels_uses_public_names_of_audiokernels(files):
    public = set(module_all(files.get(f"{OPS}__init__.py", "__all__ = []"))) | {"__version__"}
    for path, tree in python(files, MODELS):
        for line, module, names in imports(path, tree):
            if module.startswith("audiokernels."):
                yield f"{path}:{line}: must import from audiokernels itself, not {module}"
            if module == "audiokernels":
                yield from (f"{path}:{line}: not public: {name}" for name in names if name not in public)
        for node in ast.walk(tree):
            name = dotted(node)
            if name.startswith("torch.ops.audiokernels"):
                yield f"{path}:{node.lineno}: must not call torch.ops"
            if name.startswith("audiokernels.") and name.split(".")[1] not in public:
                yield f"{path}:{node.lineno}: not public: {name.split('.')[1]}"


@rule(
    ("must not import scipy", {f"{MODELS}x.py": "import scipy.signal"}),
    (
        "extra train does not bring soxr",
        {
            "pyproject.toml": "[project.optional-dependencies]\nmodels = ['soxr']\ntrain = ['tqdm']",
            f"{MODELS}x.py": 'soxr = require("soxr", "train")',
        },
    ),
)
def audiomodels_asks_for_optional_packages_with_require(files):
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "audiokernels", "audiomodels"}
    for path, tree in python(files, MODELS):
        for line, module, _ in imports(path, tree):
            if module.split(".")[0] not in allowed:
                yield f"{path}:{line}: must not import {module}, but require() it"
        for node, name, constants in calls(tree):
            if name.split(".")[-1] == "require" and constants:
                module, extra = constants[0], [*constants, "models"][1]
                package = DISTRIBUTION.get(module, DISTRIBUTION.get(module.split(".")[0], module.split(".")[0]))
                extras = pyproject(files)["project"]["optional-dependencies"]
                if package not in [re.split(r"[^\w-]", r)[0] for r in extras.get(extra, [])]:
                    yield f"{path}:{node.lineno}: extra {extra} does not bring {package}"


@rule(
    ("must not use audiokernels._library", {"benchmarks/x.py": "from audiokernels._library import C"}),
    ("must not use audiomodels.wavenet._rows", {"benchmarks/x.py": "from audiomodels.wavenet import _rows"}),
    ("must not use audiokernels._C", {"benchmarks/x.py": "import audiokernels\naudiokernels._C.isa()"}),
)
def benchmarks_use_no_private_names(files):
    """But common.py, which is their door to the switch of instruction sets."""
    ours = ("audiokernels", "audiomodels")
    for path, tree in python({**files, "benchmarks/common.py": ""}, "benchmarks/"):
        used = [(line, module, names) for line, module, names in imports(path, tree)]
        used += [(node.lineno, dotted(node), []) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        for line, module, names in used:
            for name in [f"{module}.{name}" for name in names] or [module]:
                if name.startswith(ours) and re.search(r"\._(?!_)", name):
                    yield f"{path}:{line}: must not use {name}"


@rule(
    ("must not import soundfile", {"benchmarks/x.py": "import soundfile"}),
    ("must not import scipy", {f"{OPS}haar_pool.py": "", "tests/test_haar_pool.py": "from scipy import signal"}),
)
def gpu_tests_and_benchmarks_need_what_a_gpu_machine_has(files):
    """Elsewhere than at the top of a file, that is where it is used, anything may be imported: the peers are."""
    there = {"torch", "triton", "numpy", "pytest", "hypothesis", "matplotlib", "sklearn", "audiokernels"}
    doors = {f"tests/test_{Path(path).stem}.py" for path in files if path.startswith(OPS)}
    for path, tree in python(files, "benchmarks/", "tests/"):
        if path.startswith("benchmarks/") or path in doors:
            packages = [Path(other).parent for other in files if other.endswith("/__init__.py")]
            beside = {other.stem for other in [*map(Path, files), *packages] if other.parent == Path(path).parent}
            top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
            for line, module, _ in imports(path, top):
                if (root := module.split(".")[0]) not in {*sys.stdlib_module_names, *there, *beside}:
                    yield f"{path}:{line}: must not import {root}"


@rule(
    ("executes something", {f"{OPS}__init__.py": "import torch\ntorch.set_num_threads(1)"}),
    ("executes something", {f"{MODELS}__init__.py": "for x in range(3):\n    pass"}),
)
def init_files_execute_nothing(files):
    for path, tree in python(files, OPS, MODELS):
        if path.endswith("/__init__.py"):
            for node in tree.body:
                text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                if not text and not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.FunctionDef):
                    yield f"{path}:{node.lineno}: executes something"


# ---- what Python may not do


@rule(
    ("is_cuda", {f"{OPS}x.py": "def f(x):\n    return x.is_cuda"}),
    ("is_cpu", {f"{MODELS}x.py": "x.is_cpu"}),
)
def the_dispatcher_picks_the_device(files):
    for path, tree in python(files, OPS, MODELS, "benchmarks/"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "is_cpu"):
                yield f"{path}:{node.lineno}: {node.attr}"


@rule(
    ("os.environ is read in f", {f"{OPS}x.py": "import os\ndef f():\n    return os.environ.get('FAST')"}),
    ("", {f"{MODELS}x.py": "import os\ndef f():\n    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')"}),
    ("getenv is read in f", {f"{MODELS}x.py": "from os import getenv\ndef f():\n    return getenv('FAST')"}),
    ("environment variable", {"csrc/x.cpp": 'bool fast = std::getenv("FAST");'}),
    ("AUDIOKERNELS_FAST is none", {"setup.py": "import os\nFAST = os.environ.get('AUDIOKERNELS_FAST')"}),
    ("AUDIOKERNELS_FAST is none", {"CMakeLists.txt": "set(x $ENV{AUDIOKERNELS_FAST})"}),
)
def no_environment_variable_is_read_at_call_time(files):
    for path, tree in python(files, OPS, MODELS):
        for function in functions(tree):
            for node in ast.walk(function):
                name = dotted(node)
                if name.endswith("os.environ") or name.split(".")[-1] == "getenv":
                    line = files[path].splitlines()[node.lineno - 1]
                    if "environ.setdefault(" not in line and not set(re.findall(r"\"(\w+)\"", line)) & TORCHRUN:
                        yield f"{path}:{node.lineno}: {name} is read in {function.name}"
    for path, text in cpp(files):
        yield from (f"{path}:{line}: environment variable" for line, _ in lines(r"\bgetenv\b", text))
    for path in ("setup.py", "build_backend.py", "CMakeLists.txt"):
        for line, match in lines(r"(?:environ(?:\.get\(|\[)[\"']|ENV[{ ])(\w+)", files.get(path, "")):
            if match[1] not in BUILD_VARIABLES:
                yield f"{path}:{line}: {match[1]} is none of the variables of the build"


@rule(
    ("try: import", {f"{OPS}x.py": "try:\n    import triton\nexcept ImportError:\n    triton = None"}),
    ("try: import", {f"{MODELS}x.py": "try:\n    t = importlib.import_module('t')\nexcept Exception:\n    t = None"}),
    ("try: import", {"benchmarks/x.py": "with contextlib.suppress(ImportError):\n    import flash_attn"}),
)
def one_helper_finds_optional_packages(files):
    for path, tree in python(files):
        if path in OPTIONAL_HELPERS:
            continue
        for node in ast.walk(tree):
            suppress = isinstance(node, ast.With) and "suppress" in ast.dump(node.items[0])
            if not suppress and not (isinstance(node, ast.Try) and node.handlers):
                continue
            for inner in (part for statement in node.body for part in ast.walk(statement)):
                called = isinstance(inner, ast.Call) and dotted(inner.func).endswith("import_module")
                if called or isinstance(inner, ast.Import | ast.ImportFrom):
                    yield f"{path}:{inner.lineno}: try: import"


@rule(
    ("imports pickle", {f"{MODELS}x.py": "import pickle"}),
    ("torch.load", {f"{MODELS}x.py": "torch.load(path, weights_only=True)"}),
    ("torch.save", {"benchmarks/x.py": "torch.save(x, path)"}),
    ("allow_pickle", {f"{MODELS}x.py": "numpy.load(path, allow_pickle=True)"}),
    ("save_state", {f"{MODELS}x.py": "accelerator.save_state(path)"}),
    ("load_state_dict", {f"{MODELS}x.py": "from torch.distributed.checkpoint import load_state_dict"}),
)
def no_pickle_is_read_from_a_file(files):
    modules = r"(pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)(\.|$)"
    named = r"(torch\.(load|save|jit\.load|jit\.save|hub\.load\w*|package\.\w+)|.*read_pickle|.*\.(save|load)_state)$"
    for path, tree in python(files, OPS, MODELS, "benchmarks/", "setup.py", "build_backend.py"):
        for line, module, names in imports(path, tree):
            if re.match(modules, module):
                yield f"{path}:{line}: imports {module}"
            if module == "torch.distributed.checkpoint":
                yield f"{path}:{line}: {module} (its files hold pickles): {names}"
            if module == "torch" and {"load", "save"} & set(names):
                yield f"{path}:{line}: torch.load"
        for node, name, _ in calls(tree):
            if re.match(named, name):
                yield f"{path}:{node.lineno}: {name}"
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and getattr(keyword.value, "value", True) is not False:
                    yield f"{path}:{node.lineno}: allow_pickle"


@rule(
    ("assert", {f"{OPS}x.py": "def f(x):\n    assert x > 0"}),
)
def no_assert_instead_of_an_error(files):
    for path, tree in python(files, OPS, MODELS):
        yield from (f"{path}:{node.lineno}: assert " for node in ast.walk(tree) if isinstance(node, ast.Assert))


@rule(
    (
        "postponed annotations",
        {f"{MODELS}x.py": "from __future__ import annotations\nfrom audiomodels.pretrained import Pretrained"},
    ),
    (
        "postponed annotations",
        {f"{MODELS}x.py": "from __future__ import annotations\nPyTorchModelHubMixin = require('huggingface_hub')"},
    ),
)
def hub_models_have_real_annotations(files):
    """The hub's mixin reads the annotations of __init__: text instead of types makes it lose the config."""
    for path, tree in python(files, MODELS):
        future = any(module == "__future__" for _, module, _ in imports(path, tree))
        if future and re.search(r"PyTorchModelHubMixin|import Pretrained\b", files[path]):
            yield f"{path}: postponed annotations in a file of a hub model"


# ---- size and documentation


@rule(
    ("has 801 lines", {"csrc/x.cpp": "\n" * 801}),
)
def no_file_over_800_lines(files):
    for path, text in files.items():
        if path.endswith(CODE) and text.count("\n") > 800:
            yield f"{path}: has {text.count(chr(10))} lines"


TEN = {f"csrc/haar_pool_{i}.cpp": "" for i in range(10)}


@rule(
    ("room haar_pool has 11 files", {f"{OPS}haar_pool.py": "", **TEN}),
    ("room haar_pool has 12 files", {f"{OPS}haar_pool.py": "", f"{OPS}haar_pool_triton.py": "", **TEN}),
    (
        "",
        {
            f"{OPS}haar_pool.py": "",
            f"{OPS}haar_pool_9.py": 'lib.define("haar_pool_9() -> ()")',
            **TEN,
            "x_haar_pool_9": "",
        },
    ),
    ("", {f"{OPS}haar_pool.py": 'lib.define("_haar_pool_9() -> ()")', **TEN}),
)
def no_room_over_10_files(files):
    """A file belongs to the longest op that its name holds: causal_attention_decode counts by itself, and so does
    causal_attention_sm90, whose op has an underscore before its name."""
    doors = {op.name.lstrip("_") for op in ops(files)}
    for stem in (Path(path).stem for path in files if re.match(rf"{OPS}\w+\.py$", path)):
        longer = [door for door in doors if stem in door and stem != door]
        named = (path for path in files if stem in Path(path).name)
        inside = [path for path in named if not any(door in Path(path).name for door in longer)]
        if room(stem) and len(inside) > 10:
            yield f"room {stem} has {len(inside)} files"


NINE = "a, b, c, d, e, f, g, h, i"
NINE_OP = f"""
lib.define("haar_x({", ".join(f"Tensor? {name}" for name in NINE.split(", "))}) -> Tensor")
def haar_x({NINE}): pass
def haar_x_ref({NINE}): pass
"""


@rule(
    ("f has 9 parameters", {f"{OPS}x.py": f"def f({NINE}): pass"}),
    ("__init__ has 9 parameters", {f"{MODELS}x.py": f"class C:\n    def __init__(self, *, {NINE}): pass"}),
    (
        "g has 9 parameters",
        {"csrc/x.cpp": "static void g(int a, int b, int c, X<int, int> d,\n int e, int f, int g, T h, int i)"},
    ),
    ("k has 9 parameters", {"csrc/x.cu": f"__global__ void k({NINE.replace(',', '[2], int')}) {{}}"}),
    ("", {f"{OPS}x_triton.py": f"@triton.jit\ndef k({NINE}): pass\n@jit(noinline=True)\ndef l({NINE}): pass"}),
    ("launch has 9 parameters", {f"{OPS}x_triton.py": f"@triton.jit\ndef k(): pass\ndef launch({NINE}): pass"}),
    ("", {f"{OPS}haar_x.py": NINE_OP, "csrc/haar_x_cpu.cpp": f"Tensor haar_x(Tensor {NINE.replace(',', ', Tensor')})"}),
    ("haar_x_ref has 10 parameters", {f"{OPS}haar_x.py": NINE_OP.replace("_ref(", "_ref(z, ")}),
    ("haar_y has 9 parameters", {f"{OPS}haar_x.py": NINE_OP.replace("def haar_x(", "def haar_y(")}),
)
def no_function_over_8_parameters(files):
    """But Triton kernels, and what takes the arguments of an op with more: that is op, op_ref and its launchers."""
    arguments = {op.name: len(re.findall(r"[\w?!()\[\]]+ \w+(?=[,=)])", op.schema.split("->")[0])) for op in ops(files)}

    def allowed(name):
        return max(8, arguments.get(name.removesuffix("_ref"), 0))

    for path, tree in python(files):
        for function in functions(tree):
            triton = any(ast.unparse(d).split("(")[0].split(".")[-1] == "jit" for d in function.decorator_list)
            if len(parameters(function)) > allowed(function.name) and not triton:
                yield f"{path}:{function.lineno}: {function.name} has {len(parameters(function))} parameters"
    for path, text in cpp(files):
        for line, name, count in cpp_functions(text):
            if count > allowed(name):
                yield f"{path}:{line}: {name} has {count} parameters"


@rule(
    ("x.py: has no docstring", {f"{OPS}x.py": "import torch"}),
    ("f has no docstring", {f"{MODELS}x.py": '"""Doc."""\ndef f() -> None: pass'}),
    ("C has no docstring", {f"{MODELS}x.py": '"""Doc."""\nclass C: pass'}),
    ("", {f"{MODELS}x.py": '"""Doc."""\n@overload\ndef f() -> None: ...\ndef f() -> None:\n    """Doc."""'}),
    ("g must say the type of y", {f"{MODELS}x.py": '"""Doc."""\ndef g(x: int, y) -> int:\n    """Doc."""'}),
    ("m must say what it returns", {f"{MODELS}x.py": '"""D."""\nclass C:\n    """D."""\n    def m(self): pass'}),
    (
        "op must say the type of x",
        {
            f"{OPS}__init__.py": '"""D."""\n__all__ = ["op"]',
            f"{OPS}op.py": '"""D."""\ndef op(x) -> int:\n    """D."""',
        },
    ),
)
def public_names_have_docstrings_and_type_hints(files):
    """Public are the names of an __all__; in a module of audiomodels without one, those without an underscore."""
    exported = module_all(files.get(f"{OPS}__init__.py", "__all__ = []"))
    for path, tree in python(files, OPS, MODELS):
        if files[path].strip() and not ast.get_docstring(tree):
            yield f"{path}: has no docstring"
        names = exported if path.startswith(OPS) else module_all(files[path])
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if node.name not in names and (names or path.startswith(OPS)):
                continue
            if not ast.get_docstring(node) and "overload" not in map(dotted, node.decorator_list):
                yield f"{path}:{node.lineno}: {node.name} has no docstring"
            members = [node] if isinstance(node, ast.FunctionDef) else node.body
            for function in (m for m in members if isinstance(m, ast.FunctionDef)):
                if not function.name.startswith("_") or function.name == "__init__":
                    yield from (f"{path}:{function.lineno}: {function.name} {lack}" for lack in missing_hints(function))


def missing_hints(function: ast.FunctionDef) -> Iterator[str]:
    for arg in parameters(function):
        if arg.annotation is None:
            yield f"must say the type of {arg.arg}"
    if function.returns is None and function.name != "__init__":
        yield "must say what it returns"


# ---- ops


DOOR = '''"""Sums. A paper. Its cost."""
from audiokernels._library import lib
from audiokernels.backends import describe
lib.define("haar_x(Tensor x, SymInt n) -> Tensor")
def haar_x(x, n):
    return _op(x, n)
def haar_x_ref(x, n):
    return x
def _fake(x, n):
    return x
lib.impl("haar_x", haar_x_ref, "CompositeExplicitAutograd")
torch.library.register_fake("audiokernels::haar_x", _fake, lib=lib)
describe("haar_x", _explain)
'''
HOUSE = {"tests/test_haar_x.py": "opcheck(op) fullgraph=True", "benchmarks/benchmark_haar_x.py": ""}


def door(before: str, after: str) -> Files:
    assert before in DOOR
    return {f"{OPS}haar_x.py": DOOR.replace(before, after), **HOUSE}


@rule(
    ("", {f"{OPS}haar_x.py": DOOR, **HOUSE}),
    ("no public function haar_x", door("def haar_x(x, n)", "def haar_y(x, n)")),
    ("no reference haar_x_ref", door("def haar_x_ref", "def other_ref")),
    ("no reference registered as CompositeExplicitAutograd", door('"CompositeExplicitAutograd"', '"CPU"')),
    ("no fake", door("audiokernels::haar_x", "audiokernels::haar_y")),
    ("not described", door('describe("haar_x"', 'describe("haar_y"')),
    ("sizes are SymInt", door("SymInt n", "int n")),
    ("out of order", {f"{OPS}haar_x.py": DOOR.replace("haar_x_ref(x", "_(x") + "def haar_x_ref(x): pass", **HOUSE}),
    ("its test does without opcheck(", {**door("x", "x"), "tests/test_haar_x.py": "fullgraph=True"}),
    ("no tests/test_haar_x.py", {f"{OPS}haar_x.py": DOOR, "benchmarks/benchmark_haar_x.py": ""}),
    ("no benchmarks/benchmark_haar_x.py", {f"{OPS}haar_x.py": DOOR, "tests/test_haar_x.py": ""}),
    ("custom_op", {f"{OPS}x.py": "@torch.library.custom_op('audiokernels::x', mutates_args=())\ndef x(): pass"}),
    ("schema in C++", {"csrc/x_cpu.cpp": 'STABLE_TORCH_LIBRARY(audiokernels, m) { m.def("x() -> ()"); }'}),
)
def every_op_has_its_whole_room(files):
    """Schema, public function, reference and registrations in this order, a fake, a description, a test, a benchmark.

    An op whose name begins with an underscore is a kernel behind another op: it needs its schema and its fake only.
    """
    for op in ops(files):
        where, stem = f"{op.path}:{op.line}: {op.name}", Path(op.path).stem
        made = [(name.split(".")[-1], constants, node.lineno) for node, name, constants in calls(op.tree)]
        defined = {node.name: node.lineno for node in op.tree.body if isinstance(node, ast.FunctionDef)}
        if re.search(r"[(,] *int\??(\[\])? (?!shape)", op.schema):
            yield f"{where}: sizes are SymInt in a schema"
        if not any(name == "register_fake" and args == [f"audiokernels::{op.name}"] for name, args, _ in made):
            yield f"{where}: no fake"
        if op.name.startswith("_"):
            continue
        impl = [line for name, args, line in made if (name, args) == ("impl", [op.name, "CompositeExplicitAutograd"])]
        steps = {
            f"public function {op.name}": defined.get(op.name),
            f"reference {op.name}_ref": defined.get(f"{op.name}_ref"),
            "reference registered as CompositeExplicitAutograd": next(iter(impl), None),
        }
        yield from (f"{where}: no {what}" for what, line in steps.items() if line is None)
        order = [op.line, *(line for line in steps.values() if line is not None)]
        if order != sorted(order):
            yield f"{where}: out of order: schema, public function, reference, registrations"
        if not any(name == "describe" and args[:1] == [op.name] for name, args, _ in made):
            yield f"{where}: not described: explain() and backends() do not know it"
        for needed in (f"tests/test_{stem}.py", f"benchmarks/benchmark_{stem}.py"):
            if needed not in files:
                yield f"{where}: no {needed}"
        for word in ("opcheck(", "fullgraph=True"):
            if word not in files.get(f"tests/test_{stem}.py", word):
                yield f"{where}: its test does without {word}"
    for path, tree in python(files, OPS):
        for node in ast.walk(tree):
            if dotted(node).split(".")[-1] in ("custom_op", "triton_op"):
                yield f"{path}:{node.lineno}: custom_op costs ten times a call of lib.define"
    for path, text in cpp(files):
        yield from (f"{path}:{line}: schema in C++" for line, _ in lines(r"TORCH_LIBRARY(_FRAGMENT)?\(", text))


# ---- C++


@rule(
    ("only torch_stable.h may", {"csrc/x_cpu.cpp": "#include <torch/csrc/stable/tensor.h>"}),
    ("only torch_stable.h may", {"csrc/x.h": "#include <ATen/ATen.h>"}),
    ("torch-free", {"csrc/x_cuda.cu": '#include "torch_stable.h"'}),
    ("another room", {"csrc/haar_pool_cpu.cpp": '#include "wavenet_generate.h"'}),
    ("no DeviceGuard", {"csrc/x_cuda.cpp": "STABLE_TORCH_LIBRARY_IMPL(audiokernels, CUDA, m) {}"}),
)
def csrc_has_one_door_to_torch_and_closed_rooms(files):
    for path, text in cpp(files):
        name = path.removeprefix("csrc/")
        for line, match in lines(r"#include <((torch|ATen|c10)/[^>]*)>", text):
            if name != "torch_stable.h":
                yield f"{path}:{line}: includes {match[1]}; only torch_stable.h may"
        for line, match in lines(r'#include "([^"]*)"', text):
            if name.endswith(".cu") and match[1] == "torch_stable.h":
                yield f"{path}:{line}: device code is torch-free"
            other = match[1] not in SHARED_HEADERS and room(Path(name).stem) != room(Path(match[1]).stem)
            if other and name != "audiokernels.cpp":
                yield f"{path}:{line}: includes {match[1]} of another room"
        if name.endswith("_cuda.cpp") and "DeviceGuard" not in text:
            yield f"{path}: no DeviceGuard: it would launch on the wrong one of two GPUs"


@rule(
    ("inline PTX", {"csrc/x_cuda.cu": 'asm volatile("trap;");'}),
    ("shared memory", {"csrc/x_cuda.cu": "__shared__ float x[32];"}),
    ("launch", {"csrc/x_cuda.cu": "kernel<<<1, 32>>>(x);"}),
)
def device_code_runs_on_the_host_too(files):
    """tests/cuda_on_host has twins for what csrc/ptx.h holds, and for nothing else."""
    kinds = {"inline PTX": r"\basm\b", "shared memory": "__shared__", "launch": "<<<"}
    for path, text in cpp(files):
        if path not in ("csrc/ptx.h", "csrc/tiles.h", "csrc/simd.h"):  # tiles.h: x86, with twins of its own
            for kind, pattern in kinds.items():
                yield from (f"{path}:{line}: {kind}: go through csrc/ptx.h" for line, _ in lines(pattern, text))


@rule(
    ("std::vector", {"csrc/x_simd.cpp": "std::vector<float> v;"}),
    ("#include <algorithm>", {"csrc/x_simd.cpp": "#include <algorithm>"}),
    ("not in the namespace", {"csrc/x_simd.cpp": "namespace audiokernels { void f() {} }"}),
)
def simd_files_share_no_code(files):
    """A std function compiled for AVX-512 could be the copy that the linker keeps for every processor."""
    harmless = r"(?!c(stdint|stddef|string|math|float)>|immintrin\.h>|arm_neon\.h>)"
    for path, text in cpp(files):
        if path.endswith(("_simd.cpp", "/simd.h")):
            for line, match in lines(rf"#include <{harmless}[^>]*>|\bstd::(?!u?int\d+_t|size_t|ptrdiff_t)\w+", text):
                yield f"{path}:{line}: {match[0]}"
            if not re.search(r"namespace (audiokernels::)?AUDIOKERNELS_ISA", text):
                yield f"{path}: not in the namespace of its instruction set"


# ---- build


@rule(
    ("setup.py:1: version", {"pyproject.toml": PROJECT, "setup.py": 'setup(version="9.8.7")'}),
    ("CMakeLists.txt:1: version", {"pyproject.toml": PROJECT, "CMakeLists.txt": "project(x VERSION 9.8.7)"}),
    ("x.py:1: version", {"pyproject.toml": PROJECT, f"{OPS}x.py": '__version__ = "9.8.7"'}),
)
def version_stands_in_one_place(files):
    version = re.escape(pyproject(files)["project"]["version"])
    for path, text in files.items():
        if path.endswith((".py", ".h", ".cpp", ".cu", ".sh", "CMakeLists.txt", "Makefile")):
            yield from (f"{path}:{line}: version" for line, _ in lines(rf"(?<![\d.]){version}(?![\d.])", text))


@rule(
    ("source csrc/x_cpu.cpp", {"setup.py": 'Extension("_C", sources=["csrc/x_cpu.cpp"])'}),
    ("source csrc/x_cuda.cu", {"CMakeLists.txt": "add_library(x csrc/x_cuda.cu)"}),
    ("march=native", {"CMakeLists.txt": "target_compile_options(x -march=native)"}),
    ("cpp_extension", {"setup.py": "from torch.utils.cpp_extension import CppExtension"}),
)
def one_list_of_sources(files):
    for path in ("setup.py", "build_backend.py", "pyproject.toml", "Makefile", "MANIFEST.in", "CMakeLists.txt"):
        text = re.sub(r"#.*", "", files.get(path, ""))
        for line, match in lines(r"csrc/(\w+\.(cpp|cu|h))|(march=native)|(cpp_extension)", text):
            yield f"{path}:{line}: source {match[0]}"


@rule(
    ("torch must have a lower bound only", {"pyproject.toml": PROJECT.replace("torch>=2.11", "torch==2.13.0")}),
    (
        "soxr must have a lower bound only",
        {
            "pyproject.toml": PROJECT + 'optional-dependencies.models = ["soxr~=1.0"]',
        },
    ),
    ("needs more than torch and numpy", {"pyproject.toml": PROJECT.replace('"numpy"', '"numpy", "scipy"')}),
    ("torch must not be a build requirement", {"pyproject.toml": PROJECT + '[build-system]\nrequires = ["torch"]'}),
)
def dependencies_have_lower_bounds_only(files):
    project = pyproject(files)["project"]
    groups = {"dependencies": project["dependencies"], **project.get("optional-dependencies", {})}
    groups["build-system"] = pyproject(files).get("build-system", {}).get("requires", [])
    for group, requirements in groups.items():
        for requirement in requirements:
            name, bound = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*)", requirement).groups()
            if bound and not re.fullmatch(r">=\s*[\d.]+\s*", bound):
                yield f"pyproject.toml: {group}: {name} must have a lower bound only, has {bound}"
            if group == "build-system" and name == "torch":
                yield "pyproject.toml: torch must not be a build requirement: pip would fetch a second one"
    if {re.split(r"\W", r)[0] for r in project["dependencies"]} != {"torch", "numpy"}:
        yield "pyproject.toml: needs more than torch and numpy"


# ---- the rules at work


@pytest.mark.parametrize(("check", "samples"), rule)
def test_rule(check, samples):
    assert violations(check) == ""


@pytest.mark.parametrize(("check", "samples"), rule)
def test_rule_sees_what_breaks_it(check, samples):
    assert samples and not unseen(check, samples)


# ---- importing


def brought_in(module: str, before: str, path: Path) -> set[str]:
    """Top-level packages outside of the standard library that `import module` loads after those of `before`."""
    script = f"""
import sys
import {before}
loaded = set(sys.modules)
import {module}
print(*{{name.split(".")[0] for name in set(sys.modules) - loaded}})
assert "torch" not in sys.modules or not sys.modules["torch"].cuda.is_initialized()
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=path)
    return {name for name in out.stdout.split() if name not in sys.stdlib_module_names and "__editable__" not in name}


def test_import_brings_in_nothing_else(tmp_path):
    """audiokernels adds itself to torch and numpy; audiomodels, whose names load lazily, adds nothing at all."""
    assert brought_in("audiokernels", "torch, numpy", tmp_path) == {"audiokernels"}
    assert brought_in("audiomodels", "sys", tmp_path) == {"audiomodels"}
    (tmp_path / "planted.py").write_text("import numpy")
    assert brought_in("planted", "sys", tmp_path) >= {"planted", "numpy"}


def test_the_files_are_found_with_and_without_git():
    walked = set(names_by_walking())
    assert {"README.md", "audiokernels/__init__.py", "csrc/torch_stable.h", "tests/test_house.py"} <= walked
    assert set(names_by_git()) <= walked


def test_public_names_exist():
    assert sorted(audiokernels.__all__) == sorted(set(audiokernels.__all__))
    assert not [name for name in audiokernels.__all__ if not hasattr(audiokernels, name)]


def test_type_checkers_read_the_names_that_audiomodels_loads_late():
    stub = Path(audiomodels.__file__).with_suffix(".pyi").read_text()
    names = re.findall(r"^from audiomodels\.(\w+) import (\w+) as \2$", stub, re.MULTILINE)
    assert sorted((name, home) for home, name in names) == sorted(audiomodels._HOME.items())


def test_backends_know_every_op():
    public = {op.name for op in ops(tracked()) if not op.name.startswith("_")}
    assert public and public == set(audiokernels.backends())
