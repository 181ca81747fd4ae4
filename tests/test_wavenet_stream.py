"""WaveNetStream: the same codes as wavenet_generate, pulled in any blocks from any thread, the GIL free meanwhile."""

import threading
import time

import numpy as np
import pytest
import torch
from wavenet_cases import DTYPES, pack_of

import audiokernels.wavenet_stream
from audiokernels import WaveNetStream, philox_uniform, wavenet_generate, wavenet_state
from audiokernels._library import C


@pytest.fixture(params=["compiled", "plain"])
def implementation(request, monkeypatch):
    """Both implementations of the class: over the C++ object, and over the op where nothing is compiled."""
    if request.param == "compiled" and C is None:
        pytest.skip("no compiled kernel in this installation")
    if request.param == "plain":
        monkeypatch.setattr(audiokernels.wavenet_stream, "C", None)
    return request.param


def expected_codes(pack, batch, n, seed=3, **kwargs):
    return wavenet_generate(pack, wavenet_state(pack, batch), philox_uniform(seed, batch, n), **kwargs).numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_class", [64, 300])
def test_blocks_are_the_generation(implementation, dtype, n_class):
    pack = pack_of([1, 2, 4, 8], dtype=dtype, n_class=n_class)
    stream = WaveNetStream(pack, seed=3, batch=2, temperature=0.9)
    blocks = [stream.read(n) for n in (0, 1, 2, 3, 64, 50)]
    assert blocks[-1].dtype == (np.uint8 if n_class <= 256 else np.int16)
    assert np.array_equal(np.concatenate(blocks, 1), expected_codes(pack, 2, 120, temperature=0.9))
    assert stream.position == 120
    top = {"temperature": 0.9, "top_k": 12, "top_p": 0.8}
    assert np.array_equal(WaveNetStream(pack, seed=3, batch=2, **top).read(120), expected_codes(pack, 2, 120, **top))


def test_state_forks_and_resumes(implementation):
    pack = pack_of([1, 2, 4, 8])
    stream = WaveNetStream(pack, seed=3)
    stream.read(37)
    fork = WaveNetStream(pack, seed=3, state=stream.state())
    again = stream.state()
    assert np.array_equal(stream.read(50), fork.read(50))
    assert np.array_equal(
        wavenet_generate(pack, again, philox_uniform(3, 1, 50, position=37)).numpy(),
        expected_codes(pack, 1, 87)[:, 37:],
    )


def test_condition_runs_out_with_a_clear_error(implementation):
    pack = pack_of([1, 2, 4], condition=3, hop=10)
    condition = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    stream = WaveNetStream(pack, seed=3, batch=2, condition=condition)
    blocks = [stream.read(n) for n in (7, 20, 23)]
    assert np.array_equal(np.concatenate(blocks, 1), expected_codes(pack, 2, 50, condition=condition))
    before = stream.state()
    with pytest.raises(ValueError, match="condition has 5 frames"):
        stream.read(1)
    assert torch.equal(stream.state(), before)


def test_bad_arguments_are_named(implementation):
    pack = pack_of([1, 2])
    for kwargs, name in (
        ({"seed": -1}, "seed"),
        ({"batch": -1}, "batch"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 2.0}, "top_p"),
        ({"condition": torch.zeros(1, 2, 3)}, "condition"),
        ({"state": torch.zeros(1, 5)}, "state"),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            WaveNetStream(pack, **kwargs)
    with pytest.raises(TypeError, match="^pack"):
        WaveNetStream(pack.data)
    with pytest.raises(ValueError, match="^n must be"):
        WaveNetStream(pack).read(-1)


def test_many_threads_share_one_stream(implementation):
    """Blocks pulled by eight threads are the generation, cut and handed out in some order: none lost, none twice."""
    pack = pack_of([1, 2, 4, 8])
    stream, blocks, lock = WaveNetStream(pack, seed=3), [], threading.Lock()

    def pull():
        for _ in range(5):
            block = bytes(stream.read(64)[0])
            with lock:
                blocks.append(block)

    threads = [threading.Thread(target=pull) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = bytes(expected_codes(pack, 1, 8 * 5 * 64)[0])
    assert sorted(blocks) == sorted(whole[i : i + 64] for i in range(0, len(whole), 64))


@pytest.mark.skipif(C is None, reason="no compiled kernel in this installation")
def test_the_gil_is_free_while_a_block_is_made():
    """Another Python thread keeps running during one long read: with the GIL held it could not count at all."""
    pack = pack_of([2**i for i in range(10)], residual=64, hidden=64, skip=256, head=256, n_class=256)
    stream, counting, counted = WaveNetStream(pack), threading.Event(), []

    def count():
        counting.set()
        while counting.is_set():
            counted.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    counting.wait()
    begun = time.monotonic()
    stream.read(4000)
    ended = time.monotonic()
    counting.clear()
    thread.join()
    assert sum(begun + 0.01 < t < ended - 0.01 for t in counted) >= 3


@pytest.mark.skipif(C is None, reason="no compiled kernel in this installation")
def test_who_waits_for_a_reader_lets_others_run():
    """position and state() wait for the block of another thread without the GIL: a third thread keeps counting."""
    pack = pack_of([2**i for i in range(10)], residual=64, hidden=64, skip=256, head=256, n_class=256)
    stream = WaveNetStream(pack)
    began = time.monotonic()
    stream.read(200)
    n = int(200 * 0.6 / (time.monotonic() - began))  # a block of about 0.6 s
    for asked in (lambda: stream.position, stream.state):
        reader = threading.Thread(target=stream.read, args=(n,))
        waiting = threading.Thread(target=asked)
        reader.start()
        time.sleep(0.02)  # the reader has the lock
        waiting.start()
        ticks = 0
        while reader.is_alive():
            time.sleep(0.005)
            ticks += 1
        reader.join()
        waiting.join()
        assert ticks > 10
