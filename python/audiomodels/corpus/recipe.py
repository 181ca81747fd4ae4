"""What goes into the corpus: Debian packages, scores of music21's collection, limits, licences.

A recipe is {"name", "valid_fraction", part: what the part's builder takes}; `build-corpus --recipe FILE` reads another
one from JSON. valid_fraction: of the piano, held out by piece. language: a BCP-47 tag; speaker: a name for the voice,
as far as the package tells.

An effect's licence is "license", but for the files that fit a pattern of "licenses"; both are those of the package's
copyright file. "domain" says which vocabulary of labels.py reads its file names. "without": ["GPL"] in tags leaves out
the effects under such a licence.
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


def _effects(package: str, glob: str, license_: str, **more: Any) -> dict[str, Any]:
    """Sounds whose file names tell what they are."""
    return {"package": package, "glob": glob, "license": license_, **more}


EFFECTS = [
    _effects("qabcs-data", "usr/share/qabcs/abcs/all/noises/*.ogg", "GPL-3.0-or-later"),
    _effects(
        "tuxpaint-stamps-default",
        "usr/share/tuxpaint/stamps/**/*.ogg",
        "GPL-2.0-only",
        exclude="*_desc*|*/symbols/*|*/hanukkah/*",
    ),
    _effects("lincity-ng-data", "usr/share/games/lincity-ng/sounds/*.wav", "GPL-2.0-or-later"),
    _effects(
        "minetest-data",
        "usr/share/**/sounds/*.ogg",
        "CC-BY-SA-3.0",
        licenses={"*/doors_glass_door_*": "CC0-1.0", "*/tnt/sounds/*": "CC0-1.0", "*/doors/sounds/*": "CC-BY-3.0"},
    ),
    _effects("wesnoth-1.16-data", "usr/share/games/wesnoth/1.16/data/core/sounds/**/*.*", "GPL-2.0-or-later"),
    _effects("warmux-data", "usr/share/games/warmux/sound/**/weapons/*.ogg", "GPL-2.0-or-later"),
    _effects("supertux-data", "usr/share/games/supertux2/sounds/*.*", "GPL-3.0-or-later"),
    _effects("searchandrescue-data", "usr/share/games/**/*.wav", "GPL-2.0-only"),
    _effects(
        "endless-sky-data",
        "usr/share/games/endless-sky/sounds/*.wav",
        "public domain",
        licenses={"*/heavy rocket hit.wav": "CC-BY-SA-3.0", "*/explosion huge.wav": "CC-BY-SA-3.0"},
    ),
    _effects(
        "ufoai-sound",
        "sound/**/*.ogg",
        "CC-BY-SA-3.0",
        zip="usr/share/games/ufoai/base/0snd.pk3",
        licenses={
            "*/ambience/bloodspiderwalk.ogg": "CC-BY-3.0",
            "*/ambience/minepump03.ogg": "CC-BY-3.0",
            "*/misc/breakwood0[234].ogg": "public domain",
            **dict.fromkeys(
                (
                    *(f"*/ambience/{name}*.ogg" for name in ("city_abnd", "creak", "cricket", "droning", "fire[12]")),
                    *(f"*/ambience/{name}*.ogg" for name in ("firesoft", "hum", "jingle", "lights", "machine1")),
                    *(f"*/ambience/{name}*.ogg" for name in ("radiomessage", "sparks", "steam", "ufo_night")),
                    "*/ambience/water.ogg",
                    "*/civilians/maledeath0*.ogg",
                    "*/civilians/malehurt0*.ogg",
                    "*/doors/creak_low_short.ogg",
                    "*/doors/open_close.ogg",
                    *(f"*/footsteps/{name}.ogg" for name in ("hitground*", "linoleum", "metal[13]", "sand", "sand2")),
                    "*/misc/roundstart.ogg",
                    "*/soldiers/female*.ogg",
                    "*/soldiers/maledeath0[67].ogg",
                    "*/soldiers/malehurt0[2-9].ogg",
                    "*/soldiers/malehurt1*.ogg",
                ),
                "GPL-2.0-or-later",
            ),
        },
    ),
    _effects("bucklespring-data", "usr/share/buckle/wav/*-1.wav", "GPL-2.0-or-later", labels=["Computer_keyboard"]),
    _effects(
        "hydrogen-drumkits",
        "usr/share/hydrogen/data/drumkits/**/*.*",
        "GPL-2.0-only",
        domain="drum",
        licenses={
            "*/Audiophob/*": "CC0-1.0",
            "*/rumpf_kit_z01_h2/*": "CC-BY-3.0",
            "*/circAfrique v4/*": "CC-BY-SA-3.0",
            "*/BJA_Pacific/*": "CC-BY-SA-3.0-US",
            **dict.fromkeys(
                (f"*/{kit}/*" for kit in ("ColomboAcousticDrumkit", "ElectricEmpireKit", "HardElectro1", "VariBreaks")),
                "GPL-2.0-or-later",
            ),
        },
    ),
    _effects("sonic-pi-samples", "usr/share/sonic-pi/samples/*.flac", "CC0-1.0 or MIT", domain="drum"),
    _effects("sonic-pi-samples", "usr/share/sonic-pi/samples/[mp]*c_*.flac", "CC0-1.0"),
]

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
    "tags": {
        "clip_seconds": 2.0,
        "clips": {"train": 3000, "valid": 600},
        "min_groups": 3,  # of independent recordings of a label; fewer give way to broader labels
        "effects": EFFECTS,
        "instruments": {"soundfont": "fluid-soundfont-gm", "phrases": 3},
        "speech_clips": 300,
    },
    "pitch": [
        {
            "soundfont": "fluid-soundfont-gm",
            "clips": {"train": 4000, "valid": 600},
            "programs": [0, 4, 6, 11, 16, 19, 21, 22, 24, 26, 40, 42, 46, 48, 52, 56, 57, 60, 65, 68, 71, 73, 79],
        }
    ],
}

# Speech and sound events for models that are given away: without the GPL, whose terms for weights are unsettled.
# More phrases of the instruments, and more clips to test on.
FREE: dict[str, Any] = {
    "name": "free",
    "valid_fraction": 0.25,
    "speech": [dict(source, minutes=12) for source in RECIPE["speech"][:4]],
    "tags": {
        **RECIPE["tags"],
        "clips": {"train": 0, "valid": 1500},
        "without": ["GPL"],
        "effects": [
            source
            for source in EFFECTS
            if "GPL" not in source["license"] or source["package"] == "hydrogen-drumkits"  # parts of which are free
        ],
        "instruments": {"soundfont": "fluid-soundfont-gm", "phrases": 6},
    },
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
    "tags": {
        "clip_seconds": 2.0,
        "clips": {"train": 48, "valid": 12},
        "effects": [source for source in EFFECTS[:-1] if source["package"] in ("minetest-data", "sonic-pi-samples")],
        "instruments": {"soundfont": "csound-soundfont", "phrases": 1},
        "speech_clips": 20,
    },
    "pitch": [
        {
            "soundfont": "csound-soundfont",
            "clips": {"train": 96, "valid": 24},
            "programs": [0, 16, 24, 40, 56, 73],
        }
    ],
}
