"""The demo: each of its checks fails on what it is there for, and the whole of it runs on a tiny model."""

import dataclasses
import json
import math
import re

import pytest
import torch

pytest.importorskip("huggingface_hub")
from audiomodels import demo, features, plots
from audiomodels.audio import read_audio, write_audio
from audiomodels.train import Scores
from audiomodels.wavenet import WaveNet, WaveNetConfig

pytestmark = pytest.mark.usefixtures("one_thread")


TINY = WaveNetConfig(n_layer=5, residual_channels=12, skip_channels=16, head_channels=16)


def scores(**bits):
    return {name: Scores(value, 0.5, 0.9, 1000) for name, value in bits.items()}


def test_scores_must_beat_both():
    assert demo.check_scores(scores(WaveNet=2.0, bigram=4.0, unigram=7.0)) == []
    assert re.search(
        "does not beat bigram: 4.500 .* 4.000", *demo.check_scores(scores(WaveNet=4.5, bigram=4, unigram=7))
    )
    assert "does not beat unigram" in demo.check_scores(scores(WaveNet=4.5, bigram=5.0, unigram=4.5))[0]
    assert len(demo.check_scores(scores(WaveNet=math.nan, bigram=4.0, unigram=7.0))) == 2


def noise(level: float, n: int = 48000) -> torch.Tensor:
    return level * torch.randn(n, generator=torch.Generator().manual_seed(0))


def test_sound_must_be_alive_and_as_loud():
    original = noise(0.1)
    for factor in (0.52, 1.0, 1.9):
        assert demo.check_sound(factor * original, original) == []
    for factor, words in ((0.49, "-6.2 dB off"), (2.05, "+6.2 dB off")):
        assert words in demo.check_sound(factor * original, original)[0]
    assert demo.check_sound(0.2 * original, original, 20) == []
    assert "+6.2 dB off" in demo.check_sound(2.05 * original, original, 20)[0]
    assert "-20.9 dB off the original's (allowed: -20 .. +6)" in demo.check_sound(0.09 * original, original, 20)[0]
    assert "constant" in demo.check_sound(torch.zeros(48000), original)[0]
    assert "constant" in demo.check_sound(torch.full((48000,), 0.3), original)[0]
    stuck = original.clone()
    stuck[30000:] = 0.2  # loud enough as a whole, but it stops
    assert "constant" in demo.check_sound(stuck, original)[0]
    assert demo.check_sound(original + 0.5, original) == []  # a level is not a mean
    broken = original.clone()
    broken[7] = math.nan
    assert "NaN" in demo.check_sound(broken, original)[0]


def test_level():
    sine = torch.sin(torch.arange(16000) * (2 * math.pi / 16))
    assert demo.level_db(sine) == pytest.approx(-3.01, abs=0.01)
    assert demo.level_db(0.1 * sine + 0.5) == pytest.approx(-23.01, abs=0.01)


