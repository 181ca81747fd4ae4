"""What the documents and licences say is so; rules as in test_house.py."""

import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from house import MODELS, PROJECT, Rules, code_of, documents, lines, pyproject, tracked, unseen, violations

CLIPS = f"{MODELS}clips/"
SAMPLES = "docs/samples/"
AUDIO = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".au", ".opus")

rule = Rules()


@rule(
    ("machine path", {"README.md": "see /" + "root/x"}),
    ("machine path", {"tests/x.py": 'open("/' + 'tmp/x")'}),
    ("registry", {"Makefile": "pip install --index" + "-url x"}),
    ("registry", {"docs/x.md": "https://pypi" + ".org/simple"}),
)
def no_machine_path_and_no_registry(files):
    for path, text in files.items():
        for line, match in lines(r"(?<![\w.~/*-])/(?:work|root|tmp|home|Users|opt)(?![\w-])[\w/.-]*", text):
            yield f"{path}:{line}: machine path {match[0]}"
        hosts = r"(?i)(pypi|pythonhosted|anaconda)[.]org|download[.]pytorch|--(extra-)?index-url|find[-]links"
        yield from (f"{path}:{line}: registry {match[0]}" for line, match in lines(hosts, text))


# ---- licences


@rule(
    ("b.flac is not in LICENSES", {f"{CLIPS}b.flac": "", f"{CLIPS}LICENSES": "a.flac", f"{CLIPS}manifest.jsonl": ""}),
    (
        "a.flac is not in manifest.jsonl",
        {
            f"{CLIPS}a.flac": "",
            f"{CLIPS}LICENSES": "a.flac  (1.0 s)\n    licence: CC0-1.0\n    credit:  x\n",
            f"{CLIPS}manifest.jsonl": "",
        },
    ),
    (
        "differs from the manifest's",
        {
            f"{CLIPS}a.flac": "",
            f"{CLIPS}LICENSES": "a.flac  (1.0 s)\n    licence: CC0-1.0\n    credit:  x\n",
            f"{CLIPS}manifest.jsonl": '{"path": "a.flac", "license": "CC-BY-3.0", "credit": "x"}',
        },
    ),
    ("there is no such clip", {f"{CLIPS}LICENSES": "", f"{CLIPS}manifest.jsonl": '{"path": "a.flac"}'}),
    ("outside", {"docs/x.wav": "", f"{CLIPS}LICENSES": "", f"{CLIPS}manifest.jsonl": ""}),
)
def every_clip_has_its_licence(files):
    rows = {row["path"]: row for row in map(json.loads, files[f"{CLIPS}manifest.jsonl"].splitlines())}
    entry = r"^(\S+)  \([\d.]+ s\)\n    licence: (\S+)\n    credit:  (.*)$"
    licences = {match[1]: (match[2], match[3]) for _, match in lines(entry, files[f"{CLIPS}LICENSES"])}
    clips = {path.removeprefix(CLIPS) for path in files if path.endswith(AUDIO) and not path.startswith(SAMPLES)}
    for clip in sorted(clips | set(rows) | set(licences)):
        if clip not in clips:
            yield f"{clip}: there is no such clip"
        elif f"{CLIPS}{clip}" not in files:
            yield f"{clip}: a recording outside of {CLIPS}"
        elif clip not in licences:
            yield f"{clip} is not in LICENSES"
        elif clip not in rows:
            yield f"{clip} is not in manifest.jsonl"
        elif licences[clip] != (rows[clip]["license"], rows[clip]["credit"]):
            yield f"{clip}: its licence or credit differs from the manifest's"


@rule(
    ("b.ogg is not in samples.json", {f"{SAMPLES}b.ogg": "", f"{SAMPLES}samples.json": "[]"}),
    ("b.ogg is not in samples.json", {f"{SAMPLES}b.ogg": ""}),
    (
        "b.ogg: there is no such sample",
        {f"{SAMPLES}samples.json": '[{"file": "b.ogg", "license": "x", "source": "y"}]'},
    ),
    ("names no licence", {f"{SAMPLES}b.ogg": "", f"{SAMPLES}samples.json": '[{"file": "b.ogg", "source": "y"}]'}),
    ("u/b.ogg: names no licence", {f"{SAMPLES}u/b.ogg": "", f"{SAMPLES}u/samples.json": '[{"file": "b.ogg"}]'}),
)
def every_sample_has_its_licence(files):
    lists = [path for path in files if path.startswith(SAMPLES) and path.endswith("samples.json")]
    rows = {
        f"{path.removeprefix(SAMPLES).removesuffix('samples.json')}{row['file']}": row
        for path in lists
        for row in json.loads(files[path])
    }
    samples = {path.removeprefix(SAMPLES) for path in files if path.startswith(SAMPLES) and path.endswith(AUDIO)}
    yield from (f"{SAMPLES}{name} is not in samples.json" for name in sorted(samples - set(rows)))
    yield from (f"{SAMPLES}{name}: there is no such sample" for name in sorted(set(rows) - samples))
    for name in sorted(samples & set(rows)):
        if not rows[name].get("license") or not rows[name].get("source"):
            yield f"{SAMPLES}{name}: names no licence or no source"


