"""Fixtures shared by the tests."""

import pytest


@pytest.fixture(scope="module")
def one_thread():
    """One torch thread: the same bits in every process, and no threads that wait for each other on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