@pytest.fixture(scope="module")
def draws():
    """Codes that were drawn from logits at the given numbers, by the definition, one by one."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(500, 64, generator=generator)
    uniforms = torch.rand(500, generator=generator)
    codes = []
    for row, u in zip(logits, uniforms, strict=True):
        cdf = torch.softmax(row.double() / 0.9, 0).cumsum(0)
        codes.append(next(c for c in range(64) if cdf[c] > u or c == 63))
    return torch.tensor(codes), logits, uniforms


def test_agreement_of_equals(draws):
    codes, logits, uniforms = draws
    found = demo.agreement(codes, logits, logits, uniforms, 0.9)
    assert found["codes"] == 500 and found["logit_error"] == 0 and found["differing"] == found["off_edge"] == 0
    assert found["logit_bound"] == pytest.approx(1e-5 * float(logits.abs().max()))
    assert demo.check_agreement(found) == []


def test_agreement_sees_wrong_codes_and_logits(draws):
    codes, logits, uniforms = draws
    wrong = codes.clone()
    wrong[::100] = (wrong[::100] + 1) % 64
    found = demo.agreement(wrong, logits, logits, uniforms, 0.9)
    assert found["differing"] == found["off_edge"] == 5
    assert "5 of 500 codes are not the reference's" in demo.check_agreement(found)[0]
    off = logits.clone()
    off[3, 7] += 1e-3
    assert (
        "logits differ from the reference's by 1.00e-03"
        in demo.check_agreement(demo.agreement(codes, off, logits, uniforms, 0.9))[0]
    )
    off[3, 7] = math.nan
    assert demo.check_agreement(demo.agreement(codes, off, logits, uniforms, 0.9))
    other = demo.agreement(codes, logits, logits, uniforms, 1.5)  # drawn at another temperature
    assert other["off_edge"] > 50


def test_agreement_allows_the_edge(draws):
    """A draw may go to the other side of an edge that lies within half the logit difference of its number."""
    codes, logits, uniforms = draws
    cdf = torch.softmax(logits.double() / 0.9, 1).cumsum(1)
    near, far = uniforms.clone(), uniforms.clone()
    for t in range(500):
        if codes[t] < 63:  # the number sits just above the edge: the reference draws the next code
            near[t], far[t] = cdf[t, codes[t]] + 5e-6, cdf[t, codes[t]] + 1e-3
    assert demo.agreement(codes, logits, logits, near, 0.9)["differing"] > 400
    assert demo.agreement(codes, logits, logits, near, 0.9)["off_edge"] == 0
    assert demo.agreement(codes, logits, logits, far, 0.9)["off_edge"] > 400
    shifted = logits.clone()
    shifted[:, 0] += 4e-3  # explains 2e-3 / 0.9
    assert demo.agreement(codes, shifted, logits, far, 0.9)["off_edge"] == 0


def test_a_wrong_kernel_is_caught(monkeypatch):
    model = WaveNet(TINY)
    assert demo.check_agreement(demo.measure_agreement(model, demo.DemoConfig())) == []
    right, other = model.pack(), WaveNet(TINY).pack()
    assert not torch.equal(right.data, other.data)
    monkeypatch.setattr(model, "pack", lambda: other)
    assert demo.check_agreement(demo.measure_agreement(model, demo.DemoConfig()))


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Three seconds of a tone that decays again and again."""
    t = torch.arange(48000) / 16000
    audio = 0.4 * torch.sin(2 * math.pi * 440 * t) * torch.exp(-3 * (t % 0.5)) + noise(0.01)
    path = tmp_path_factory.mktemp("recording") / "tones.wav"
    write_audio(path, audio, 16000)
    return path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "LENGTH", 1024)
    for name, value in (("STREAMS", 3), ("PIANO_TARGETS", 4096), ("PROMPT_SECONDS", 0.5), ("AGREEMENT_CODES", 500)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(
        demo.peers,
        "samples_per_second",
        lambda model, seconds: {"fused kernel": 2e4, "ring buffers": 1e3, "recomputation": 30.0},
    )  # noqa: E501


def test_the_whole_demo(recording, tmp_path, quick, capsys):
    config = demo.DemoConfig(out=tmp_path / "demo", recording=recording, seconds=3)
    results = demo.run(config, TINY, steps=60)
    assert results.scores["WaveNet"].bits < results.scores["bigram"].bits
    assert results.real_time_factor == pytest.approx(1.25)
    out, rate = read_audio(tmp_path / "demo/out.wav")
    assert rate == 16000 and len(out) == 48000
    original, rate = read_audio(tmp_path / "demo/original.wav")
    assert rate == 16000 and len(original) == 48000
    piano, rate = read_audio(tmp_path / "demo/piano.wav")  # half a second of prompt before the three
    assert rate == 16000 and len(piano) == 56000 and piano[8000:].std() > 0.01
    assert results.piano.scores["WaveNet"].bits < results.piano.scores["bigram"].bits
    assert (tmp_path / "demo/report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    report = json.loads((tmp_path / "demo/report.json").read_text())
    assert report["scores"]["WaveNet"]["bits"] == results.scores["WaveNet"].bits and report["failures"] == []
    assert WaveNet.from_pretrained(tmp_path / "demo/model").config == TINY
    assert "Trained on this recording" in capsys.readouterr().out


def test_a_demo_that_fails_says_why_and_keeps_what_it_made(recording, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(demo.predictors, "bigram", lambda head, tail, **_: Scores(0.1, 1.0, 1.0, len(tail[0].codes)))
    monkeypatch.setattr(demo.quantize, "decode", lambda codes, *_: torch.zeros(codes.shape))
    with pytest.raises(demo.DemoError, match="does not beat bigram(.|\n)*constant(.|\n)*pretrained piano: .*constant"):
        demo.run(demo.DemoConfig(out=tmp_path, recording=recording, seconds=3), TINY, steps=3)
    assert (tmp_path / "out.wav").is_file() and (tmp_path / "report.png").is_file()
    assert len(json.loads((tmp_path / "report.json").read_text())["failures"]) >= 2


def test_a_slow_machine_makes_fewer_steps(recording, quick, monkeypatch):
    monkeypatch.setattr(demo, "seconds_per_step", lambda model, crops: 1.0)
    monkeypatch.setattr(demo, "fit", lambda model, crops, training: training.steps)
    recordings = demo.Recordings.load(recording, sample_rate=16000)
    for seconds, steps in ((300.0, 200), (120.0, 120), (1.0, 50)):
        assert demo.train(WaveNet(TINY), recordings, demo.DemoConfig(train_seconds=seconds), 200) == steps


def test_seconds_per_step_leaves_the_model_alone(recording):
    torch.manual_seed(0)
    model = WaveNet(TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    crops = demo.Crops(demo.Recordings.load(recording, sample_rate=16000), batch=2, length=100, context=64, seed=0)
    assert 0 < demo.seconds_per_step(model, crops) < 10
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "change",
    [{"seconds": 2.9}, {"seconds": math.nan}, {"train_seconds": 0}, {"temperature": 0}, {"temperature": math.inf}],
)
def test_config_is_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        demo.DemoConfig(**change)
    assert dataclasses.replace(demo.DemoConfig(), seconds=3).seconds == 3


# --- plots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_rate", [8000, 16000, 44100])
def test_mel_power(sample_rate):
    for hz in (200, 1000, 3000):
        tone = 0.5 * torch.sin(2 * math.pi * hz * torch.arange(sample_rate) / sample_rate)
        power = plots.mel_power(tone, sample_rate)[:, 5:-5].mean(1)
        centre = features.mel_to_hz(features.hz_to_mel(sample_rate / 2) * (int(power.argmax()) + 1) / 81)
        assert centre == pytest.approx(hz, rel=0.06)
        assert 10 * math.log10(float(power.sum())) == pytest.approx(-12, abs=3)  # the tone's 0.5 amplitude, halved
    silence = plots.mel_power(torch.zeros(100), sample_rate)
    assert silence.shape[0] == 80 and silence.max() == 0


def test_panels_draw(tmp_path):
    fig, grid = plots.figure(8, 6, 2, 2)
    audio = noise(0.1, 5000)
    plots.waveform(plots.add(fig, grid[0, 0], "w"), audio, 16000)
    image = plots.log_mel(plots.add(fig, grid[0, 1], "m"), audio, 16000)
    assert image.get_array().shape[0] == 80
    axis = plots.add(fig, grid[1, 0], "l")
    plots.loss_curve(axis, [1, 2, 3], [8.0, 6.0, 5.0], {"held out": 5.5})
    assert axis.lines[1].get_ydata()[0] == 8.0 and axis.lines[2].get_ydata()[0] == 5.5
    axis = plots.add(fig, grid[1, 1], "b")
    plots.bars(axis, {"a": 3.0, "b": 1.0}, "unit", log=True)
    assert [bar.get_width() for bar in axis.patches] == [3.0, 1.0]
    fig.savefig(tmp_path / "x.png")


def test_the_median_stream_is_written():
    time = torch.arange(1000) / 50
    streams = torch.stack([gain * time.sin() for gain in (0.5, 0.01, 0.2, 0.3, 0.1)])
    assert torch.equal(demo.median_stream(streams), streams[2])
    assert torch.equal(demo.median_stream(streams[:1]), streams[0])