@rule(
    ("is not the full Apache", {"LICENSE": "MIT License", "pyproject.toml": PROJECT, "README.md": "Apache-2.0"}),
    (
        "pyproject.toml: names another",
        {
            "LICENSE": "Apache License\n Version 2.0" + "\n" * 200 + "END OF TERMS AND CONDITIONS",
            "pyproject.toml": PROJECT.replace("Apache-2.0", "MIT"),
            "README.md": "Apache-2.0",
        },
    ),
    (
        "does not name CC-BY-9",
        {
            "LICENSE": "",
            "pyproject.toml": PROJECT,
            "README.md": "Apache-2.0",
            f"{CLIPS}LICENSES": "    licence: CC-BY-9\n",
        },
    ),
)
def licence_is_apache_and_the_readme_says_what_else(files):
    text = files.get("LICENSE", "")
    if text.count("\n") < 190 or not all(s in text for s in ("Apache License", "Version 2.0", "END OF TERMS")):
        yield "LICENSE: is not the full Apache License 2.0"
    if pyproject(files)["project"]["license"] != "Apache-2.0":
        yield "pyproject.toml: names another licence"
    named = {match[1] for _, match in lines(r"^    licence: (\S+)$", files.get(f"{CLIPS}LICENSES", ""))}
    for licence in sorted(named | {"Apache-2.0"}):
        if licence not in files.get("README.md", ""):
            yield f"README.md: does not name {licence}"


# ---- what the documents say


@rule(
    ("no target fly", {"README.md": "```\nmake demo\nmake fly\n```", "Makefile": "demo: x\n"}),
    ("no such file: csrc/x.cpp", {"CONTRIBUTING.md": "see `csrc/x.cpp`"}),
    ("no such file: docs/x.png", {"README.md": "![picture](docs/x.png)"}),
    ("no such file: docs/y.md", {"docs/x.md": "[page](y.md)"}),
)
def documents_name_what_exists(files):
    targets = set(re.findall(r"^([a-z][a-z-]*):", files.get("Makefile", ""), re.MULTILINE))
    folders = {str(parent) for path in files for parent in Path(path).parents}
    for path, text in documents(files):
        code = code_of(text)
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", code):
            if target not in targets:
                yield f"{path}: no target {target} in the Makefile"
        named = re.findall(
            r"(?<![\w<./-])((?:audiokernels|python|csrc|tests|benchmarks|docs)/[\w./-]*\w)(?![\w<*/>-])", code
        )
        links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
        for name in named + [os.path.normpath(Path(path).parent / link) for link in links]:
            if name not in files and name not in folders:
                yield f"{path}: no such file: {name}"


# ---- the rules at work


@pytest.mark.parametrize(("check", "samples"), rule)
def test_rule(check, samples):
    assert violations(check) == ""


@pytest.mark.parametrize(("check", "samples"), rule)
def test_rule_sees_what_breaks_it(check, samples):
    assert samples and not unseen(check, samples)


def run_python_blocks(path: str, text: str) -> None:
    names: dict = {"__name__": "document"}
    for line, match in lines(r"^```python\n(.*?)^```", text, re.DOTALL):
        exec(compile("\n" * line + match[1], path, "exec"), names)


@pytest.mark.parametrize("path", [path for path, text in documents(tracked()) if "```python\n" in text])
def test_python_blocks_of_documents_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python_blocks(path, tracked()[path])


def test_a_python_block_that_fails_is_seen():
    with pytest.raises(ZeroDivisionError):
        run_python_blocks("x.md", "Text.\n```python\nx = 0\n```\nMore.\n```python\n1 / x\n```\n")


def misunderstood(text: str, helps: dict[str, str]) -> Iterator[str]:
    """Commands and options in the code of `text` that the help texts {command: help} do not know, or that it lacks."""
    used = [match for _, match in lines(r"^\s*audiokernels ([a-z][a-z-]*)(.*)", code_of(text))]
    yield from sorted({match[1] for match in used} ^ set(helps))
    for match in used:
        for option in re.findall(r"(?<!\S)--?[\w.-]+", match[2].split("#")[0]):
            if not re.search(rf"{option}\b", helps.get(match[1], "")):
                yield f"{match[1]} {option}"


def test_command_lines_of_the_readme_are_understood(capsys):
    pytest.importorskip("tyro", reason="the command line needs audiokernels[models]")
    command = importlib.import_module("audiomodels.cli")
    helps = {}
    for name in command.COMMANDS:
        with pytest.raises(SystemExit):
            command.main([name, "--help"])
        helps[name] = capsys.readouterr().out
    assert not list(misunderstood(tracked()["README.md"], helps))
    text = "```\naudiokernels info\naudiokernels fly --out x\naudiokernels train --fast\n```"
    helps = {"info": "", "train": "--out PATH", "demo": ""}
    assert list(misunderstood(text, helps)) == ["demo", "fly", "fly --out", "train --fast"]
