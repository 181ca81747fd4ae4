"""The convolutional baselines: the published numbers of parameters, log-mel, training through the loop, folders."""

import numpy as np
import pytest
import torch
from audiomodels import features
from audiomodels.cnn import CNN, CNNConfig
from audiomodels.tagging import Tagging
from audiomodels.train import TrainConfig, fit

pytestmark = pytest.mark.usefixtures("one_thread")
# at 200 labels: published (FSD50K, two digits), exact here, depth of the longest path of convolutions and dense layers
SIZES = {
    "vgg": (0.27e6, 265_640, 7),
    "resnet18": (11.3e6, 11_272_840, 18),
    "densenet121": (12.5e6, 12_365_512, 121),
    "crnn": (0.96e6, 972_616, 4),
}


@pytest.mark.parametrize("kind", SIZES)
def test_published_sizes(kind):
    published, exact, depth = SIZES[kind]
    net = CNN(CNNConfig(kind=kind))
    count = sum(p.numel() for p in net.parameters())
    assert count == exact and abs(count / published - 1) < 0.02
    shortcut = sum(isinstance(m, torch.nn.Conv2d) for n, m in net.named_modules() if "shortcut" in n)
    weighted = sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in net.modules())
    assert weighted - shortcut == depth and shortcut == (3 if kind == "resnet18" else 0)


@pytest.mark.parametrize("kind", SIZES)
def test_forward_save_and_load(kind, tmp_path):
    torch.manual_seed(0)
    net = CNN(CNNConfig(kind=kind, n_class=7, labels=tuple("abcdefg"))).train()
    audio = 0.1 * torch.randn(3, 16000)
    first = next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_hook(lambda _m, _i, y: seen.append(y.is_contiguous(memory_format=torch.channels_last)))
    seen = []
    logits = net(audio)
    assert logits.shape == (3, 7)
    assert seen == [True]  # else a step takes 1.3 to 1.6 times as long
    net.loss(logits, torch.ones(3, 7)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    net.eval()
    torch.testing.assert_close(net(audio[:1]), net(audio)[:1], rtol=1e-3, atol=1e-4)  # rows do not mix
    net(audio[:, :9600])
    with pytest.raises(ValueError, match="audio must have at least 9600 samples, got 9599"):
        net(audio[:, :9599])
    net.save_pretrained(tmp_path / kind)
    again = CNN.from_pretrained(tmp_path / kind)
    assert again.config == net.config and torch.equal(again(audio), net(audio))
    assert {p.suffix for p in (tmp_path / kind).iterdir()} == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize("rate", [16000, 22050])
def test_log_mel_has_the_published_shape(rate):
    net = CNN(CNNConfig(sample_rate=rate))
    tone = torch.sin(6.283185 * 1000 * torch.arange(rate) / rate)[None]
    log_mel = net.log_mel(tone)
    assert log_mel.shape == (1, 96, 101)
    assert (features.mel_filters(96, 2048, rate).sum(1) > 0).all()
    band = int(log_mel[0, :, 50].argmax()) + 1
    assert features.mel_to_hz(band / 97 * features.hz_to_mel(rate / 2)) == pytest.approx(1000, rel=0.03)
    assert float(net.log_mel(torch.zeros(1, rate)).max()) == pytest.approx(np.log(1e-5))


def test_it_trains_through_the_loop_and_resumes(tmp_path):
    """Batch norm's counters go through checkpoints too."""

    def crops(step):
        draw = torch.Generator().manual_seed(step)
        labels = torch.rand(4, 2, generator=draw) < 0.5
        time = torch.arange(9600) / 16000
        tones = torch.stack([torch.sin(6.2832 * hz * time) for hz in (300, 2000)])
        return labels.float() @ tones * 0.3 + 0.01 * torch.randn(4, 9600, generator=draw), labels.float()

    def run(out, steps):
        torch.manual_seed(0)
        net = CNN(CNNConfig(kind="vgg", n_class=2))
        config = TrainConfig(out=str(out), steps=steps, batch=4, length=9600, context=0, lr=3e-3, warmup=1)
        config.schedule, config.save_every, config.tensorboard, config.progress = "constant", 3, False, False
        return net, fit(net, crops, config, task=Tagging())

    net, history = run(tmp_path / "whole", 12)
    run(tmp_path / "parts", 7)
    again, _ = run(tmp_path / "parts", 12)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    assert int(net.state_dict()["standardise.num_batches_tracked"]) == 12
    assert np.mean(history.bits[-3:]) < 0.8 * history.bits[0]


@pytest.mark.parametrize(("change", "rule"), [({"kind": "vgg16"}, "kind must be one of"), ({"n_mel": 8}, "40 .. 256")])
def test_wrong_configs(change, rule):
    with pytest.raises(ValueError, match=rule):
        CNNConfig(**change)
