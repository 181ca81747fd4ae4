"""Saved models: half-width files, and the models that come with the package."""

import pytest
import torch
from audiomodels import WaveNet, WaveNetConfig, pretrained

SIZES = {"n_layer": 2, "dilation_cycle": 2, "residual_channels": 8, "skip_channels": 8, "head_channels": 8}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_width_files(tmp_path, dtype):
    """Half the size; what is read is float32 of the rounded weights; the model that was saved stays as it was."""
    torch.manual_seed(0)
    model = WaveNet(WaveNetConfig(**SIZES))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "half", dtype=dtype)
    again = WaveNet.from_pretrained(tmp_path / "half").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and again[name].dtype == tensor.dtype
        torch.testing.assert_close(again[name], tensor.to(dtype).to(tensor.dtype), rtol=0, atol=0)
    full, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.6 * full
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        model.save_pretrained(tmp_path / "int", dtype=torch.int8)


def test_shipped_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "SHIPPED", tmp_path / "checkpoints")
    assert pretrained.shipped() == []
    with pytest.raises(pretrained.ModelError, match="piano: no such folder, and none of the models shipped: none"):
        WaveNet.from_pretrained("piano")
    WaveNet(WaveNetConfig(**SIZES)).save_pretrained(tmp_path / "checkpoints" / "piano")
    assert pretrained.shipped() == ["piano"]
    assert WaveNet.from_pretrained("piano").config == WaveNetConfig(**SIZES)
    with pytest.raises(pretrained.ModelError, match="violin: no such folder, and none of the models shipped: piano"):
        WaveNet.from_pretrained("violin")
