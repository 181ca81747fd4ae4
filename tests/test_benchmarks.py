"""The benchmarks: the harness's statistics, its files, each benchmark's --quick run, and on_gpu.sh on a false GPU."""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from audiokernels import backends, causal_attention_plan, philox_uniform, wavenet_generate, wavenet_pack, wavenet_state
from audiokernels._library import C

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
NAMES = sorted(path.stem.removeprefix("benchmark_") for path in BENCHMARKS.glob("benchmark_*.py"))
sys.path.insert(0, str(BENCHMARKS))
import benchmark_causal_attention  # noqa: E402
import common  # noqa: E402
import wavenet_peers  # noqa: E402
from benchmark_wavenet_generate import DILATIONS, standard_weights  # noqa: E402


class Machine:
    """A clock that stands still but for the work done on it."""

    def __init__(self):
        self.time, self.turns, self.asked = 0.0, [], 0.0

    def clock(self):
        return common.Clock("false", lambda: self.time, self.settle)

    def work(self, name, *seconds):
        """A side whose n-th call takes the n-th of `seconds`, the last one ever after."""
        remaining = list(seconds)

        def call():
            self.asked += remaining.pop(0) if len(remaining) > 1 else remaining[0]
            self.turns.append(name)

        return call

    def settle(self):
        self.time, self.asked = self.time + self.asked, 0.0


# ---- statistics


def test_sides_alternate_and_calls_fill_their_turn():
    machine = Machine()
    sides = {"slow": machine.work("slow", 1.0), "fast": machine.work("fast", 0.25)}
    times = common.interleave(sides, machine.clock(), rounds=3, seconds=1.0)
    assert machine.turns[-15:] == (["slow"] + 4 * ["fast"]) * 3
    assert times["slow"].seconds == (1.0, 1.0, 1.0) and times["fast"].seconds == (0.25, 0.25, 0.25)
    assert times["fast"].times_as_fast_as(times["slow"]) == 4
    assert times["fast"].clock == "false"


def test_first_call_is_not_timed():
    """It may compile, allocate or fill a cache."""
    machine = Machine()
    times = common.interleave({"a": machine.work("a", 1000.0, 0.125)}, machine.clock(), rounds=3, seconds=1.0)
    assert times["a"].seconds == (0.125, 0.125, 0.125)
    assert len(machine.turns) > 3 * 8  # nor does it tell how many calls fill a turn


def test_work_still_running_when_a_call_returns_is_counted():
    machine = Machine()  # asks for work at once; the time passes when the clock settles, as on a GPU
    assert common.interleave({"a": machine.work("a", 2.0)}, machine.clock(), rounds=2)["a"].median == 2.0


def test_median_quartiles_and_ratio_by_rounds():
    ours, theirs = common.Timing((1.0, 2.0, 4.0, 3.0, 5.0), "cpu"), common.Timing((2.0, 4.0, 8.0, 6.0, 99.0), "cpu")
    assert ours.median == 3.0 and ours.quartiles == (2.0, 4.0)
    assert ours.times_as_fast_as(theirs) == 2.0  # the round in which theirs was disturbed does not count
    row = common.rate_row("case", "ours", ours, 12.0, "samples/s")
    assert (row.median, row.low, row.high, row.rounds) == (4.0, 3.0, 6.0, 5)
    row = common.time_row("case", "ours", ours, "ms")
    assert (row.median, row.low, row.high) == (3000.0, 2000.0, 4000.0)
    assert common.Timing((1.0,), "cpu").quartiles == (1.0, 1.0)


@pytest.mark.parametrize(
    ("ratio", "floor", "goal", "verdict"),
    [
        (8.0, 7, 8, "goal met"),
        (7.5, 7, 8, "floor met"),
        (6.9, 7, 8, "MISSED"),
        (3.9, 4, 4, "MISSED"),
        (9, None, None, ""),
    ],
)
def test_verdict(ratio, floor, goal, verdict):
    row = common.Row("case", "side", "samples/s", 1.0, ratio=ratio, floor=floor, goal=goal)
    assert row.verdict == verdict and verdict in common.table([row])


def test_clock_counts_own_time_on_one_thread_and_wall_time_on_several():
    assert common.clock_of("cpu").name == "cpu" and common.clock_of("cpu", 2).name == "wall"
    assert common.clock_of("cuda").name == "wall"


