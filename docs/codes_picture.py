"""Draws docs/codes.png: two piano-like notes in turn, under 16 codes and under 512. Needs audiokernels[models].

python docs/codes_picture.py
"""

import dataclasses
import tempfile
from pathlib import Path

import torch
from audiomodels import codebook, plots, quantize
from audiomodels.data import Recording, Recordings
from audiomodels.patch_codes import PatchCodes, PatchCodesConfig, learn
from audiomodels.train import TrainConfig

RATE, LOW, HIGH = 8000, 50, 51  # Hz; MIDI numbers of the two notes, D and D sharp below middle C
CONFIG = PatchCodesConfig(n_code=512, n_fft=1024, hop=256, patch_frames=1, hidden=256, sample_rate=RATE)


def note(midi: int, seconds: float = 0.5) -> torch.Tensor:
    """A struck string: harmonics that fade, the higher the faster."""
    t, hz = torch.arange(round(seconds * RATE)) / RATE, 440 * 2 ** ((midi - 69) / 12)
    partials = (0.4**k * torch.sin(2 * torch.pi * hz * k * t) * torch.exp(-t * (2 + k)) for k in range(1, 8))
    return sum(partials) * (200 * t).clamp(max=1)


def scale() -> Recordings:
    """36 notes, each in three loudnesses after three pauses: what the codes are learned from."""
    variants = ((1.0, 0), (0.8, 77), (0.6, 140))
    sounds = [gain * torch.cat([torch.zeros(pause), note(m)]) for m in range(48, 84) for gain, pause in variants]
    rows = [Recording(f"{i}", quantize.encode(x, "linear", 1 << 16), f"{i}") for i, x in enumerate(sounds)]
    return Recordings(rows, sample_rate=RATE, companding="linear", n_class=1 << 16)


def train(recordings: Recordings) -> PatchCodes:
    """An autoencoder of their patches, the same for both numbers of codes."""
    torch.manual_seed(0)
    model = PatchCodes(CONFIG)
    with tempfile.TemporaryDirectory() as out:
        options = {"tensorboard": False, "progress": False, "save_every": 0}
        learn(model, recordings, TrainConfig(out, steps=800, batch=16, length=1024, lr=4e-3, warmup=10, **options))
    return model


def panel(axis, model: PatchCodes, sound: torch.Tensor, which: torch.Tensor) -> None:
    """The spectrogram up to 1 kHz, the number of each frame's code above it."""
    codes = model.encode(sound[None])[0].tolist()
    labels = which[(torch.arange(len(codes)) * model.hop + model.hop // 2).clamp(max=len(which) - 1)]
    purity = codebook.purity(torch.tensor(codes), labels)
    patches = model.patches(sound[None])[0, :, 0, :128]
    seconds = len(codes) * model.hop / RATE
    axis.imshow(patches.T, origin="lower", aspect="auto", extent=(0, seconds, 0, 1000), cmap="magma")
    color = {code: f"C{i % 10}" for i, code in enumerate(dict.fromkeys(codes))}
    start = 0
    for end in range(1, len(codes) + 1):
        if end == len(codes) or codes[end] != codes[start]:
            place = (start * model.hop / RATE, (end - start) * model.hop / RATE)
            axis.broken_barh([place], (1010, 130), color=color[codes[start]], edgecolor="white", linewidth=0.6)
            if end - start > 1:
                centre = place[0] + place[1] / 2
                axis.text(centre, 1075, codes[start], ha="center", va="center", fontsize=6, color="white")
            start = end
    axis.set(ylim=(0, 1150), ylabel="Hz", xlabel="seconds")
    axis.set_title(
        f"{model.config.n_code} codes: {len(color)} of them here, frame purity {purity:.0%}", loc="left", fontsize=10
    )
    for i in range(1, 6):
        axis.axvline(i / 2, color="white", linewidth=0.6, linestyle=":")


def draw(path: Path) -> None:
    """Two panels, the same sound and the same autoencoder."""
    recordings = scale()
    model = train(recordings)
    sound = torch.cat([note((LOW, HIGH)[i % 2]) for i in range(6)])
    which = torch.arange(len(sound)) // (RATE // 2) % 2
    figure, grid = plots.figure(11, 6, 2, 1)
    for row, n_code in enumerate((16, 512)):
        coder = PatchCodes(dataclasses.replace(CONFIG, n_code=n_code)).eval()
        coder.encoder, coder.decoder = model.encoder, model.decoder
        coder.fit_codes(recordings)
        panel(plots.add(figure, grid[row, 0], ""), coder, sound, which)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    draw(Path(__file__).with_name("codes.png"))
