"""python -m audiokernels --check: does every kernel compute here what the plain-torch reference computes?

Each case runs an op, its gradients and its caches on made-up numbers, by the kernel in each of its dtypes, and by the
reference on the CPU in float32 from the same rounded numbers. Every result y counts, by the largest |y - expected| /
(|expected| + their root mean square) of its elements. It is for machines that the tests have never seen; it takes
seconds on a CPU, and on a GPU as long as Triton compiles.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

import audiokernels as ak
from audiokernels.backends import implementation, use_reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.int8: 1e-1}
"""Of that error. A wrong index gives 0.3 to 3. int8: activations are rounded to 8 bits too."""


class Inputs:
    """Random inputs of a case: the same numbers, rounded to `dtype`, for the kernel and for the reference."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, compute: torch.dtype | None = None):
        self.device, self.dtype, self.compute = device, dtype, compute or dtype
        self.generator = Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        """Normal numbers of this shape, whose gradient can be asked for."""
        x = self.float32(*shape).to(self.dtype).to(self.compute)
        return x.to(self.device).requires_grad_()

    def float32(self, *shape: int) -> Tensor:
        """Normal numbers on the CPU, not rounded."""
        return torch.randn(*shape, generator=self.generator)

    def integers(self, *numbers: int) -> Tensor:
        """These numbers as int32."""
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)


def with_gradients(out: Tensor, x: Inputs, *inputs: Tensor) -> list[Tensor]:
    """`out`, and the gradients of its sum with random weights."""
    return [out, *torch.autograd.grad(out, inputs, x(*out.shape).detach())]


# --- cases --------------------------------------------------------------------------------------------------------


def attention(x: Inputs, headdim: int, window: int | None = None) -> list[Tensor]:
    q, k, v = x(2, 4, 700, headdim), x(2, 2, 700, headdim), x(2, 2, 700, headdim)
    return with_gradients(ak.causal_attention(q, k, v, window=window), x, q, k, v)


@torch.no_grad()
def decode(x: Inputs) -> list[Tensor]:
    k_cache, v_cache, seen = x(2, 2, 300, 32), x(2, 2, 300, 32), x.integers(120, 900)
    ak.kv_cache_update(k_cache, v_cache, x(2, 2, 1, 32), x(2, 2, 1, 32), seen)
    return [ak.causal_attention_decode(x(2, 4, 1, 32), k_cache, v_cache, seen), k_cache, v_cache]


def haar(x: Inputs, mode: str) -> list[Tensor]:
    a = x(2, 1000, 64)
    return with_gradients(ak.haar_pool(a, mode=mode, norm="count"), x, a)


@torch.no_grad()
def haar_in_place(x: Inputs) -> list[Tensor]:
    return [ak.haar_pool_(x(2, 1000, 64))]


@torch.no_grad()
def haar_steps(x: Inputs) -> list[Tensor]:
    state = ak.haar_pool_state(2, 64, seqlen=1000, dtype=x.compute, device=x.device)
    return [ak.haar_pool_update(x(2, 64), state, x.integers(t, t), seqlen=1000) for t in range(20)] + [state]


def wavelet(x: Inputs) -> list[Tensor]:
    a = x(2, 1001, 48)
    coefficients = ak.haar_dwt(a, 5)
    return with_gradients(ak.haar_idwt(coefficients, 5, seqlen=1001), x, a) + [coefficients]


@torch.no_grad()
def conv_steps(x: Inputs) -> list[Tensor]:
    weight, bias, ring = x(96, 64, 3), x(96), x(2, 8, 64)
    steps = [ak.dilated_conv_update(x(2, 64), ring, weight, bias, x.integers(t, t), dilation=4) for t in range(9)]
    return [*steps, ring]


@torch.no_grad()
def wavenet(x: Inputs) -> list[Tensor]:
    n, r, s, classes = 8, 64, 128, 256
    weights = {
        "embedding": x.float32(classes, r),
        "conv_weight": x.float32(n, 2 * r, r, 2) * (2 * r) ** -0.5,
        "conv_bias": x.float32(n, 2 * r) * 0.1,
        "res_weight": x.float32(n - 1, r, r) * r**-0.5,
        "res_bias": x.float32(n - 1, r) * 0.1,
        "skip_weight": x.float32(n, s, r) * r**-0.5,
        "skip_bias": x.float32(n, s) * 0.1,
        "head_weight": x.float32(s, s) * s**-0.5,
        "head_bias": x.float32(s) * 0.1,
        "out_weight": x.float32(classes, s) * 3 * s**-0.5,
        "out_bias": x.float32(classes) * 0.1,
    }
    pack = ak.wavenet_pack(weights, [2**layer for layer in range(n)], dtype=x.dtype)
    return generated(x, pack.to(x.device), ak.wavenet_state, ak.wavenet_generate)


