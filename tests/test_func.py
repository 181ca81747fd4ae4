"""Derivatives inside torch.func, beside those of torch.autograd and of the plain-torch reference."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

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
def call(request):
    """x (1, 8, 4, 8) -> what an op makes of it."""
    return CALLS[request.param]


@pytest.fixture
def scalar(call):
    """x -> a number whose derivatives are not constant."""
    return lambda x: (call(x.sin()) ** 3).sum()


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


def test_jvp(call, x):
    t = x.flip(1).cos()
    expected = torch.autograd.functional.jvp(call, x, t)
    torch.testing.assert_close(jvp(call, (x,), (t,)), expected)
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(call(forward_ad.make_dual(x, t)))
        torch.testing.assert_close(tuple(found), expected)
    with ak.use_reference():
        torch.testing.assert_close(jvp(call, (x,), (t,)), expected)
    each = vmap(lambda t: jvp(call, (x,), (t,))[1])(torch.stack([t, -2 * t]))
    torch.testing.assert_close(each, torch.stack([expected[1], -2 * expected[1]]))
    torch.testing.assert_close(jvp(lambda y: call(x) + y.sum(), (x,), (t,))[1], t.sum().expand_as(expected[0]))


def test_jvp_of_low_precision_and_of_some_arguments():
    q, k, v, t = torch.randn(4, 1, 2, 40, 8, generator=torch.Generator().manual_seed(1)).unbind()

    def run(k):
        return ak.causal_attention(q.to(k), k, v.to(k), return_lse=True)

    exact, half = jvp(run, (k.double(),), (t.double(),)), jvp(run, (k.half(),), (t.half(),))
    assert [x.dtype for pair in half for x in pair] == [torch.float16, torch.float32] * 2
    torch.testing.assert_close(half, exact, check_dtype=False, rtol=0.01, atol=0.01)


def test_derivatives_of_tangents(scalar, x):
    """As losses have them that are made of a jvp."""
    t = x.flip(1).cos()

    def slope(y):
        return jvp(scalar, (y,), (t,))[1]

    def by_gradients(y):
        return (torch.autograd.grad(scalar(y), y, create_graph=True)[0] * t).sum()

    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(by_gradients(leaf), leaf)[0]
    torch.testing.assert_close(grad(slope)(x), expected)
    torch.testing.assert_close(torch.autograd.grad(slope(leaf), leaf)[0], expected)
    torch.testing.assert_close(jvp(slope, (x,), (t,))[1], (expected * t).sum())


def test_tangents_of_gradients(scalar, x, request):
    t = x.flip(1).cos()
    if "attention" in request.node.callspec.id:
        with pytest.raises(NotImplementedError, match="causal_attention_backward has no forward-mode derivative"):
            jvp(grad(scalar), (x,), (t,))
    else:
        expected = vjp(grad(scalar), x)[1](t)[0]  # a Hessian is symmetric
        torch.testing.assert_close(jvp(grad(scalar), (x,), (t,))[1], expected)


def test_jacfwd(call, x):
    torch.testing.assert_close(jacfwd(call)(x), jacrev(call)(x))


def test_float32_takes_the_kernel(scalar, x):
    torch.testing.assert_close(grad(scalar)(x.float()), by_autograd(scalar, x.float()), rtol=0, atol=0)


def test_autocast(x):
    def loss(x):
        with torch.autocast("cpu", torch.bfloat16):
            out = CALLS["causal_attention"](x)
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


def test_steps_refuse_tangents():
    position, x, cache = torch.zeros(1, dtype=torch.int32), torch.randn(1, 4), torch.randn(1, 1, 4, 8)
    steps = {
        "haar_pool_": lambda x: ak.haar_pool_(x[None].sin()),
        "haar_pool_update": lambda x: ak.haar_pool_update(x, ak.haar_pool_state(1, 4), position, norm="count"),
        "dilated_conv_update": lambda x: ak.dilated_conv_update(
            x, torch.zeros(1, 1, 4), torch.ones(4, 4, 2), None, position, dilation=1
        ),
        "causal_attention_decode": lambda x: ak.causal_attention_decode(
            x.repeat(1, 2)[None, None], cache, cache, position
        ),
    }
    for name, step in steps.items():
        with pytest.raises(RuntimeError, match=f"{name} has no gradient, but . has a tangent"):
            jvp(step, (x,), (x,))
        _, tangent = jvp(lambda x, step=step: step(forward_ad.unpack_dual(x).primal) + x.sum(), (x,), (x,))
        torch.testing.assert_close(tangent, x.sum().expand_as(tangent))  # the way out that the error tells
