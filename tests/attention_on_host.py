"""causal_attention by its CUDA C++ kernel for small heads, run on the host or on a GPU."""

import torch
from cuda_on_host import CSRC, build

from audiokernels.causal_attention import lse_like, output_like

LOG2_E = 1.4426950408889634
KERNEL = "causal_attention_sm90_cuda.cu"
SOURCE = """
CUDA_ON_HOST_EXPORT int attend(const int64_t* n, void** data, double scale) {
  audiokernels::AttentionCall c{};
  const auto next = [&] { return *n++; };
  c.batch = next(), c.nheads = next(), c.group = next(), c.seqlen_q = next(), c.seqlen_k = next();
  c.headdim = next(), c.window = next();
  for (auto& stride : c.q_stride) stride = next();
  for (auto* strides : {c.k_stride, c.v_stride, c.o_stride})
    for (int i = 0; i < 3; i++) strides[i] = next();
  c.q = (uint16_t*)data[0], c.k = (uint16_t*)data[1], c.v = (uint16_t*)data[2], c.out = (uint16_t*)data[3];
  c.lse = (float*)data[4], c.scale = float(scale);
  return audiokernels::causal_attention_sm90_cuda(c, nullptr);
}
CUDA_ON_HOST_EXPORT int exponentials(const float* s, uint32_t* out, int64_t n, double scale, double m) {
  for (int64_t i = 0; i < n; i += 2)
    out[i / 2] = audiokernels::exp2_polynomial(s[i], s[i + 1], float(scale), audiokernels::kMagic - float(m));
  return 0;
}
"""


def on_host(q, k, v, *, scale=None, window=None, seed=0, edit=None):
    """(out, lse); room for them is poisoned with NaN. `edit` changes (this, to that) in the kernel."""
    (batch, nheads, seqlen_q, headdim), (_, nheads_kv, seqlen_k, _) = q.shape, k.shape
    out, lse = output_like(q).fill_(torch.nan), lse_like(q).fill_(torch.nan)
    sizes = [batch, nheads, nheads // nheads_kv, seqlen_q, seqlen_k, headdim, min(window or seqlen_k, seqlen_k)]
    strides = [*q.stride(), *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]]
    pointers = torch.tensor([x.data_ptr() for x in (q, k, v, out, lse)])
    text = f'#include "{KERNEL}"'
    if edit is not None:
        text = (CSRC / KERNEL).read_text()
        if edit[0] not in text:
            raise ValueError(f"not in the kernel: {edit[0]}")
        text = text.replace(*edit)
    scale = headdim**-0.5 if scale is None else scale
    build(text + SOURCE).call("attend", torch.tensor(sizes + strides), pointers, float(scale * LOG2_E), seed=seed)
    return out, lse


def on_gpu(q, k, v, *, scale=None, window=None, seed=0):
    """The same on a GPU."""
    q, k, v = (x.cuda() for x in (q, k, v))
    out, lse = output_like(q).fill_(torch.nan), lse_like(q).fill_(torch.nan)
    scale = (q.shape[3] ** -0.5 if scale is None else scale) * LOG2_E
    torch.ops.audiokernels._causal_attention_sm90(q, k, v, out, lse, scale, min(window or k.shape[2], k.shape[2]))
    return out.cpu(), lse.cpu()


def exponentials(s, scale, m):
    """2^(s scale - m) by the kernel's polynomial, float32 to bfloat16; an even number of them."""
    out = torch.empty(len(s) // 2, dtype=torch.int32)
    build(f'#include "{KERNEL}"' + SOURCE).call("exponentials", s, out, len(s), float(scale), float(m))
    return out.view(torch.bfloat16).double()
