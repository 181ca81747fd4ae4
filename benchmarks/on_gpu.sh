#!/usr/bin/env bash
# The one command for a machine with a GPU: build, GPU tests, benchmarks beside their peers, compute-sanitizer.
#
#   benchmarks/on_gpu.sh [--only ROOM] [--stages NAMES] [--quick] [--built] [--no-build] [--budget SECONDS] [--dry-run]
#
#   --only ROOM    the rooms whose name contains ROOM (default: all, if the budget lasts)
#   --stages NAMES some of "tests benchmark sanitize" (default: all), each for all rooms before the next
#   --quick        short benchmarks, which show that they run, not how fast
#   --built        use what an earlier call installed in build/on_gpu
#   --no-build     use the audiokernels that $PYTHON imports, instead of installing this tree beside it
#   --budget N     seconds for everything (default 540); each stage has its own limit within it
#   --dry-run      as far as a machine without a GPU can go: build (CUDA kernels too, where nvcc is), collect the tests,
#                  load the benchmarks, and print what would run
#
# A room is found by its files: benchmarks/benchmark_<room>.py, or tests/test_<room>.py beside audiokernels/<room>.py;
# its tests are tests/test_<room>.py and tests/test_<room>_*.py. A test is for the GPU if its name, parameters or
# markers say "cuda" or "gpu"; those that run a GPU's kernels on the host are left out, and several run at a time where
# pytest-xdist is, since Triton compiles for minutes. Where they name a variable that asks for another kernel
# (AUDIOKERNELS_ATTENTION_CUDA), those that do not ask for it themselves run once more with it. compute-sanitizer's
# memcheck and synccheck run those of a file that say "sanitize" too (in a file without that word: all but CUDA graphs,
# compile, export and opcheck), racecheck those that say "racecheck".
#
# Variables: PYTHON (default python3, or .venv/bin/python), COMMIT (for the CSV, where the tree has no .git), OUT (a
# folder that gets a copy of the results), AUDIOKERNELS_CUDA and TORCH_CUDA_ARCH_LIST (default: this GPU's) for the build.
# Leaves benchmarks/results/<device>.csv, and in build/on_gpu/ the log, the pictures and the installed package.
# Exit: 0 all well, 1 a stage failed or was left out for lack of time, 2 wrong usage or no GPU.
set -u -o pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
WORK=$ROOT/build/on_gpu
LOG=$WORK/on_gpu.log
GPU_TESTS="cuda or gpu"
SANITIZE_UNMARKED="($GPU_TESTS) and not (graph or compile or export or opcheck)"
NOTHING_COLLECTED=5 # pytest's exit status

only="" stages="tests benchmark sanitize" budget=540 dry_run=0 build=1 built=0 quick=()
usage() {
  sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}
while [ $# -gt 0 ]; do
  case $1 in
    --only) only=${2:?--only needs the name of a room} && shift ;;
    --budget) budget=${2:?--budget needs seconds} && shift ;;
    --quick) quick=(--quick) ;;
    --stages) stages=${2:?--stages needs names} && shift ;;
    --built) build=0 built=1 ;;
    --no-build) build=0 ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage && exit 0 ;;
    *) echo "unknown argument: $1" >&2 && usage >&2 && exit 2 ;;
  esac
  shift
done

for stage in $stages; do
  case $stage in
    tests | benchmark | sanitize) ;;
    *) echo "--stages $stage: no such stage" >&2 && usage >&2 && exit 2 ;;
  esac
done

# ---- rooms

all_rooms() {
  local path name
  {
    for path in "$ROOT"/benchmarks/benchmark_*.py; do
      name=$(basename "$path" .py)
      echo "${name#benchmark_}"
    done
    for path in "$ROOT"/tests/test_*.py; do
      name=$(basename "$path" .py)
      [ -f "$ROOT/audiokernels/${name#test_}.py" ] && echo "${name#test_}"
    done
  } | sort -u
}

