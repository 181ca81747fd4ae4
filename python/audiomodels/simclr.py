"""SimCLR: an encoder that maps two altered views of one sound near each other, and other sounds away from them.

    h = VGG(view),   z = projection(h) / |projection(h)|
    loss = mean over views i of  -log( exp(z_i . z_pair(i) / t) / sum over k != i of exp(z_i . z_k / t) )

Chen et al. 2020, "A simple framework for contrastive learning of visual representations" (arXiv 2002.05709), on log-mel
spectrograms as the contrastive side of Verma & Smith 2020 (2010.11459). The loss is NT-Xent (normalised temperature
cross-entropy). A probe reads h, not z. Views are crops that are then shifted in pitch, filtered, given noise, blurred,
reversed and masked, all on the log-mel spectrogram, by a stream that depends on (seed, step) alone.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from audiomodels.cnn import CNN, CNNConfig
from audiomodels.pretrained import Pretrained
from audiomodels.train import data_of


@dataclass(frozen=True)
class SimCLRConfig:
    """Sizes of a SimCLR."""

    n_mel: int = 96  # bands of the spectrogram
    n_projection: int = 64  # width of z
    sample_rate: int = 16000  # Hz

    def __post_init__(self):
        for name, (low, high) in {"n_projection": (1, 1 << 16)}.items():
            value = operator.index(getattr(self, name))
            if not low <= value <= high:
                raise ValueError(f"{name} must be {low} .. {high}, got {value}")
        CNNConfig(n_class=1, n_mel=self.n_mel, sample_rate=self.sample_rate)


class SimCLR(nn.Module, Pretrained):
    """model(views) -> z for the loss; model.embed(audio) -> rows of h. An Encoder of encoders.py."""

    config_class = SimCLRConfig

    def __init__(self, config: SimCLRConfig = SimCLRConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        self.cnn = CNN(CNNConfig(n_class=1, n_mel=config.n_mel, sample_rate=config.sample_rate))
        width = self.cnn.net[-1].in_features
        self.cnn.net = self.cnn.net[:-1]
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.n_projection))
        self.sample_rate, self.hop, self.dim = config.sample_rate, 8 * (config.sample_rate // 100), width

    def forward(self, views: Tensor) -> Tensor:
        """z, float (batch, n_projection), of log-mel spectrograms (batch, n_mel, frames)."""
        return self.projection(self.cnn.net(self.cnn.standardise(views)[:, None]))

    def embed(self, audio: Tensor) -> Tensor:
        """Rows of h of audio (batch, samples): (batch, samples / hop, dim); their mean over time is h."""
        return vgg_rows(self.cnn, audio)


def vgg_rows(cnn: CNN, audio: Tensor) -> Tensor:
    """The last feature map of a VGG over audio (batch, samples), averaged over frequency: (batch, time, channels)."""
    convolutions = [layer for layer in cnn.net if not isinstance(layer, nn.AdaptiveAvgPool2d | nn.Flatten | nn.Linear)]
    x = cnn.standardise(cnn.log_mel(audio))[:, None]
    return nn.Sequential(*convolutions)(x).mean(2).transpose(1, 2)


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.2) -> Tensor:
    """The contrastive loss of pairs: a, b float (batch, dim), row i of one belonging to row i of the other.

    Under DDP the other sounds of a view are those of its own process. Source: Chen et al. 2020, equation 1.
    """
    if a.shape != b.shape or a.ndim != 2 or len(a) < 2:
        raise ValueError(f"a and b must both be (batch >= 2, dim), got {tuple(a.shape)} and {tuple(b.shape)}")
    z = F.normalize(torch.cat([a, b]).float(), dim=1)
    similar = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similar, torch.arange(2 * len(a), device=z.device).roll(len(a)))


def contrast(model: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """The loss of two views of each sound, for train.Objective."""
    return nt_xent(*model(torch.cat([first, second])).chunk(2))


# ---- views: each function takes log-mel spectrograms x (batch, n_mel, frames) and alters every row in its own way


class Views:
    """crops(step) -> two views (batch, n_mel, frames) of each sound: what fit takes with Objective(contrast).

    sounds(step): audio (batch, samples), such as Crops(...).audio; log_mel: SimCLR(...).cnn.log_mel; frames: of a view,
    at most those of the sounds.
    """

    def __init__(
        self,
        sounds: Callable[[int], Tensor],
        log_mel: Callable[[Tensor], Tensor],
        *,
        frames: int,
        seed: int = 0,
    ):
        self.sounds, self.log_mel, self.frames, self.seed = sounds, log_mel, frames, seed
        self.data = data_of(sounds)  # for a run that is resumed

    @torch.no_grad()
    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The two views of training step `step`."""
        state = np.random.SeedSequence([self.seed, step]).generate_state(1)  # torch reads 32 bits of a seed
        generator = Generator().manual_seed(int(state[0]))
        x = self.log_mel(self.sounds(step))
        return self.view(x, generator), self.view(x, generator)

    def view(self, x: Tensor, generator: Generator) -> Tensor:
        """One view (batch, n_mel, frames) of log-mel spectrograms x."""
        x = crop(x, self.frames, generator)
        for change in (shift_pitch, equalise, add_noise, blur, flip, mask_patches):
            x = change(x, generator)
        return x


