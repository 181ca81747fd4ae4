"""Sound continued without text: sound -> units -> language model -> units -> sound.

    codes            = coder(sound)                    PatchCodes, or k-means units of a Hugging Face encoder
    units, durations = codes without repeats           "aaab" is a, b and 3, 1
    next units       ~ CodeLM(units)                   next durations ~ how long each unit lasted in the data
    sound            = decoder(all codes)              a WaveNet on the codes that goes on from the sound's last samples

The pipeline of generative spoken language modeling (Lakhotia et al. 2021, arXiv 2102.01192), for any sound: nothing in
it knows of words. `train_units` makes a folder of models from recordings alone, `continue_sound` uses it; both are
commands, `audiokernels train-units` and `audiokernels continue`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from audiomodels import codebook as cb
from audiomodels import patch_codes, quantize
from audiomodels.code_lm import CodeLM, CodeLMConfig, code_recordings
from audiomodels.data import Crops, Recordings
from audiomodels.encoders import Coder, Decoder, HuggingFaceEncoder
from audiomodels.patch_codes import PatchCodes, PatchCodesConfig
from audiomodels.pretrained import CONFIG, ModelError, model_folder
from audiomodels.train import Objective, TrainConfig, fit
from audiomodels.unit_decoder import (
    ConditionedCrops,
    MelCrops,
    MelWaveNet,
    NoisyPast,
    UnitToMel,
    UnitToMelConfig,
    UnitWaveNet,
    mel_error,
    mel_recordings,
    unit_frames,
    unit_mel_recordings,
    unit_recordings,
)
from audiomodels.units import Durations, DurationsConfig, Units, collapsed
from audiomodels.wavenet import WaveNet, WaveNetConfig

PARTS = ("coder", "lm", "durations")  # and a decoder, unless the coder is its own


class Textless(NamedTuple):
    """The models of a folder that `train_units` wrote."""

    coder: Coder
    lm: CodeLM
    durations: Durations
    decoder: Decoder


@dataclass
class UnitTraining:
    """What `train_units` needs to know."""

    out: Path
    """Folder of the models; a run that is there is resumed."""
    n_code: int = 100
    """Units; 50, 100 and 200 are usual."""
    encoder: Path | None = None
    """Folder of a wav2vec 2.0, HuBERT or EnCodec to take the units from; default: an autoencoder of patches."""
    layer: int | None = None
    """Of that encoder; default: its last."""
    decoder: Literal["wavenet", "mel", "griffin-lim"] = "wavenet"
    """wavenet: on the codes; mel: codes -> mel frames -> WaveNet; griffin-lim: the autoencoder's own, soonest made."""
    steps: int = 3000
    """Of each model."""
    decoder_steps: int | None = None
    """Of the decoder's WaveNet, which is most of the work; default: as the others."""
    batch: int = 8
    """Crops per step."""
    device: str = "auto"
    """auto: a GPU where there is one."""
    seed: int = 0
    """Of weights and crops."""
    progress: bool = True
    """Show bars."""
    patches: PatchCodesConfig = field(default_factory=PatchCodesConfig)
    """The autoencoder's sizes; its n_code is that above."""
    lm: CodeLMConfig = field(default_factory=lambda: CodeLMConfig(n_layer=4, n_head=4, n_embd=128, window=256))
    """The language model's sizes; what it shares with the units is set by them."""
    wavenet: WaveNetConfig = field(default_factory=WaveNetConfig)
    """The decoder's sizes; what it shares with the units is set by them."""

    def run(self, stage: str, **changes: object) -> TrainConfig:
        """The training of one stage."""
        shared = {"steps": self.steps, "batch": self.batch, "device": self.device, "seed": self.seed}
        return TrainConfig(**{"out": str(self.out / "runs" / stage), **shared, "progress": self.progress, **changes})


