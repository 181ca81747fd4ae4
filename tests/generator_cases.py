"""What every generator that steps in plain torch must do: the same whole and step by step, saved and read back."""

import torch
from audiomodels.registry import load
from torch.nn import functional as F


def sharpen(model, scale=3.0):
    """Fresh weights give smooth and nearly uniform logits: these are neither."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale
    return model.eval()


def stepped(model, codes):
    """The logits of each step of a stream that begins with codes[:, 0] and is forced to go on with the others."""
    state, logits = model.initial_state(len(codes)), []
    for now, following in zip(codes.unbind(1), codes[:, 1:].unbind(1), strict=False):
        chosen, step = model.step(state, now, forced=following)
        assert torch.equal(chosen, following)
        logits.append(step)
    return torch.stack(logits, 1)


def check_generation(model):
    """Blocks, batch and prompt do not change what is drawn."""
    n = 2 * (model.config.sample_rate // 10) + 7  # two blocks and a part of one
    codes = model.generate(n, seed=4, batch=2)
    assert codes.shape == (2, n) and codes.unique().numel() > 10
    blocks = list(model.stream(n, seed=4, batch=2))
    assert [block.shape[1] for block in blocks] == [model.config.sample_rate // 10] * 2 + [7]
    assert torch.equal(torch.cat(blocks, 1), codes)
    assert torch.equal(model.generate(n, seed=4)[0], codes[0])
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(model.generate(n, seed=5, batch=2), codes)
    assert torch.equal(model.generate(n - 50, codes[:, :50], seed=4, batch=2), codes[:, 50:])
    assert model.generate(0).shape == (1, 0)
    best = model.generate(30, temperature=0)
    assert torch.equal(best, model.generate(30, temperature=0, seed=1))
    assert torch.equal(best, model.generate(30, top_k=1)) and torch.equal(best, model.generate(30, top_p=1e-6, seed=2))
    assert not torch.equal(best, model.generate(30, top_k=2))


def check_top(logits, drawn, k):
    """drawn (batch, time) are among the k most probable classes of logits (batch, time, n_class), not all the first."""
    chosen, best = logits.gather(2, drawn[:, :, None]), logits.topk(min(k, logits.shape[2]), 2).values
    margin = 2e-5 * max(1.0, float(logits.abs().max()))
    assert (chosen >= best[:, :, -1:] - margin).all() and (chosen < best[:, :, :1] - margin).any()


def check_drawn_frequencies(probabilities, drawn):
    """drawn (n,) classes follow probabilities (n_class,): each frequency within 5 standard deviations."""
    frequency = F.one_hot(drawn, len(probabilities)).double().mean(0)
    deviation = (probabilities * (1 - probabilities) / len(drawn)).sqrt()
    assert ((frequency - probabilities).abs() <= 5 * deviation + 1e-6).all()


def check_folder(model, folder, *inputs):
    """save_pretrained, and registry.load, which finds the class."""
    model.save_pretrained(folder)
    again = load(folder)
    assert type(again) is type(model) and again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(*inputs), model(*inputs))
