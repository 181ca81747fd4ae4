"""PatchCodes: sound as a stream of codes, one or a few for each short patch of its spectrogram, and back.

    patch = `patch_frames` frames of the log spectrogram, all its bins or one of `n_band` equal bands of them
    z     = encoder(patch)                 three dense layers down to n_embd numbers
    code  = argmin_k |z - codebook[k]|     k-means over the z of the training sound
    patch ~ decoder(codebook[code])        three dense layers back up

Verma & Smith 2020, "A framework for contrastive and generative learning of audio representations" (arXiv 2010.11459):
a fully connected autoencoder whose bottleneck is clustered afterwards, "vanilla" k-means, nothing end to end. The
autoencoder learns by gradient steps (`learn`, through train.fit), the codebook then in one go. Sound comes back by
Griffin-Lim, or through a WaveNet that is conditioned on the codes (unit_decoder.py).
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiomodels import codebook as cb
from audiomodels import features, quantize
from audiomodels.data import Crops, Recordings
from audiomodels.pretrained import Pretrained
from audiomodels.train import History, Objective, TrainConfig, changed, fit

LOUDNESS = 0.5  # power of the magnitude that patches hold: peaks count more than noise; a full-scale sine peaks at 1


@dataclass(frozen=True)
class PatchCodesConfig:
    """Sizes of a PatchCodes, and the sound that it takes."""

    n_code: int = 256  # codes are 0 .. n_code - 1
    n_fft: int = 1024  # samples in a window; n_fft / 2 bins
    hop: int = 256  # samples between frames
    patch_frames: int = 2  # frames in a patch
    n_band: int = 1  # patches that share the bins of a frame; one autoencoder and codebook serve all of them
    hidden: int = 512  # width of the outer dense layers
    n_embd: int = 64  # width of the bottleneck
    sample_rate: int = 16000  # Hz

    def __post_init__(self):
        limits = {
            "n_code": (2, 32768),
            "n_fft": (16, 1 << 16),
            "hop": (1, 1 << 15),
            "patch_frames": (1, 1024),
            "n_band": (1, 1024),
            "hidden": (1, 1 << 14),
            "n_embd": (1, 1 << 14),
            "sample_rate": (1000, 768_000),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            try:
                value = operator.index(value)
            except TypeError:
                raise TypeError(f"{name} must be an integer, got {value!r}") from None
            if not low <= value <= high:
                raise ValueError(f"{name} must be {low} .. {high}, got {value}")
            object.__setattr__(self, name, value)
        if self.n_fft % (2 * self.n_band):
            raise ValueError(f"n_fft must be a multiple of {2 * self.n_band}, twice the bands, got {self.n_fft}")
        if self.hop > self.n_fft // 2:
            raise ValueError(f"hop must be at most n_fft / 2 = {self.n_fft // 2}, got {self.hop}")

    @property
    def patch_hop(self) -> int:
        """Samples that a patch stands for."""
        return self.patch_frames * self.hop

    @property
    def patch_size(self) -> int:
        """Numbers in a patch."""
        return self.patch_frames * self.n_fft // 2 // self.n_band


class PatchCodes(nn.Module, Pretrained):
    """codes = model.encode(audio); audio = model.decode(codes). An Encoder and a Decoder of encoders.py."""

    config_class = PatchCodesConfig

    def __init__(self, config: PatchCodesConfig = PatchCodesConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        widths = [config.patch_size, config.hidden, max(config.hidden // 2, config.n_embd), config.n_embd]
        self.encoder, self.decoder = _dense(widths), _dense(widths[::-1])
        self.register_buffer("codebook", torch.zeros(config.n_code, config.n_embd))

    @property
    def sample_rate(self) -> int:
        """Of the sound, Hz."""
        return self.config.sample_rate

    @property
    def hop(self) -> int:
        """Samples that a row of `embed` stands for."""
        return self.config.patch_hop

    @property
    def dim(self) -> int:
        """Numbers in a row of `embed`: the bottlenecks of all bands."""
        return self.config.n_band * self.config.n_embd

    def patches(self, audio: Tensor) -> Tensor:
        """Patches of audio (batch, samples): float (batch, ceil(samples / hop), n_band, patch_size), about -1 .. 1.

        The end is padded with silence to a whole patch. Errors: ValueError for another shape, for less than one patch
        of sound, and for samples that are not finite.
        """
        config = self.config
        if audio.ndim != 2 or not audio.is_floating_point():
            raise ValueError(f"audio must be float (batch, samples), got {audio.dtype} of shape {tuple(audio.shape)}")
        if audio.shape[1] < self.hop:
            raise ValueError(f"audio must hold at least one patch, {self.hop} samples, got {audio.shape[1]}")
        if not torch.isfinite(audio).all():
            raise ValueError("audio must be finite")
        audio = F.pad(audio, (0, -audio.shape[1] % self.hop))
        spectrum = features.spectrogram(audio, config.n_fft, config.hop)
        level = 4 / config.n_fft * spectrum[:, :-1, :-1]  # without the top bin and the frame past the end
        frames = (level**LOUDNESS).transpose(1, 2)
        return (
            frames.unflatten(1, (-1, config.patch_frames)).unflatten(3, (config.n_band, -1)).transpose(2, 3).flatten(3)
        )

    def levels(self, patches: Tensor) -> Tensor:
        """Magnitudes of a spectrogram (batch, n_fft / 2 + 1, frames + 1), as torch.stft gives them, of `patches`."""
        config = self.config
        parts = patches.unflatten(3, (config.patch_frames, -1)).transpose(2, 3)  # (batch, time, frames, band, bin)
        frames = parts.flatten(3).flatten(1, 2).transpose(1, 2)
        level = config.n_fft / 4 * frames.clamp(min=0) ** (1 / LOUDNESS)  # the sum of a Hann window is n_fft / 2
        return F.pad(level, (0, 1, 0, 1))

    def forward(self, patches: Tensor) -> Tensor:
        """The autoencoder: patches (..., patch_size) -> their reconstruction, without codes."""
        return self.decoder(self.encoder(patches))

    def embed(self, audio: Tensor) -> Tensor:
        """The bottleneck of audio (batch, samples): float (batch, ceil(samples / hop), dim)."""
        return self.encoder(self.patches(audio)).flatten(2)

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Codes of audio (batch, samples): integers (batch, ceil(samples / hop) * n_band), the bands of a patch side
        by side; uint8 up to 256 codes, int16 above."""
        return cb.nearest(self.encoder(self.patches(audio)), self._codebook()).flatten(1)

    @torch.no_grad()
    def decode_patches(self, codes: Tensor) -> Tensor:
        """Patches (batch, time, n_band, patch_size) that codes (batch, time * n_band) stand for."""
        codes = cb.check_codes(codes, self.config.n_code)
        if codes.shape[1] % self.config.n_band:
            raise ValueError(f"codes must come in groups of {self.config.n_band} bands, got {codes.shape[1]} codes")
        return self.decoder(self._codebook()[codes.unflatten(1, (-1, self.config.n_band))])

    def decode(self, codes: Tensor, *, n_iter: int = 32) -> Tensor:
        """Sound of codes (batch, time * n_band): float32 (batch, time * hop), its phases by Griffin-Lim."""
        return griffin_lim(self.levels(self.decode_patches(codes)), self.config.hop, n_iter=n_iter)

    @torch.no_grad()
    def fit_codes(self, recordings: Recordings, *, seed: int = 0) -> None:
        """k-means over the bottlenecks of all of `recordings`; a recording shorter than a patch is left out."""
        self.check_length(recordings)
        device = self.codebook.device
        rows = [self.encoder(self.patches(audio.to(device))).flatten(0, 2) for audio in _sounds(recordings, self.hop)]
        self.codebook.copy_(cb.fit_codebook(torch.cat(rows), self.config.n_code, seed=seed))

    def check_length(self, recordings: Recordings) -> None:
        """ValueError unless one of `recordings` holds a patch."""
        if all(len(recording.codes) < self.hop for recording in recordings):
            raise ValueError(f"recordings must hold at least one patch, {self.hop} samples, in one piece")

    def _codebook(self) -> Tensor:
        if not self.codebook.any():
            raise ValueError("this model has no codes yet: see PatchCodes.fit_codes")
        return self.codebook