def train_units(recordings: Recordings, training: UnitTraining) -> Textless:
    """Train coder, language model and decoder on `recordings` (16-bit linear codes) and save them in training.out.

    Each stage resumes where it was stopped. Errors: ValueError for recordings of another rate, or too short or silent;
    those of train.fit.
    """
    if training.encoder is not None and training.decoder == "griffin-lim":
        raise ValueError("decoder must be wavenet for the units of another encoder: they have no spectrogram")
    coder = _coder(recordings, training)
    name, shared = cb.name_of(coder.codebook), {"sample_rate": coder.sample_rate}
    streams = code_recordings(recordings, coder)
    durations = Durations(DurationsConfig(training.n_code, codebook=name))
    durations.count(stream.codes for stream in streams)
    durations.save_pretrained(training.out / "durations")

    units = collapsed(streams)
    config = dataclasses.replace(training.lm, n_class=training.n_code, codebook=name, hop=coder.hop, **shared)
    torch.manual_seed(training.seed)
    lm, length = CodeLM(config), max(1, min(128, max(len(stream.codes) for stream in units)))
    run = training.run("lm", length=length, context=min(128, config.window))
    fit(lm, Crops(units, batch=run.batch, length=length, context=run.context, seed=run.seed), run)
    lm.cpu().eval().save_pretrained(training.out / "lm")

    if training.decoder == "griffin-lim":
        return Textless(coder, lm, durations, coder)
    return Textless(coder, lm, durations, _decoder(recordings, coder, training))


