"""Packs as a user keeps them: saved and read by torch, copied, sent to another process."""

import copy
from dataclasses import replace
from pickle import UnpicklingError

import pytest
import torch
import transformer_cases
import wavenet_cases

import audiokernels as ak

PACKS = {
    "wavenet": lambda dtype: wavenet_cases.pack_of([1, 2, 4], dtype=dtype),
    "transformer": lambda dtype: transformer_cases.pack_of(dtype=dtype, **transformer_cases.SHAPES["film, sinusoidal"]),
}
BOTH = pytest.mark.parametrize("kind", PACKS)


def generated(pack):
    """Some codes of two streams; also what a worker runs."""
    room = "wavenet" if isinstance(pack, ak.WaveNetPack) else "transformer"
    state, generate = getattr(ak, f"{room}_state"), getattr(ak, f"{room}_generate")
    return generate(pack, state(pack, 2), ak.philox_uniform(1, 2, 30))


class Foreign:
    """A class that torch does not know."""


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_torch_reads_what_it_saved(kind, dtype, tmp_path):
    pack, path = PACKS[kind](dtype), tmp_path / "model.pt"
    state = ak.wavenet_state(pack, 2) if kind == "wavenet" else ak.transformer_state(pack, 2)
    torch.save({"pack": pack, "state": state}, path)
    for options in ({}, {"mmap": True}, {"weights_only": False}):
        loaded = torch.load(path, **options)
        assert type(loaded["pack"]) is type(pack) and loaded["pack"].shape == pack.shape
        assert torch.equal(generated(loaded["pack"]), generated(pack)) and torch.equal(loaded["state"], state)
    elsewhere = torch.load(path, map_location="meta")["pack"]
    assert elsewhere.data.device.type == "meta" and elsewhere.shape == pack.shape


@BOTH
def test_a_file_is_not_believed(kind, tmp_path):
    """What is saved in a pack must be of torch or a pack, and what torch read must be a pack."""
    pack, path = PACKS[kind](torch.float32), tmp_path / "model.pt"
    torch.save(replace(pack, shape=Foreign()), path)
    with pytest.raises(UnpicklingError, match="Foreign"):
        torch.load(path)
    cut = {"residual" if kind == "wavenet" else "n_inner": 17}
    for wrong in ({"shape": replace(pack.shape, **cut)}, {"data": pack.data[4:]}, {"data": pack.data.float()}):
        torch.save(replace(pack, **wrong), path)
        with pytest.raises(ValueError, match="pack must hold"):
            generated(torch.load(path))
    for wrong in ({"hop": 0}, {"n_class": 1 << 40}, {"n_class": -2}):
        torch.save(replace(pack, shape=replace(pack.shape, **wrong)), path)
        with pytest.raises((ValueError, RuntimeError)):
            generated(torch.load(path))


@BOTH
def test_copies(kind):
    pack = PACKS[kind](torch.float32)
    deep = copy.deepcopy(pack)
    assert deep.data.data_ptr() != pack.data.data_ptr() and torch.equal(generated(deep), generated(pack))
    assert copy.copy(pack).data is pack.data and pack.to("cpu").data is pack.data
    rows = replace(pack, data=torch.stack([pack.data, pack.data], 1)[:, 0])
    with pytest.raises(ValueError, match=r"pack must hold .* strides \(2,\)"):
        generated(rows)


def test_another_process_takes_them():
    packs = [make(torch.bfloat16) for make in PACKS.values()]
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        codes = pool.map(_codes, packs)
    assert codes == [generated(pack).tolist() for pack in packs]


def _codes(pack):
    return generated(pack).tolist()
