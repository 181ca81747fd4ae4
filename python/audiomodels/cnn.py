"""The convolutional baselines of FSD50K on log-mel: VGG-like, ResNet-18, DenseNet-121, CRNN.

    audio -> 96 mel bands of 30 ms every 10 ms -> log -> each band standardised -> convolutions -> logits

Fonseca et al., "FSD50K" (arXiv 2010.00475), section 5, whose numbers of parameters they have at 200 labels: 0.27 M,
11.3 M, 12.5 M and 0.96 M. ResNet is He et al. (1512.03385), DenseNet Huang et al. (1608.06993), the CRNN Cakir et al.
(1702.06286). Where a width is not known, it is the one that gives the number: the VGG-like net's last block has 112
channels, and DenseNet-121 has its transitions without compression (with it, as usual, it would have 7.2 M).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiomodels import features
from audiomodels.tagger import Tagger, TaggerConfig, check_audio


@dataclass(frozen=True)
class CNNConfig(TaggerConfig):
    """Which baseline."""

    kind: Literal["vgg", "resnet18", "densenet121", "crnn"] = "vgg"
    n_mel: int = 96

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 40 <= self.n_mel <= 256:
            raise ValueError(f"n_mel must be 40 .. 256, got {self.n_mel}")


class CNN(Tagger):
    """model(audio (batch, samples)) -> logits (batch, n_class), for samples of 0.6 s and more."""

    config_class = CNNConfig

    def __init__(self, config: CNNConfig = CNNConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        self.standardise = nn.BatchNorm1d(config.n_mel, affine=False)
        self.net = {"vgg": vgg, "resnet18": resnet18, "densenet121": densenet121, "crnn": CRNN}[config.kind](config)

    def forward(self, audio: Tensor) -> Tensor:
        """Logits of audio, float (batch, samples), full scale [-1, 1]."""
        check_audio(audio)
        least = int(0.6 * self.config.sample_rate)
        if audio.shape[1] < least:
            raise ValueError(f"audio must have at least {least} samples, got {audio.shape[1]}")
        bands = self.standardise(self.log_mel(audio))
        return self.net(bands[..., None].permute(0, 3, 1, 2))  # channels last in memory: 1.3 to 1.6 times as fast

    def log_mel(self, audio: Tensor) -> Tensor:
        """(batch, n_mel, samples / 10 ms + 1), natural log of the power in 30 ms windows."""
        rate = self.config.sample_rate
        power = features.mel(
            audio,
            rate,
            n_fft=2 ** (rate * 3 // 100).bit_length() * 2,  # finer than the window: no band falls between two bins
            win_length=rate * 3 // 100,
            hop=rate // 100,
            n_mel=self.config.n_mel,
        )
        return torch.log(power + 1e-5)


def conv(n_in: int, n_out: int, width: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size (or divides it by the stride), for a norm to follow."""
    return nn.Conv2d(n_in, n_out, width, stride, padding=width // 2, bias=False)


def conv_norm_relu(n_in: int, n_out: int, width: int = 3, stride: int = 1) -> list[nn.Module]:
    """Convolution, batch norm, ReLU."""
    return [conv(n_in, n_out, width, stride), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]


def head(n_in: int, config: CNNConfig) -> list[nn.Module]:
    """Mean over time and frequency, then one dense layer."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, config.n_class)]


def vgg(config: CNNConfig) -> nn.Module:
    """Three blocks of two 3 x 3 convolutions, each followed by a maximum over 2 x 2."""
    layers, n_in = [], 1
    for n_out in (32, 64, 112):
        layers += [*conv_norm_relu(n_in, n_out), *conv_norm_relu(n_out, n_out), nn.MaxPool2d(2)]
        n_in = n_out
    return nn.Sequential(*layers, *head(n_in, config))


class Residual(nn.Module):
    """x + two convolutions of it; where the size changes, x goes through a 1 x 1 convolution."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(*conv_norm_relu(n_in, n_out, 3, stride), conv(n_out, n_out), nn.BatchNorm2d(n_out))
        same = n_in == n_out and stride == 1
        self.shortcut = None if same else nn.Sequential(conv(n_in, n_out, 1, stride), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + (x if self.shortcut is None else self.shortcut(x)))


def resnet18(config: CNNConfig) -> nn.Module:
    """He et al., table 1, 18 layers."""
    layers, n_in = [*conv_norm_relu(1, 64, 7, 2), nn.MaxPool2d(3, 2, 1)], 64
    for n_out in (64, 128, 256, 512):
        layers += [Residual(n_in, n_out, 1 if n_out == 64 else 2), Residual(n_out, n_out, 1)]
        n_in = n_out
    return nn.Sequential(*layers, *head(n_in, config))


class Dense(nn.Module):
    """x, with the 32 channels that a 1 x 1 and a 3 x 3 convolution make of it behind it."""

    def __init__(self, n_in: int, growth: int = 32):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(n_in), nn.ReLU(), *conv_norm_relu(n_in, 4 * growth, 1), conv(4 * growth, growth)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet121(config: CNNConfig) -> nn.Module:
    """Huang et al., table 1, 121 layers, with transitions that keep the number of channels."""
    layers, n = [*conv_norm_relu(1, 64, 7, 2), nn.MaxPool2d(3, 2, 1)], 64
    for count in (6, 12, 24, 16):
        layers += [Dense(n + 32 * i) for i in range(count)]
        n += 32 * count
        layers += [nn.BatchNorm2d(n), nn.ReLU(inplace=True)]
        if count != 16:
            layers += [conv(n, n, 1), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, *head(n, config))


class CRNN(nn.Module):
    """Three 5 x 5 convolutions that keep time and divide frequency by 5, 4 and 2, a two-way GRU, mean over time."""

    def __init__(self, config: CNNConfig):
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, factor in ((1, 5), (128, 4), (128, 2)):
            layers += [*conv_norm_relu(n_in, 128, 5), nn.MaxPool2d((factor, 1))]
        self.body = nn.Sequential(*layers)
        self.gru = nn.GRU(128 * (config.n_mel // 5 // 4 // 2), 64, batch_first=True, bidirectional=True)
        self.out = nn.Linear(128, config.n_class)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).flatten(1, 2).transpose(1, 2)
        return self.out(self.gru(x)[0].mean(1))