@pytest.mark.parametrize("error", [1.1e-5, float("nan"), float("inf")])
def test_nothing_wrong_is_timed(error):
    common.gate("right", 1e-5, 1e-5)
    with pytest.raises(SystemExit, match="not timed, because wrong: something: error"):
        common.gate("something", error, 1e-5)


def test_limits_are_positive_and_finite():
    clock = common.clock_of("cpu")
    rates = [common.read_rate(1 << 16, clock), common.copy_rate(clock, n_bytes=1 << 20), common.mm_rate(clock, size=64)]
    assert all(1e6 < rate < 1e14 for rate in rates)


# ---- files


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_keeps_the_rows_of_other_benchmarks_and_replaces_its_own(tmp_path):
    path, where = tmp_path / "new" / "device.csv", common.facts("cpu")
    first = [common.Row("case, with a comma", f"side {i}", "us", 1.5 + i, 1.0, 2.0, ratio=1 / 3) for i in range(2)]
    common.write_csv(path, "one", first, where)
    common.write_csv(path, "two", first[:1], where)
    common.write_csv(path, "one", first[1:], where)
    rows = rows_of(path)
    assert [(row["benchmark"], row["side"]) for row in rows] == [("two", "side 0"), ("one", "side 1")]
    assert list(rows[0]) == common.COLUMNS
    assert rows[1]["median"] == "2.5" and rows[1]["ratio"] == "0.333333" and rows[1]["floor"] == ""
    assert rows[1]["case"] == "case, with a comma"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", rows[0]["date"]) and rows[0]["torch"] == torch.__version__
    assert rows[0]["isa"] == (C.isa() if C else "none (reference)")
    assert re.fullmatch(r"[0-9a-f]{10}(\+changes)?|unknown", rows[0]["commit"])
    assert re.fullmatch(r"[a-z0-9-]+", common.device_slug())


def test_bars_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [common.Row("case", "a", "us", 1.0, 0.5, 2.0), common.Row("other", "b", "GB/s", 3.0)]
    common.write_bars(tmp_path / "bars.png", "title", rows)
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_bars_of_a_panel_are_told_apart():
    one, four = (common.Row("case", "ours", "us", 1.0, dtype="float32", batch=batch) for batch in (1, 4))
    unbatched = common.Row("case", "limit", "us", 1.0, threads=2)
    assert common._bar_name(four, [four]) == "ours float32"
    assert common._bar_name(four, [one, four]) == "ours float32, batch 4"
    assert common._bar_name(unbatched, [one, unbatched]) == "limit, threads 2"


@pytest.mark.parametrize(("option", "words"), [("no-such", "name must be an instruction set"), (None, "")])
def test_instruction_set_is_chosen(option, words):
    if C is None:
        pytest.skip("nothing is compiled")
    before, threads = C.isa(), torch.get_num_threads()
    try:
        if words:
            with pytest.raises(SystemExit, match=words):
                common.begin(argparse.Namespace(device="cpu", instruction_set=option))
        common.begin(argparse.Namespace(device="cpu", instruction_set="generic"))
        assert C.isa() == "generic" and torch.get_num_threads() == 1
    finally:
        C.set_isa(before)
        torch.set_num_threads(threads)


def test_cuda_without_a_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        common.begin(argparse.Namespace(device="cuda", instruction_set=None))


# ---- the benchmarks


