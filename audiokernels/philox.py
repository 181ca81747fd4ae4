"""Counter-based uniform numbers: one number per (seed, row, position), so that chunking never changes a draw.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), with the
64-bit seed as key and the counter (position // 4 as 64 bits, row, 0); word position % 4 of the block is the number.
csrc/wavenet_stream.cpp computes the same function.
"""

import torch

from audiokernels._checks import check_whole

_MASK = 0xFFFFFFFF


def _mulhilo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    product = b * a  # below 2^64; int64 wraps, and the masks below read it as unsigned
    return (product >> 32) & _MASK, product & _MASK


def philox_uniform(seed: int, batch: int, n: int, *, position: int = 0) -> torch.Tensor:
    """Uniform numbers for samples position .. position + n - 1 of each stream, a pure function of its arguments.

    Args:
        seed: 0 <= seed < 2^64.
        batch: number of streams; row b of the result depends on b, not on batch.
        n: numbers per stream.
        position: index of the first one, 0 <= position < 2^63.

    Returns:
        float32 (batch, n) in [0, 1), multiples of 2^-24, on the CPU.

    Raises:
        ValueError: naming the argument, the rule and what came.
    """
    seed = check_whole("seed", seed, 0, (1 << 64) - 1)
    batch, n = check_whole("batch", batch, 0), check_whole("n", n, 0)
    position = check_whole("position", position, 0, (1 << 63) - 1)
    if n == 0 or batch == 0:
        return torch.empty(batch, n, dtype=torch.float32, device="cpu")
    first, last = position // 4, (position + n - 1) // 4
    block = torch.arange(first, last + 1, device="cpu").expand(batch, -1)
    c0, c1 = block & _MASK, (block >> 32) & _MASK
    c2 = torch.arange(batch, device="cpu")[:, None].expand_as(block)
    c3 = torch.zeros_like(block)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        hi0, lo0 = _mulhilo(0xD2511F53, c0)
        hi1, lo1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    words = torch.stack([c0, c1, c2, c3], dim=2).reshape(batch, -1)[:, position - 4 * first :][:, :n]
    return (words >> 8).to(torch.float32) * 2.0**-24
