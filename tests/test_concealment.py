"""Concealment: gaps, the fillers, the measures, and the command with a model that knows its sound."""

import math

import pytest
import torch
from audiomodels import concealment, quantize
from audiomodels.audio import read_audio, write_audio
from audiomodels.concealment import Gap, check_gaps, conceal, generated, lost_packets, measure, parse_gaps
from audiomodels.wavenet import WaveNet, WaveNetConfig
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("one_thread")
RATE = 8000
TONE = 0.5 * torch.sin(torch.arange(4000) * (2 * math.pi / 16))  # 500 Hz


@pytest.fixture(scope="module")
def model():
    """A WaveNet that has learned the tone's codes."""
    torch.manual_seed(0)
    config = WaveNetConfig(n_layer=4, residual_channels=16, skip_channels=32, head_channels=32, sample_rate=RATE)
    model, codes = WaveNet(config), quantize.encode(TONE)[None, :200].long()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(codes)[0, 16:-1], codes[0, 17:]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conceal")
    model.save_pretrained(folder / "model")
    write_audio(folder / "tone.wav", TONE, RATE)
    return folder


# ---- gaps


def test_gaps_are_read_and_put_in_order():
    assert parse_gaps("0.5:0.02,0.1:0.1", RATE) == [(4000, 4160), (800, 1600)]
    assert check_gaps([Gap(50, 60), Gap(10, 20), Gap(20, 30)], 60) == [(10, 30), (50, 60)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parse_gaps("0.5", RATE), r"gaps must be START:LENGTH,... in seconds.*got '0.5'"),
        (lambda: parse_gaps("0.5:0.1,", RATE), "gaps must be START:LENGTH"),
        (lambda: parse_gaps("1:0", RATE), "a length above 0, got '1:0'"),
        (lambda: parse_gaps("-1:1", RATE), "start at 0 or later"),
        (lambda: parse_gaps("nan:1", RATE), "start at 0 or later"),
        (lambda: check_gaps([Gap(0, 5)], 9), r"begin after the first sample.*got samples 0 \.\. 5"),
        (lambda: check_gaps([Gap(5, 10)], 9), r"end within the 9 of the recording, got samples 5 \.\. 10"),
        (lambda: check_gaps([Gap(2, 6), Gap(5, 7)], 9), "gaps must not overlap"),
        (lambda: check_gaps([], 9), "nothing is lost"),
        (lambda: lost_packets(100, 10, 1.5), "loss rate must be above 0 and below 1, got 1.5"),
        (lambda: lost_packets(100, 0, 0.5), "packet must hold at least one sample, got 0"),
        (lambda: generated(None, candidates=0), "candidates must be 1 .. 1024, got 0"),
    ],
)
def test_wrong_gaps_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_packets_are_lost_at_the_given_rate():
    lost = lost_packets(160_005, 16, 0.1, seed=3)
    assert lost == lost_packets(160_005, 16, 0.1, seed=3) != lost_packets(160_005, 16, 0.1, seed=4)
    assert abs(len(lost) - 1000) < 5 * math.sqrt(900)
    assert all(gap.start % 16 == 0 and gap.start > 0 and gap.end == min(gap.start + 16, 160_005) for gap in lost)


# ---- fillers


def test_only_gaps_and_fades_change():
    """A filler of ones; a fade is cut short by the next gap and by the end."""
    audio, seen = torch.zeros(100), []

    def ones(past, n, following):
        seen.append((past.clone(), n, len(following)))
        return torch.ones(n + len(following))

    out = conceal(audio, [Gap(20, 30), Gap(33, 40), Gap(98, 100)], 4, ones)
    assert [(len(past), n, after) for past, n, after in seen] == [(20, 10, 3), (33, 7, 4), (98, 2, 0)]
    assert seen[1][0][20:30].eq(1).all()  # the second sees what the first has filled
    assert torch.allclose(out[30:33], torch.tensor([5 / 6, 1 / 2, 1 / 6]))
    changed = [*range(20, 44), 98, 99]
    assert out.nonzero()[:, 0].tolist() == changed and not audio.any()


def test_repeating_a_period_goes_on_with_a_periodic_sound():
    past = TONE[:1000]
    assert concealment.period(past, RATE) in (32, 48, 64, 80, 96, 112)  # 66 to 400 Hz: multiples of 16 from 20 on
    made = concealment.pitch_period(RATE)(past, 300, TONE[1300:1340])
    assert torch.allclose(made, TONE[1000:1340], atol=1e-4)
    assert concealment.pitch_period(RATE)(past[:7], 20, past[:0]).shape == (20,)  # less sound than a period
    noisy = torch.cat([torch.randn(3000, generator=torch.Generator().manual_seed(0)), TONE[:700]])
    assert concealment.period(noisy, RATE) % 16 == 0
    assert torch.equal(
        concealment.last_packet(3)(torch.arange(9.0), 4, torch.zeros(1)), torch.tensor([6.0, 7, 8, 6, 7])
    )


class Candidates:
    """In place of a model: candidate i goes on at the level i / 10."""

    def __init__(self):
        self.config, self.train_context, self.asked = WaveNetConfig(sample_rate=RATE), 50, []

    def generate(self, n, prompt, *, batch, seed):
        self.asked.append((len(prompt), batch, seed))
        return quantize.encode(torch.arange(batch)[:, None].expand(-1, n) / 10.0)

    def to_codes(self, codes):
        return codes


