"""Reading the tracked files as text, syntax trees and C++ declarations, for test_house.py and test_documents.py."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
Files = dict[str, str]

OPS, MODELS = "audiokernels/", "python/audiomodels/"
PROJECT = '[project]\nversion = "9.8.7"\nlicense = "Apache-2.0"\ndependencies = ["torch>=2.11", "numpy"]\n'  # a sample
DOCS = ("README.md", "CONTRIBUTING.md", "docs/")


class Rules(list):
    """As a decorator, registers a rule with samples: (words that must stand in what it says, files); "" for nothing."""

    def __call__(self, *samples: tuple[str, Files]) -> Callable:
        def register(check: Callable[[Files], Iterator[str]]) -> Callable:
            self.append(pytest.param(check, samples, id=check.__name__))
            return check

        return register


def violations(check: Callable[[Files], Iterator[str]]) -> str:
    return "\n".join(sorted(check(tracked())))


def unseen(check: Callable[[Files], Iterator[str]], samples: tuple[tuple[str, Files], ...]) -> list[str]:
    """The samples in which the rule does not see what they are named after (or sees something, where that is "")."""
    found = [(words, list(check(files))) for words, files in samples]
    right = [any(words in line for line in seen) if words else not seen for words, seen in found]
    return [f"{words!r} not in {seen}" for ok, (words, seen) in zip(right, found, strict=True) if not ok]


@lru_cache(maxsize=1)
def tracked() -> Files:
    """{path: text} of what git tracks, of every file where this is no git checkout; "" for what is not text."""
    return {name: _text(ROOT / name) for name in sorted(names_by_git() or names_by_walking())}


def names_by_git() -> list[str]:
    try:
        git = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [name for name in git.stdout.split("\0") if name and (ROOT / name).is_file()]


def names_by_walking() -> list[str]:
    """What .gitignore leaves, roughly."""
    skip = re.compile(
        r"(^|/)(\.(?!ci/)\w+|build|dist|demo|__pycache__|[^/]+\.egg-info)/|\.(so|pyc)$|not_compiled\.txt$"
    )
    names = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file())
    return [name for name in names if not skip.search(name)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


# ---- Python


@lru_cache(maxsize=512)
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def python(files: Files, *folders: str) -> Iterator[tuple[str, ast.Module]]:
    for path, text in files.items():
        if path.endswith(".py") and path.startswith(folders or ("",)):
            yield path, parsed(text)


def cpp(files: Files) -> Iterator[tuple[str, str]]:
    for path, text in files.items():
        if path.startswith("csrc/") and path.endswith((".h", ".cpp", ".cu")):
            yield path, text


def lines(pattern: str, text: str, flags: int = 0) -> Iterator[tuple[int, re.Match]]:
    for match in re.finditer(pattern, text, flags | re.MULTILINE):
        yield text.count("\n", 0, match.start()) + 1, match


def dotted(node: ast.AST) -> str:
    """ "torch.ops.x" of such an expression; "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str, list]]:
    """(call, name of what is called, its constant arguments)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func), [a.value for a in node.args if isinstance(a, ast.Constant)]


def imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str, list[str]]]:
    """(line, module, names taken from it), those inside functions and by importlib too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.removeprefix("python/").split("/")[: -node.level] if node.level else []
            yield node.lineno, ".".join([*package, *filter(None, [node.module])]), [a.name for a in node.names]
    for node, name, constants in calls(tree):
        if name.split(".")[-1] in ("import_module", "__import__") and constants:
            yield node.lineno, constants[0], []


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    args = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [arg for i, arg in enumerate(args) if i or arg.arg not in ("self", "cls")]


def module_all(text: str) -> list[str]:
    """__all__ of a module, read without running it; also where it is sorted(_HOME)."""
    values = {}
    for node in parsed(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
    value = values.get("__all__")
    if isinstance(value, ast.Call):
        value = values[value.args[0].id]
    return [] if value is None else list(ast.literal_eval(value))


class Op(NamedTuple):
    name: str
    schema: str
    line: int
    path: str
    tree: ast.Module


def ops(files: Files) -> Iterator[Op]:
    for path, tree in python(files, OPS):
        for node, name, constants in calls(tree):
            if name == "lib.define" and constants:
                yield Op(constants[0].split("(")[0], constants[0], node.lineno, path, tree)


# ---- C++


def cpp_functions(text: str) -> Iterator[tuple[int, str, int]]:
    """(line, name, parameters) of what looks like `type name(...)`, which a call does not."""
    text = re.sub(r"//.*|/\*[\s\S]*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    text = re.sub(r'"(\\.|[^"\\\n])*"', lambda m: " " * len(m[0]), text)
    for line, match in lines(r"(?<![\w#])(\w+[>*&]*|[>*&])\s+(\w+)\(", text):
        if match[1] in ("return", "else", "case", "throw", "new", "define", "and", "or", "not", "in", "asm"):
            continue
        depth, commas, empty = 0, 0, True
        for char in text[match.end() - 1 :]:
            depth += (char in "([{<") - (char in ")]}>")
            commas += char == "," and depth == 1
            empty = empty and char in "( \n"
            if depth == 0:
                break
        yield line, match[2], 0 if empty else commas + 1


# ---- the rest


def pyproject(files: Files) -> dict:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads(files["pyproject.toml"])


def documents(files: Files) -> Iterator[tuple[str, str]]:
    for path, text in files.items():
        if path.startswith(DOCS) and path.endswith(".md"):
            yield path, re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def code_of(text: str) -> str:
    """Blocks and spans of code, one a line."""
    blocks = re.findall(r"```.*?\n(.*?)```", text, re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))])