def crop(x: Tensor, frames: int, generator: Generator) -> Tensor:
    """`frames` frames from a random place of each row."""
    if not 1 <= frames <= x.shape[2]:
        raise ValueError(f"frames must be 1 .. {x.shape[2]}, those of the spectrogram, got {frames}")
    first = torch.randint(x.shape[2] - frames + 1, (len(x), 1, 1), generator=generator)
    return x.gather(2, (first + torch.arange(frames)).expand(-1, x.shape[1], -1))


def shift_pitch(x: Tensor, generator: Generator, *, most: int = 4) -> Tensor:
    """All bands moved up or down by up to `most`; what comes in at the edge repeats the edge."""
    by = torch.randint(-most, most + 1, (len(x), 1, 1), generator=generator)
    bands = (torch.arange(x.shape[1])[:, None] - by).clamp(0, x.shape[1] - 1)
    return x.gather(1, bands.expand(-1, -1, x.shape[2]))


def equalise(x: Tensor, generator: Generator, *, points: int = 5, most: float = 1.5) -> Tensor:
    """A random smooth filter: a curve through `points` levels of up to +-most (natural log of power: 6.5 dB)."""
    levels = (2 * torch.rand(len(x), 1, points, generator=generator) - 1) * most
    return x + F.interpolate(levels, x.shape[1], mode="linear", align_corners=True).transpose(1, 2)


def add_noise(x: Tensor, generator: Generator, *, quietest: float = 12.0, loudest: float = 4.0) -> Tensor:
    """White noise in power, between `quietest` and `loudest` (natural log) below the row's loudest point."""
    below = loudest + (quietest - loudest) * torch.rand(len(x), 1, 1, generator=generator)
    grain = torch.rand(x.shape, generator=generator).clamp(min=1e-6)
    return torch.logaddexp(x, x.amax((1, 2), keepdim=True) - below + (-grain.log()).log())


def blur(x: Tensor, generator: Generator, *, most: float = 1.0) -> Tensor:
    """A Gaussian blur over time and bands, of up to `most` steps."""
    sigma = 0.1 + most * torch.rand(len(x), 1, generator=generator)
    weight = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma).square())
    weight = (weight / weight.sum(1, keepdim=True))[:, None]
    rows = F.pad(x, (3, 3, 3, 3), mode="replicate")[None]
    rows = F.conv2d(rows, weight[:, :, None], groups=len(x))
    return F.conv2d(rows, weight[..., None], groups=len(x))[0]


def flip(x: Tensor, generator: Generator) -> Tensor:
    """Half of the rows backwards in time."""
    return torch.where(torch.rand(len(x), 1, 1, generator=generator) < 0.5, x.flip(2), x)


def mask_patches(x: Tensor, generator: Generator, *, count: int = 3, share: float = 0.25) -> Tensor:
    """`count` rectangles, each up to `share` of the bands and of the frames, set to the row's mean."""
    hidden = torch.zeros(x.shape, dtype=torch.bool)
    for _ in range(count):
        inside = True
        for axis in (1, 2):
            size = x.shape[axis]
            width = (share * size * torch.rand(len(x), 1, 1, generator=generator)).long() + 1
            first = (torch.rand(len(x), 1, 1, generator=generator) * (size - width + 1)).long()
            place = torch.arange(size).view([1, -1, 1] if axis == 1 else [1, 1, -1])
            inside = inside & (first <= place) & (place < first + width)
        hidden |= inside
    return torch.where(hidden, x.mean((1, 2), keepdim=True), x)