def _decoder(recordings: Recordings, coder: Coder, training: UnitTraining) -> Decoder:
    mel = UnitToMelConfig(n_code=training.n_code, sample_rate=coder.sample_rate, hop=coder.hop)
    channels = mel.n_mel if training.decoder == "mel" else training.n_code
    options = {"condition_channels": channels, "condition_hop": coder.hop, "n_label": 0}
    torch.manual_seed(training.seed)
    wavenet = WaveNet(dataclasses.replace(training.wavenet, sample_rate=coder.sample_rate, **options))
    frames = -(-wavenet.receptive_field // coder.hop)
    length, context = -(-1600 // coder.hop) * coder.hop, frames * coder.hop
    if training.decoder == "mel":
        data = mel_recordings(recordings, mel, wavenet, context=context)
    else:
        data = unit_recordings(recordings, coder, wavenet, context=context)
    steps = training.steps if training.decoder_steps is None else training.decoder_steps
    run = training.run("decoder", steps=steps, lr=2e-3, length=length, context=context)
    crops = ConditionedCrops(data, coder.hop, batch=run.batch, length=length, context=context, seed=run.seed)
    fit(wavenet, crops, run, task=NoisyPast(data.n_class))
    wavenet.cpu().eval().save_pretrained(training.out / "decoder")
    if training.decoder != "mel":
        return UnitWaveNet(wavenet)
    torch.manual_seed(training.seed)
    to_mel, data = UnitToMel(mel), unit_mel_recordings(recordings, coder, mel)
    length = min(64, max(len(recording.codes) for recording in data))
    run = training.run("to_mel", length=length, context=0)
    fit(to_mel, MelCrops(data, batch=run.batch, length=length, seed=run.seed), run, task=Objective(mel_error))
    to_mel.cpu().eval().save_pretrained(training.out / "to_mel")
    return MelWaveNet(to_mel, wavenet)


def _coder(recordings: Recordings, training: UnitTraining) -> Coder:
    if training.encoder is not None:
        encoder = HuggingFaceEncoder(training.encoder, layer=training.layer)
        if recordings.sample_rate != encoder.sample_rate:
            raise ValueError(f"recordings must be at {encoder.sample_rate} Hz, got {recordings.sample_rate}")
        sounds = (quantize.decode(r.codes, recordings.companding, recordings.n_class) for r in recordings)
        where = str(Path(training.encoder).resolve())
        coder = Units.learn(encoder, sounds, training.n_code, seed=training.seed, where=where)
    else:
        torch.manual_seed(training.seed)
        config = dataclasses.replace(training.patches, n_code=training.n_code, sample_rate=recordings.sample_rate)
        if config.n_band != 1:
            raise ValueError(f"patches.n_band must be 1: a unit is a whole frame; got {config.n_band}")
        coder, length = PatchCodes(config), 16 * config.patch_hop
        patch_codes.learn(coder, recordings, training.run("coder", length=length, lr=2e-3))
    coder.cpu().eval().save_pretrained(training.out / "coder")
    return coder


def save(models: Textless, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write models that decode by a WaveNet on the codes, or by the coder itself, so that `load` reads them again.

    dtype: torch.bfloat16 halves the files. The rounded codebook is another one, and the parts name that.
    """
    folder = Path(folder)
    models.coder.save_pretrained(folder / "coder", dtype=dtype)
    rounded = models.coder.codebook if dtype is None else models.coder.codebook.to(dtype).to(models.coder.codebook)
    for part in ("lm", "durations"):
        model = getattr(models, part)
        again = type(model)(dataclasses.replace(model.config, codebook=cb.name_of(rounded)))
        again.load_state_dict(model.state_dict())
        again.save_pretrained(folder / part, dtype=dtype)
    if models.decoder is not models.coder:
        models.decoder.wavenet.save_pretrained(folder / "decoder", dtype=dtype)


def load(folder: str | Path) -> Textless:
    """The models in a folder that train_units wrote, or shipped ones by name ("piano-units").

    Errors: ModelError that says what is missing or does not fit.
    """
    given, folder = folder, model_folder(folder)
    missing = [part for part in PARTS if not (folder / part / CONFIG).is_file()]
    if missing:
        raise ModelError(
            f"{given}: no models to continue sound with ({', '.join(missing)} missing). "
            f"Train them on your recordings: audiokernels train-units DATA --out FOLDER"
        )
    kind = json.loads((folder / "coder" / CONFIG).read_text(encoding="utf-8"))
    if "encoder" in kind:
        coder = Units.from_pretrained(folder / "coder")
        layer = None if coder.config.layer < 0 else coder.config.layer
        coder.attach(HuggingFaceEncoder(coder.config.encoder, layer=layer))
    else:
        coder = PatchCodes.from_pretrained(folder / "coder")
    lm, durations = CodeLM.from_pretrained(folder / "lm"), Durations.from_pretrained(folder / "durations")
    name = cb.name_of(coder.codebook)
    for part, config in (("lm", lm.config), ("durations", durations.config)):
        if config.codebook != name:
            raise ModelError(f"{folder / part}: made for codebook {config.codebook}, but {folder / 'coder'} has {name}")
    decoder = coder
    if (folder / "decoder" / CONFIG).is_file():
        wavenet = WaveNet.from_pretrained(folder / "decoder")
        to_mel = UnitToMel.from_pretrained(folder / "to_mel") if (folder / "to_mel" / CONFIG).is_file() else None
        decoder = UnitWaveNet(wavenet) if to_mel is None else MelWaveNet(to_mel, wavenet)
        n_code = wavenet.config.condition_channels if to_mel is None else to_mel.config.n_code
        if (n_code, decoder.hop, decoder.sample_rate) != (len(coder.codebook), coder.hop, coder.sample_rate):
            raise ModelError(f"{folder / 'decoder'}: made for other units than {folder / 'coder'}")
    elif not isinstance(coder, PatchCodes):
        raise ModelError(f"{folder / 'decoder'}: no such model, and these units cannot be decoded without")
    return Textless(coder, lm, durations, decoder)


@torch.no_grad()
def continue_codes(models: Textless, codes: Tensor, n: int, *, seed: int = 0, **sampling: float) -> Tensor:
    """n codes (n,) that follow `codes` (time,): units from the language model, each held for a drawn time."""
    if not len(codes):
        raise ValueError("codes must hold at least one to go on from")
    units = cb.collapse(codes)[0]
    made, position = [], len(units)
    for block in models.lm.stream(n, units, seed=seed, **sampling):
        durations = models.durations.draw(block[0], seed=(seed + 1) % 2**64, position=position)
        made.append(cb.expand(block[0], durations))
        position += block.shape[1]
        if sum(map(len, made)) >= n:
            break
    return torch.cat(made)[:n].to(codes.dtype) if made else codes[:0]


def continue_sound(
    models: Textless, audio: Tensor, seconds: float, *, seed: int = 0, progress: bool = False, **sampling: float
) -> Tensor:
    """`audio` (samples,) at the coder's rate and what comes after it: float32 (samples + seconds * rate,).

    sampling: temperature, top_k, top_p (audiokernels.Sampling), of the units and of the samples that a WaveNet draws.
    The sound is cut to whole codes first. Errors: ValueError for less sound than one code.
    """
    coder, hop = models.coder, models.coder.hop
    if audio.ndim != 1 or len(audio) < hop:
        raise ValueError(f"audio must hold at least one code, {hop} samples in one channel, got {tuple(audio.shape)}")
    audio, n = audio[: len(audio) // hop * hop], max(1, round(seconds * coder.sample_rate))
    codes = unit_frames(coder, audio)
    new = continue_codes(models, codes, -(-n // hop), seed=seed, **sampling)
    both = torch.cat([codes, new])[None]
    if isinstance(models.decoder, UnitWaveNet | MelWaveNet):
        made = models.decoder.decode(both, prompt=audio[None], seed=seed, progress=progress, **sampling)
    else:
        made = models.decoder.decode(both)[:, len(audio) :]
    return torch.cat([audio, made[0, :n].to(audio)])
