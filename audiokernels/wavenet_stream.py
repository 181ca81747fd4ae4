"""WaveNetStream: a generation that another thread (an audio callback, a server's worker) pulls block by block."""

import threading
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from audiokernels._checks import check_whole
from audiokernels._generation import condition_frames
from audiokernels._library import C
from audiokernels.philox import philox_uniform
from audiokernels.sampling import Sampling
from audiokernels.wavenet_generate import (
    check_call,
    wavenet_generate,
    wavenet_position,
    wavenet_state,
)
from audiokernels.wavenet_pack import WaveNetPack


class WaveNetStream:
    """Endless generation from a pack on the CPU, read in blocks of any size.

    The codes are those of wavenet_generate with the numbers of philox_uniform(seed, ...), however they are cut into
    blocks. read() may be called from any thread: it holds a lock of the stream, and not Python's GIL, while it works.

        stream = WaveNetStream(pack, seed=1)
        block = stream.read(320)[0]  # 20 ms at 16 kHz, in an audio callback

    Args:
        pack: from wavenet_pack, on the CPU; its weights are shared, not copied.
        seed: of the random numbers.
        batch: number of streams; with `state`, its rows are.
        temperature: >= 0; 0 takes the largest logit.
        top_k, top_p: as in wavenet_generate.
        condition: float32 (batch, frames, condition_channels); frame i holds for samples i * hop .. (i + 1) * hop - 1
            of the stream, counted from its position 0. Reading past the last frame raises ValueError.
        state: start here (copied) instead of at a fresh state: continues or forks an earlier generation.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.
    """

    def __init__(
        self,
        pack: WaveNetPack,
        *,
        seed: int = 0,
        batch: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        condition: Tensor | None = None,
        state: Tensor | None = None,
    ) -> None:
        if isinstance(pack, WaveNetPack) and pack.data.device.type != "cpu":
            raise ValueError(f"pack must be on the CPU, got {pack.data.device}")
        state = wavenet_state(pack, batch) if state is None else state
        seed = check_whole("seed", seed, 0, (1 << 64) - 1)
        uniforms = philox_uniform(seed, state.shape[0] if isinstance(state, Tensor) and state.ndim else batch, 0)
        frames = condition
        if isinstance(condition, Tensor) and condition.ndim == 3 and isinstance(pack, WaveNetPack):
            sizes = (uniforms.shape[0], pack.shape.condition)
            if pack.shape.condition and (condition.shape[0], condition.shape[2]) != sizes:
                rule = f"({sizes[0]}, frames, {sizes[1]})"
                raise ValueError(f"condition must have shape {rule}, got {tuple(condition.shape)}")
            frames = condition[:, :0] if pack.shape.condition else condition
        self._sampling = Sampling(temperature, top_k, top_p)
        check_call(pack, state, uniforms, None, frames)
        self._pack, self._seed, self._condition = pack, seed, condition
        self._lock = threading.Lock()
        self._compiled = None
        if C is None:
            self._state = state.detach().clone()
        else:
            self._compiled = C.WaveNetStream(
                pack.data.numpy(),
                pack.shape.to_ints(),
                state.detach().contiguous().numpy(),
                seed,
                temperature,
                top_k,
                top_p,
                None if condition is None else condition.detach().contiguous().numpy(),
            )

    def read(self, n: int) -> np.ndarray:
        """The next n codes of every stream: (batch, n) uint8, int16 above 256 classes."""
        n = check_whole("n", n, 0)
        if self._compiled is not None:
            return self._compiled.read(n)
        with self._lock:
            positions, shape = wavenet_position(self._state).tolist(), self._pack.shape
            rows = [philox_uniform(self._seed, b + 1, n, position=p)[b:] for b, p in enumerate(positions)]
            uniforms = torch.cat(rows) if rows else philox_uniform(self._seed, 0, n)
            frames = None
            if self._condition is not None:
                count = condition_frames(shape, self._state, n)
                first = [p // shape.hop for p in positions]
                if n and any(
                    f + (p % shape.hop + n - 1) // shape.hop >= self._condition.shape[1]
                    for f, p in zip(first, positions, strict=True)
                ):
                    raise ValueError(f"condition has {self._condition.shape[1]} frames, too few for {n} more samples")
                padded = torch.nn.functional.pad(self._condition, (0, 0, 0, count))
                frames = torch.stack([padded[b, f : f + count] for b, f in enumerate(first)])
            codes = wavenet_generate(self._pack, self._state, uniforms, condition=frames, **asdict(self._sampling))
            return codes.numpy()

    @property
    def position(self) -> int:
        """Samples that the (first) stream has behind it."""
        if self._compiled is not None:
            return self._compiled.position
        with self._lock:
            return int(wavenet_position(self._state)[0]) if self._state.shape[0] else 0

    def state(self) -> Tensor:
        """A copy of the state: start another stream, or wavenet_generate, from here."""
        if self._compiled is not None:
            return torch.from_numpy(self._compiled.state())
        with self._lock:
            return self._state.clone()
