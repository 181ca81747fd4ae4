"""WaveNet generation in PyTorch as fast as a GPU user would get it: ring buffers, one step captured in a CUDA graph.

A step keeps everything in tensors of fixed address (rings, position, code), so that it runs eagerly, replays in a CUDA
graph, and can be compiled before it is captured.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class RingStep:
    """Draws one sample of `batch` streams a call; weights as wavenet_pack takes them, computed in their dtype."""

    def __init__(self, weights: dict[str, Tensor], dilations: Sequence[int], batch: int):
        w = self.weights = weights
        self.dilations = list(dilations)
        self.convs = w["conv_weight"].transpose(2, 3).flatten(2)
        self.skip = w["skip_weight"].transpose(0, 1).flatten(1), w["skip_bias"].sum(0)
        n_class, residual = w["embedding"].shape
        self.width = w["conv_weight"].shape[3]
        self.rings = [w["embedding"].new_zeros((self.width - 1) * d, batch, residual) for d in self.dilations]
        self.position = torch.zeros(1, dtype=torch.int64, device=w["embedding"].device)
        self.code = torch.full((batch,), n_class // 2, device=self.position.device)
        self.uniform = torch.zeros(batch, 1, device=self.position.device)  # the caller's to fill
        self.condition = None  # (layers, batch, 2 H): projected, for the current frame

    def __call__(self) -> Tensor:
        """The next codes (batch,), in the same tensor each time."""
        w, x, hs = self.weights, self.weights["embedding"][self.code], []
        for layer, (ring, d) in enumerate(zip(self.rings, self.dilations, strict=True)):
            taps = [ring.index_select(0, (self.position + k * d) % len(ring))[0] for k in range(self.width - 1)] + [x]
            ring.index_copy_(0, self.position % len(ring), x[None])
            z = F.linear(torch.cat(taps, -1), self.convs[layer], w["conv_bias"][layer])
            if self.condition is not None:
                z = z + self.condition[layer]
            a, b = z.chunk(2, -1)
            hs.append(torch.tanh(a) * torch.sigmoid(b))
            if layer + 1 < len(self.rings):
                x = x + F.linear(hs[-1], w["res_weight"][layer], w["res_bias"][layer])
        head = F.relu(F.linear(F.relu(F.linear(torch.cat(hs, -1), *self.skip)), w["head_weight"], w["head_bias"]))
        logits = F.linear(head, w["out_weight"], w["out_bias"]).float()
        cdf = torch.softmax(logits, -1).cumsum(-1)
        drawn = torch.searchsorted(cdf, self.uniform * cdf[:, -1:], right=True)[:, 0]
        self.code.copy_(drawn.clamp_(max=logits.shape[1] - 1))
        self.position += 1
        return self.code


def captured(step: RingStep, compiled: bool) -> Callable[[], object]:
    """The step as a replay of a CUDA graph, compiled by torch.compile before that or not."""
    body = torch.compile(step.__call__, fullgraph=True, dynamic=False) if compiled else step
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        body()
    return graph.replay
