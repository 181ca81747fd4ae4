"""Checkpoints: exact, atomic, checked. The kills are in test_train.py, where there is something to kill."""

import errno
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from audiomodels import checkpoint
from audiomodels.checkpoint import CheckpointError
from safetensors.torch import load_file, save_file
from torch import nn

FILES = ("SHA256SUMS", "model.safetensors", "optimizer.safetensors", "state.json")


class Tiny(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.linear = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)  # buffers, one of them an integer
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(width, 1)

    def forward(self, x):
        return self.out(self.dropout(self.norm(self.linear(x))))


def made(seed=0, steps=3, width=8):
    torch.manual_seed(seed)
    model = Tiny(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    model(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def contents(model, optimizer=None):
    """Everything that a load may change, as bytes."""
    tensors = dict(model.state_dict())
    if optimizer is not None:
        for i, values in enumerate(optimizer.state.values()):
            tensors.update({f"{i}.{key}": value for key, value in values.items()})
    return {name: (t.shape, t.dtype, t.numpy().tobytes()) for name, t in tensors.items()}


def resum(path):
    """Make the sums fit the files again, as somebody who forges a checkpoint would."""
    lines = [f"{hashlib.sha256((path / n).read_bytes()).hexdigest()}  {n}\n" for n in FILES[1:]]
    (path / "SHA256SUMS").write_text("".join(lines))


def test_round_trip_is_exact(tmp_path):
    random.seed(5)
    np.random.seed(5)
    model, optimizer = made()
    random.gauss(0, 1)  # leaves a second number waiting in the generator
    np.random.normal()
    path = checkpoint.save(tmp_path, step=3, model=model, optimizer=optimizer, state={"bits": 0.1 + 0.2, "é": [None]})
    assert path == tmp_path / "step-00000003" == checkpoint.latest(tmp_path)
    expected = contents(model, optimizer)
    draws = (torch.rand(5).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random())
    other, other_optimizer = made(seed=1, steps=0)
    assert checkpoint.load(path, model=other, optimizer=other_optimizer, rng=True) == (
        3,
        {"bits": 0.1 + 0.2, "é": [None]},
    )
    assert contents(other, other_optimizer) == expected
    assert (torch.rand(5).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random()) == draws
    for pair in ((model, optimizer), (other, other_optimizer)):  # and the next steps are the same
        torch.manual_seed(9)
        step(*pair)
        step(*pair)
    assert contents(model, optimizer) == contents(other, other_optimizer)


def test_load_leaves_the_rng_and_the_learning_rate_alone(tmp_path):
    model, optimizer = made()
    path = checkpoint.save(tmp_path, step=3, model=model, optimizer=optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    before = torch.get_rng_state()
    checkpoint.load(path, model=model, optimizer=optimizer)
    assert torch.equal(torch.get_rng_state(), before) and optimizer.param_groups[0]["lr"] == 0.5


def test_what_is_loaded_does_not_hang_on_the_file(tmp_path):
    model, optimizer = made()
    path = checkpoint.save(tmp_path, step=3, model=model, optimizer=optimizer)
    other, other_optimizer = made(seed=1)
    checkpoint.load(path, model=other, optimizer=other_optimizer)
    for name in FILES:
        with open(path / name, "r+b") as file:
            file.write(bytes(os.path.getsize(path / name)))
    assert contents(other, other_optimizer) == contents(model, optimizer)


def test_files_are_what_they_say(tmp_path):
    model, optimizer = made()
    path = checkpoint.save(tmp_path, step=3, model=model, optimizer=optimizer)
    assert tuple(sorted(os.listdir(path))) == FILES and os.listdir(tmp_path) == [path.name]
    weights = load_file(path / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    moments = load_file(path / "optimizer.safetensors")
    assert {"linear.weight.exp_avg", "linear.weight.exp_avg_sq", "linear.weight.step"} < moments.keys()
    assert json.loads((path / "state.json").read_text())["step"] == 3
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, check=True, capture_output=True)
    assert len({(path / name).stat().st_mode for name in FILES}) == 1  # safetensors alone would be 0600


def test_no_pickle_is_read(tmp_path, monkeypatch):
    source = Path(checkpoint.__file__).read_text()
    code = re.sub(r'""".*?"""', "", source, flags=re.S)
    assert not re.search(r"torch\.load|import pickle|unpickle|marshal|allow_pickle|distributed\.checkpoint\.load", code)
    model, optimizer = made()
    path = checkpoint.save(tmp_path, step=3, model=model, optimizer=optimizer)

    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle was read")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, forbidden)
    checkpoint.load(path, model=model, optimizer=optimizer, rng=True)
    monkeypatch.undo()
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    for name in FILES:
        for forged in (pickle.dumps(Bomb()), _torch_file(Bomb(), tmp_path)):
            shutil.rmtree(path)
            checkpoint.save(tmp_path, step=3, model=model, optimizer=optimizer)
            (path / name).write_bytes(forged)
            if name != "SHA256SUMS":
                resum(path)
            with pytest.raises(CheckpointError):
                checkpoint.load(path, model=model, optimizer=optimizer, rng=True)
    assert not canary.exists()


def _torch_file(value, folder):
    torch.save(value, folder / "bomb.pt")
    return (folder / "bomb.pt").read_bytes()


def test_the_last_ones_are_kept(tmp_path):
    model, optimizer = made()
    for name in ("step-5", "step-0000000x", "steps", "tensorboard"):  # not ours
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000099").write_text("a file")
    for number in (1, 9, 10, 2_000_000_000):
        checkpoint.save(tmp_path, step=number, model=model, optimizer=optimizer, keep=3)
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["step-00000009", "step-00000010", "step-2000000000"]
    assert checkpoint.latest(tmp_path).name == "step-2000000000"
    checkpoint.save(tmp_path, step=2_000_000_001, model=model, keep=1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-2000000001"]
    assert len(os.listdir(tmp_path)) == 6
    assert checkpoint.latest(tmp_path / "nowhere") is None and checkpoint.checkpoints(tmp_path / "step-00000099") == []


def test_clean_takes_only_leftovers(tmp_path):
    model, optimizer = made()
    path = checkpoint.save(tmp_path / "run", step=3, model=model, optimizer=optimizer)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (path.parent / ".tmp-step-00000004").mkdir()
    (path.parent / ".tmp-step-00000004" / "model.safetensors").write_bytes(b"half")
    (path.parent / ".tmp-log.jsonl").write_text("half")
    (path.parent / ".tmp-link").symlink_to(precious)
    checkpoint.clean(path.parent)
    assert os.listdir(path.parent) == [path.name] and (precious / "file").exists()
    assert checkpoint.load(path, model=model)[0] == 3
    (path.parent / ".tmp-step-00000004").mkdir()  # in the way of the next save, and of one after it
    (path.parent / ".tmp-step-00000007").mkdir()
    checkpoint.save(path.parent, step=4, model=model, optimizer=optimizer)
    assert sorted(os.listdir(path.parent)) == ["step-00000003", "step-00000004"]


def test_a_step_is_written_once(tmp_path):
    model, optimizer = made()
    path = checkpoint.save(tmp_path, step=3, model=model, optimizer=optimizer)
    before = contents(model, optimizer)
    step(model, optimizer)
    with pytest.raises(CheckpointError, match="step-00000003: there is a checkpoint of this step already"):
        checkpoint.save(tmp_path, step=3, model=model, optimizer=optimizer)
    checkpoint.load(path, model=model, optimizer=optimizer)
    assert contents(model, optimizer) == before


@pytest.mark.parametrize("point", range(20))
def test_a_file_system_that_ends(tmp_path, point):
    """No file may grow beyond a limit, as on a full disk: the write fails at one of 20 offsets."""
    model, optimizer = made(width=300)
    first = checkpoint.save(tmp_path, step=3, model=model, optimizer=optimizer)
    before = contents(model, optimizer)
    largest = max((first / name).stat().st_size for name in FILES)
    step(model, optimizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest * point // 20, hard))
    try:
        with pytest.raises(CheckpointError, match="step-00000004: cannot be written: .*(too large|27).*untouched"):
            checkpoint.save(tmp_path, step=4, model=model, optimizer=optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == [first.name]
    checkpoint.load(first, model=model, optimizer=optimizer)
    assert contents(model, optimizer) == before
    checkpoint.save(tmp_path, step=4, model=model, optimizer=optimizer)  # and with room again it works


@pytest.mark.parametrize("name", ["mkdir", "chmod", "fsync", "rename", "open"])
def test_any_call_that_fails(tmp_path, monkeypatch, name):
    """The n-th call of a system function fails: an error or a checkpoint, never half of one."""
    model, optimizer = made()
    first = checkpoint.save(tmp_path, step=3, model=model, optimizer=optimizer)
    failures = 0
    for nth in range(12):
        real, calls = getattr(os, name), []

        def failing(*args, real=real, calls=calls, nth=nth, **kwargs):
            calls.append(args)
            if len(calls) == nth + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, failing)
        try:
            checkpoint.save(tmp_path, step=4 + nth, model=model, optimizer=optimizer, keep=100)
        except CheckpointError as error:
            failures += 1
            assert "No space left" in str(error)
        finally:
            monkeypatch.undo()
        assert not [entry for entry in os.listdir(tmp_path) if entry.startswith(".tmp")]
        for path in checkpoint.checkpoints(tmp_path):
            checkpoint.load(path, model=model, optimizer=optimizer)
    assert failures > 0 and first.is_dir()


def mutants(path, seed, count):
    """Damage the files of a checkpoint, one way at a time; yields what was done."""
    rng = random.Random(seed)
    original = {name: (path / name).read_bytes() for name in FILES}
    for _ in range(count):
        name = rng.choice(FILES)
        data = bytearray(original[name])
        kind = rng.choice(
            ("flip", "flip", "byte", "cut", "grow", "zero", "header", "insert", "swap", "empty", "delete")
        )
        at = rng.randrange(len(data))
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        elif kind == "cut":
            del data[at:]
        elif kind == "grow":
            data += rng.randbytes(rng.choice((1, 8, 5000)))
        elif kind == "zero":
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        elif kind == "header":
            data[:8] = rng.choice((0, 1, 99, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little")
        elif kind == "insert":
            data[at:at] = rng.randbytes(3)
        elif kind == "swap":
            data = bytearray(original[rng.choice(FILES)])
        elif kind == "empty":
            data = bytearray()
        (path / name).write_bytes(data)
        if kind == "delete":
            (path / name).unlink()
        yield f"{kind} {name} at {at}"
        for restored, content in original.items():
            (path / restored).write_bytes(content)


@pytest.mark.parametrize("forged", [False, True], ids=["damaged", "forged"])
def test_mutants(tmp_path, forged):
    """300 damaged checkpoints, and 300 whose sums were made to fit: CheckpointError with nothing changed, or a load
    that is exact (damaged) or at least whole (forged)."""
    model, optimizer = made(steps=4)
    path = checkpoint.save(tmp_path, step=4, model=model, optimizer=optimizer, state={"x": 1})
    saved = contents(model, optimizer)
    other, other_optimizer = made(seed=1)
    before, errors = contents(other, other_optimizer), 0
    for what in mutants(path, seed=forged, count=300):
        if forged and all((path / name).exists() for name in FILES):
            resum(path)
        began = time.process_time()
        try:
            checkpoint.load(path, model=other, optimizer=other_optimizer, rng=True)
        except CheckpointError as error:
            errors += 1
            assert str(path) in str(error), what
            assert contents(other, other_optimizer) == before, what
        else:
            if not forged:
                assert contents(other, other_optimizer) == saved, what
            other, other_optimizer = made(seed=1)
        assert time.process_time() - began < 1, what
    assert errors > (100 if forged else 290)


def forge(path, **files):
    """Write files of a checkpoint and make the sums fit."""
    for name, content in files.items():
        name = {"model": "model.safetensors", "optimizer": "optimizer.safetensors", "state": "state.json"}[name]
        if isinstance(content, dict):
            save_file(content, path / name)
        else:
            (path / name).write_bytes(content)
    resum(path)


def test_foreign_contents(tmp_path):
    """Whole files with wrong contents; each message names the rule that was broken."""
    model, optimizer = made()
    path = checkpoint.save(tmp_path, step=3, model=model, optimizer=optimizer)
    weights, moments = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    meta = json.loads((path / "state.json").read_text())
    rng = meta["rng"][0]

    def state(**changes):
        return json.dumps({**meta, **changes}).encode()

    def numpy_at(position):
        return state(rng=[{**rng, "numpy": [rng["numpy"][0], position, 0, 0.0]}])

    cases = [
        ({"model": {k: v for k, v in weights.items() if k != "out.bias"}}, "made for another model.*out.bias"),
        ({"model": {**weights, "extra": torch.zeros(0)}}, "made for another model.*extra"),
        ({"model": {**weights, "out.bias": torch.zeros(1, 1)}}, "out.bias must be .*is \\(1, 1\\)"),
        ({"model": {**weights, "out.bias": torch.zeros(1).half()}}, "out.bias must be .*float16"),
        ({"model": {**weights, "extra": torch.zeros(10_000)}}, "at most"),
        ({"optimizer": {**moments, "nobody.exp_avg": torch.zeros(1)}}, "nobody.exp_avg .* fits no parameter"),
        ({"optimizer": {**moments, "out.bias.exp_avg": torch.zeros(2)}}, "out.bias.exp_avg .* fits no parameter"),
        ({"optimizer": {k: v for k, v in moments.items() if k != "out.bias.exp_avg"}}, "same kinds of state"),
        ({"optimizer": {**moments, "x.y": torch.zeros(99_999)}}, "at most"),
        ({"state": b"[]"}, "not the state of a checkpoint"),
        ({"state": b"\xff{"}, "not the state of a checkpoint"),
        ({"state": b"[" * 100_000}, "not the state of a checkpoint"),
        ({"state": b"9" * 10_000}, "not the state of a checkpoint"),
        ({"state": state(format=2)}, "format must be 1, got 2"),
        ({"state": state(step=4)}, "not the state of step 3"),
        ({"state": state(step=3.0)}, "not the state of step 3"),
        ({"state": state(state=[])}, "not the state of step 3"),
        ({"state": state(rng={})}, "not the state of step 3"),
        ({"state": state(optimizer="SGD")}, "must hold the state of AdamW, has SGD"),
        ({"state": state(optimizer=None)}, "must hold the state of AdamW, has None"),
        ({"state": state(rng=[{}])}, "random generators"),
        ({"state": state(rng=[{**rng, "torch": "AAAA"}])}, "random generators"),
        ({"state": state(rng=[{**rng, "torch": "?"}])}, "random generators"),
        ({"state": state(rng=[{**rng, "python": [3, rng["numpy"][0], None]}])}, "random generators"),
        ({"state": state(rng=[{**rng, "python": [9, rng["python"][1], None]}])}, "random generators"),
        ({"state": numpy_at(625)}, "random generators"),
        ({"state": numpy_at(-1)}, "random generators"),
        ({"state": numpy_at("a")}, "random generators"),
    ]
    other, other_optimizer = made(seed=1)
    before = contents(other, other_optimizer)
    for files, rule in cases:
        forge(path, **{"model": weights, "optimizer": moments, "state": state(), **files})
        with pytest.raises(CheckpointError, match=rule):
            checkpoint.load(path, model=other, optimizer=other_optimizer, rng=True)
        assert contents(other, other_optimizer) == before
    forge(path, model=weights, optimizer=moments, state=state())
    checkpoint.load(path, model=other, optimizer=other_optimizer, rng=True)
    assert contents(other, other_optimizer) == contents(model, optimizer)


def test_things_that_are_not_files(tmp_path):
    model, optimizer = made()
    path = checkpoint.save(tmp_path, step=3, model=model, optimizer=optimizer)
    for name in FILES:
        content = (path / name).read_bytes()
        for put in (os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink(p, p)):
            (path / name).unlink()
            put(path / name)
            with pytest.raises(CheckpointError, match=name):
                checkpoint.load(path, model=model, optimizer=optimizer)
            os.rmdir(path / name) if (path / name).is_dir() else (path / name).unlink()
            (path / name).write_bytes(content)
    checkpoint.load(path, model=model, optimizer=optimizer)
    shutil.copytree(path, tmp_path / "renamed")
    shutil.copytree(path, tmp_path / "step-00000005")
    for wrong in (
        tmp_path / "renamed",
        tmp_path / "step-00000005",
        tmp_path,
        tmp_path / "step-3",
        tmp_path / "step-00000004",
        tmp_path / "nowhere" / "step-00000003",
    ):
        with pytest.raises(CheckpointError, match=re.escape(str(wrong))):
            checkpoint.load(wrong, model=model)


def test_bombs_take_neither_memory_nor_time(tmp_path):
    """Small files that claim much, and large ones, in a fresh process whose memory is watched."""
    result = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=True)
    reports = json.loads(result.stdout)
    assert len(reports) == 10
    for what, seconds, megabytes, error in reports:
        assert error.startswith("CheckpointError"), (what, error)
        assert seconds < 2 and megabytes < 200, (what, seconds, megabytes)  # an idle core takes half a second at most


def bombs(tmp_path):
    """Child of the test above: prints [name, CPU seconds, MB of new peak memory, error] for each bomb."""
    model, optimizer = made()
    path = checkpoint.save(tmp_path, step=3, model=model, optimizer=optimizer)
    good = {name: (path / name).read_bytes() for name in FILES}
    entries = (
        b"{" + b",".join(b'"a%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(60_000)) + b"}"
    )

    def header(content):
        return len(content).to_bytes(8, "little") + content

    cases = {
        "header of 2^63 bytes": ("model.safetensors", (2**63).to_bytes(8, "little") + b"{}"),
        "header of 99 MB": ("model.safetensors", header(b" " * 99_000_000)),
        "60,000 tensors": ("model.safetensors", header(entries)),
        "60,000 states": ("optimizer.safetensors", header(entries)),
        "tensor of 2^60 bytes": (
            "model.safetensors",
            header(b'{"a":{"dtype":"F32","shape":[288230376151711744],"data_offsets":[0,1152921504606846976]}}'),
        ),
        "negative shape": ("model.safetensors", header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}')),
        "2 MB of JSON": ("state.json", b"[" + b"[]," * 690_000 + b"[]]"),
        "5 MB of JSON": ("state.json", b'{"a":"' + b"x" * 5_000_000 + b'"}'),
        "sums of 1 MB": ("SHA256SUMS", b"x" * 1_000_000),
        "sparse file of 100 GB": ("model.safetensors", None),
    }
    reports = []
    for what, (name, data) in cases.items():
        for restored, content in good.items():
            (path / restored).write_bytes(content)
        if data is None:
            os.truncate(path / name, 100_000_000_000)
        else:
            (path / name).write_bytes(data)
            if name != "SHA256SUMS":
                resum(path)
        before, began, error = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), "loaded"
        try:
            checkpoint.load(path, model=model, optimizer=optimizer, rng=True)
        except Exception as caught:
            error = repr(caught)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        reports.append([what, time.process_time() - began, used / 1024, error])
    print(json.dumps(reports))


def test_lock(tmp_path):
    folder = tmp_path / "a" / "run"
    with checkpoint.lock(folder):
        assert os.listdir(folder) == []
        with pytest.raises(CheckpointError, match="run: another process is training"), checkpoint.lock(folder):
            pass
    with checkpoint.lock(folder):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: must be a folder"), checkpoint.lock(tmp_path / "file"):
        pass


def test_an_optimizer_that_has_not_stepped(tmp_path):
    model, optimizer = made(steps=0)
    path = checkpoint.save(tmp_path, step=1, model=model, optimizer=optimizer)
    assert not optimizer.state  # saving does not step it
    stepped, stepped_optimizer = made(steps=2)
    checkpoint.load(path, model=stepped, optimizer=stepped_optimizer)
    assert not stepped_optimizer.state and contents(stepped) == contents(model)


def test_weights_alone(tmp_path):
    model, optimizer = made()
    path = checkpoint.save(tmp_path, step=3, model=model)
    other, other_optimizer = made(seed=1)
    with pytest.raises(CheckpointError, match="must hold the state of AdamW, has None"):
        checkpoint.load(path, model=other, optimizer=other_optimizer)
    checkpoint.load(path, model=other)
    assert contents(other) == contents(model)
    path = checkpoint.save(tmp_path, step=4, model=model, optimizer=optimizer)
    with pytest.raises(CheckpointError, match="must hold the state of SGD, has AdamW"):
        checkpoint.load(path, model=other, optimizer=torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9))


def test_tied_frozen_and_strided_parameters(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.out = nn.Linear(4, 5, bias=False)
            self.out.weight = self.embedding.weight
            self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
            self.unused = nn.Parameter(torch.randn(3))
            self.strided = nn.Parameter(torch.randn(6, 4).T)
            self.register_buffer("view", torch.arange(12.0)[::3])

        def forward(self, codes):
            return self.out(self.embedding(codes) @ self.strided.T[:4])

    def pair():
        model = Odd()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        return model, optimizer

    model, optimizer = pair()
    model(torch.arange(5)).square().mean().backward()
    optimizer.step()
    path = checkpoint.save(tmp_path, step=1, model=model, optimizer=optimizer)
    other, other_optimizer = pair()
    checkpoint.load(path, model=other, optimizer=other_optimizer)
    assert contents(other) == contents(model)
    assert other.out.weight is other.embedding.weight
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        ours, theirs = optimizer.state.get(parameter, {}), other_optimizer.state.get(twin, {})
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_wrappers_leave_no_trace_in_names(tmp_path):
    model, optimizer = made()
    path = checkpoint.save(tmp_path, step=3, model=torch.compile(model), optimizer=optimizer)
    other, other_optimizer = made(seed=1)
    checkpoint.load(path, model=torch.compile(other), optimizer=other_optimizer)
    assert contents(other, other_optimizer) == contents(model, optimizer)
    assert checkpoint.unwrap(torch.compile(model)) is model


def test_only_tensors_and_json_are_saved(tmp_path):
    model, optimizer = made()
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            checkpoint.save(tmp_path, step=3, model=model, state={"x": bad})
    with pytest.raises(CheckpointError, match="must be at most"):
        checkpoint.save(tmp_path, step=3, model=model, state={"x": "y" * 5_000_000})

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"any": "object"}

    with pytest.raises(CheckpointError, match="_extra_state: only tensors can be saved, got dict"):
        checkpoint.save(tmp_path, step=3, model=Extra(2, 2))
    assert checkpoint.latest(tmp_path) is None


if __name__ == "__main__":
    bombs(Path(sys.argv[1]))
