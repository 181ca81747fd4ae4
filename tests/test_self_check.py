"""python -m audiokernels --check: it sees every op, every wrong number, and whatever a kernel raises."""

import runpy

import pytest
import torch

from audiokernels import haar_pool, self_check
from audiokernels.backends import backends

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments):
    return runpy.run_module("audiokernels.__main__")["main"](arguments)


def test_every_op_is_checked():
    assert {op for case in self_check.CASES for op in case.ops} == set(backends())


def test_all_is_right_here(monkeypatch, capsys):
    monkeypatch.setattr(self_check, "devices", lambda: ["cpu"])
    assert run("--check") == 0
    lines = capsys.readouterr().out.split("allowed:\n")[1].splitlines()
    assert sum(line.startswith("right ") for line in lines) == sum(len(case.dtypes) for case in self_check.CASES)
    assert lines[-1] == "all right"


def almost(x, runs, causal=False, count=False, adjoint=False):
    """haar_pool with one wrong number."""
    y = haar_pool.__globals__["haar_pool_ref"](x, runs, causal=causal, count=count, adjoint=adjoint)
    y[1, 999, 63] += 1
    return y


def broken(x, *_, **__):
    raise RuntimeError("out of resource: shared memory\nmore")


@pytest.mark.parametrize(
    "kernel, words", [(almost, " of 1e-04"), (broken, "RuntimeError: out of resource: shared memory ")]
)
def test_what_is_wrong_is_told(monkeypatch, capsys, kernel, words):
    cases = [case for case in self_check.CASES if case.ops[0].startswith("haar_pool")]
    monkeypatch.setattr(self_check, "CASES", cases)
    override = torch.library.Library("audiokernels", "IMPL")
    try:
        override.impl("haar_pool", kernel, "CPU", allow_override=True)
        assert run("--check") == 1
    finally:
        override._destroy()
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG ")]
    assert len(wrong) == 6 and all("haar_pool, " in line for line in wrong)  # blocks and causal, three dtypes
    assert any(words in line for line in wrong) and lines[-1] == "6 wrong"
    assert sum(line.startswith("right ") for line in lines) == 6  # the two others


def test_without_check_nothing_is_run(capsys):
    assert run() == 0
    assert "right" not in capsys.readouterr().out
