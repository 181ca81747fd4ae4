"""The models that come with the package: what is in their folders, and that they are what their cards say.

tests/data/piano_test.mulaw.npz: 2.5 s each of two pieces of the corpus's test split, which no shipped model has seen
(Mozart, K. 155, second movement; Beethoven, op. 59 no. 1, fourth movement: public-domain compositions, scores from
music21's collection, played through the soundfont FluidR3 GM, MIT).
"""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("soundfile")
from audiomodels import pretrained, quantize
from audiomodels.audio import read_audio
from audiomodels.compare import predictors, score
from audiomodels.data import Recordings, clips
from audiomodels.registry import load
from audiomodels.train import evaluate
from safetensors import safe_open

pytestmark = pytest.mark.usefixtures("one_thread")
BITS = {"piano": 4.039, "piano-transformer": 4.238}  # per sample of the excerpts
SECTIONS = ["Use", "Data", "How it was made", "Figures", "Limits"]
SHIPPED = pretrained.shipped()
SAMPLES = Path(__file__).parent.parent / "docs" / "samples"


@pytest.fixture(scope="module")
def excerpts():
    return Recordings.load(Path(__file__).parent / "data" / "piano_test.mulaw.npz", sample_rate=16000)


@pytest.fixture(scope="module", params=BITS)
def generator(request):
    return request.param, load(request.param)


def test_models_are_there():
    assert set(BITS) <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_folder(name):
    """A card and one model, or a folder for each of several: config, at most 4 MB of bfloat16; 8 MB in all."""
    folder = pretrained.model_folder(name)
    weights = sorted(folder.rglob("*.safetensors"))
    files = {folder / "README.md"} | {path.with_name(file) for path in weights for file in ("config.json", path.name)}
    assert files == {path for path in folder.rglob("*") if path.is_file()}
    assert sum(path.stat().st_size for path in files) < 8_000_000
    for path in weights:
        assert path.name == "model.safetensors" and path.stat().st_size < 4_000_000
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        for key, tensor in tensors.items():
            assert tensor.dtype == torch.bfloat16 or not tensor.is_floating_point(), key
            assert bool(torch.isfinite(tensor).all()), key


@pytest.mark.parametrize("name", SHIPPED)
def test_card(name):
    """Title, sections, and what each must say."""
    text = (pretrained.model_folder(name) / "README.md").read_text()
    assert pretrained.title(name).startswith(f"{name}: ") and len(pretrained.title(name)) < 120
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    for words in ("licence", "audiokernels train", "95 %"):
        assert words in text, words


def test_card_of_a_generator(generator):
    name, model = generator
    text = (pretrained.model_folder(name) / "README.md").read_text()
    config = json.loads((pretrained.model_folder(name) / "config.json").read_text())
    assert f"{model.config.n_parameter:,} parameters" in text and "bits per sample" in text
    assert f"{config['sample_rate']:,} Hz" in text and "mu-law" in text and config["companding"] == "mulaw"


def test_bits(generator, excerpts):
    """On music that it has not seen it is far ahead of the bigram, counted on the bundled piano, and as it ever was."""
    name, model = generator
    bits = evaluate(model, excerpts, context=4000, batch=1).bits
    piano = Recordings.load(clips() / "music" / "prelude_bwv846.flac", sample_rate=16000)
    assert bits < predictors.bigram(piano, excerpts).bits - 0.5
    assert bits == pytest.approx(BITS[name], abs=0.01)
    few = {"context": 4000, "batch": 1, "max_targets": 4096}
    before, weight = evaluate(model, excerpts, **few).bits, [p for p in model.parameters() if p.ndim == 2][-1]
    weight.data, kept = -weight, weight.data  # a damaged last layer is seen
    assert evaluate(model, excerpts, **few).bits > before + 0.1
    weight.data = kept


def test_causal(generator):
    assert score.causal(generator[1], 256, length=1500)


