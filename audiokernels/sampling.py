"""How a code is drawn from logits: by one uniform number, with a temperature, top-k and top-p.

    p_c = exp((l_c - max l) / T) in float32,    code = the first class with sum_{c' <= c} p_c' > u * sum p

over the classes that stay. top_k leaves out every class whose logit is below the k-th largest (Fan et al.,
"Hierarchical neural story generation", arXiv 1805.04833). Of the rest, top_p keeps the smallest set of most probable
classes that holds that share of their probability, the class that reaches it included (Holtzman et al., "The curious
case of neural text degeneration", arXiv 1904.09751, equations 2 and 3). Classes that tie stay or go together: what
stays are those at or above a threshold, whatever the order of the classes. T = 0 takes the first largest logit; any
other is taken as at least 2^-126 (classes that tie for the largest are alike) and at most 2^126 (all are).
"""

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from audiokernels._checks import is_whole


@dataclass(frozen=True)
class Sampling:
    """The drawing rule of all generators: those with a kernel have it in the kernel, others call `draw`.

    Args:
        temperature: >= 0; logits are divided by it; 0 takes the largest logit.
        top_k: an integer >= 1: only the k most probable classes are drawn (more where several tie for the k-th place).
        top_p: above 0, at most 1: after top_k, only the smallest set of most probable classes that holds this share.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if value is None and name == "top_p":
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k is not None and not is_whole(self.top_k):
            raise TypeError(f"top_k must be an integer, got {type(self.top_k).__name__}")
        if self.top_k is not None and not 1 <= self.top_k < 1 << 63:
            raise ValueError(f"top_k must be {'>= 1' if self.top_k < 1 else 'below 2^63'}, got {self.top_k}")

    def weights(self, logits: Tensor) -> Tensor:
        """Probabilities times a number: logits (batch, n_class) -> float32 of that shape, 0 for classes left out."""
        logits = logits.float()
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float()
        if self.top_k is not None and self.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k, 1).values[:, -1:], -torch.inf)
        temperature = min(max(self.temperature, 2.0**-126), 2.0**126)  # and 1 / temperature: normal numbers in float32
        p = torch.exp((logits - logits.amax(1, keepdim=True)) * (1 / temperature))
        if self.top_p is not None and self.top_p < 1:
            ordered = p.sort(1, descending=True).values
            share = ordered.cumsum(1)
            crossing = (share < self.top_p * share[:, -1:]).sum(1, keepdim=True)
            p = p * (p >= ordered.gather(1, crossing))
        return p

    def draw(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Codes int64 (batch,) by inverse CDF: logits (batch, n_class), uniforms (batch,) in [0, 1)."""
        for name, tensor in (("logits", logits), ("uniforms", uniforms)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if logits.ndim != 2 or uniforms.shape != logits.shape[:1]:
            came = f"{tuple(logits.shape)} and {tuple(uniforms.shape)}"
            raise ValueError(f"logits must have shape (batch, n_class) and uniforms (batch,), got {came}")
        if self.temperature == 0:
            return logits.argmax(1)
        cdf = self.weights(logits).cumsum(1)
        total = cdf[:, -1:]
        return torch.minimum((cdf <= uniforms[:, None] * total).sum(1), (cdf < total).sum(1))
