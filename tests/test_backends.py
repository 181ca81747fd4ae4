"""use_reference: plain torch serves ops for a while; backends() and explain() say so."""

import threading

import pytest
import torch
from wavenet_cases import pack_of

import audiokernels
from audiokernels import backends, causal_attention, explain, haar_pool, use_reference
from audiokernels._library import C
from audiokernels.causal_attention import causal_attention_ref

pytestmark = pytest.mark.skipif(C is None, reason="without compiled kernels the reference serves everything")
x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0))
q = torch.randn(3, 1, 2, 40, 16, generator=torch.Generator().manual_seed(1))


def asked() -> set[str]:
    return {op for op, devices in backends().items() if devices["cpu"].endswith("use_reference asks for it")}


def test_every_op_and_back():
    before = backends()
    with use_reference():
        assert asked() == set(before)
        assert all(d["cuda"].startswith("reference") for d in backends().values())
    assert backends() == before


def test_results_and_gradients_are_the_references():
    """The kernels differ from it in the last bits."""
    kernel, reference = causal_attention(*q), causal_attention_ref(*q)[0]
    assert not kernel.equal(reference)
    leaf = q.clone().requires_grad_()
    with use_reference(causal_attention):
        assert causal_attention(*q).equal(reference)
        causal_attention(*leaf).square().sum().backward()
    by_reference, leaf.grad = leaf.grad, None
    causal_attention(*leaf).square().sum().backward()
    assert not leaf.grad.equal(by_reference)
    torch.testing.assert_close(leaf.grad, by_reference)
    assert causal_attention(*q).equal(kernel)


def test_only_what_was_asked_for_and_its_backward():
    with use_reference("causal_attention"):
        assert asked() == {"causal_attention", "causal_attention_backward"}
        with use_reference("haar_pool", "causal_attention"):
            assert asked() == {"causal_attention", "causal_attention_backward", "haar_pool"}
        assert asked() == {"causal_attention", "causal_attention_backward"}
        assert explain(causal_attention, *q).kernel == "reference (plain torch)"
        assert explain(haar_pool, x).kernel == f"cpu_{C.isa()}"
    assert asked() == set()


def test_an_error_inside_ends_it():
    with pytest.raises(KeyError), use_reference():
        raise KeyError
    assert asked() == set()


def test_other_threads_and_compiled_graphs_take_it_too():
    compiled, seen = torch.compile(causal_attention, fullgraph=True, backend="aot_eager"), []
    kernel, reference = compiled(*q), causal_attention_ref(*q)[0]
    with use_reference("causal_attention"):
        thread = threading.Thread(target=lambda: seen.append(causal_attention(*q)))
        thread.start()
        thread.join()
        assert compiled(*q).equal(reference)
        assert seen[0].equal(reference)
    assert compiled(*q).equal(kernel)
    assert not kernel.equal(reference)


def test_wrong_names():
    with pytest.raises(ValueError, match="op must be one of causal_attention, .* got haar"), use_reference("haar"):
        pass
    assert asked() == set()


def test_explain_says_which_arguments_are_missing():
    with pytest.raises(TypeError, match=r"^explain\(causal_attention, ...\): missing a required argument: 'v'$"):
        explain("causal_attention", torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8))


def test_generation_goes_on_from_a_kernels_state():
    """Kernel and reference share packs and states."""
    pack = pack_of([1, 2, 4])
    uniforms = audiokernels.philox_uniform(0, 1, 60)
    whole = audiokernels.wavenet_generate(pack, audiokernels.wavenet_state(pack, 1), uniforms)
    state = audiokernels.wavenet_state(pack, 1)
    first = audiokernels.wavenet_generate(pack, state, uniforms[:, :20])
    with use_reference("wavenet_generate"):
        middle = audiokernels.wavenet_generate(pack, state, uniforms[:, 20:40])
    last = audiokernels.wavenet_generate(pack, state, uniforms[:, 40:])
    assert torch.cat([first, middle, last], dim=1).equal(whole)
