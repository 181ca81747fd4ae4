"""What goes into the corpus: Debian packages, scores of music21's collection, limits, licences.

A recipe is {"name", "valid_fraction", part: what the part's builder takes}; `build-corpus --recipe FILE` reads another
one from JSON. valid_fraction: of the piano, held out by piece. language: a BCP-47 tag; speaker: a name for the voice,
as far as the package tells.
"""

from typing import Any

SOUNDFONTS = {  # package: (file, licence)
    "fluid-soundfont-gm": ("usr/share/sounds/sf2/FluidR3_GM.sf2", "MIT"),
    "csound-soundfont": ("usr/share/sounds/sf2/sf_GMbank.sf2", "LGPL-2.1-or-later"),
    "timgm6mb-soundfont": ("usr/share/sounds/sf2/TimGM6mb.sf2", "GPL-2.0-only"),
}


def _prompts(language: str, speaker: str, license_: str) -> dict[str, Any]:
    """Telephone prompts of one voice."""
    package, glob = f"asterisk-core-sounds-{language}-g722", "usr/share/asterisk/sounds/*/**/*.g722"
    source = {"package": package, "glob": glob, "exclude": "*/silence/*", "license": license_}
    return {**source, "language": language, "speaker": speaker}


def _names(language: str) -> dict[str, Any]:
    """Spoken descriptions of pictures."""
    glob = f"usr/share/tuxpaint/stamps/**/*_desc_{language}.ogg"
    source = {"package": "tuxpaint-stamps-default", "glob": glob, "license": "GPL-2.0-only", "minutes": 10}
    return {**source, "language": language, "speaker": f"tuxpaint-{language}"}


RECIPE: dict[str, Any] = {
    "name": "default",
    "valid_fraction": 0.25,
    "piano": [
        # pieces: patterns below music21's corpus folder; bwv: inclusive range of Bach chorale numbers.
        {
            "soundfont": "fluid-soundfont-gm",
            "program": 0,
            "minutes": 85,
            "max_seconds": 150,
            "pieces": [
                "bach/bwv846.mxl",
                "joplin/*.mxl",
                "schumann_clara/polonaise_op1n[1-3].mxl",
                "schubert/*.xml",
                "corelli/*/*.xml",
                "handel/*/*.mxl",
                "mozart/k155/*.mxl",
                "mozart/k156/*.mxl",
                "mozart/k458/*.mxl",
                "haydn/opus1no1/*.mxl",
                "schumann_robert/opus41no1/*.mxl",
                "beethoven/opus59no[12]/*.mxl",
                "beethoven/opus18no1/*.mxl",
                "ryansMammoth/[A-C]*Hornpipe.abc",
            ],
            "bwv": [1, 299],
        },
    ],
    "speech": [
        _prompts("en", "allison", "CC-BY-SA-3.0"),
        _prompts("fr", "june", "CC-BY-SA-3.0"),
        _prompts("it", "carlo", "CC-BY-3.0"),
        _prompts("ru", "ivrvoice", "CC-BY-3.0"),
        {
            "package": "fillets-ng-data-nl",
            "glob": "usr/share/games/fillets-ng/sound/*/**/*.ogg",
            "language": "nl",
            "speaker": "fillets-nl",
            "license": "GPL-2.0-only",
            "minutes": 30,
        },
        *(_names(language) for language in ("fr", "ru", "ro", "ca", "bg", "es", "be", "el")),
    ],
}

# Small packages and small counts: about two minutes of each part, in well under a minute.
QUICK: dict[str, Any] = {
    "name": "quick",
    "valid_fraction": 0.25,
    "piano": [
        {
            "soundfont": "csound-soundfont",
            "program": 0,
            "minutes": 2,
            "max_seconds": 30,
            "pieces": ["bach/bwv846.mxl", "joplin/*.mxl", "mozart/k155/movement1.mxl"],
            "bwv": [1, 6],
        }
    ],
    "speech": [dict(RECIPE["speech"][i], minutes=0.7) for i in (0, 2, 3)],
}