def test_sound(generator, excerpts):
    """It goes on with a piece: the same for the same seed, another for another, neither silent nor clipped."""
    model, prompt = generator[1], excerpts[0].codes[:8000]
    codes = model.generate(8000, prompt, seed=1)
    assert torch.equal(codes, model.generate(8000, prompt, seed=1))
    assert not torch.equal(codes, model.generate(8000, prompt, seed=2))
    audio = quantize.decode(codes[0], "mulaw", 256)
    before = quantize.decode(prompt, "mulaw", 256)
    assert before.std() / 4 < audio.std() < 4 * before.std()
    assert (audio.abs() > 0.99).float().mean() < 0.01


def test_command_line(call, tmp_path):
    words = ["--seconds", 0.05, "--seed", 4, "--out"]
    for given in (["piano"], ["--model", "piano"]):
        code, out, _ = call("generate", *given, *words, tmp_path / f"{len(given)}.wav")
        assert code == 0 and "x real time" in out
    audio, rate = read_audio(tmp_path / "1.wav")
    assert torch.equal(audio, read_audio(tmp_path / "2.wav")[0]) and (rate, len(audio)) == (16000, 800)
    for given in ([], ["piano", "--model", "piano"]):
        code, _, err = call("generate", *given, *words, tmp_path / "x.wav")
        assert code == 2 and "generate takes one MODEL" in err and "piano-transformer" in err
    code, _, err = call("generate", "pianoo", *words, tmp_path / "x.wav")
    assert code == 2 and "pianoo: no such folder, and none of the models shipped: " in err and "piano, " in err
    code, out, _ = call("info")
    assert code == 0 and all(pretrained.title(name) in out for name in SHIPPED)


@pytest.fixture(scope="module")
def maker():
    """docs/samples/make_samples.py as a module."""
    spec = importlib.util.spec_from_file_location("make_samples", SAMPLES / "make_samples.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_samples_page_is_what_its_program_makes(maker):
    """Nothing is edited by hand, chosen or left out; the page stands alone and is small."""
    rows, ways = json.loads((SAMPLES / "samples.json").read_text()), maker.continuations()
    text = (SAMPLES / "index.html").read_text(encoding="utf-8")
    assert text == maker.page(rows, {way.name: way.title for way in ways})
    wanted = [(way.name, seed) for way in ways for seed in maker.SEEDS]
    assert {(row["piece"], row["by"], row["seed"]) for row in rows} == {
        (piece, *what) for piece in maker.PROMPTS for what in [("original", None), *wanted]
    }
    named = set(re.findall(r'src="([^"]+)"', text))
    assert named == {row["file"] for row in rows} | {f"{row['file'][:-4]}.png" for row in rows}
    assert "<script" not in text and "http" not in text
    assert sum(path.stat().st_size for path in SAMPLES.iterdir()) < 3_000_000


def test_sounds_of_the_page(maker):
    """Each is as long as the page says, continues where its prompt ends, and has the level that the page states."""
    for row in json.loads((SAMPLES / "samples.json").read_text()):
        audio, rate = read_audio(SAMPLES / row["file"])
        assert (rate, len(audio)) == (maker.RATE, (maker.PROMPT + maker.SECONDS) * maker.RATE)
        assert maker.level_db(audio[maker.PROMPT * rate :]) == pytest.approx(row["level_db"], abs=0.6)
        assert row["level_db"] > maker.SILENT_DB


def test_figures_of_the_page(maker):
    """On signals whose answer is known."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(16000, generator=generator)
    sine = 0.1 * torch.sin(torch.arange(16000) * (2 * math.pi * 440 / 16000))
    assert maker.level_db(noise) == pytest.approx(-20, abs=0.2)
    assert maker.level_db(sine + 0.5) == pytest.approx(-23.01, abs=0.02)
    assert maker.spectral_distance(noise, noise) == 0
    assert maker.spectral_distance(noise, 0.1 * noise) == pytest.approx(20, abs=0.1)
    assert maker.flatness_db(noise) == pytest.approx(-2.5, abs=0.2)  # -10 log10(e^0.577), of exponential power
    assert maker.flatness_db(sine) < -40
    with pytest.raises(ValueError, match="above -60 dB, got -80"):
        maker.measure(0.001 * noise, noise)
