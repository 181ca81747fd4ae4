"""causal_attention in bfloat16: what may go wrong where two numbers share a lane, and a build that emulates that."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import Errors, dense, gradients, in_turn, main_kernels, make, mask, plain

from audiokernels import explain
from audiokernels._library import C

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent


KERNELS = [kernel for kernel in main_kernels("causal_attention") if kernel != "reference"]


@pytest.fixture(params=KERNELS)
def kernel(request):
    yield from in_turn(request.param)


def of_grad(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x)


def values_and_gradients(call, inputs, grad, window):
    out, lse = call(*inputs, window=window)
    return [out.detach(), lse.detach(), *gradients([out], inputs, [grad])]


@pytest.mark.parametrize("scaled", [1, 3, 30])
def test_odd_sizes(kernel, scaled):
    """Lengths, windows and headdims of both parities, grouped heads: values and gradients against float64."""
    g = torch.Generator().manual_seed(scaled)
    errors = {name: Errors(torch.bfloat16, 256 * scaled**2) for name in ("out", "dq", "dk", "dv")}
    for error in errors.values():
        error.ulp /= 4  # less than a rounding of the result
    for seed in range(40):
        group, nheads_kv, seqlen_k, headdim = (int(torch.randint(1, n, (), generator=g)) for n in (3, 3, 120, 60))
        seqlen_q = int(torch.randint(1, seqlen_k + 1, (), generator=g))
        window = int(torch.randint(1, seqlen_k + 5, (), generator=g)) if seed % 3 else None
        size = (1, group * nheads_kv, nheads_kv, seqlen_q, seqlen_k, headdim + 7)
        inputs = make(size, torch.bfloat16, kernel.device, scale=scaled, seed=seed, grad=True)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        grad = of_grad(inputs[0].detach())
        right = values_and_gradients(dense, exact, grad.double(), window)
        peer = values_and_gradients(lambda *x, window: (plain(*x, window=window), x[0]), inputs, grad, window)
        result = values_and_gradients(kernel, inputs, grad, window)
        for name, *each in zip(("out", "lse", "dq", "dk", "dv"), result, peer, right, strict=True):
            if name == "lse":
                torch.testing.assert_close(each[0].double(), each[2], rtol=1e-6, atol=1e-6 * scaled**2)
            else:
                errors[name].add(*each, at_least=scaled)
    for error in errors.values():
        error.check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("window", [None, 1, 30, 31])
@pytest.mark.parametrize("where", [60, 61, 100])
def test_what_is_not_finite_stays_with_the_queries_that_see_it(kernel, where, window, bad):
    """The other row of a pair is not touched; 101 keys: the last one has no partner."""
    clean = make((1, 2, 1, 101, 101, 16), torch.bfloat16, kernel.device)
    before, seeing = kernel(*clean, window=window), mask(101, 101, window)[:, where].to(kernel.device)
    for which in (1, 2):
        inputs = [x.clone() for x in clean]
        inputs[which][0, 0, where, 3] = bad
        out, lse = kernel(*inputs, window=window)
        assert torch.equal(out[:, :, ~seeing], before[0][:, :, ~seeing])
        assert torch.equal(lse[:, :, ~seeing], before[1][:, :, ~seeing])
        assert which == 1 or not out[:, :, seeing, 3].isfinite().any()
        assert which == 2 or bad == float("inf") or out[:, :, seeing].isnan().all()


@pytest.mark.parametrize("window", [None, 1, 30, 31])
@pytest.mark.parametrize("where", [60, 61, 100])
def test_gradients_of_what_sees_no_nan(kernel, where, window):
    clean = make((1, 1, 1, 101, 101, 16), torch.bfloat16, kernel.device)
    grad, seen = of_grad(clean[0]), mask(101, 101, window).to(kernel.device)
    before = None
    for which in [None, *range(4)]:  # nothing, q, k, v, grad_out
        tensors = [x.clone() for x in (*clean, grad)]
        if which is not None:
            tensors[which][0, 0, where, 3] = torch.nan
        inputs = [x.requires_grad_() for x in tensors[:3]]
        results = values_and_gradients(kernel, inputs, tensors[3], window)[2:]
        before = before or results
        if which is None:
            continue
        queries = seen[:, where] if which in (1, 2) else torch.arange(101, device=kernel.device) == where
        keys = seen[queries].any(0)
        for result, old, reached in zip(results, before, (queries, keys, keys), strict=True):
            assert torch.equal(result[:, :, ~reached], old[:, :, ~reached])
        assert results[0][:, :, queries].isnan().any(-1).all() and results[1][:, :, keys].isnan().any(-1).all()


@pytest.mark.parametrize("window", [None, 51])
def test_gradients_do_not_depend_on_what_is_not_seen(kernel, window):
    """dk and dv from key t on: on no query before t, in no bit."""
    inputs = make((1, 2, 1, 151, 151, 16), torch.bfloat16, kernel.device, grad=True)
    grad = of_grad(inputs[0].detach())
    before = values_and_gradients(kernel, inputs, grad, window)
    for t in (1, 64, 97, 150):
        q, other = inputs[0].detach().clone(), grad.clone()
        q[:, :, :t] += 3
        other[:, :, :t] -= 5
        changed = values_and_gradients(kernel, [q.requires_grad_(), *inputs[1:]], other, window)
        assert all(torch.equal(x[:, :, t:], y[:, :, t:]) for x, y in zip(changed, before, strict=True))


def test_threads_and_neighbours_do_not_change_a_bit(kernel):
    inputs = make((2, 4, 2, 190, 201, 24), torch.bfloat16, kernel.device, grad=True)
    grad, before, outcomes = of_grad(inputs[0].detach()), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            outcomes.append(values_and_gradients(kernel, inputs, grad, 100))
    finally:
        torch.set_num_threads(before)
    alone = [x.detach()[1:, 2:] if x.shape[1] == 4 else x.detach()[1:, 1:] for x in inputs]
    alone = values_and_gradients(kernel, [x.requires_grad_() for x in alone], grad[1:, 2:], 100)
    parts = [x[1:, 2:] if x.shape[1] == 4 else x[1:, 1:] for x in outcomes[0]]
    assert all(torch.equal(x, y) for other in outcomes for x, y in zip(outcomes[0], other, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(alone[:2], parts[:2], strict=True))
    torch.testing.assert_close(alone, parts)  # keys are cut otherwise where heads are few


def test_explain(kernel):
    inputs = make((1, 1, 1, 20, 20, 16), torch.bfloat16)  # on the CPU
    answer, wide = (explain("causal_attention", *(x.to(dtype) for x in inputs)) for dtype in (None, torch.float32))
    pairs = kernel.name in ("avx512_bf16", "avx512_amx")
    assert ("pairs" in answer.why) == pairs and "pairs" not in wide.why
    if kernel.device == "cpu":
        float_isa = kernel.name.split("_")[0]
        assert (answer.kernel, wide.kernel) == (f"cpu_{kernel.name if pairs else float_isa}", f"cpu_{float_isa}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(C is None or "avx512_vnni" not in C.supported_isas(), reason="no compiler, or no AVX-512")
def test_with_the_instructions_emulated(tmp_path):
    """The tests of everything that is compiled for avx512_bf16 and avx512_amx, whatever this processor has."""
    folder = ROOT / "build" / "emulated"
    build = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", f"-DPython_EXECUTABLE={sys.executable}"]
    build += ["-DAUDIOKERNELS_CUDA=0", "-DAUDIOKERNELS_EMULATE=ON", "-DAUDIOKERNELS_ASSEMBLES_TILES=OFF"]
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, *build], check=True)
    subprocess.run(["cmake", "--build", folder, "--parallel", str(os.cpu_count())], check=True)
    assert any(folder.glob("CMakeFiles/simd_avx512_amx.dir/csrc/*.o")), "emulated, it needs no assembler that knows it"
    shutil.copytree(ROOT / "audiokernels", tmp_path / "audiokernels", ignore=shutil.ignore_patterns("_C.*so"))
    (module,) = folder.glob("_C.*so")
    shutil.copy(module, tmp_path / "audiokernels")
    tests = [ROOT / "tests" / f"test_{name}.py" for name in ("causal_attention", "attention_pairs", "wavenet_generate",
                                                             "transformer_generate")]  # fmt: skip
    words = ["-q", "-x", "-m", "not slow", "-k", "avx512_bf16 or avx512_amx", "-p", "no:cacheprovider"]
    run = "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", run, *tests, *words], env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and int(passed[1]) > 260, done.stdout[-3000:]