# The test files of a room; one that fits several rooms (causal_attention, causal_attention_decode) is the longest's.
tests_of() {
  local path name room best
  for path in "$ROOT"/tests/test_*.py; do
    name=$(basename "$path" .py) best=""
    name=${name#test_}
    for room in "${rooms[@]}"; do
      case $name in
        "$room" | "$room"_*) [ ${#room} -gt ${#best} ] && best=$room ;;
      esac
    done
    [ "$best" = "$1" ] && echo "$path"
  done
}

mapfile -t rooms < <(all_rooms)
chosen=()
for room in "${rooms[@]}"; do
  case $room in *"$only"*) chosen+=("$room") ;; esac
done
if [ ${#chosen[@]} -eq 0 ]; then
  echo "--only $only: no such room; there are: ${rooms[*]}" >&2
  exit 2
fi

# ---- the machine

python=${PYTHON:-python3}
sees() { # "cuda", "cpu", or nothing where $python has no torch
  "$python" -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')" 2> /dev/null
}
seen=$(sees)
if [ -z "$seen${PYTHON:-}" ] && [ -x "$ROOT/.venv/bin/python" ]; then
  python=$ROOT/.venv/bin/python
  seen=$(sees)
fi
if [ -z "$seen" ]; then
  echo "$python cannot import torch: name one that can, PYTHON=..." >&2
  exit 2
fi
if [ "$seen" = cpu ] && [ $dry_run -eq 0 ]; then
  echo "torch sees no GPU here; --dry-run goes as far as that allows" >&2
  exit 2
fi
sanitizer=$(command -v compute-sanitizer || true)
for folder in "${CUDA_HOME:-}" /usr/local/cuda; do
  [ -z "$sanitizer" ] && [ -x "$folder/bin/compute-sanitizer" ] && sanitizer=$folder/bin/compute-sanitizer
done

mkdir -p "$WORK"
: > "$LOG"
cd "$WORK" || exit 2 # not the root, where `python -m` would find the package without its kernels

say() {
  echo "$*" | tee -a "$LOG"
}

# ---- stages

failed=0
summary=()

record() { # name, result, seconds
  summary+=("$(printf '%-62s %-28s %4s s' "$1" "$2" "$3")")
}

# run NAME LIMIT COMMAND...: the command within its limit and the budget; its output is shown and logged.
run() {
  local name=$1 limit=$2 status start=$SECONDS left=$((budget - SECONDS)) result
  shift 2
  say ""
  say "==== $name"
  if [ "$left" -lt 5 ]; then
    say "not run: the budget of $budget s is spent"
    record "$name" "NOT RUN: budget spent" 0
    failed=1
    return 1
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  say "\$ $*"
  timeout -k 10 "$limit" "$@" 2>&1 | tee -a "$LOG"
  status=${PIPESTATUS[0]}
  case $status in
    0) result="ok" ;;
    "$NOTHING_COLLECTED") result="nothing to run" ;;
    124 | 137) result="FAILED: over $limit s" ;;
    *) result="FAILED: exit $status" ;;
  esac
  record "$name" "$result" $((SECONDS - start))
  case $result in FAILED*) failed=1 ;; esac
  [ "$result" = ok ] || [ "$status" -eq "$NOTHING_COLLECTED" ]
}

# would NAME COMMAND...: in a dry run, what needs a GPU is only printed.
would() {
  local name=$1
  shift
  say ""
  say "==== $name"
  say "would run: $*"
  record "$name" "needs a GPU: printed only" 0
}

