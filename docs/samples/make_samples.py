"""Makes the page of sounds: the same beginnings of pieces that no model has seen, continued by every model.

python docs/samples/make_samples.py CORPUS     (of `audiokernels build-corpus`; needs audiokernels[models])

It writes index.html, the sounds (Ogg Vorbis), a spectrogram of each, and samples.json with seeds, licences and figures.
Nothing is chosen by ear: PROMPTS and SEEDS were written down before the first sound was made, and every sound that they
ask for is on the page. What else can continue a sound joins the page as one more `Continuation` in `continuations`.
"""

import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean

import torch
from audiomodels import features, plots, quantize, textless
from audiomodels._optional import require
from audiomodels.audio import read_audio
from audiomodels.data import rows_of
from audiomodels.pretrained import title
from audiomodels.registry import load
from PIL import Image
from torch import Tensor

FOLDER = Path(__file__).parent
RATE = 16000
PROMPT, SECONDS = 2, 4  # seconds of prompt, and of what follows it
START = 4  # where a prompt begins in its piece, in seconds
PROMPTS = {  # test pieces of the corpus, by the music21 name of their score
    "bach/bwv245.40": "J. S. Bach, St John Passion, last chorale",
    "mozart/k155/movement2": "W. A. Mozart, quartet K. 155, second movement",
    "haydn/opus1no1/movement1": "J. Haydn, quartet op. 1 no. 1, first movement",
}
SEEDS = (0, 1, 2)
# Temperatures: of 0.8, 0.9 and 1 the one whose average spectrum came nearest on one piece of the split dev, seed 0.
MODELS = {"piano": 0.9, "piano-transformer": 1.0}
SILENT_DB, FLOOR_DB = -60.0, 60.0  # a sound below is silent; bands more than this below the loudest do not count


@dataclass(frozen=True)
class Continuation:
    """A way to go on: play(prompt (time,), seed) -> (SECONDS * RATE,), audio at RATE, full scale [-1, 1]."""

    name: str  # in file names
    title: str
    play: Callable[[Tensor, int], Tensor]


def continuations() -> list[Continuation]:
    """The rows of the page below the original."""
    return [*(of_model(name, temperature) for name, temperature in MODELS.items()), of_units("piano-units")]


def of_model(name: str, temperature: float) -> Continuation:
    """A shipped generator, computed with the bfloat16 weights that it is stored in."""
    model = load(name)
    kind = (model.config.companding, model.config.n_class)
    if model.config.sample_rate != RATE:
        raise ValueError(f"{name}: must have {RATE} Hz, got {model.config.sample_rate}")

    def play(prompt: Tensor, seed: int) -> Tensor:
        options = {"temperature": temperature, "seed": seed, "dtype": torch.bfloat16}
        return quantize.decode(model.generate(SECONDS * RATE, quantize.encode(prompt, *kind), **options)[0], *kind)

    return Continuation(name, f"{title(name)}, temperature {temperature:g}", play)


def of_units(name: str) -> Continuation:
    """A shipped coder with its language model, at the coder's own rate; resampled both ways."""
    models, soxr = textless.load(name), require("soxr")
    rate = models.coder.sample_rate

    def play(prompt: Tensor, seed: int) -> Tensor:
        heard = torch.from_numpy(soxr.resample(prompt.numpy(), RATE, rate))
        made = textless.continue_sound(models, heard, SECONDS, seed=seed)[-SECONDS * rate :]
        return torch.from_numpy(soxr.resample(made.numpy(), rate, RATE))[: SECONDS * RATE]

    return Continuation(name, f"{title(name)}; {rate:,} Hz", play)


# --- what can be measured -----------------------------------------------------------------------------------------


def level_db(audio: Tensor) -> float:
    """Root mean square without the mean, dB of full scale."""
    return 20 * math.log10(max(float(audio.double().std(correction=0)), 1e-12))


def spectral_distance(audio: Tensor, other: Tensor) -> float:
    """RMS difference in dB, over 80 mel bands, of the two sounds' average spectra."""
    a, b = (10 * torch.log10(plots.mel_power(x, RATE).double().mean(1) + 1e-12) for x in (audio, other))
    floor = torch.maximum(a.max(), b.max()) - FLOOR_DB
    return float((a.maximum(floor) - b.maximum(floor)).square().mean().sqrt())


def flatness_db(audio: Tensor) -> float:
    """Spectral flatness, mean over frames of 64 ms: 0 dB were white noise (-2.5 measured), tones lie far below."""
    power = features.spectrogram(audio.float(), 1024, 256).double().square() + 1e-12
    return float(10 * (power.log10().mean(0) - power.mean(0).log10()).mean())


