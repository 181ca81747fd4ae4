"""The launchers of the generators' CUDA kernels, on GPUs that are not there."""

import sys

import pytest
import torch

import audiokernels
from audiokernels._gpu import Gpu

H100 = Gpu((9, 0), 132, 232448, (15, 7))


def launch(monkeypatch, room, device, pack, **options):
    """What wavenet's or transformer's launcher asks of its kernels on such a GPU: the plan, or the results of the
    reference where it takes that."""
    door, asked = sys.modules[f"audiokernels.{room}_generate"], []
    monkeypatch.setattr(door, "gpu_facts", lambda _: device)
    monkeypatch.setattr(door, "_cuda_op", lambda *arguments: asked.append(arguments[-1]))
    call = {
        "state": getattr(audiokernels, f"{room}_state")(pack, 2),
        "uniforms": audiokernels.philox_uniform(0, 2, 8),
        "codes": None,
        "condition": None,
    }
    result = door._launch(pack.data, pack.shape.to_ints(), *(call | options).values(), 1.0, False)
    return asked or result


def check_checks_come_first(monkeypatch, room, pack, conditioned):
    """Before the device is asked. conditioned: a pack with 3 condition channels and a hop of 4."""
    frames = torch.zeros(2, 3, 3)
    for frame_count in (2, 3):  # where in a frame the stream stands is not looked at
        assert launch(monkeypatch, room, H100, conditioned, condition=frames[:, :frame_count])
    for wrong, message in (
        ({"uniforms": torch.zeros(2, 8, device="meta")}, "uniforms must be on the pack's device cpu, got meta"),
        ({"state": getattr(audiokernels, f"{room}_state")(pack, 3)}, "state must have shape"),
        ({"codes": torch.zeros(2, 9, dtype=torch.uint8)}, "codes must have shape"),
        ({"condition": frames}, "condition must be given exactly for"),
    ):
        with pytest.raises(ValueError, match=message):
            launch(monkeypatch, room, H100, pack, **wrong)
    with pytest.raises(ValueError, match=r"condition must have shape \(2, 2 .. 3, 3\) \(hop 4\), got \(2, 1, 3\)"):
        launch(monkeypatch, room, H100, conditioned, condition=frames[:, :1])