finish() {
  say ""
  say "---- summary"
  printf '%s\n' "${summary[@]}" | tee -a "$LOG"
  if [ $dry_run -eq 1 ]; then
    say "DRY RUN: no kernel ran on a GPU, and nothing above says that one would work there."
  fi
  if [ $failed -eq 0 ]; then say "no stage failed"; else say "A STAGE FAILED"; fi
  if [ -n "${OUT:-}" ] && [ "$OUT" != "$WORK" ]; then
    mkdir -p "$OUT"
    cp "$LOG" "$OUT/"
    [ -f "$csv" ] && cp "$csv" "$OUT/"
    for picture in "$WORK"/*.png; do
      [ -f "$picture" ] && cp "$picture" "$OUT/"
    done
  fi
  exit $failed
}

csv=$WORK/dry-run.csv
rm -f "$WORK"/*.png

say "rooms: ${chosen[*]}; budget $budget s; python $("$python" --version 2>&1), $(command -v "$python")"
# shellcheck disable=SC2016 # $1 is the inner shell's
run "machine" 60 bash -c 'nvidia-smi -L 2> /dev/null || echo "no nvidia-smi"
  nvcc --version 2> /dev/null | tail -n 2 || echo "no nvcc"
  echo "compute-sanitizer: ${1:-not found}"; nproc; uptime' _ "$sanitizer"

if [ $build -eq 1 ]; then
  # Beside the machine's packages, not into them. Without nvcc the build is an error here, except in a dry run.
  if [ $dry_run -eq 0 ]; then
    export AUDIOKERNELS_CUDA=${AUDIOKERNELS_CUDA:-1}
    capability='import torch; n = torch.cuda.get_device_capability(); print("%d.%d" % n + "a" * (n[0] == 9))'
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c "$capability")} # all of them take minutes
  fi
  rm -rf "$WORK/installed"
  export PYTHONPATH=$WORK/installed${PYTHONPATH:+:$PYTHONPATH}
  run "build" 400 "$python" -m pip install --disable-pip-version-check --no-build-isolation --no-deps --quiet \
    --target "$WORK/installed" "$ROOT" || finish
fi
if [ $built -eq 1 ]; then
  export PYTHONPATH=$WORK/installed${PYTHONPATH:+:$PYTHONPATH}
  [ -d "$WORK/installed/audiokernels" ] || { say "--built: nothing is installed in $WORK/installed" && exit 2; }
fi
run "what was built" 60 "$python" -m audiokernels || finish
[ $dry_run -eq 0 ] && csv=$ROOT/benchmarks/results/$("$python" "$ROOT/benchmarks/common.py" --device cuda).csv

# addopts: the machine may lack plugins whose marks a file uses
pytest=("$python" -m pytest -q -p no:cacheprovider -o "addopts=" --rootdir "$ROOT")
export CUDA_ON_HOST=0
workers=()
"$python" -c "import xdist" 2> /dev/null && workers=(-n 8)

# The files of a room's tests for a GPU.
gpu_files() {
  tests_of "$1" | xargs -r -d '\n' grep -lE "cuda|gpu"
}

run_tests() {
  local room=$1 files command switch
  mapfile -t files < <(gpu_files "$room")
  command=("${pytest[@]}" "${workers[@]}" -m "not slow" -k "$GPU_TESTS" "${files[@]}")
  if [ ${#files[@]} -eq 0 ]; then
    record "$room: GPU tests" "none in its test files" 0
  elif [ $dry_run -eq 1 ]; then
    run "$room: GPU tests collected without one" 60 "${pytest[@]}" -m "not slow" -k "$GPU_TESTS" "${files[@]}" \
      --collect-only
    would "$room: GPU tests" "${command[@]}"
  else
    run "$room: GPU tests" 300 "${command[@]}"
  fi
  switch=$(cat /dev/null "${files[@]}" | grep -oE -m 1 "AUDIOKERNELS_[A-Z]+_CUDA" | head -n 1)
  [ -n "$switch" ] || return
  command=(env "$switch=1" "${pytest[@]}" "${workers[@]}" -m "not slow" -k "_gpu or graph" "${files[@]}")
  if [ $dry_run -eq 1 ]; then
    would "$room: GPU tests, $switch=1" "${command[@]}"
  else
    run "$room: GPU tests, $switch=1" 120 "${command[@]}"
  fi
}

run_sanitize() {
  local room=$1 files file tool tools name command selection
  mapfile -t files < <(gpu_files "$room")
  for file in "${files[@]}"; do
    selection=(-m "not slow" -k "$SANITIZE_UNMARKED")
    grep -q sanitize "$file" && selection=(-k "($GPU_TESTS) and sanitize")
    tools=(memcheck synccheck)
    grep -q racecheck "$file" && tools+=(racecheck)
    for tool in "${tools[@]}"; do
      [ "$tool" = racecheck ] && selection=(-k "($GPU_TESTS) and racecheck")
      name="$room: $tool, $(basename "$file")"
      # without torch's caching allocator, so that a kernel's step past its tensor is a step past an allocation
      command=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer:-compute-sanitizer}" --tool "$tool"
        --error-exitcode 86 --print-limit 20 "${pytest[@]}" "${selection[@]}" "$file")
      if [ $dry_run -eq 1 ]; then
        would "$name" "${command[@]}"
      elif [ -z "$sanitizer" ]; then
        say "$name: not run, compute-sanitizer was not found"
        record "$name" "NOT RUN: no compute-sanitizer" 0
        failed=1
      else
        run "$name" 150 "${command[@]}"
      fi
    done
  done
}

run_benchmark() {
  local room=$1 script=$ROOT/benchmarks/benchmark_$1.py command
  [ -f "$script" ] || return
  command=("$python" "$script" --device cuda --csv "$csv" --png "$WORK/$room.png" "${quick[@]}")
  if [ $dry_run -eq 1 ]; then
    run "$room: benchmark loads" 60 "$python" -c "import sys; sys.path[0] = sys.argv[1]; __import__(sys.argv[2])" \
      "$ROOT/benchmarks" "benchmark_$room"
    would "$room: benchmark" "${command[@]}"
  else
    run "$room: benchmark" 240 "${command[@]}"
  fi
}

for stage in $stages; do
  for room in "${chosen[@]}"; do
    "run_$stage" "$room"
  done
done
finish
