"""The types that a checker sees in a user's program."""

import inspect
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import audiokernels

PACKAGE = Path(audiokernels.__file__).parent
PROGRAM = """
import audiokernels as ak
from torch import Tensor

def f(x: Tensor, wavenet: ak.WaveNetPack, transformer: ak.TransformerPack, flag: bool) -> None:
    reveal_type(ak.causal_attention(x, x, x))  # Tensor
    reveal_type(ak.causal_attention(x, x, x, window=3, return_lse=True))  # tuple[Tensor, Tensor]
    reveal_type(ak.causal_attention(x, x, x, return_lse=flag))  # Tensor | tuple[Tensor, Tensor]
    reveal_type(ak.wavenet_generate(wavenet, x, x, return_logits=False))  # Tensor
    reveal_type(ak.wavenet_generate(wavenet, x, x, codes=x, top_k=3, return_logits=True))  # tuple[Tensor, Tensor]
    reveal_type(ak.transformer_generate(transformer, x, x, temperature=0.5))  # Tensor
    reveal_type(ak.transformer_generate(transformer, x, x, return_logits=True))  # tuple[Tensor, Tensor]
    reveal_type(ak.transformer_generate(transformer, x, x, return_logits=flag))  # Tensor | tuple[Tensor, Tensor]
    reveal_type(ak.haar_pool(x, levels=[0, 1]))  # Tensor
    reveal_type(ak.explain(ak.haar_pool, x).flops)  # int
"""


def test_a_checker_sees_them(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "torch").mkdir()  # in place of the real one, which takes a checker half a minute
    stub = "from typing import Any\nclass Tensor: ...\ndef __getattr__(name: str) -> Any: ...\n"
    (tmp_path / "torch/__init__.pyi").write_text(stub)
    (tmp_path / "program.py").write_text(PROGRAM)
    options = ["--config-file=", "--no-site-packages", "--ignore-missing-imports", "--follow-imports=silent"]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"},
        capture_output=True,
        text=True,
    )
    found = [line.split('"')[1].replace("torch.", "") for line in run.stdout.splitlines() if "Revealed type" in line]
    assert found == [line.split("  # ")[1] for line in PROGRAM.splitlines() if "reveal_type" in line], run.stdout
    assert run.returncode == 0, run.stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads came with Python 3.11")
@pytest.mark.parametrize("name", ["causal_attention", "wavenet_generate", "transformer_generate"])
def test_overloads_repeat_the_function(name):
    """But for the last parameter, the flag."""
    function = getattr(audiokernels, name)
    *expected, flag = inspect.signature(function).parameters.values()
    overloads = [list(inspect.signature(f).parameters.values()) for f in typing.get_overloads(function)]
    assert all(same == expected for *same, _ in overloads) and len(overloads) == 3
    assert [last.name for *_, last in overloads] == [flag.name] * 3
    assert [last.default for *_, last in overloads] == [flag.default, inspect.Parameter.empty, inspect.Parameter.empty]
