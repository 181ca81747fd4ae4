"""Fixtures shared by the tests."""

import sys
import warnings

import pytest


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
