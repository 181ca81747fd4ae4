"""SampleRNN: recurrent networks at three clock rates, the slowest over frames of frames, the fastest over samples.

    top     h_j = GRU(W frame_j),              one step for every frame_size * big_frame samples
    middle  g_i = GRU(V frame_i + up(h)_i),    one step for every frame_size samples
    sample  logits = MLP(last frame_size codes, embedded, + up(g)_t)

Mehri et al., "SampleRNN: an unconditional end-to-end neural audio generation model" (arXiv 1612.07837); `up` is a
learned projection of one step's output to one vector for each step of the tier below. Frames count from the first code
of a stream and end at the last known one, so a prediction sees everything before it.

Truncated backpropagation (section 2.3 there): the recurrent state is carried through all codes of a call, and cut off
from its past every `bptt` samples; what lies before the predictions asked for needs no graph at all. Cost of a training
step: one GRU step a frame and tier, and three matrix products a sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiokernels import Sampling
from audiomodels.generator import check_codes, check_config, check_parameters, start_near_levels_near
from audiomodels.step_generator import StepGenerator


@dataclass(frozen=True)
class SampleRNNConfig:
    """Sizes of a SampleRNN, and the sound that its codes stand for."""

    frame_size: int = 16  # samples in a frame of the middle tier, and seen by the sample tier
    big_frame: int = 4  # frames of the middle tier in one of the top tier
    n_embd: int = 256  # width of all tiers
    n_rnn: int = 2  # GRU layers of a tier
    bptt: int = 1024  # samples that a gradient reaches back; a multiple of frame_size * big_frame
    n_class: int = 256  # codes are 0 .. n_class - 1
    sample_rate: int = 16000  # Hz
    companding: str = "linear"  # how a code stands for a level: mulaw or linear

    def __post_init__(self):
        limits = {
            "frame_size": (1, 4096),
            "big_frame": (1, 4096),
            "n_embd": (1, 65536),
            "n_rnn": (1, 100),
            "bptt": (1, 1 << 30),
        }
        check_config(self, limits)
        check_parameters(self.n_parameter)
        if self.bptt % (self.frame_size * self.big_frame):
            raise ValueError(f"bptt must be a multiple of {self.frame_size * self.big_frame}, got {self.bptt}")

    @property
    def n_parameter(self) -> int:
        d, f, b = self.n_embd, self.frame_size, self.big_frame
        grus = 2 * self.n_rnn * (6 * d * d + 6 * d)
        tiers = (f * b + 1) * d + (f + 1) * d + (d + 1) * b * d + (d + 1) * f * d
        return grus + tiers + self.n_class * d + f * d * d + (d + 1) * d + (d + 1) * self.n_class


class Tier(nn.Module):
    """Frames in, `up` vectors a frame out."""

    def __init__(self, frame: int, up: int, width: int, n_rnn: int):
        super().__init__()
        self.frame, self.up = frame, up
        self.enter = nn.Linear(frame, width)
        self.gru = nn.GRU(width, width, n_rnn, batch_first=True)
        self.leave = nn.Linear(width, up * width)

    def forward(self, frames: Tensor, above: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """frames (batch, n, frame) levels, above (batch, n, width) -> (batch, n * up, width), next state."""
        x = self.enter(frames)
        x, state = self.gru(x if above is None else x + above, state)
        return self.leave(x).unflatten(2, (self.up, -1)).flatten(1, 2), state


class SampleRNN(nn.Module, StepGenerator):
    """model(codes) -> logits; model.generate(n) -> codes. See SampleRNNConfig for the sizes."""

    config_class = SampleRNNConfig

    def __init__(self, config: SampleRNNConfig = SampleRNNConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        d, f = config.n_embd, config.frame_size
        self.top = Tier(f * config.big_frame, config.big_frame, d, config.n_rnn)
        self.middle = Tier(f, f, d, config.n_rnn)
        self.embedding = nn.Embedding(config.n_class, d)
        self.enter = nn.Linear(f * d, d, bias=False)  # the middle tier's `leave` has the bias
        self.hidden = nn.Linear(d, d)
        self.out = nn.Linear(d, config.n_class)
        start_near_levels_near(self.embedding.weight, self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, codes: Tensor, *, length: int | None = None) -> Tensor:
        """Logits of the code after each of `codes`.

        Args:
            codes: integers (batch, time), 0 .. n_class - 1; the first is the start of a stream, silence before it.
            length: only the last `length` predictions; the codes before them only carry the state there.

        Returns:
            float (batch, length or time, n_class); logits[:, t] predicts codes[:, t + 1].
        """
        check_codes(codes)
        time, big = codes.shape[1], self._big
        length = time if length is None else length
        if not 0 <= length <= time:
            raise ValueError(f"length must be 0 .. {time}, got {length}")
        padded = F.pad(codes.long(), (big - 1, 0), value=self.config.n_class // 2)
        silent = (time - length) // big * big  # whole frames before the first prediction
        borders = sorted({0, *range(silent, time, self.config.bptt), time})
        parts, states = [codes.new_zeros(len(codes), 0, self.config.n_embd, dtype=self.out.weight.dtype)], (None, None)
        for start, stop in zip(borders, borders[1:], strict=False):
            with torch.set_grad_enabled(torch.is_grad_enabled() and stop > silent):
                part, states = self._tiers(padded[:, start : stop + big - 1], stop - start, states)
            states = tuple(state.detach() for state in states)
            parts.append(part[:, max(0, time - length - start) :])
        last = padded[:, padded.shape[1] - length - self.config.frame_size + 1 :] if length else padded[:, :0]
        return self._sample(last, torch.cat(parts, 1))

    def _tiers(self, padded: Tensor, n: int, states: tuple) -> tuple[Tensor, tuple]:
        """What the sample tier is told about n samples; padded: their frame of past codes and they themselves."""
        f, big = self.config.frame_size, self._big
        level = self._level(padded)
        above, top = self.top(level[:, : -(-n // big) * big].unflatten(1, (-1, big)), None, states[0])
        frames = level[:, big - f :][:, : -(-n // f) * f].unflatten(1, (-1, f))
        below, middle = self.middle(frames, above[:, : frames.shape[1]], states[1])
        return below[:, :n], (top, middle)

    def _sample(self, codes: Tensor, told: Tensor) -> Tensor:
        """codes (batch, frame_size - 1 + n), told (batch, n, width) -> logits (batch, n, n_class)."""
        f, d, n = self.config.frame_size, self.config.n_embd, told.shape[1]
        # tap k of all samples at once: no copy of each sample's frame
        taps, x = self.enter.weight.unflatten(1, (f, d)), told
        embedded = self.embedding(codes)
        for k in range(f if n else 0):
            x = x + embedded[:, k : k + n] @ taps[:, k].T
        return self.out(F.relu(self.hidden(F.relu(x))))

    def _level(self, codes: Tensor) -> Tensor:
        """Codes as numbers in -2 .. 2, the paper's scale."""
        return (codes.to(self.out.weight.dtype) * (4 / (self.config.n_class - 1))) - 2

    @property
    def _big(self) -> int:
        return self.config.frame_size * self.config.big_frame

    def initial_state(self, batch: int) -> dict:
        """Past codes, position, and of each tier its GRU's state and what it told the tier below."""
        past = torch.full((batch, self._big), self.config.n_class // 2, device=self._device)
        return {"past": past, "position": 0, "top": None, "middle": None, "above": None, "below": None}

    def step(
        self, state: dict, last: Tensor, *, forced: Tensor | None = None, uniforms: Tensor | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One sample: see StepGenerator.step. A tier runs where one of its frames begins."""
        f, big, t = self.config.frame_size, self._big, state["position"]
        past = state["past"] = torch.cat([state["past"][:, 1:], last[:, None]], 1)
        if t % big == 0:
            state["above"], state["top"] = self.top(self._level(past)[:, None], None, state["top"])
        if t % f == 0:
            i = t % big // f
            frame, above = self._level(past[:, None, big - f :]), state["above"][:, i : i + 1]
            state["below"], state["middle"] = self.middle(frame, above, state["middle"])
        logits = self._sample(past[:, big - f :], state["below"][:, t % f : t % f + 1])[:, 0]
        state["position"] = t + 1
        return (sampling.draw(logits, uniforms) if forced is None else forced), logits