def learn(model: PatchCodes, recordings: Recordings, training: TrainConfig) -> History:
    """Train the autoencoder on crops of `recordings` (resuming what is in training.out), then fit the codebook.

    training.length: samples of a crop, a multiple of model.hop is best. Errors: ValueError where the recordings have
    another sample rate, are silent, or hold no patch; those of train.fit.
    """
    if recordings.sample_rate != model.sample_rate:
        raise ValueError(f"recordings must be at {model.sample_rate} Hz as the model, got {recordings.sample_rate}")
    if all(not audio.any() for audio in _sounds(recordings, 1)):
        raise ValueError("recordings must hold sound, got silence alone")
    model.check_length(recordings)
    crops = Crops(recordings, batch=training.batch, length=training.length, context=0, seed=training.seed)
    history = fit(model, changed(crops.audio, model.patches), training, task=Objective(reconstruction))
    model.fit_codes(recordings, seed=training.seed)
    return history


def reconstruction(model: nn.Module, patches: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of the autoencoder, in loudness squared."""
    return F.mse_loss(model(patches), targets)


@torch.no_grad()
def griffin_lim(level: Tensor, hop: int, *, n_iter: int = 32, momentum: float = 0.99) -> Tensor:
    """Sound whose spectrogram is nearest to `level`: float (batch, (frames - 1) * hop).

    level: magnitudes (batch, n_fft / 2 + 1, frames) of torch.stft with a Hann window and centred frames. Source:
    Griffin & Lim 1984; with momentum, Perraudin, Balazs & Sondergaard, "A fast Griffin-Lim algorithm" (WASPAA 2013).
    The first phases are those of steady partials: each bin runs on at its own frequency.
    """
    n_fft, frames = 2 * (level.shape[1] - 1), level.shape[2]
    options = {"n_fft": n_fft, "hop_length": hop, "window": torch.hann_window(n_fft, device=level.device)}
    bins = torch.arange(level.shape[1], device=level.device, dtype=torch.float64)[:, None]
    start = 2 * torch.pi * (bins * torch.arange(frames, device=level.device) * hop / n_fft % 1)
    phase, last = torch.polar(torch.ones_like(start), start).to(torch.complex64).expand(level.shape), None
    length = (frames - 1) * hop
    for _ in range(n_iter):
        audio = torch.istft(level * phase, length=length, **options)
        spectrum = torch.stft(audio, pad_mode="constant", return_complex=True, **options)
        ahead = spectrum if last is None else spectrum + momentum * (spectrum - last)
        phase, last = ahead / ahead.abs().clamp(min=1e-12), spectrum
    return torch.istft(level * phase, length=length, **options)


def _dense(widths: list[int]) -> nn.Sequential:
    """Linear layers of these widths, with GELU between them."""
    layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.GELU())]
    return nn.Sequential(*layers[:-1])


def _sounds(recordings: Recordings, least: int) -> list[Tensor]:
    """Recordings of at least `least` samples as float32 (1, samples)."""
    return [
        quantize.decode(recording.codes, recordings.companding, recordings.n_class)[None]
        for recording in recordings
        if len(recording.codes) >= least
    ]
