"""The `audiokernels` command: what it prints and writes, and one clear line for every mistake."""

import io
import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")
from audiomodels import cli, demo, quantize
from audiomodels.audio import read_audio, write_audio
from audiomodels.audio_transformer import AudioTransformer, AudioTransformerConfig
from audiomodels.commands import generators
from audiomodels.sample_transformer import SampleTransformer, SampleTransformerConfig
from audiomodels.wavenet import WaveNet, WaveNetConfig

import audiokernels
from audiokernels import self_check

TINY = WaveNetConfig(n_layer=3, residual_channels=8, skip_channels=8, head_channels=8, sample_rate=8000)
SIZES = [word for name in ("residual", "skip", "head") for word in (f"--model.{name}-channels", "8")]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "wavenet"
    WaveNet(TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of one recording, half a second at 8 kHz."""
    folder = tmp_path_factory.mktemp("data")
    write_audio(folder / "a.wav", 0.3 * torch.sin(torch.arange(4000) * (2 * math.pi * 440 / 8000)), 8000)
    return folder


def test_info(call):
    code, out, err = call("info")
    assert code == 0 and err == ""
    assert re.search("wavenet_generate +cpu", out) and audiokernels.__version__ in out and "soundfile" in out
    for line in ("generate  piano: ", "generate  piano-transformer: ", "continue  piano-units: ", "tag       tagger: "):
        assert f"\n{line}" in out
    assert call("--version")[:2] == (0, f"audiokernels {audiokernels.__version__}\n")


def test_info_checks_the_ops(call, monkeypatch):
    cases = [case for case in self_check.CASES if case.name == "haar_pool_"]
    monkeypatch.setattr(self_check, "CASES", cases)
    code, out, _ = call("info", "--check")
    assert code == 0 and out.count("right  haar_pool_ ") == 3 and "WRONG" not in out and "tag       tagger: " in out
    monkeypatch.setattr(self_check, "LIMITS", dict.fromkeys(self_check.LIMITS, 0.0))
    code, out, _ = call("info", "--check")
    assert code == 1 and "WRONG  haar_pool_ " in out


@pytest.mark.parametrize("what", ["generators", "taggers", "representations"])
def test_comparisons_want_a_corpus_before_they_write(call, what, tmp_path):
    code, _, err = call(f"compare-{what}", "--data", tmp_path / "none", "--out", tmp_path / "out")
    assert code and "data must be a corpus folder, as audiokernels build-corpus writes; " in err
    assert not list(tmp_path.iterdir())


def test_generate(call, model, tmp_path):
    code, out, _ = call("generate", model, "--out", tmp_path / "x.wav", "--seconds", 0.1, "--seed", 5)
    assert code == 0 and "x real time" in out
    audio, rate = read_audio(tmp_path / "x.wav")
    assert rate == 8000 and len(audio) == 800
    codes = WaveNet.from_pretrained(model).generate(800, seed=5)
    expected = quantize.decode(codes[0], "mulaw", 256)
    torch.testing.assert_close(audio, expected, rtol=0, atol=1 / 32768)


def test_generate_from_the_most_probable_codes(call, model, tmp_path):
    words = ["--out", tmp_path / "x.wav", "--seconds", 0.02, "--top-k", 7, "--top-p", 0.5]
    assert call("generate", model, *words)[0] == 0
    codes = WaveNet.from_pretrained(model).generate(160, top_k=7, top_p=0.5)[0]
    expected = quantize.decode(codes, "mulaw", 256)
    torch.testing.assert_close(read_audio(tmp_path / "x.wav")[0], expected, rtol=0, atol=1 / 32768)
    assert len(codes.unique()) < 8


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_generate_batch(call, model, data, tmp_path, dtype):
    words = ["--seconds", 0.05, "--batch", 3, "--dtype", dtype, "--temperature", 0.8, "--prompt", data / "a.wav"]
    code, out, _ = call("generate", model, "--out", tmp_path / "new" / "x.flac", *words)
    assert code == 0
    rows = [read_audio(tmp_path / "new" / f"x_{row}.flac")[0] for row in range(3)]
    assert [len(row) for row in rows] == [400] * 3
    assert not torch.equal(rows[0], rows[1])
    continued = WaveNet.from_pretrained(model).generate(
        400,
        quantize.encode(read_audio(data / "a.wav")[0], "mulaw", 256),
        batch=3,
        temperature=0.8,
        dtype=generators.DTYPES[dtype],
    )
    torch.testing.assert_close(rows[2], quantize.decode(continued[2], "mulaw", 256), rtol=0, atol=1 / 32768)


@pytest.mark.parametrize(
    "words",
    [
        "generate {model} --prompt {file} --out {file}",
        "generate {model} --prompt {folder}/a_1.wav --batch 2 --out {folder}/a.wav",
        "conceal {file} --gaps 0.1:0.02 --model {model} --out {folder}/../data/a.wav",
        "continue {file} --out {file}",
        "demo --recording {folder}/original.wav --out {folder}",
    ],
)
def test_a_file_that_is_read_is_not_written(call, model, data, tmp_path, words):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.wav", "a_1.wav", "original.wav"):
        (folder / name).write_bytes((data / "a.wav").read_bytes())
    code, _, err = call(*words.format(model=model, folder=folder, file=folder / "a.wav").split())
    assert code == 2 and "--out must be another file than" in err
    assert all(file.read_bytes() == (data / "a.wav").read_bytes() for file in folder.iterdir())


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("generate MODEL --seconds 0.01", "out.wav"),
        ("generate MODEL --seconds 0.01 --batch 2", "out_1.wav"),
        ("conceal DATA/a.wav --model MODEL --gaps 0.1:0.01 --candidates 1", "out.wav"),
        ("continue DATA/a.wav", "out.wav"),
        ("plot-attention TRANSFORMER DATA/a.wav --seconds 0.05", "attention.png"),
        ("plot-filters TAGGER", "filters_tagger.png"),
    ],
)
def test_a_file_that_nobody_named_replaces_only_what_was_made_here(
    call, model, data, tmp_path, monkeypatch, words, name
):
    monkeypatch.chdir(tmp_path)
    SampleTransformer(SampleTransformerConfig(n_layer=1, n_head=1, n_embd=8, window=16)).save_pretrained("transformer")
    AudioTransformer(AudioTransformerConfig(n_layer=1, n_head=1, n_embd=8, n_class=4)).save_pretrained("tagger")
    for word, path in {"MODEL": model, "DATA": data, "TRANSFORMER": "transformer", "TAGGER": "tagger"}.items():
        words = words.replace(word, str(path))
    Path(name).write_bytes(b"a recording")
    code, out, err = call(*words.split())
    assert code == 2 and f"{name} is there already, and audiokernels did not make it" in err and out == ""
    assert Path(name).read_bytes() == b"a recording"
    if words.startswith("continue"):  # with the models that come along it takes long
        return
    Path(name).unlink()
    assert [call(*words.split())[0] for _ in range(2)] == [0, 0]


def test_generate_resamples_a_prompt_with_a_notice(call, model, tmp_path):
    write_audio(tmp_path / "p.wav", torch.zeros(1600), 16000)
    code, _, err = call(
        "generate", model, "--prompt", tmp_path / "p.wav", "--seconds", 0.01, "--out", tmp_path / "x.wav"
    )
    assert code == 0 and "resampled from 16000 to 8000 Hz" in err


def test_generate_reads_the_end_of_a_prompt(call, model, tmp_path):
    """An hour of it would take an hour: what lies before the last ten seconds is left out."""
    end = torch.rand(80000) - 0.5
    for name, before in (("short", 0), ("long", 9000)):
        write_audio(tmp_path / f"{name}.wav", torch.cat([torch.rand(before) - 0.5, end]), 8000)
        words = ("--prompt", tmp_path / f"{name}.wav", "-o", tmp_path / f"{name}_next.wav", "--seconds", 0.1)
        code, _, err = call("generate", model, *words)
        assert code == 0 and "reading the prompt:   0%" in err and "reading the prompt: 100%" not in err
    assert (tmp_path / "short_next.wav").read_bytes() == (tmp_path / "long_next.wav").read_bytes()


def test_a_run_says_when_it_is_done_and_when_its_data_is_another(call, data, tmp_path, caplog):
    other = 0.3 * torch.cos(torch.arange(4000) * (2 * math.pi * 330 / 8000))
    (tmp_path / "other").mkdir()
    write_audio(tmp_path / "other" / "a.wav", other, 8000)
    sizes = "--model.n-layer 1 --model.residual-channels 4 --model.skip-channels 4 --model.sample-rate 8000 --steps 2"
    words = [*sizes.split(), "--length", 50, "--context", 10, "--no-tensorboard", "--no-progress"]
    words += ["--eval-targets", 200, "--out", tmp_path / "run"]
    code, out, err = call("train", data, *words)
    assert code == 0 and "nothing is trained" not in out and err == ""
    code, out, _ = call("train", data, *words)
    assert code == 0 and "step-00000002: all 2 steps are done, nothing is trained" in out and "data" not in caplog.text
    code, *_ = call("train", tmp_path / "other", *words)
    assert code == 0 and "resumed with other settings: {'data': '1 recordings, 3200 samples, " in caplog.text


def test_evaluate(call, model, data):
    code, out, _ = call("evaluate", model, data)
    assert code == 0 and "the last 20 % of each recording" in out and "800 targets" in out
    rows = {
        line.split()[0]: line.split()[1:]
        for line in out.splitlines()
        if line.startswith(("WaveNet", "uni", "rep", "lpc"))
    }
    assert 7 < float(rows["WaveNet"][0]) < 9 and 0 < float(rows["unigram"][0]) < 9
    assert rows["repeat"][0] == "-" and rows["repeat"][2].endswith("%")
    assert float(rows["lpc64"][0]) < float(rows["unigram"][0])


def test_evaluate_by_split(call, model, tmp_path):
    """A folder with groups enough is divided by group."""
    for i in range(40):
        write_audio(tmp_path / f"{chr(97 + i % 26)}x{i}.wav", 0.1 * torch.randn(200), 8000)
    code, out, _ = call("evaluate", model, tmp_path, "--split", "test")
    assert code == 0 and ", test: " in out


TRANSFORMER = """--model sample_transformer --model.n-layer 2 --model.n-head 2 --model.n-embd 16 --model.window 64
    --model.context-channels 4 --model.context-widths 5 4"""
KINDS = {"WaveNet": [*SIZES, "--model.n-layer", 3], "SampleTransformer": TRANSFORMER.split()}


@pytest.mark.parametrize("kind", KINDS)
def test_train_generate_evaluate(call, data, tmp_path, kind):
    run = tmp_path / "run"
    words = [
        "train",
        data,
        "--out",
        run,
        *KINDS[kind],
        "--model.sample-rate",
        8000,
        "--batch",
        2,
        "--length",
        64,
    ]
    code, out, _ = call(*words, "--steps", 3, "--no-progress", "--no-tensorboard")
    assert code == 0 and kind in out and "the last 20 %" in out
    scores = json.loads((run / "scores.json").read_text())
    assert scores[kind]["n_target"] == scores["bigram"]["n_target"] == 800
    assert (run / "report.png").read_bytes()[:4] == b"\x89PNG"
    first = (run / "model/model.safetensors").read_bytes()
    code, _, _ = call(*words, "--steps", 6, "--no-progress", "--no-tensorboard")  # goes on from step 3
    assert code == 0 and (run / "model/model.safetensors").read_bytes() != first
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()][-1] == 6
    assert call("generate", run / "model", "--seconds", 0.01, "--out", tmp_path / "x.wav")[0] == 0
    code, out, _ = call("evaluate", run / "model", data)
    assert code == 0 and kind in out


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("sample_transformer", ["--model.n-layer", 1, "--model.n-head", 1, "--model.n-embd", 8, "--model.window", 16]),
        ("sample_rnn", ["--model.n-embd", 8, "--model.n-rnn", 1]),
        ("wave_rnn", ["--model.n-embd", 8, "--model.head-channels", 8]),
    ],
)
def test_train_and_generate_others(call, data, tmp_path, kind, sizes):
    run, words = tmp_path / "run", ["--batch", 2, "--length", 64, "--steps", 2, "--no-progress", "--no-tensorboard"]
    code, out, _ = call("train", data, "--model", kind, "--out", run, *sizes, "--model.sample-rate", 8000, *words)
    assert code == 0 and ("lpc64" in out) == (kind != "wave_rnn")  # predictors are for 8 bits
    code, out, _ = call("generate", run / "model", "--seconds", 0.01, "--out", tmp_path / "x.wav")
    assert code == 0 and len(read_audio(tmp_path / "x.wav")[0]) == 80
    code, out, _ = call("evaluate", run / "model", data)
    assert code == 0 and "800 targets" in out


MODULES = """
import torch

class Uniform(torch.nn.Module):
    def __init__(self, ahead=0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.ahead = ahead

    def forward(self, codes):
        later = torch.nn.functional.one_hot(codes[:, self.ahead:].long(), 256).float()
        later = torch.nn.functional.pad(later, (0, 0, 0, self.ahead))
        return self.weight + (later if self.ahead else torch.zeros_like(later))

def leaking():
    return Uniform(1)

class Bigram(torch.nn.Module):  # no parameters, and a config of its own
    config = {"vocabulary": 256}

    def forward(self, codes):
        return torch.nn.functional.one_hot(codes, 256).float()

class Turned(Bigram):
    def forward(self, codes):
        return super().forward(codes).transpose(1, 2)

class Broken(Bigram):
    def forward(self, codes):
        return super().forward(codes) / 0

class Pair(Bigram):
    def forward(self, codes):
        return super().forward(codes), None

def nothing():
    return 3
"""


def test_evaluate_any_module(call, data, tmp_path, monkeypatch):
    (tmp_path / "planted_models.py").write_text(MODULES)
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("evaluate", "--model", "planted_models:Uniform", data, "--sample-rate", 8000)
    assert code == 0 and re.search(r"Uniform +8\.000", out) and "lpc64" in out and "800 targets" in out
    assert "Bigram" in call("evaluate", "--model", "planted_models:Bigram", data, "--sample-rate", 8000)[1]
    for name, text in (
        ("planted_models:leaking", "is not causal"),
        ("planted_models:Turned", "(batch, time, n_class): (2, 4096, 256) for codes (2, 4096), got (2, 256, 4096)"),
        ("planted_models:Broken", "Broken must give logits that are numbers, got NaN"),
        ("planted_models:Pair", "Pair must give a tensor of floating-point logits, got tuple"),
        (".planted_models:Uniform", "must be package:Class"),
        ("planted_models:nothing", "gave int"),
        ("planted_models:missing", "missing"),
        ("planted_nowhere:X", "planted_nowhere"),
        ("planted_models", "must be package:Class"),
    ):
        code, out, err = call("evaluate", "--model", name, data, "--sample-rate", 8000)
        assert code == 2 and text in err and out == ""
    code, _, err = call("evaluate", data)
    assert code == 2 and "evaluate takes a MODEL folder and DATA" in err


def test_comparison_commands(call, tmp_path):
    code, _, err = call("compare-generators", "--out", tmp_path / "c", "--protocol", "smoke")
    assert code == 2 and "no such file, and no --data to make it from" in err
    (tmp_path / "r.json").write_text('{"rows": []}')
    code, _, err = call("reproduce", tmp_path / "r.json", "--row", "wavenet10", "--out", tmp_path / "d")
    assert code == 2 and "must be one of []" in err
    (tmp_path / "manifest.jsonl").touch()
    code, _, err = call("build-corpus", "--out", tmp_path)
    assert code == 2 and "holds a corpus already" in err


def test_demo_runs_and_fails_with_one(call, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(cli, "run", asked.append)
    code, _, err = call("demo", "--out", tmp_path, "--seconds", 5, "--seed", 3)
    assert code == 0 and err == ""
    assert (asked[0].out, asked[0].seconds, asked[0].seed, asked[0].recording) == (tmp_path, 5, 3, None)

    def fails(config):
        raise demo.DemoError("the model does not beat bigram")

    monkeypatch.setattr(cli, "run", fails)
    code, _, err = call("demo")
    assert code == 1 and err == "audiokernels: the demo failed: the model does not beat bigram\n"


def test_bench(call, monkeypatch):
    monkeypatch.setattr(cli, "WaveNetConfig", lambda: TINY)
    code, out, _ = call("bench", "--quick")
    assert code == 0 and "batch 1  fused kernel" in out and "batch 4  recomputation" in out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("generate", "generate takes one MODEL: a folder, or one of the models shipped: piano"),
        ("generate {no}", "no such folder"),
        ("generate tagger", "tagger: is not one of wavenet, sample_transformer, sample_rnn, wave_rnn; of the models"),
        ("generate piano-units", "of the models shipped these are: piano, piano-transformer"),
        ("generate {model} -o {tmp}/folder.wav", "--out must be a file, "),
        ("plot-attention {model} {data}/a.wav -o x.txt", "--out must end in .png, .pdf or .svg, got x.txt"),
        ("tag {data}/a.wav -o x.txt", "--out must end in .png, .pdf or .svg, got x.txt"),
        ("train {data} --out {tmp}/run --device nowhere", "device must be auto, cpu or another that torch can use"),
        ("train {data} --out {tmp}/run --device cuda:77", "device must be auto, cpu or another that torch can use"),
        ("generate {data}", "config.json: no such file"),
        ("generate {model} --prompt {no}", "nothing-here"),
        ("generate {model} --prompt {model}/config.json", "config.json: is not a readable audio file"),
        ("generate {model} --out x.mp3", "--out must end in .wav or .flac, got x.mp3"),
        ("generate {model} --seconds 0", "--seconds must be above 0"),
        ("generate {model} --seconds nan", "--seconds must be above 0"),
        ("generate {model} --batch 0", "--batch must be 1 .. 1024, got 0"),
        ("generate {model} --temperature -1", "temperature must be finite and >= 0, got -1.0"),
        ("generate {model} --top-k 0", "top_k must be >= 1, got 0"),
        ("generate {model} --top-k 9223372036854775808", "top_k must be below 2^63, got 9223372036854775808"),
        ("generate {model} --top-p 1.5", "top_p must be above 0 and at most 1, got 1.5"),
        ("generate {model} --seed -1", "--seed must be in 0 .. 2**64 - 1, got -1"),
        ("continue {short} --seed 18446744073709551616", "--seed must be in 0 .. 2**64 - 1, got 18446744073709551616"),
        ("conceal {short} --loss-rate 0.1 --seed -1", "--seed must be in 0 .. 2**64 - 1, got -1"),
        ("plot-filters tagger --seed -1", "--seed must be in 0 .. 2**64 - 1, got -1"),
        ("train {data} --out {tmp}/run --seed 18446744073709551616", "seed must be in 0 .. 2**64 - 1, got 184467"),
        ("generate {labelled}", "needs a condition or label"),
        ("generate {model} --seconds 0.01 --out {data}/a.wav/x.wav", "a.wav"),
        ("evaluate {no} {data}", "no such folder"),
        ("evaluate {tmp} {data}", "config.json: no such file"),
        ("evaluate {stranger} {data}", "not the config of one of wavenet, sample_transformer"),
        ("evaluate {model} {no}", "no such file or folder"),
        ("evaluate {model} {model}", "no audio files"),
        ("evaluate {model} {data} --max-targets 0", "--max-targets must be at least 1, got 0"),
        ("evaluate {model} {short}", "short.wav: too short, nothing is left to test on"),
        ("evaluate --model json:loads {data}", "--model json:loads: loads() cannot be called: "),
        ("evaluate {model} {data} --part piano", "has no parts; got 'piano'"),
        ("train {no} --out {tmp}/run", "no such file or folder"),
        ("train {short} --out {tmp}/run", "short.wav: too short, nothing is left to test on"),
        ("train-units {short} --out {tmp}/run", "recordings must hold at least one patch, 512 samples"),
        ("demo --recording {short} --out {tmp}/run", "short.wav: too short, nothing is left to test on"),
        ("continue {short} --models piano", "piano: no models to continue sound with"),
        ("train {data} --out {tmp}/run --steps 0", "steps must be at least 1, got 0"),
        ("train {data} --out {tmp}/run --model.n-label 3", "train takes models without condition and labels"),
        ("train {data} --out {data}/a.wav", "a.wav"),
        ("demo --recording {no}", "nothing-here"),
        ("demo --out {data}/a.wav/demo", "is no folder that may be written to"),
        ("bench --only haar", "--only must be one of"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(call, model, data, tmp_path, words, text):
    config = WaveNetConfig(n_layer=1, residual_channels=4, skip_channels=4, head_channels=4, n_label=2)
    WaveNet(config).save_pretrained(tmp_path / "labelled")
    write_audio(tmp_path / "short.wav", torch.full((1,), 0.1), 8000)
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "config.json").write_text('{"n_layer": 3, "hidden": 1024}')
    places = {
        "no": tmp_path / "nothing-here",
        "stranger": tmp_path / "stranger",
        "data": data,
        "model": model,
        "tmp": tmp_path,
        "short": tmp_path / "short.wav",
    }
    code, _, err = call(*(word.format(**places, labelled=tmp_path / "labelled") for word in words.split()))
    assert code == 2
    assert not (tmp_path / "run").exists()
    line = err.splitlines()[-1]  # bars and notices may stand above it
    assert line.startswith("audiokernels: ") and text in line and "Traceback" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_a_name_that_cannot_be_printed_or_drawn(monkeypatch, tmp_path):
    """ASCII output, a byte that is no text, a formula that is none: escaped, and the picture is made."""
    file = tmp_path / "caf\udce9 $\\frac$.wav"
    write_audio(file, torch.zeros(400), 8000)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as end:
        cli.main(["spectrogram", str(file), "--kinds", "mel", "--out", str(tmp_path)])
    sys.stdout.flush()
    assert not end.value.code and sys.stdout.buffer.getvalue().endswith(b"caf\\udce9 $\\frac$.png\n")
    assert file.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["train"], "DATA"),
        (["fly"], "fly"),
        (["demo", "--seconds", 1], "seconds must be 3 .. 600, got 1.0"),
        (["demo", "--seconds", "long"], "--seconds"),
        (["train", "d", "--out", "o", "--model.n-layer", 10**9], "n_layer must be 1 .. 1000"),
        (["train", "d", "--out", "o", "--model.sample-rate", 5], "sample_rate must be 1000 .. 768000"),
        (["evaluate", "m", "d", "--split", "all"], "invalid choice 'all'"),
    ],
)
def test_words_that_make_no_command(call, words, text):
    """tyro's own words, and where help is."""
    code, _, err = call(*words)
    assert code == 2 and text in " ".join(err.split()) and "--help" in err and "Traceback" not in err


def test_command_as_it_is_installed(tmp_path):
    """In a fresh process: threads sleep at barriers, help is there, a mistake gives no traceback."""
    run = [sys.executable, "-m", "audiomodels", "generate", str(tmp_path / "nothing-here")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("audiokernels: ") and done.stderr.count("\n") == 1