@pytest.mark.parametrize("name", NAMES)
def test_quick_run(name, tmp_path):
    command = [sys.executable, BENCHMARKS / f"benchmark_{name}.py", "--quick", "--csv", tmp_path / "x.csv"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "correct before timed:" in result.stdout and "--quick: these figures" in result.stdout
    rows = rows_of(tmp_path / "x.csv")
    assert {row["benchmark"] for row in rows} == {name}
    assert all(float(row["median"]) > 0 for row in rows)
    kernels = [row for row in rows if row["side"] == name]
    assert {row["dtype"] for row in kernels} >= {"float32", "bfloat16"}
    assert {row["batch"] for row in kernels} >= {"1", "16"}
    assert any(row["floor"] for row in kernels) and any(row["case"] == "limits" for row in rows)
    if backends().get(name, {"cpu": ""})["cpu"].startswith("C++"):  # but for a model's, whose steps are torch's
        # attention has nothing of its own for VNNI: there it says avx512
        isa = C.isa().split("_")[0] if name.startswith("causal_attention") else C.isa()
        assert all(isa in row["note"] for row in kernels)


def test_ring_buffer_peer_draws_what_the_kernel_draws():
    peers = pytest.importorskip("audiomodels.peers")
    weights, uniforms = standard_weights(), philox_uniform(3, 3, 60)
    pack = wavenet_pack(weights, DILATIONS)
    codes, logits = wavenet_generate(pack, wavenet_state(pack, 3), uniforms, return_logits=True)
    drawn = peers.ring_buffers(weights, DILATIONS, uniforms)
    assert common.off_edge(codes, drawn, logits, uniforms) <= 2.0**-14
    assert len(codes.unique()) > 40  # the draws do visit the distribution
    moved = (drawn + (torch.arange(60) == 30)) % 256  # one code off, in the middle of the CDF's range
    assert common.off_edge(codes, moved, logits, uniforms) > 2.0**-14


def test_peers_import_with_torch_and_numpy_alone():
    """As on a GPU machine: none of the extras is there."""
    block = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in EXTRAS: raise ImportError(name)\n"
        "EXTRAS = 'huggingface_hub safetensors soundfile soxr tyro tqdm sklearn scipy matplotlib accelerate'.split()\n"
        "sys.meta_path.insert(0, Block())\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import audiomodels.peers, benchmark_wavenet_generate, benchmark_dilated_conv_update, common\n"
        "assert common.optional('audiomodels.wavenet') is None\n"
    )
    result = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "not timed, because not importable: audiomodels.wavenet" in result.stdout


def test_cuda_is_a_side_where_triton_serves_unasked(monkeypatch):
    """On a GPU that takes CUDA C++ if it is asked for: asked for within its own calls alone."""
    room, asked = benchmark_causal_attention, []
    monkeypatch.setattr(causal_attention_plan, "ASKED", False)

    def explain(*arguments, **options):
        kernel = causal_attention_plan.SM90 if causal_attention_plan.ASKED and compiled else "Triton"
        return argparse.Namespace(kernel=kernel)

    monkeypatch.setattr(room, "explain", explain)
    monkeypatch.setattr(room, "causal_attention", lambda *inputs, window: asked.append(causal_attention_plan.ASKED))
    case, compiled = room.Case(16, 100, 1, 1), True
    ((name, attend),) = room.by_cuda(case, []).items()
    attend(None, None, None)
    assert name == room.CUDA and asked == [True] and not causal_attention_plan.ASKED
    compiled = False
    assert room.by_cuda(case, []) == {}
    compiled, causal_attention_plan.ASKED = True, True
    assert room.by_cuda(case, []) == {}


# ---- on_gpu.sh

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@needs_bash
@pytest.mark.parametrize(
    "names", [pytest.param(("dilated_conv_update",), id="one"), pytest.param(NAMES, id="all", marks=pytest.mark.slow)]
)
def test_on_gpu_dry_run_names_every_room(names):
    only = ["--only", names[0]] if len(names) == 1 else []
    command = ["bash", BENCHMARKS / "on_gpu.sh", "--dry-run", "--no-build", *only]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280,
                            env={**os.environ, "PYTHON": sys.executable, "OUT": ""})  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    for name in names:
        assert re.search(rf"^{name}: benchmark +needs a GPU", result.stdout, re.MULTILINE), result.stdout
        assert re.search(rf"^{name}: benchmark loads +ok", result.stdout, re.MULTILINE)
    assert "would run: env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck" in result.stdout
    assert "DRY RUN: no kernel ran on a GPU" in result.stdout


FALSE_PYTHON = """#!/bin/sh
echo "python $*" >> "$CALLS"
case "$*" in
  *cuda.is_available*) echo cuda ;;
  *get_device_capability*) echo 9.0a ;;
  *"pip install"*) echo "for $TORCH_CUDA_ARCH_LIST" >> "$CALLS" ;;
  *common.py*) echo false-gpu ;;
  *benchmark_x.py*) touch "$ROOT/benchmarks/results/false-gpu.csv" "$ROOT/build/on_gpu/x.png"; exit "$BENCHMARK" ;;
esac
"""
FALSE_SANITIZER = """#!/bin/sh
echo "compute-sanitizer $PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> "$CALLS"
case "$*" in *racecheck*) exit "$RACECHECK" ;; esac
"""


