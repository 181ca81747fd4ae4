"""Units, decoders and the pipeline sound -> units -> language model -> units -> sound; encoders from a local folder."""

import dataclasses
import json

import pytest
import torch
from audiomodels import cli, quantize, textless
from audiomodels import codebook as cb
from audiomodels.audio import read_mono, write_audio
from audiomodels.code_lm import CodeLM, CodeLMConfig, code_recordings
from audiomodels.encoders import CodeLMEncoder, Coder, Decoder, Encoder, HuggingFaceEncoder
from audiomodels.patch_codes import PatchCodes, PatchCodesConfig, learn
from audiomodels.pretrained import ModelError
from audiomodels.train import Objective, TrainConfig, cross_entropy, fit
from audiomodels.unit_decoder import (
    ConditionedCrops,
    MelCrops,
    MelWaveNet,
    NoisyPast,
    UnitToMel,
    UnitToMelConfig,
    UnitWaveNet,
    mel_error,
    mel_frames,
    one_hot,
    unit_mel_recordings,
    unit_recordings,
)
from audiomodels.units import Durations, DurationsConfig, Units, UnitsConfig, collapsed
from audiomodels.wavenet import WaveNet, WaveNetConfig
from sounds import RATE, cents_off, note, notes, recordings

PATCHES = PatchCodesConfig(n_code=12, n_fft=256, hop=128, patch_frames=1, hidden=48, n_embd=8, sample_rate=RATE)
WAVE = WaveNetConfig(
    n_layer=5,
    dilation_cycle=5,
    residual_channels=8,
    skip_channels=16,
    head_channels=16,
    condition_channels=12,
    condition_hop=128,
    sample_rate=RATE,
)
LM = CodeLMConfig(n_class=12, n_layer=2, n_head=2, n_embd=16, window=16)
MELODY = torch.cat([note(midi, 0.25) for midi in (60, 64, 67, 72) * 4])


def settings(out, **changes):
    usual = {"steps": 20, "batch": 4, "length": 1024, "lr": 4e-3, "warmup": 5, "save_every": 0}
    return TrainConfig(**{"out": str(out), **usual, "tensorboard": False, "progress": False, **changes})


def training(out, **changes):
    usual = {"n_code": 12, "steps": 6, "batch": 2, "progress": False, "patches": PATCHES, "lm": LM, "wavenet": WAVE}
    return textless.UnitTraining(**{"out": out, **usual, **changes})


