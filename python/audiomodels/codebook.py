"""A codebook: the rows that integer codes stand for, by k-means; and what codes alone need.

    code(x) = argmin_k |x - codebook[k]|

`collapse` turns a stream of codes into units and how often each is repeated, as in textless language models (Lakhotia
et al. 2021, "On generative spoken language modeling from raw audio", arXiv 2102.01192); `expand` is its inverse.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from audiomodels._optional import require
from audiomodels.quantize import code_dtype

BLOCK = 8192  # rows whose distances to all of a codebook are in memory at once


def fit_codebook(rows: Tensor, n_code: int, *, seed: int = 0) -> Tensor:
    """Centres of k-means over `rows`: float32 (n_code, dim), a function of its arguments.

    rows: float (n, dim), finite, at least n_code different ones. n_code: 2 .. 32768. Errors: ValueError that names the
    argument. Source: scikit-learn's MiniBatchKMeans (Sculley 2010, "Web-scale k-means clustering").
    """
    if rows.ndim != 2 or not torch.isfinite(rows).all():
        raise ValueError(f"rows must be finite numbers (n, dim), got shape {tuple(rows.shape)}")
    if not 2 <= n_code <= 32768:
        raise ValueError(f"n_code must be 2 .. 32768, got {n_code}")
    different = len(torch.unique(rows, dim=0))
    if different < n_code:
        raise ValueError(f"rows must hold at least {n_code} different ones for as many codes, got {different}")
    kmeans = require("sklearn.cluster").MiniBatchKMeans(
        n_code,
        batch_size=max(4096, 16 * n_code),
        max_iter=300,
        max_no_improvement=30,
        n_init=3,
        random_state=seed,
    )
    return torch.from_numpy(kmeans.fit(rows.detach().cpu().float().numpy()).cluster_centers_)


def nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    """Index of the row of `codebook` (n_code, dim) next to each of `rows` (..., dim): integers (...), uint8 up to 256
    codes, int16 above; of two as near the lower one."""
    flat = rows.reshape(-1, rows.shape[-1])
    found = [torch.cdist(part, codebook).argmin(1) for part in flat.split(BLOCK)]
    codes = torch.cat(found) if found else flat.new_zeros(0)
    return codes.reshape(rows.shape[:-1]).to(code_dtype(len(codebook)))


def name_of(codebook: Tensor) -> str:
    """16 hexadecimal digits that tell this codebook from any other: streams of another one mean something else."""
    return hashlib.sha256(codebook.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def usage(codes: Tensor, n_code: int) -> float:
    """Share of the codes 0 .. n_code - 1 that occur."""
    return len(torch.unique(codes)) / n_code


def purity(codes: Tensor, labels: Tensor) -> float:
    """Share of frames that carry the most frequent label of their code: 1 where a code never mixes labels.

    codes, labels: integers of the same shape.
    """
    pairs, counts = torch.unique(
        torch.stack([codes.flatten().long(), labels.flatten().long()]), dim=1, return_counts=True
    )
    most = counts.new_zeros(int(pairs[0].max()) + 1).scatter_reduce(0, pairs[0], counts, "amax")
    return float(most.sum() / counts.sum())


def collapse(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(units, durations) of codes (time,): each run of one code as one unit, and its length (int64)."""
    return torch.unique_consecutive(codes, return_counts=True)


def expand(units: Tensor, durations: Tensor) -> Tensor:
    """The codes that `collapse` came from: each unit, `durations` (as many integers >= 0) times."""
    return torch.repeat_interleave(units, durations)


def check_codes(codes: Tensor, n_code: int, ndim: int = 2) -> Tensor:
    """`codes` as int64. Errors: TypeError if they are not integers, ValueError for another shape or a code out of
    range, as of another codebook."""
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(f"codes must be integers, got {codes.dtype}")
    if codes.ndim != ndim:
        raise ValueError(f"codes must have {ndim} dimensions, got shape {tuple(codes.shape)}")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < n_code:
        got = f"{int(codes.min())} .. {int(codes.max())}"
        raise ValueError(f"codes must be 0 .. {n_code - 1}, got {got}: are they of another codebook?")
    return codes.long()