def test_the_candidate_that_meets_what_follows_is_taken():
    model, audio = Candidates(), torch.cat([torch.zeros(100), torch.full((100,), 0.3), torch.full((100,), 0.6)])
    out = conceal(audio, [Gap(80, 100), Gap(180, 200), Gap(290, 300)], 10, generated(model, candidates=8, seed=5))
    assert torch.allclose(out[80:100], torch.full((20,), 0.3), atol=0.01)
    assert torch.allclose(out[180:200], torch.full((20,), 0.6), atol=0.02)
    assert torch.allclose(out[290:], torch.zeros(10), atol=0.01)  # nothing follows: one candidate
    assert model.asked == [(50, 8, 85), (50, 8, 185), (50, 1, 295)]


# ---- measures


def test_measures():
    gaps = [Gap(1000, 1200), Gap(2000, 2400)]
    silent = conceal(TONE, gaps, 0, concealment.silence)
    assert abs(measure(TONE, silent, gaps, RATE).total_snr) < 1e-6
    half = conceal(TONE, gaps, 0, lambda past, n, following: TONE[len(past) : len(past) + n] / 2)
    got = measure(TONE, half, gaps, RATE)
    assert torch.allclose(got.snr, torch.full((2,), 20 * math.log10(2)).double(), atol=1e-4)
    assert 1 < got.distance[1] < measure(TONE, silent, gaps, RATE).distance[1]
    same = measure(TONE, TONE, gaps, RATE)
    assert same.total_snr > 100 and not same.distance.any()
    noise = 0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    louder = measure(noise, conceal(noise, [Gap(500, 3500)], 0, lambda past, n, _: 10 * noise[500:3500]), gaps, RATE)
    assert torch.allclose(louder.distance, torch.full((2,), 20.0), atol=0.01)  # 20 dB at every frequency
    with pytest.raises(ValueError, match="not silent"):
        measure(torch.zeros(100), torch.ones(100), [Gap(10, 20)], RATE)


# ---- the command


def test_a_model_that_knows_the_sound_fills_the_gap(call, folder, model):
    out = folder / "new" / "out.wav"
    words = ["conceal", folder / "tone.wav", "--model", folder / "model", "-o", out, "--temperature", 0]
    code, text, _ = call(*words, "--gaps", "0.1:0.03,0.3:0.05", "--candidates", 1)
    assert code == 0 and "2 gaps, 80 ms of 0.5 s" in text
    made, _ = read_audio(out)
    gaps, fade = [Gap(800, 1040), Gap(2400, 2800)], 40
    keep = torch.ones(4000, dtype=torch.bool)
    for gap in gaps:
        keep[gap.start : gap.end + fade] = False
    assert torch.equal(made[keep], read_audio(folder / "tone.wav")[0][keep])
    rows = {line[:14].strip(): line[14:].split() for line in text.splitlines()}
    rows = {name: float(words[0]) for name, words in rows.items() if words[1:2] == ["dB"]}
    assert set(rows) == {"WaveNet", "silence", "last packet", "pitch period"}
    assert rows["WaveNet"] > 25 and abs(rows["silence"]) < 0.01
    assert abs(rows["WaveNet"] - measure(TONE, made, gaps, RATE).total_snr) < 0.1
    assert (out.parent / "out.png").stat().st_size > 20_000


def test_lost_packets_of_the_command(call, folder):
    words = ["conceal", folder / "tone.wav", "--model", folder / "model", "-o", folder / "lost.flac"]
    options = ["--loss-rate", 0.2, "--packet-ms", 10, "--candidates", 2, "--seed", 2, "--top-k", 20, "--top-p", 0.9]
    assert call(*words, *options)[0] == 0
    audio, _ = read_audio(folder / "lost.flac")
    packets = (audio - read_audio(folder / "tone.wav")[0]).abs().unflatten(0, (50, 80))[:, 40:].amax(1) > 0
    assert packets.sum() > 4 and not packets[0]


def test_the_largest_seed(model):
    past, fill = TONE[:100], generated(model, candidates=2, seed=2**64 - 1)
    assert len(fill(past, 10, TONE[110:112])) == 12


def test_a_picture_of_the_same_name_is_kept(call, folder):
    (folder / "kept.png").write_bytes(b"a photograph")
    words = ["conceal", folder / "tone.wav", "--gaps", "0.1:0.01", "--model", folder / "model"]
    words += ["-o", folder / "kept.wav"]
    code, _, err = call(*words)
    assert code == 2 and "kept.png is there already" in err and not (folder / "kept.wav").exists()
    (folder / "kept.png").unlink()
    assert [call(*words)[0] for _ in range(2)] == [0, 0]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("", "exactly one of --gaps and --loss-rate"),
        ("--gaps 0.1:0.1 --loss-rate 0.1", "exactly one of --gaps and --loss-rate"),
        ("--gaps 0.4:0.2", "gaps must begin after the first sample and end within the 4,000"),
        ("--gaps 0:0.2", "gaps must begin after the first sample"),
        ("--gaps 0.1:0.2,0.2:0.1", "gaps must not overlap"),
        ("--gaps 0.1", "gaps must be START:LENGTH"),
        ("--loss-rate 0", "loss rate must be above 0"),
        ("--loss-rate 0.1 --packet-ms 0", "--packet-ms is out of range"),
        ("--gaps 0.1:0.1 --fade-ms -1", "--fade-ms is out of range"),
        ("--gaps 0.1:0.1 --candidates 0", "candidates must be 1 .. 1024"),
        ("--gaps 0.1:0.1 --top-k 0", "top_k must be >= 1"),
        ("--gaps 0.1:0.1 -o x.mp3", "--out must end in .wav or .flac"),
        ("--gaps 0.1:0.1 --model nowhere", "nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_line(call, folder, words, text):
    model = [] if "--model" in words else ["--model", folder / "model"]
    code, _, err = call("conceal", folder / "tone.wav", *model, *words.split())
    assert code == 2 and text in err.splitlines()[-1]
