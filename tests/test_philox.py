"""philox_uniform: the published generator, a pure function of (seed, row, position)."""

import pytest
import torch

from audiokernels import philox_uniform


def test_known_answers():
    """The generator's published test vector for counter 0 and key 0 (Random123, philox4x32-10)."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    expected = torch.tensor([[(word >> 8) * 2.0**-24 for word in words]], dtype=torch.float32)
    assert torch.equal(philox_uniform(0, 1, 4), expected)


def test_chunks_and_batches_do_not_change_a_draw():
    whole = philox_uniform(2**63 + 5, 7, 100, position=2**34 - 50)  # crosses the counter's second word
    for begin, end in ((0, 1), (1, 4), (4, 50), (50, 100)):
        part = philox_uniform(2**63 + 5, 3, end - begin, position=2**34 - 50 + begin)
        assert torch.equal(part, whole[:3, begin:end])


def test_numbers_are_uniform_and_rows_and_seeds_differ():
    u = philox_uniform(1, 4, 50_000)
    assert u.dtype == torch.float32 and float(u.min()) >= 0 and float(u.max()) < 1
    counts = torch.histc(u.flatten(), 100, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 150  # chi-squared, 99 degrees of freedom: 148.2 is 1 in 1000
    assert abs(float(torch.corrcoef(u)[0, 1])) < 0.02
    assert not torch.equal(philox_uniform(2, 1, 100), u[:1, :100])
    lagged = torch.corrcoef(torch.stack([u[0, :-1], u[0, 1:]]))[0, 1]
    assert abs(float(lagged)) < 0.02


def test_empty():
    assert philox_uniform(0, 0, 5).shape == (0, 5) and philox_uniform(0, 5, 0).shape == (5, 0)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((-1, 1, 1), "seed"),
        ((2**64, 1, 1), "seed"),
        ((0.5, 1, 1), "seed"),
        ((None, 1, 1), "seed"),
        ((0, -1, 1), "batch"),
        ((0, 1.0, 1), "batch"),
        ((0, 1, -1), "n"),
        ((0, 1, 1, 2**63), "position"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    *arguments, position = (*arguments, 0)[:4]
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        philox_uniform(*arguments, position=position)


def test_torch_defaults_do_not_matter():
    expected, before = philox_uniform(3, 2, 8), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(philox_uniform(3, 2, 8), expected)
            assert philox_uniform(3, 2, 0).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
