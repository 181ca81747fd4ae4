"""Training that is killed, signalled or spread over processes ends in the same bits.

Run as a program this file is the child of its own tests: `python test_train_kills.py kills|fresh|ranks ...`.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from audiomodels import checkpoint, train
from audiomodels.checkpoint import CheckpointError
from audiomodels.train import fit
from test_train import Killed, Recordings, Tiny, crops, settings, stop_at, tiny

pytestmark = pytest.mark.usefixtures("one_thread")  # as the children
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
LONG = 24  # steps of the runs that are killed
PAUSE = 0.02  # seconds that a step of a fresh process takes at least, on any machine


def child(*arguments, timeout=280):
    result = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def check_kills(report, kills, signals):
    assert report["problems"] == []
    assert report["kills"] == kills and report["signals"] == signals
    assert report["in_save"] >= kills // 6  # not only between saves
    assert report["finished"] >= 2


def test_20_kills(tmp_path):
    """kill -9 at 9 seeded moments and 9 seeded lines of the code that trains and saves; SIGTERM and Ctrl-C 6 times.

    The children are forks of one process that has imported torch and done nothing with it. Two more kills, of fresh
    processes, are in the next test.
    """
    check_kills(child("kills", tmp_path, 18, 6, 1), 18, 6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_100_kills(tmp_path):
    check_kills(child("kills", tmp_path, 100, 20, 2, timeout=1700), 100, 20)


def test_kills_of_fresh_processes(tmp_path):
    """The same with two processes of their own, and the end in a third."""
    out = tmp_path / "run"
    command = [sys.executable, __file__, "fresh", str(out)]
    rng = random.Random(3)
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        reached = int(process.stdout.readline())  # it has started, and saved a step
        time.sleep(rng.random() * 8 * PAUSE)  # after at most 9 steps more, so that both kills come before the end
        process.kill()
        last = [reached, *map(int, process.communicate()[0].split())][-1]
        assert process.returncode == -signal.SIGKILL
        assert int(checkpoint.latest(out).name[5:]) >= last
    last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert last == str(LONG) and not list(out.glob(".tmp*"))
    model = tiny(dropout=0.3)
    fit(model, crops, long_run(tmp_path / "whole"))
    for name in FILES:
        assert (checkpoint.latest(out) / name).read_bytes() == (
            tmp_path / "whole" / f"step-{LONG:08d}" / name
        ).read_bytes()


def long_run(out):
    return settings(out, steps=LONG)


def fresh(out):
    """Child: train to the end, saying each step that is safe."""
    torch.set_num_threads(1)

    def first_crops(step):
        assert not list(Path(out).glob(".tmp*")), "an orphan of the run before"
        return crops(step)

    def say(step, bits):
        print(step, flush=True)
        time.sleep(PAUSE)

    fit(tiny(dropout=0.3), first_crops, long_run(out), on_step=say)


def kills(folder, n_kill, n_signal, seed):
    """Child: stop forks of this process, which trains nothing itself, and compare what they leave; prints a report."""
    torch.set_num_threads(1)
    train.require("safetensors.torch"), train.require("tqdm")
    folder, rng = Path(folder), random.Random(seed)
    report = {"kills": 0, "signals": 0, "in_save": 0, "finished": 0, "problems": []}
    _, _, again, _, lines = forked(folder / "lines", rng, "line", 10**9)
    code, _, whole, seconds, _ = forked(folder / "whole", rng, "none")
    assert code == 0 and whole and whole == again, code
    plans = ["time", "line"] * (n_kill // 2) + ["signal"] * n_signal
    rng.shuffle(plans)
    out, safe = folder / "run 0", 0
    while plans or out.exists():
        plan = plans[-1] if plans else "none"
        when = rng.randrange(1, lines // 4) if plan == "line" else rng.random() * seconds / 4
        code, said, files, _, _ = forked(out, rng, plan, when)
        where = f"{plan} {when}, after step {safe} in {out.name}: "
        leftovers = [path.name for path in out.glob(".tmp*")]
        reached = int(checkpoint.latest(out).name[5:]) if checkpoint.latest(out) else 0
        if reached < max(said, safe):
            report["problems"].append(f"{where}lost step {max(said, safe)}, has {reached}")
        for path in checkpoint.checkpoints(out):
            model = Tiny()
            checkpoint.load(path, model=model, optimizer=torch.optim.AdamW(model.parameters()))
        safe = reached
        if leftovers and code != -signal.SIGKILL:
            report["problems"].append(f"{where}exit code {code} left {leftovers}")
        if code == 0:  # it was done before it could be stopped
            report["finished"] += 1
            if files != whole:
                report["problems"].append(f"{where}ended in other bits")
            out, safe = folder / f"run {report['finished']}", 0
        elif code in ((143, 130) if plan == "signal" else (-signal.SIGKILL,)):
            report["kills" if code < 0 else "signals"] += 1
            report["in_save"] += bool(leftovers)
            plans.pop()
        else:
            report["problems"].append(f"{where}exit code {code}")
            break
    print(json.dumps(report))


def forked(out, rng, plan, when=0.0):
    """Train in a fork and stop it as planned: (exit code, last step said to be safe, files, seconds, lines run)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        code = 70
        try:
            fork_main(out, writer, when if plan == "line" else None)
            code = 0
        except SystemExit as exit_:
            code = exit_.code
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader) as pipe:
        said = [pipe.readline()]
        began = time.monotonic()
        if plan in ("time", "signal"):
            time.sleep(when)
            os.kill(pid, signal.SIGKILL if plan == "time" else rng.choice((signal.SIGTERM, signal.SIGINT)))
        said += pipe.readlines()
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - began
    last = checkpoint.latest(out)
    files = {path.name: path.read_bytes() for path in last.iterdir()} if last and last.name[5:] == f"{LONG:08d}" else {}
    steps = [int(line) for line in said if line.strip().isdigit()]
    for line in said:
        if line.startswith("history"):
            files["history"] = line
    lines = [int(line.split()[1]) for line in said if line.startswith("lines")]
    return os.waitstatus_to_exitcode(status), max(steps, default=0), files, seconds, sum(lines)