@pytest.fixture(scope="module")
def coder():
    torch.manual_seed(0)
    coder = PatchCodes(PATCHES)
    coder.fit_codes(recordings([MELODY]))
    return coder.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models of `audiokernels train-units` after a few steps."""
    out = tmp_path_factory.mktemp("units")
    write_audio(out / "melody.wav", MELODY, RATE)
    command = f"train-units {out / 'melody.wav'} --out {out / 'models'} --n-code 12 --steps 6 --batch 2 --no-progress"
    for name, config in (("patches", PATCHES), ("lm", LM), ("wavenet", WAVE)):
        for field, value in dataclasses.asdict(config).items():
            if value != getattr(type(config)(), field):
                command += f" --{name}.{field.replace('_', '-')} {value}"
    with pytest.raises(SystemExit) as stop:
        cli.main(command.split())
    assert stop.value.code == 0
    return out


# ---- the command


def test_one_command_from_sound_to_its_sequel(folder, capsys):
    for name, options in (("a", ""), ("b", ""), ("c", " --seed 1"), ("d", " --temperature 0"), ("e", " --top-k 1")):
        command = f"continue {folder / 'melody.wav'} --models {folder / 'models'} --seconds 0.5 -o {folder / name}.wav"
        with pytest.raises(SystemExit) as stop:
            cli.main((command + options).split())
        assert stop.value.code == 0
    a, b, c, d, e = (read_mono(folder / f"{name}.wav", sample_rate=RATE)[0] for name in "abcde")
    assert torch.equal(d, e)
    whole = len(MELODY) // 128 * 128
    assert len(a) == whole + RATE // 2 and torch.equal(a, b)
    assert (a[:whole] - MELODY[:whole]).abs().max() < 1e-3 and torch.equal(a[:whole], d[:whole])
    assert not torch.equal(a, c) and not torch.equal(a, d) and a[whole:].std() > 1e-3


def test_half_width_models_still_belong_together(folder, tmp_path):
    """bf16 rounds the codebook, whose name is its hash: what is saved names the rounded one."""
    models = textless.load(folder / "models")
    textless.save(models, tmp_path, dtype=torch.bfloat16)
    again = textless.load(tmp_path)
    assert again.lm.config.codebook != models.lm.config.codebook
    assert torch.equal(again.coder.codebook, models.coder.codebook.bfloat16().float())
    sizes = [sum(f.stat().st_size for f in path.rglob("*.safetensors")) for path in (folder / "models", tmp_path)]
    assert sizes[1] < 0.7 * sizes[0]
    assert len(textless.continue_sound(again, MELODY[:4096], 0.1)) == 4096 + 800


def test_the_parts_of_the_command(folder):
    """The sequel's codes are units of the language model, and its sound the decoder's on all codes."""
    models = textless.load(folder / "models")
    assert isinstance(models.coder, PatchCodes) and isinstance(models.decoder, UnitWaveNet)
    codes = models.coder.encode(MELODY[None])[0]
    new = textless.continue_codes(models, codes, 40, seed=3)
    units = models.lm.generate(40, cb.collapse(codes)[0], seed=3)[0]
    held = models.durations.draw(units, seed=4, position=len(cb.collapse(codes)[0]))
    assert new.shape == (40,) and torch.equal(new, cb.expand(units, held)[:40])
    assert torch.equal(textless.continue_codes(models, codes, 15, seed=3), new[:15])
    sound = textless.continue_sound(models, MELODY, 0.1, seed=3)
    both = torch.cat([codes[: len(MELODY) // 128], new[:7]])[None]
    expected = models.decoder.decode(both, prompt=MELODY[None, : len(MELODY) // 128 * 128], seed=3)[0]
    assert torch.equal(sound[-800:], expected[:800])


def test_again_is_the_same(folder):
    """A finished run is not trained anew, and a loaded model is the one that was saved."""
    data = recordings([read_mono(folder / "melody.wav", sample_rate=RATE)[0]])
    before = {path: path.read_bytes() for path in (folder / "models").glob("*/model.safetensors")}
    made = textless.train_units(data, training(folder / "models"))
    assert len(before) == 4 and all(path.read_bytes() == found for path, found in before.items())
    loaded = textless.load(folder / "models")
    ours, theirs = (textless.continue_sound(models, MELODY, 0.2) for models in (made, loaded))
    assert torch.equal(ours, theirs)


def test_by_way_of_mel(tmp_path):
    wave = dataclasses.replace(WAVE, condition_channels=80)
    made = textless.train_units(recordings([MELODY]), training(tmp_path, decoder="mel", wavenet=wave))
    models = textless.load(tmp_path)
    assert isinstance(made.decoder, MelWaveNet) and isinstance(models.decoder, MelWaveNet)
    ours, theirs = (textless.continue_sound(m, MELODY, 0.1) for m in (made, models))
    assert torch.equal(ours, theirs) and len(ours) == len(MELODY) // 128 * 128 + 800


def test_griffin_lim_needs_no_decoder(tmp_path):
    data = recordings([MELODY])
    textless.train_units(data, training(tmp_path, decoder="griffin-lim"))
    models = textless.load(tmp_path)
    assert models.decoder is models.coder and not (tmp_path / "decoder").exists()
    assert len(textless.continue_sound(models, MELODY, 0.25)) == len(MELODY) // 128 * 128 + 2000
    with pytest.raises(ValueError, match="decoder must be wavenet"):
        textless.train_units(data, training(tmp_path, decoder="griffin-lim", encoder=tmp_path))


def test_what_is_missing_is_told(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["continue", str(folder / "melody.wav"), "--models", str(tmp_path)])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "no models to continue sound with" in told and "audiokernels train-units" in told
    models = textless.load(folder / "models")
    for audio in (MELODY[:100], MELODY[None], torch.zeros(0)):
        with pytest.raises(ValueError, match="at least one code, 128 samples"):
            textless.continue_sound(models, audio, 1.0)
    models.durations.save_pretrained(tmp_path / "durations")
    models.coder.save_pretrained(tmp_path / "coder")
    CodeLM(dataclasses.replace(models.lm.config, codebook="0" * 16)).save_pretrained(tmp_path / "lm")
    with pytest.raises(ModelError, match="lm: made for codebook 0000000000000000, but .*coder has"):
        textless.load(tmp_path)


# ---- units


def test_durations_follow_what_was_counted():
    durations = Durations(DurationsConfig(3, longest=8))
    durations.count([torch.tensor([0] * 5 + [1] * 2 + [0] * 5 + [1] * 20 + [0]), torch.tensor([1] * 4 + [0])])
    assert durations.counts[0].tolist() == [0, 0, 0, 0, 2, 0, 0, 0]
    assert durations.counts[1].tolist() == [0, 1, 0, 1, 0, 0, 0, 1]
    drawn = durations.draw(torch.tensor([0, 1, 2]).repeat(300))
    assert set(drawn[0::3].tolist()) == {5} and set(drawn[1::3].tolist()) == {2, 4, 8}
    assert set(drawn[2::3].tolist()) == {2, 4, 5, 8}  # never counted: as long as units are
    part = durations.draw(torch.tensor([0, 1, 2]).repeat(100), position=300)
    assert torch.equal(part, drawn[300:600])


def test_collapsed_streams(coder):
    codes = coder.encode(MELODY[None])[0]
    found = collapsed(code_recordings(recordings([MELODY]), coder))
    assert torch.equal(found[0].codes, torch.unique_consecutive(codes)) and found.n_class == 12
    assert len(found[0].codes) < len(codes)


# ---- decoders


def test_a_code_moves_a_fresh_wavenet():
    """Of 512 codes too: what a code adds to a layer is about as large as what a condition of mean square 1 adds."""
    conditions = one_hot(torch.arange(512)[None], 512)
    assert conditions.square().mean() == pytest.approx(1)
    wavenet = WaveNet(dataclasses.replace(WAVE, condition_channels=512))
    codes, noise = wavenet.condition(conditions).std(), wavenet.condition(torch.randn(1, 512, 512)).std()
    assert 0.7 < codes / noise < 1.4


class Notes:
    """A Coder that knows the notes: code 1 + i while note i of `midis` sounds, 0 in silence; 64 codes."""

    sample_rate, hop, codebook, midis = RATE, 256, torch.zeros(64, 1), (60, 63, 67, 70)

    def encode(self, audio):
        frames = torch.nn.functional.pad(audio, (0, -audio.shape[1] % self.hop))[0].split(self.hop)
        return torch.tensor([[self.code(frame) for frame in frames]])

    def code(self, frame):
        off = [cents_off(frame, midi, skip=0, seconds=1) for midi in self.midis]
        return 0 if frame.abs().max() < 1e-4 else 1 + off.index(min(off))


def test_a_wavenet_sings_the_note_of_its_code(tmp_path):
    """Codes -> WaveNet, small: four notes, each from its code alone. With a 1 for the code none is in tune,
    and the right codes are worth 0.2 bits to a sample. The slow test below asks for 95 % of 24 tones."""
    coder, size = Notes(), {"residual_channels": 16, "skip_channels": 32, "head_channels": 32}
    orders = [torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    data = recordings([torch.cat([note(coder.midis[i], 0.25) for i in order]) for order in orders])
    torch.manual_seed(0)
    wavenet = WaveNet(
        dataclasses.replace(WAVE, n_layer=7, dilation_cycle=7, condition_channels=64, condition_hop=256, **size)
    )
    crops = ConditionedCrops(unit_recordings(data, coder, wavenet, context=256), 256, batch=4, length=256, context=256)
    run = settings(tmp_path, steps=300, length=256, context=256, lr=8e-3, warmup=10)
    fit(wavenet, crops, run, task=NoisyPast(noise=4.0))
    made = UnitWaveNet(wavenet).decode(torch.arange(1, 5)[:, None].expand(4, 8))
    off = [cents_off(sound, midi, seconds=0.2) for sound, midi in zip(made, coder.midis, strict=True)]
    assert sum(cents < 50 for cents in off) >= 2, off
    codes, extra = crops(1000)
    nats = [
        cross_entropy(wavenet, wavenet(codes[:, :-1].long(), **given, length=256), codes[:, -256:].long()).item()
        for given in (extra, {"condition": extra["condition"].roll(1, 0)})
    ]
    assert nats[1] - nats[0] > 0.5, nats


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tones_regenerated_from_codes_keep_their_pitch(tmp_path):
    """PatchCodes -> WaveNet: 24 tones, learned codes, 95 % within 50 cents. Two minutes of one core."""
    scale, data = range(55, 79), notes(range(55, 79))
    torch.manual_seed(0)
    coder = PatchCodes(PatchCodesConfig(n_code=256, n_fft=1024, hop=256, patch_frames=1, hidden=256, sample_rate=RATE))
    learn(coder, data, settings(tmp_path / "coder", steps=500, batch=16, warmup=10))
    coder.eval()
    sizes = {"residual_channels": 32, "skip_channels": 64, "head_channels": 64, "condition_channels": 256}
    wavenet = WaveNet(dataclasses.replace(WAVE, n_layer=7, dilation_cycle=7, condition_hop=256, **sizes))
    sounds = unit_recordings(data, coder, wavenet, context=512)
    run = settings(tmp_path / "wave", steps=700, batch=16, length=256, context=256, lr=8e-3, warmup=10)
    fit(wavenet, ConditionedCrops(sounds, 256, batch=16, length=256, context=256), run, task=NoisyPast())
    made = UnitWaveNet(wavenet).decode(torch.cat([coder.encode(note(midi)[None]) for midi in scale]))
    off = [cents_off(sound, midi) for sound, midi in zip(made, scale, strict=True)]
    assert sum(cents < 50 for cents in off) >= 0.95 * len(off), off


def test_the_past_is_noisy_and_the_targets_are_not(coder):
    data = unit_recordings(recordings([MELODY]), coder, WaveNet(WAVE), context=256)
    drawn = ConditionedCrops(data, 128, batch=8, length=512, context=256)(0)
    config = settings("x", batch=8, length=512, context=256)
    torch.manual_seed(0)
    inputs, targets, extra = NoisyPast(256, 6.0).batch(drawn, config)
    assert torch.equal(targets, drawn[0][:, -512:]) and torch.equal(extra["condition"], drawn[1]["condition"])
    spread = (inputs.float() - drawn[0][:, :-1].float()).std(1)
    assert inputs.dtype == drawn[0].dtype and spread.max() < 6.5 and spread.max() - spread.min() > 1
    assert torch.equal(NoisyPast(256, 0.0).batch(drawn, config)[0], drawn[0][:, :-1])


def test_wavenet_on_codes(coder):
    torch.manual_seed(0)
    decoder = UnitWaveNet(WaveNet(WAVE))
    codes = coder.encode(MELODY[None, :2560])
    sound = decoder.decode(codes)
    assert isinstance(decoder, Decoder) and sound.shape == (1, 20 * 128) and torch.equal(sound, decoder.decode(codes))
    changed = codes.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 12
    other = decoder.decode(changed)
    assert torch.equal(other[:, :1280], sound[:, :1280]) and not torch.equal(other[:, 1280:], sound[:, 1280:])
    prompt = quantize.decode(quantize.encode(sound[:, :300]))
    assert torch.equal(decoder.decode(codes, prompt=prompt), sound[:, 300:])
    with pytest.raises(ValueError, match="codes must be 0 .. 11"):
        decoder.decode(codes.long() + 12)


def test_conditioned_crops_hold_the_condition_of_their_samples(coder):
    wavenet = WaveNet(WAVE)
    data = unit_recordings(recordings([MELODY, note(60)[:500], MELODY[:9000]]), coder, wavenet, context=200)
    assert [len(r.codes) for r in data] == [256 + 32000, 256 + 512, 256 + 9088]
    crops = ConditionedCrops(data, 128, batch=6, length=1024, context=256)
    assert crops.data.startswith(f"{len(crops.recordings)} recordings, ")
    for step in range(3):
        codes, extra = crops(step)
        assert codes.shape == (6, 256 + 1024 + 1) and extra["condition"].shape == (6, 10, 12)
        assert torch.equal(codes, crops(step)[0])
        for row, condition in zip(codes, extra["condition"], strict=True):
            hits = [
                (r, f) for r in data for f in range(len(r.condition) - 9)
                if torch.equal(r.codes[f * 128 : f * 128 + 1280], row[1:])
            ]  # fmt: skip
            assert any(torch.equal(r.condition[f : f + 10], condition) for r, f in hits)
    logits = wavenet(codes[:, :-1].long(), **extra)
    assert logits.shape == (6, 1280, 256)
    with pytest.raises(ValueError, match="multiples of the hop 128"):
        ConditionedCrops(data, 128, batch=1, length=100, context=0)
    with pytest.raises(ValueError, match="at least 128000 samples"):
        ConditionedCrops(data, 128, batch=1, length=128000, context=0)


def test_mel_crops_pair_units_with_their_frames(coder):
    config = UnitToMelConfig(n_code=12, n_mel=20, sample_rate=RATE, hop=128)
    data = unit_mel_recordings(recordings([MELODY]), coder, config)
    assert len(data[0].codes) == len(data[0].condition) == 250
    codes, mel = MelCrops(data, batch=3, length=40)(0)
    assert codes.shape == (3, 40) and mel.shape == (3, 40, 20)
    for row, frames in zip(codes, mel, strict=True):
        at = next(i for i in range(211) if torch.equal(data[0].condition[i : i + 40], frames))
        assert torch.equal(data[0].codes[at : at + 40], row)


def test_units_to_mel_to_sound(coder, tmp_path):
    """What it learns: the mel frames of a melody from its codes, each frame fed back."""
    torch.manual_seed(0)
    model = UnitToMel(UnitToMelConfig(n_code=12, n_mel=20, n_embd=32, sample_rate=RATE, hop=128))
    codes, mel = coder.encode(MELODY[None, :8192]), mel_frames(MELODY[None, :8192], model.config)
    assert mel.shape == (1, 64, 20) and 0.1 < mel.std() < 1
    config = settings(tmp_path, steps=60, batch=1, lr=1e-2)
    fit(model, lambda step: (codes.long(), mel), config, task=Objective(mel_error))
    model.eval()
    made = model.generate(codes)
    assert made.shape == mel.shape and (made - mel).square().mean() < 0.25 * mel.var()
    forced = model(codes, made)  # generation is the forward pass on its own frames
    assert torch.allclose(forced, made, atol=1e-5)
    changed = made.clone()
    changed[:, 30:] += 1
    assert torch.equal(model(codes, changed)[:, :31], forced[:, :31])
    wavenet = WaveNet(dataclasses.replace(WAVE, condition_channels=20))
    decoder = MelWaveNet(model, wavenet)
    assert isinstance(decoder, Decoder) and decoder.decode(codes[:, :5]).shape == (1, 640)
    with pytest.raises(ValueError, match="wavenet must have the condition channels"):
        MelWaveNet(model, WaveNet(WAVE))


# ---- encoders of transformers, tiny and random


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    import transformers

    out = tmp_path_factory.mktemp("hub")
    small = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
        "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    for name, kind in (("wav2vec2", "Wav2Vec2"), ("hubert", "Hubert")):
        getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**small)).save_pretrained(
            out / name
        )
    codec = transformers.EncodecConfig(
        num_filters=2, hidden_size=16, codebook_dim=16, codebook_size=8, upsampling_ratios=[4, 2], sampling_rate=8000
    )
    transformers.EncodecModel(codec).save_pretrained(out / "encodec")
    return out


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "encodec"])
def test_encoders_from_a_folder(hubs, kind):
    encoder = HuggingFaceEncoder(hubs / kind)
    sound = torch.stack([note(60, rate=16000), note(72, rate=16000)])
    rows = encoder.embed(sound)
    assert isinstance(encoder, Encoder) and rows.shape[::2] == (2, 16) == (2, encoder.dim)
    assert abs(rows.shape[1] - sound.shape[1] / encoder.hop) <= 2 and not rows.requires_grad
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)
    assert encoder.embed(sound[:, : encoder.least]).shape[1] == 1
    with pytest.raises(ValueError, match=f"at least {encoder.least} samples"):
        encoder.embed(sound[:, : encoder.least - 1])
    if kind == "encodec":
        return
    first = HuggingFaceEncoder(hubs / kind, layer=0).embed(sound)
    assert first.shape == rows.shape and not torch.allclose(first, rows)
    assert torch.allclose(encoder.embed(3 * sound), rows, atol=1e-3)  # loudness is taken out
    with pytest.raises(ValueError, match="layer must be 0 .. 2, got 3"):
        HuggingFaceEncoder(hubs / kind, layer=3)


def test_units_of_an_encoder(hubs, tmp_path):
    encoder = HuggingFaceEncoder(hubs / "hubert", layer=1)
    sounds = [note(midi, 0.2, rate=16000) for midi in (60, 67, 72)]
    units = Units.learn(encoder, sounds, 5, where=str(hubs / "hubert"))
    codes = units.encode(sounds[0][None])
    assert isinstance(units, Coder) and codes.shape == (1, 159) and int(codes.max()) < 5
    units.save_pretrained(tmp_path)
    again = Units.from_pretrained(tmp_path)
    assert again.config == units.config and again.config.layer == 1
    with pytest.raises(ValueError, match="no encoder yet"):
        again.encode(sounds[0][None])
    assert torch.equal(again.attach(encoder).encode(sounds[0][None]), codes)
    with pytest.raises(ValueError, match="encoder must have sample_rate 16000 as these units, got 8000"):
        again.attach(HuggingFaceEncoder(hubs / "encodec"))
    assert UnitsConfig().n_code == 100


def test_the_pipeline_on_another_encoder(hubs, tmp_path):
    sounds = recordings([note(midi, 0.6, rate=16000) for midi in (60, 67)], rate=16000)
    wave = dataclasses.replace(WAVE, condition_hop=20)
    textless.train_units(sounds, training(tmp_path, n_code=5, encoder=hubs / "hubert", wavenet=wave, steps=2))
    models = textless.load(tmp_path)
    assert models.coder.encoder.kind == "hubert" and models.decoder.hop == 20
    assert len(textless.continue_sound(models, note(60, rate=16000), 0.05)) == 8000 + 800


def test_no_pickle_and_no_other_model(hubs, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="config.json: cannot be read"):
        HuggingFaceEncoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    with pytest.raises(ModelError, match="weights are read from safetensors only"):
        HuggingFaceEncoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="model_type must be one of wav2vec2, hubert, encodec, got 'bert'"):
        HuggingFaceEncoder(tmp_path)


def test_a_language_model_encodes(coder):
    model = CodeLM(LM)
    encoder = CodeLMEncoder(coder, model)
    assert isinstance(encoder, Encoder) and isinstance(coder, Encoder) and isinstance(coder, Decoder)
    rows = encoder.embed(MELODY[None, :1280])
    assert torch.equal(rows, model.representation(coder.encode(MELODY[None, :1280]))) and rows.shape == (1, 10, 16)
    with pytest.raises(ValueError, match="coder must have the model's 13 codes, got 12"):
        CodeLMEncoder(coder, CodeLM(dataclasses.replace(LM, n_class=13)))
