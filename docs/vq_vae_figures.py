"""The table of docs/codes.md, "What the VQ-VAE keeps": python docs/vq_vae_figures.py SEED ...

Each row: a level of a small VQ-VAE after 120 steps on notes of a struck string, and what it makes of notes between
those: 64 crops of 4,096 samples, 2,048 codes of the top level. Fewer would cap the share of codes that can be in use.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
from audiomodels import codebook as cb
from audiomodels.data import Crops
from audiomodels.train import Objective, TrainConfig, fit
from audiomodels.vq_vae import VQVAE, VQVAEConfig, snr, spectral_distance, vq_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from sounds import RATE, notes  # noqa: E402

CONFIG = VQVAEConfig(n_code=256, width=12, depth=1, n_embd=16, sample_rate=RATE)
DECAYS = (0.99, 0.9, 0.8)


def train(decay: float, seed: int) -> VQVAE:
    """A model after 120 steps of 8 x 4,096 samples."""
    torch.manual_seed(seed)
    model = VQVAE(dataclasses.replace(CONFIG, decay=decay))
    crops = Crops(notes(range(48, 72, 2)), batch=8, length=4096, context=0, seed=seed)
    with tempfile.TemporaryDirectory() as out:
        run = TrainConfig(out=out, steps=120, batch=8, length=4096, context=0, lr=5e-3, warmup=10, save_every=0,
                          seed=seed, tensorboard=False, progress=False)  # fmt: skip
        fit(model, crops.audio, run, task=Objective(vq_loss))
    return model.eval()


def main() -> None:
    sounds = Crops(notes(range(49, 72, 2)), batch=64, length=4096, context=0, seed=9).audio(0)
    print("| decay | seed | hop | SNR, dB | spectral distance | codes in use |\n|---|---|---|---|---|---|")
    for decay in DECAYS:
        for seed in map(int, sys.argv[1:] or ["0"]):
            for level in train(decay, seed).levels:
                codes = level.encode(sounds)
                made, use = level.decode(codes), cb.usage(codes, CONFIG.n_code)
                distance = float(spectral_distance(made, sounds))
                print(f"| {decay:g} | {seed} | {level.hop} | {snr(made, sounds):.1f} | {distance:.2f} | {use:.0%} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
