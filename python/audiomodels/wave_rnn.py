"""WaveRNN: one recurrent layer predicts a 16-bit sample in two steps, its coarse byte, then its fine byte.

    x_t = [coarse_t-1, fine_t-1, coarse_t],  h_t = GRU(x_t, h_t-1),  h_t = [h_coarse, h_fine]
    P(coarse_t) = softmax(O_2 relu(O_1 h_coarse)),  P(fine_t | coarse_t) = softmax(O_4 relu(O_3 h_fine))

Kalchbrenner et al., "Efficient neural audio synthesis" (arXiv 1802.08435), section 2: the input weights from coarse_t
to h_coarse are masked, so that one recurrent layer serves both. Its cell (equation 2 there, biases added) is the GRU of
torch. Cost: one GRU step a sample; generation runs the layer's two halves one after the other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from audiokernels import Sampling
from audiomodels.generator import check_config, check_parameters
from audiomodels.step_generator import StepGenerator

N_BYTE, N_CLASS = 256, 65536


@dataclass(frozen=True)
class WaveRNNConfig:
    """Sizes of a WaveRNN, and the sound that its codes stand for."""

    n_embd: int = 896  # width of the recurrent state, half of it for each byte; even
    head_channels: int = 448  # width of a head's hidden layer
    n_class: int = N_CLASS  # 16 bits
    sample_rate: int = 16000  # Hz
    companding: str = "linear"  # 16-bit PCM + 32768

    def __post_init__(self):
        limits = {"n_embd": (2, 65536), "head_channels": (1, 65536), "n_class": (N_CLASS, N_CLASS)}
        check_config(self, limits)
        check_parameters(self.n_parameter)
        if self.n_embd % 2:
            raise ValueError(f"n_embd must be even, got {self.n_embd}")
        if self.companding != "linear":
            raise ValueError(f"companding must be 'linear' (16-bit PCM), got {self.companding!r}")

    @property
    def n_parameter(self) -> int:
        d, half, head = self.n_embd, self.n_embd // 2, self.head_channels
        return 3 * d * (d + 3 + 2) + 2 * ((half + 1) * head + (head + 1) * N_BYTE)


class Head(nn.Sequential):
    """Half of the recurrent state -> logits of a byte."""

    def __init__(self, width: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, N_BYTE))


class WaveRNN(nn.Module, StepGenerator):
    """model(codes, targets) -> logits of both bytes; model.generate(n) -> int16 PCM. See WaveRNNConfig for the sizes.

    Codes are 16-bit PCM: int16, or PCM + 32768 (0 .. 65535) in any other integer type, as data.Recordings holds them.
    """

    config_class = WaveRNNConfig

    def __init__(self, config: WaveRNNConfig = WaveRNNConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        d = config.n_embd
        self.gru = nn.GRUCell(3, d)
        self.coarse, self.fine = Head(d // 2, config.head_channels), Head(d // 2, config.head_channels)

    def forward(self, codes: Tensor, targets: Tensor) -> Tensor:
        """Logits of `targets`, the codes that follow the last of `codes`.

        Args:
            codes: (batch, time), the first being the start of a stream.
            targets: (batch, n), n <= time: the codes after the last n of `codes`; P(fine) needs their coarse byte.

        Returns:
            float (batch, n, 512): of the coarse byte, then of the fine byte given the coarse one; see `log_prob`.
        """
        if codes.ndim != 2 or targets.ndim != 2 or len(codes) != len(targets) or targets.shape[1] > codes.shape[1]:
            shapes = f"{tuple(codes.shape)} and {tuple(targets.shape)}"
            raise ValueError(f"codes and targets must have shapes (batch, time) and (batch, n <= time), got {shapes}")
        codes, targets = self.to_codes(codes), self.to_codes(targets)
        now = torch.cat([codes[:, 1:], targets[:, -1:]], 1)
        if not codes.shape[1] or not targets.shape[1]:
            return codes.new_zeros(len(codes), 0, 2 * N_BYTE, dtype=self.gru.weight_hh.dtype)
        x = torch.stack([_scaled(codes // N_BYTE), _scaled(codes % N_BYTE), _scaled(now // N_BYTE)], 2)
        h = self._gru(x, self.initial_state(len(codes))["h"])[:, -targets.shape[1] :]
        coarse, fine = h.chunk(2, dim=2)
        return torch.cat([self.coarse(coarse), self.fine(fine)], 2)

    def log_prob(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Natural log-probability (...,) of `targets` (...,) under the logits (..., 512) that forward gave for them."""
        targets = self.to_codes(targets)
        halves = zip(logits.chunk(2, dim=-1), (targets // N_BYTE, targets % N_BYTE), strict=True)
        return sum(half.log_softmax(-1).gather(-1, byte[..., None])[..., 0] for half, byte in halves)

    def ranked(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and targets of the coarse byte: top-1 and top-5 of a WaveRNN are those of its 8 upper bits."""
        return logits[..., :N_BYTE], self.to_codes(targets) // N_BYTE

    def _gru(self, x: Tensor, h: Tensor) -> Tensor:
        """x (batch, time, 3), h (batch, width) before it -> all states (batch, time, width)."""
        cell, d = self.gru, self.config.n_embd
        mask = cell.weight_ih.new_ones(3, d, 3)  # gate, unit, [coarse before, fine before, coarse now]
        mask[:, : d // 2, 2] = 0
        weights = [cell.weight_ih * mask.flatten(0, 1), cell.weight_hh, cell.bias_ih, cell.bias_hh]
        if torch.is_autocast_enabled(x.device.type):  # torch.gru wants one dtype
            dtype = torch.get_autocast_dtype(x.device.type)
            x, h, weights = x.to(dtype), h.to(dtype), [weight.to(dtype) for weight in weights]
        return torch.gru(x, h[None], weights, True, 1, 0.0, self.training, False, True)[0]

    def to_codes(self, codes: Tensor) -> Tensor:
        """int64 codes 0 .. 65535."""
        return super().to_codes(codes.long() + 32768 if codes.dtype == torch.int16 else codes)

    def from_codes(self, codes: Tensor) -> Tensor:
        """int16 PCM."""
        return (codes - 32768).to(torch.int16)

    def initial_state(self, batch: int) -> dict:
        """The recurrent state, zero."""
        return {"h": self.gru.weight_hh.new_zeros(batch, self.config.n_embd)}

    def step(
        self, state: dict, last: Tensor, *, forced: Tensor | None = None, uniforms: Tensor | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One sample: see StepGenerator.step. `sampling` holds for each of the two bytes."""
        before = [_scaled(last // N_BYTE), _scaled(last % N_BYTE)]

        def states(coarse: Tensor) -> Tensor:
            return self._gru(torch.stack([*before, coarse], 1)[:, None], state["h"])[:, 0]

        half = self.config.n_embd // 2
        coarse_logits = self.coarse(states(torch.zeros_like(before[0]))[:, :half])  # masked: any coarse byte would do
        coarse = sampling.draw(coarse_logits, uniforms) if forced is None else forced // N_BYTE
        state["h"] = states(_scaled(coarse))
        fine_logits = self.fine(state["h"][:, half:])
        if forced is None:
            fine = sampling.draw(fine_logits, _rest(sampling.weights(coarse_logits), coarse, uniforms))
        else:
            fine = forced % N_BYTE
        return coarse * N_BYTE + fine, torch.cat([coarse_logits, fine_logits], 1)


def _rest(weights: Tensor, drawn: Tensor, uniforms: Tensor) -> Tensor:
    """Where in its class's share of [0, 1) the number fell that drew it: uniform again, so that one number draws both
    bytes, by the inverse CDF of the whole sample."""
    p = weights.double() / weights.double().sum(1, keepdim=True)
    below = p.cumsum(1).gather(1, drawn[:, None])[:, 0]
    share = p.gather(1, drawn[:, None])[:, 0]
    return (1 - (below - uniforms) / share).clamp(0, 1 - 2**-24).float()


def _scaled(byte: Tensor) -> Tensor:
    """0 .. 255 as -1 .. 1, the paper's scale of inputs."""
    return byte.float() / 127.5 - 1