@pytest.fixture
def gpu_machine(tmp_path):
    """A tree of two rooms, x and x_decode, on a machine whose Python and compute-sanitizer only write down calls."""
    root = tmp_path / "tree"
    for folder in ("benchmarks/results", "tests", "audiokernels", "bin"):
        (root / folder).mkdir(parents=True)
    shutil.copy(BENCHMARKS / "on_gpu.sh", root / "benchmarks")
    for name in ("benchmarks/benchmark_x.py", "audiokernels/x_decode.py", "tests/test_other.py"):
        (root / name).write_text("")
    for name in ("x", "x_values", "x_decode"):
        (root / f"tests/test_{name}.py").write_text("device = 'cuda'\n")
    (root / "tests/test_x_decode.py").write_text(
        "@pytest.mark.sanitize\n@pytest.mark.racecheck\ndef test_cuda(): pass\n"
    )
    for name, text in (("python", FALSE_PYTHON), ("compute-sanitizer", FALSE_SANITIZER)):
        (root / "bin" / name).write_text(text)
        (root / "bin" / name).chmod(0o755)

    def run(*arguments, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {
            **{k: v for k, v in os.environ.items() if "CUDA" not in k},
            "PATH": f"{root}/bin:{os.environ['PATH']}", "PYTHON": str(root / "bin/python"), "CALLS": str(calls),
            "ROOT": str(root), "OUT": str(tmp_path / "out"), "BENCHMARK": "0", "RACECHECK": "0", **environment,
        }  # fmt: skip
        command = ["bash", root / "benchmarks/on_gpu.sh", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        return result, calls.read_text().replace(str(root), "ROOT").splitlines()

    run.root, run.out = root, tmp_path / "out"
    return run


@needs_bash
def test_on_gpu_runs_every_stage(gpu_machine):
    result, calls = gpu_machine()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no stage failed" in result.stdout and "DRY RUN" not in result.stdout
    text = "\n".join(calls)
    assert "-m pip install" in text and "--target ROOT/build/on_gpu/installed ROOT\nfor 9.0a\n" in text
    tests = [line for line in calls if line.startswith("python -m pytest")]
    assert len(tests) == 2 and all("-m not slow -k cuda or gpu" in line for line in tests)
    assert tests[0].endswith("ROOT/tests/test_x.py ROOT/tests/test_x_values.py")  # not x_decode's
    assert tests[1].endswith("ROOT/tests/test_x_decode.py")
    sanitized = [line for line in calls if line.startswith("compute-sanitizer 1 --tool")]
    tools = [(line.split()[3], line.split("test_")[-1]) for line in sanitized]
    files = ("x.py", "x_values.py", "x_decode.py")
    expected = [(tool, file) for file in files for tool in ("memcheck", "synccheck")] + [("racecheck", "x_decode.py")]
    assert tools == expected
    assert "(cuda or gpu) and not (graph" in sanitized[0]
    assert "(cuda or gpu) and sanitize" in sanitized[4] and "(cuda or gpu) and racecheck" in sanitized[6]
    assert [
        line for line in calls if "benchmark_x.py --device cuda --csv ROOT/benchmarks/results/false-gpu.csv" in line
    ]
    order = [next(i for i, line in enumerate(calls) if word in line) for word in ("pytest", "benchmark_x.py", "--tool")]
    assert order == sorted(order)  # what takes longest comes last
    assert sorted(path.name for path in gpu_machine.out.iterdir()) == ["false-gpu.csv", "on_gpu.log", "x.png"]
    assert (gpu_machine.out / "on_gpu.log").read_text().endswith("no stage failed\n")


@needs_bash
@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"RACECHECK": "86"}, "x_decode: racecheck.*FAILED: exit 86"),
        ({"BENCHMARK": "1"}, "x: benchmark.*FAILED: exit 1"),
    ],
)
def test_on_gpu_fails_where_a_stage_fails_and_goes_on(gpu_machine, environment, line):
    result, calls = gpu_machine(**environment)
    assert result.returncode == 1 and re.search(line, result.stdout) and "A STAGE FAILED" in result.stdout
    assert len([line for line in calls if "--tool" in line]) == 7 and any("benchmark_x.py" in line for line in calls)