@torch.no_grad()
def transformer(x: Inputs) -> list[Tensor]:
    n, e, classes = 3, 128, 256

    def linear(name: str, rows: int, columns: int, *layers: int) -> dict[str, Tensor]:
        weight, bias = x.float32(*layers, rows, columns) * columns**-0.5, x.float32(*layers, rows) * 0.1
        return {f"{name}_weight": weight, f"{name}_bias": bias}

    def norm(name: str, *shape: int) -> dict[str, Tensor]:
        return {f"{name}_weight": 1 + 0.1 * x.float32(*shape), f"{name}_bias": 0.1 * x.float32(*shape)}

    weights = {"embedding": x.float32(classes, e), **norm("norm1", n, e), **norm("norm2", n, e), **norm("norm", e)}
    weights |= linear("qkv", 3 * e, e, n) | linear("proj", e, e, n) | linear("out", classes, e)
    weights |= linear("up", 4 * e, e, n) | linear("down", e, 4 * e, n)
    pack = ak.transformer_pack(weights, n_head=4, window=40, dtype=x.dtype)
    return generated(x, pack.to(x.device), ak.transformer_state, ak.transformer_generate)


def generated(x: Inputs, pack, state_of: Callable, generate: Callable) -> list[Tensor]:
    """Logits of 60 forced samples; then whether 20 drawn ones keep to the drawing rule."""
    batch, forced, n = 2, 60, 20
    state = state_of(pack, batch)
    codes = torch.randint(0, 256, (batch, forced), generator=x.generator).to(x.device)
    uniforms = ak.philox_uniform(1, batch, forced + n).to(x.device)
    _, logits = generate(pack, state, uniforms[:, :forced], codes=codes, return_logits=True)
    drawn, free = generate(pack, state, uniforms[:, forced:], return_logits=True)
    kept = [drawn[:, t] == ak.Sampling().draw(free[:, t], uniforms[:, forced + t]) for t in range(n)]
    return [logits, torch.stack(kept)]


@dataclass(frozen=True)
class Case:
    """What is run, in words, which ops that takes, and in which dtypes they have kernels."""

    name: str
    ops: tuple[str, ...]
    run: Callable[[Inputs], list[Tensor]]
    dtypes: tuple[torch.dtype, ...] = FLOATS


ATTENTION = ("causal_attention", "causal_attention_backward")
PACKS = (torch.float32, torch.bfloat16, torch.int8)
CASES = (
    *(Case(f"causal_attention, headdim {d}", ATTENTION, lambda x, d=d: attention(x, d)) for d in (8, 32, 64, 128)),
    Case("causal_attention, window", ATTENTION, lambda x: attention(x, 16, window=100)),
    Case("causal_attention_decode", ("causal_attention_decode", "kv_cache_update"), decode),
    Case("haar_pool, blocks", ("haar_pool",), lambda x: haar(x, "block")),
    Case("haar_pool, causal", ("haar_pool",), lambda x: haar(x, "causal")),
    Case("haar_pool_", ("haar_pool_",), haar_in_place),
    Case("haar_pool_update", ("haar_pool_update",), haar_steps),
    Case("haar_dwt, haar_idwt", ("haar_dwt", "haar_idwt"), wavelet),
    Case("dilated_conv_update", ("dilated_conv_update",), conv_steps),
    Case("wavenet_generate", ("wavenet_generate",), wavenet, (*PACKS, torch.float16)),
    Case("transformer_generate", ("transformer_generate",), transformer, PACKS),
)


# --- running them -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One case in one dtype on one device; error: the largest, or what was raised."""

    case: Case
    device: str
    dtype: torch.dtype
    error: float | str
    seconds: float

    @property
    def right(self) -> bool:
        return isinstance(self.error, float) and self.error <= LIMITS[self.dtype]

    def __str__(self) -> str:
        kernel = implementation(self.case.ops[0], torch.device(self.device).type).partition(" (")[0]
        error = f"{self.error:.1e} of {LIMITS[self.dtype]:.0e}" if isinstance(self.error, float) else self.error
        name = str(self.dtype).removeprefix("torch.")
        verdict = "right" if self.right else "WRONG"
        return f"{verdict}  {self.case.name:29} {self.device:6} {name:8} {kernel:9} {error}  {self.seconds:.1f} s"


def devices() -> list[str]:
    """The CPU, and every GPU that torch sees."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def check() -> Iterator[Result]:
    """Every case on every device in every dtype."""
    for case in CASES:
        for dtype in case.dtypes:
            with use_reference():
                expected = case.run(Inputs("cpu", dtype, torch.float32))
            for device in devices():
                start = time.perf_counter()
                try:
                    error = largest_error(case.run(Inputs(device, dtype)), expected)
                except Exception as raised:  # whatever a kernel, a compiler or a driver says is the answer
                    error = f"{type(raised).__name__}: {str(raised).partition(chr(10))[0]}"
                yield Result(case, device, dtype, error, time.perf_counter() - start)


@torch.no_grad()
def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of a list of tensors, as above; infinite where a number is not finite."""
    errors = []
    for y, b in zip(found, expected, strict=True):
        y, b = y.cpu().double(), b.double()
        errors.append(((y - b).abs() / (b.abs() + b.square().mean().sqrt())).max())
    return float(torch.stack(errors).nan_to_num(nan=torch.inf).max())