def fork_main(out, writer, last_line):
    """Train, say each step that is safe, and die at line `last_line` of the code that trains and saves."""
    files, count, first = (checkpoint.__file__, train.__file__, shutil.__file__), 0, True

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            count += 1
            if count == last_line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def checked(step):
        nonlocal first
        if first and list(Path(out).glob(".tmp*")):
            raise AssertionError("an orphan of the run before")
        first = False
        return crops(step)

    for number in (signal.SIGTERM, signal.SIGINT):  # before and after fit, which has its own handlers
        signal.signal(number, signal.SIG_IGN)
    os.write(writer, b"started\n")
    if last_line:
        sys.settrace(trace)
    run = fit(tiny(dropout=0.3), checked, long_run(out), on_step=lambda step, bits: os.write(writer, b"%d\n" % step))
    sys.settrace(None)
    os.write(writer, f"history {run.step} {run.bits} {run.lr} {run.skipped}\nlines {count}\n".encode())


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Folder of what two processes under torchrun left: plain DDP by accelerate, and fully_shard."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, "ranks", str(folder)], capture_output=True, text=True, timeout=280, env=environment
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


def ranks(folder):
    """Child, one of two: each way of training whole, and stopped and resumed."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    def sharded():
        model = tiny()
        for part in (model.embedding, model.conv, model.out, model):
            fully_shard(part)
        return model

    heldout = Recordings(np.arange(100) % 16)
    for name, make in (("ddp", tiny), ("fsdp", sharded)):
        for out, stops in ((f"{name} whole", ()), (f"{name} stopped", (5,))):
            for stop in stops:
                with contextlib.suppress(Killed):
                    fit(make(), crops, rank_settings(folder, out), valid=heldout, on_step=stop_at(stop))
            seen = []
            model = make()

            def watched(step, seen=seen):
                seen.append(step)
                return crops(step)

            history = fit(model, watched, rank_settings(folder, out), valid=heldout)
            if dist.get_rank() == 0:
                assert seen[0] == (4 if stops else 0), seen
                (Path(folder) / out / "history.json").write_text(json.dumps([history.bits, history.valid[-1].bits]))
    # one rank is asked to stop, both do, at the same step
    out = Path(folder) / "signalled"

    def ask(step, bits):
        if step == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        fit(tiny(), crops, settings(out, save_every=0), on_step=ask)
    except SystemExit as exit_:
        (Path(folder) / f"exit {dist.get_rank()}").write_text(str(exit_.code))
    # an error on rank 0 is an error on both
    try:
        fit(tiny(channels=9), crops, settings(out, save_every=0))
    except CheckpointError as error:
        (Path(folder) / f"error {dist.get_rank()}").write_text(str(error))
    with contextlib.suppress(ValueError):
        fit(tiny(), crops, settings(out, batch=3))
        raise AssertionError("batch 3 on 2 processes")
    dist.barrier()
    dist.destroy_process_group()


def rank_settings(folder, out):
    return settings(Path(folder) / out, save_every=4, eval_every=6, weight_decay=0.1)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_equal_one(two_ranks, tmp_path, name):
    heldout = Recordings(np.arange(100) % 16)
    one = tiny()
    history = fit(one, crops, rank_settings(tmp_path, "one"), valid=heldout)
    bits, valid_bits = json.loads((two_ranks / f"{name} whole" / "history.json").read_text())
    assert bits == pytest.approx(history.bits, rel=1e-5) and valid_bits == pytest.approx(
        history.valid[-1].bits, rel=1e-5
    )
    both = tiny(seed=1)
    optimizer = torch.optim.AdamW(both.parameters())
    step, _ = checkpoint.load(two_ranks / f"{name} whole" / "step-00000012", model=both, optimizer=optimizer)
    assert step == 12
    for ours, theirs in zip(both.parameters(), one.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert max((a - b).abs().max() for a, b in zip(one.parameters(), tiny().parameters(), strict=True)) > 0.01
    # a checkpoint of two processes is resumed by one
    shutil.copytree(two_ranks / f"{name} whole", tmp_path / "two then one")
    shutil.rmtree(tmp_path / "two then one" / "step-00000012")
    resumed = tiny(seed=2)
    again = fit(resumed, crops, rank_settings(tmp_path, "two then one"), valid=heldout)
    assert again.bits[:8] == bits[:8] and again.bits == pytest.approx(history.bits, rel=1e-5)
    for ours, theirs in zip(resumed.parameters(), one.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_resume_exactly(two_ranks, name):
    whole, stopped = (two_ranks / f"{name} {how}" / "step-00000012" for how in ("whole", "stopped"))
    for file in FILES:
        assert (whole / file).read_bytes() == (stopped / file).read_bytes()
    assert len(json.loads((whole / "state.json").read_text())["rng"]) == 2


def test_two_processes_stop_and_fail_together(two_ranks):
    assert [(two_ranks / f"exit {rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    assert checkpoint.latest(two_ranks / "signalled").name == "step-00000004"
    errors = [(two_ranks / f"error {rank}").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1] and "made for another model" in errors[0]


if __name__ == "__main__":
    job, where, *numbers = sys.argv[1:]
    {"kills": kills, "fresh": fresh, "ranks": ranks}[job](where, *map(int, numbers))