@needs_bash
def test_on_gpu_asks_for_the_other_kernel_too(gpu_machine):
    with (gpu_machine.root / "tests/test_x.py").open("a") as file:
        file.write("# AUDIOKERNELS_X_CUDA=1\n")
    result, calls = gpu_machine("--stages", "tests")
    assert result.returncode == 0 and "x: GPU tests, AUDIOKERNELS_X_CUDA=1" in result.stdout
    tests = [line for line in calls if line.startswith("python -m pytest")]
    assert (
        len(tests) == 3
        and "-k _gpu or graph" in tests[1]
        and tests[1].split(" or graph")[1] == tests[0].split("gpu")[1]
    )


@needs_bash
def test_on_gpu_options(gpu_machine):
    result, calls = gpu_machine("--only", "decode", "--no-build", "--quick")
    assert result.returncode == 0 and not [line for line in calls if "pip" in line or "benchmark_x" in line]
    assert [line for line in calls if line.endswith("test_x_decode.py")]
    result, calls = gpu_machine("--stages", "benchmark")
    assert result.returncode == 0 and not [line for line in calls if "pytest" in line]
    assert [line for line in calls if "benchmark_x.py" in line]
    result, calls = gpu_machine("--stages", "everything")
    assert result.returncode == 2 and "--stages everything: no such stage" in result.stderr and not calls
    result, calls = gpu_machine("--built", "--stages", "tests")
    assert result.returncode == 2 and "--built: nothing is installed" in result.stdout
    (gpu_machine.root / "build/on_gpu/installed/audiokernels").mkdir(parents=True)
    result, calls = gpu_machine("--built", "--stages", "tests")
    assert result.returncode == 0 and not [line for line in calls if "pip" in line]
    assert [line for line in calls if line.startswith("python -m pytest") and " -n 8 " in line]
    result, calls = gpu_machine("--only", "nothing")
    assert result.returncode == 2 and "there are: x x_decode" in result.stderr and not calls
    result, calls = gpu_machine("--fast")
    assert result.returncode == 2 and "unknown argument: --fast" in result.stderr and not calls
    result, calls = gpu_machine("--budget", "3")
    assert result.returncode == 1 and "NOT RUN: budget spent" in result.stdout
    result, calls = gpu_machine("--help")
    assert result.returncode == 0 and "--only ROOM" in result.stdout and "set -u" not in result.stdout


@needs_bash
def test_on_gpu_says_what_is_missing(gpu_machine):
    (gpu_machine.root / "bin/compute-sanitizer").unlink()
    result, _ = gpu_machine(PATH=f"{gpu_machine.root}/bin:/usr/bin:/bin")
    if shutil.which("compute-sanitizer", path="/usr/bin:/bin:/usr/local/cuda/bin") is None:
        assert result.returncode == 1 and "NOT RUN: no compute-sanitizer" in result.stdout
    python = gpu_machine.root / "bin/python"
    python.write_text("#!/bin/sh\necho cpu\n")
    result, _ = gpu_machine()
    assert result.returncode == 2 and "torch sees no GPU here; --dry-run" in result.stderr
    python.write_text("#!/bin/sh\nexit 1\n")
    result, _ = gpu_machine()
    assert result.returncode == 2 and "cannot import torch" in result.stderr


def test_the_peer_for_gpus_draws_what_the_kernel_draws():
    """Its step, on the CPU in float32: the same codes, or on an edge."""
    weights, uniforms = standard_weights(), philox_uniform(3, 2, 30)
    step, drawn = wavenet_peers.RingStep(weights, DILATIONS, 2), []
    for t in range(30):
        step.uniform.copy_(uniforms[:, t : t + 1])
        drawn.append(step().clone())
    pack = wavenet_pack(weights, DILATIONS)
    codes, logits = wavenet_generate(pack, wavenet_state(pack, 2), uniforms, return_logits=True)
    assert common.off_edge(codes, torch.stack(drawn, 1), logits, uniforms) <= 2.0**-14
