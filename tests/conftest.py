"""Fixtures shared by the tests, and how many processes run them (`make test` asks for -n auto of pytest-xdist)."""

import os
import sys
import warnings

import pytest

MOST_WORKERS = 4  # a process takes 1 to 2 GB
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: the processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """What -n auto is: a process a core, but one alone where there is a GPU."""
    import torch

    return 0 if CORES == 1 or torch.cuda.is_available() else min(CORES, MOST_WORKERS)


@pytest.fixture(scope="module")
def one_thread():
    """One torch thread: the same bits in every process, and no threads that wait for each other on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unchecked_weights(monkeypatch):
    """Packs are made of weights that are not finite too: what a damaged pack may hold."""
    import audiokernels  # noqa: F401

    for room in ("wavenet_pack", "transformer_pack"):
        monkeypatch.setattr(sys.modules[f"audiokernels.{room}"], "check_weights", lambda weights, expected: None)


@pytest.fixture
def call(capsys):
    """call(*words) -> (exit code, standard output, standard error)."""

    from audiomodels import cli

    def call(*words) -> tuple[int, str, str]:
        show = warnings.showwarning
        try:
            with pytest.raises(SystemExit) as exit:
                cli.main([str(word) for word in words])
        finally:
            warnings.showwarning = show
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    return call
