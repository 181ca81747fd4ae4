"""Derivatives inside torch.func, beside those of torch.autograd and of the plain-torch reference."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vjp, vmap

import audiokernels as ak

CALLS = {
    "causal_attention": lambda x: ak.causal_attention(x[:, :4], x[:, 4:6], x[:, 6:8], window=3),
    "causal_attention, lse": lambda x: ak.causal_attention(x[:, :2], x[:, 2:4], x[:, 4:6], return_lse=True)[1],
    "haar_pool": lambda x: ak.haar_pool(x[0], levels=[0, 1, 2, -1] * 2),
    "haar_pool causal": lambda x: ak.haar_pool(x[0], mode="causal", norm="count"),
    "haar_dwt": lambda x: ak.haar_dwt(x[0, :, :3], 2, pad="edge"),
    "haar_idwt": lambda x: ak.haar_idwt(x[0], 2),
}


@pytest.fixture(params=CALLS)
def scalar(request):
    """x (1, 8, 4, 8) -> a number whose derivatives are not constant."""
    return lambda x: (CALLS[request.param](x.sin()) ** 3).sum()


@pytest.fixture
def x():
    return torch.randn(1, 8, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def by_autograd(scalar, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(scalar(x), x)[0]


def test_grad_and_vjp(scalar, x):
    expected = by_autograd(scalar, x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(grad(scalar)(x), expected)
    torch.testing.assert_close(vjp(scalar, x)[1](torch.ones((), dtype=x.dtype))[0], expected)
    with torch.no_grad():  # it is about what lies outside
        torch.testing.assert_close(grad(scalar)(x), expected)
    assert grad(lambda y: scalar(x) + y.sum())(x).eq(1).all()
    with ak.use_reference():
        torch.testing.assert_close(grad(scalar)(x), expected)


def test_second_derivatives(scalar, x):
    part = slice(0, 2)  # of the heads or of the steps: a smaller matrix

    def at(y):
        return scalar(torch.cat([y, x[:, 2:]], 1))

    expected = torch.autograd.functional.hessian(at, x[:, part])
    torch.testing.assert_close(jacrev(grad(at))(x[:, part]), expected)
    leaf = x[:, part].clone().requires_grad_()  # autograd around torch.func
    torch.testing.assert_close(torch.autograd.grad(grad(at)(leaf).sum(), leaf)[0], expected.sum((0, 1, 2, 3)))


def test_gradients_of_each_sample(scalar, x):
    many = torch.cat([x, 2 * x, x.flip(1)])
    each = torch.stack([by_autograd(scalar, row) for row in many.unsqueeze(1)])
    torch.testing.assert_close(vmap(grad(scalar))(many.unsqueeze(1)), each)
    torch.testing.assert_close(grad(lambda rows: vmap(scalar)(rows).sum())(many.unsqueeze(1)), each)


def test_compiled(scalar, x):
    compiled = torch.compile(grad(scalar), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), by_autograd(scalar, x))


def test_float32_takes_the_kernel(scalar, x):
    torch.testing.assert_close(grad(scalar)(x.float()), by_autograd(scalar, x.float()), rtol=0, atol=0)


def test_autocast(x):
    call = CALLS["causal_attention"]

    def loss(x):
        with torch.autocast("cpu", torch.bfloat16):
            out = call(x)
        assert out.dtype == torch.bfloat16
        return (out.float() ** 2).sum()

    assert torch.equal(grad(loss)(x.float()), by_autograd(loss, x.float()))


def test_parameters_of_a_module():
    layer = torch.nn.Linear(6, 48)

    def loss(weights, x):
        q, k, v = functional_call(layer, weights, (x,)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return ak.causal_attention(q, k, v).square().sum()

    weights, x = dict(layer.named_parameters()), torch.randn(2, 7, 6)
    expected = torch.autograd.grad(loss(weights, x), list(weights.values()))
    found = grad(loss)({name: weight.detach() for name, weight in weights.items()}, x)
    torch.testing.assert_close(tuple(found.values()), expected)