def measure(audio: Tensor, truth: Tensor) -> dict[str, float]:
    """Figures of a continuation (time,) beside what the piece really does; ValueError for a sound that is none."""
    if not bool(torch.isfinite(audio).all()) or level_db(audio) < SILENT_DB:
        raise ValueError(f"a continuation must be finite and above {SILENT_DB:g} dB, got {level_db(audio):.1f} dB")
    return {
        "level_db": level_db(audio),
        "peak": float(audio.abs().max()),
        "distance_db": spectral_distance(audio, truth),
        "flatness_db": flatness_db(audio),
    }


# --- files --------------------------------------------------------------------------------------------------------


def write_sound(name: str, audio: Tensor) -> None:
    """FOLDER/name.ogg; ValueError if what was written does not sound as loud as what was given."""
    soundfile, path = require("soundfile"), FOLDER / f"{name}.ogg"
    with soundfile.SoundFile(path, "w", RATE, 1, format="OGG", subtype="VORBIS", compression_level=0.6) as file:
        for block in audio.numpy().astype("float32").reshape(-1, RATE // 10):  # libsndfile overflows on long blocks
            file.write(block)
    again, _ = read_audio(path)
    if len(again) != len(audio) or abs(level_db(again) - level_db(audio)) > 0.5:
        raise ValueError(f"{path}: read back as {len(again)} samples, {level_db(again):.1f} dB")


def draw_sound(name: str, audio: Tensor, top_db: float) -> None:
    """FOLDER/name.png: the log-mel spectrogram, a line where the prompt ends; 80 dB, one scale for a piece."""
    fig, grid = plots.figure(3.6, 1.3, 1, 1)
    fig.get_layout_engine().set(w_pad=0, h_pad=0)
    axis = plots.add(fig, grid[0, 0], "")
    plots.log_mel(axis, audio, RATE, top_db=top_db)
    axis.axvline(PROMPT, color="white", linewidth=1)
    axis.set_axis_off()
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=100)
    image = Image.open(buffer).convert("RGB").quantize(48, dither=Image.Dither.NONE)
    image.save(FOLDER / f"{name}.png", optimize=True)


def make(corpus: Path) -> list[dict]:
    """Write all sounds and pictures; a row of samples.json for each, the original of a piece before the others."""
    piano = [row for row in rows_of(corpus) if row.get("part") == "piano"]
    pieces = {row["group"].removeprefix("music21:").removesuffix(".mxl"): row for row in piano}
    made, rows = continuations(), []
    for piece, called in PROMPTS.items():
        row = pieces[piece]
        if row["split"] != "test":
            raise ValueError(f"{piece}: must be of the split test, got {row['split']}")
        audio, _ = read_audio(row["file"], sample_rate=RATE)
        audio = audio[START * RATE :][: (PROMPT + SECONDS) * RATE]
        audio = quantize.decode(quantize.encode(audio, "mulaw", 256), "mulaw", 256)  # what a model would give at best
        prompt, truth = audio[: PROMPT * RATE], audio[PROMPT * RATE :]
        top_db = 10 * math.log10(float(plots.mel_power(audio, RATE).max()))
        sounds = [("original", None, truth)]
        sounds += [(way.name, seed, way.play(prompt, seed)) for way in made for seed in SEEDS]
        for way, seed, after in sounds:
            name = f"{piece.replace('/', '_')}-{way}{'' if seed is None else f'-{seed}'}"
            write_sound(name, torch.cat([prompt, after]))
            draw_sound(name, torch.cat([prompt, after]), top_db)
            found = {key: round(value, 2) for key, value in measure(after, truth).items()}
            if seed is None:
                found["distance_db"] = round(spectral_distance(prompt, truth), 2)  # of the prompt: a yardstick
            source = f"{row['source']}, from {START} s on" + ("" if seed is None else f"; after {PROMPT} s, {way}")
            rows.append({"file": f"{name}.ogg", "piece": piece, "title": called, "by": way, "seed": seed,
                         "license": row["license"], "source": source, **found})  # fmt: skip
            print(name, found, flush=True)
    return rows


# --- the page -----------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem } p { max-width: 50rem }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1rem }
figure { margin: 0; padding: .6rem; border: 1px solid var(--line); border-radius: 8px; max-width: 400px }
figure img { width: 100%; height: auto; border-radius: 4px; display: block } audio { width: 100%; margin-top: .5rem }
figcaption { font-size: .82rem; color: var(--soft); font-variant-numeric: tabular-nums }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: .25rem .9rem .25rem 0 }
th { text-align: left; border-bottom: 1px solid var(--line) } td + td, th + th { text-align: right }
code { font-size: .9em }
"""


def figure(row: dict) -> str:
    """One sound: picture, player, figures."""
    name, original = row["file"].removesuffix(".ogg"), row["seed"] is None
    text = "the recording itself" if original else f"seed {row['seed']}"
    away = "prompt to continuation" if original else "from the original"
    label = escape(f"{row['title']}, {row['by']}, {text}")
    return f"""<figure><img src="{name}.png" width="360" height="130" alt="Spectrogram: {label}" loading="lazy">
<audio controls preload="none" src="{row["file"]}" title="{label}"></audio>
<figcaption>{text} &middot; {row["level_db"]:.1f} dB &middot; {row["distance_db"]:.1f} dB {away} &middot; flatness
{row["flatness_db"]:.1f} dB</figcaption></figure>"""


def table(rows: list[dict]) -> str:
    """Means and ranges over all sounds of a row of the page."""
    lines = []
    for by in dict.fromkeys(row["by"] for row in rows):
        mine = [row for row in rows if row["by"] == by]
        cells = []
        for key in ("level_db", "distance_db", "flatness_db"):
            values = [row[key] for row in mine]
            cells.append(f"<td>{mean(values):.1f} ({min(values):.1f} .. {max(values):.1f})</td>")
        lines.append(f"<tr><td>{by}</td><td>{len(mine)}</td>{''.join(cells)}</tr>")
    return (
        "<table><tr><th>by</th><th>sounds</th><th>level, dB</th><th>distance, dB</th><th>flatness, dB</th></tr>"
        + "\n".join(lines)
        + "</table>"
    )


def page(rows: list[dict], titles: dict[str, str]) -> str:
    """index.html, of the rows of samples.json and what each continuation is called."""
    parts, titles = [], {"original": "The piece itself", **titles}
    for piece, called in PROMPTS.items():
        parts.append(f"<h2>{escape(called)}</h2>")
        for by, name in titles.items():
            figures = "\n".join(figure(row) for row in rows if (row["piece"], row["by"]) == (piece, by))
            parts.append(f'<h3>{escape(name)}</h3>\n<div class="row">\n{figures}\n</div>')
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>audiokernels: samples</title><style>{STYLE}</style></head><body>
<h1>The same beginnings, continued</h1>
<p>Each sound begins with {PROMPT} s of a rendered piano piece of the corpus's test split, which no model has seen; the
next {SECONDS} s, right of the white line, are the piece's own or drawn: sample by sample ({RATE:,} a second, 256 mu-law
levels), or, by piano-units, as codes of patches of a spectrogram, which is then turned into sound. The seeds are
{", ".join(map(str, SEEDS))}; pieces and seeds were fixed before the first sound was made, and none was left out. The
temperature of piano-units is 1, that of the others, of 0.8, 0.9 and 1, the one whose average spectrum came nearest to
the original's on one piece of the split dev.</p>
<p><strong>How good it is, as far as it can be measured.</strong> Level: root mean square of the continuation, dB of
full scale. Distance: RMS difference between the average mel spectra of the continuation and of the piece's own, over 80
bands, levels more than {FLOOR_DB:g} dB below the loudest band counted as that; for the original, between its first
{PROMPT} s and its next {SECONDS} s, which is how far a piece moves by itself. Flatness: near 0 dB is noise, a lower
number more tonal. Means and ranges over the sounds of this page:</p>
{table(rows)}
<p>So, in these figures and in the pictures: the continuations have the average spectrum of a piano. They also
have attacks, decays and partials, the horizontal lines of the prompt, but many at once, smeared, in no key; the
WaveNet's are 5 dB too quiet, the transformer's as loud as the piece, with more noise. Neither figure sees most of that:
both are taken of averages over time. piano-units goes on with clear lines; it has nothing above 4 kHz, so its distance
and flatness are not to be compared with the others'. The models are small (the generators see a fifth of a second) and
were trained for about an hour of one processor core, piano-units for a quarter of one. Bits per sample with intervals,
and what else they cannot do, stand in their cards, <code>python/audiomodels/checkpoints/</code>.
Files are Ogg Vorbis; <code>samples.json</code> lists the source and licence of every one.
<code>python docs/samples/make_samples.py CORPUS</code> makes this page; one of the sounds again, as WAV:
<code>audiokernels generate piano --prompt PROMPT.wav --seconds {SECONDS} --seed 0 --dtype bf16</code>.</p>
{chr(10).join(parts)}
</body></html>
"""


def main() -> None:
    """Remove what was made before, make everything anew."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    for old in (*FOLDER.glob("*.ogg"), *FOLDER.glob("*.png")):
        old.unlink()
    rows = make(Path(sys.argv[1]))
    (FOLDER / "samples.json").write_text(json.dumps(rows, indent=1) + "\n")
    titles = {way.name: way.title for way in continuations()}
    (FOLDER / "index.html").write_text(page(rows, titles), encoding="utf-8")


if __name__ == "__main__":
    main()
