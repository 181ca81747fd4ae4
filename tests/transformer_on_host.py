"""transformer_generate by its kernel for GPUs, run on the host: its arguments, and in how many blocks."""

import re
from functools import cache
from unittest import mock

import torch
from cuda_on_host import CSRC, build
from launcher_cases import H100

from audiokernels import transformer_plan
from audiokernels._generation import condition_frames

SOURCE = """
CUDA_ON_HOST_EXPORT int generate(const int64_t* n, void** data, double temperature, double top_p) {
  using namespace audiokernels;
  TransformerCall c{};
  const auto next = [&] { return *n++; };
  c.dtype = next(), c.cache = next(), c.n_layer = next(), c.n_head = next(), c.n_embd = next(), c.n_inner = next();
  c.n_class = next(), c.window = next(), c.positions = next(), c.fusion = next(), c.context = next(), c.code = next();
  c.condition = next(), c.hop = next(), c.n_width = next();
  for (int i = 0; i < c.n_width; i++) c.widths[i] = next();
  c.n_haar = next();
  for (int i = 0; i < c.n_haar; i++) c.levels[i] = next(), c.counts[i] = next();
  c.blocks = next(), c.resident = next(), c.staged = next(), c.aligned = next();
  c.batch = next(), c.n = next(), c.table_bytes = next(), c.state_stride = next();
  for (auto& stride : c.uniforms_stride) stride = next();
  for (auto& stride : c.codes_stride) stride = next();
  c.forced = next(), c.code_bytes = next();
  for (auto& stride : c.frames_stride) stride = next();
  c.n_frames = next();
  c.pack = (uint8_t*)data[0], c.state = (float*)data[1], c.uniforms = (float*)data[2], c.codes = data[3];
  c.frames = (float*)data[4], c.out = data[5], c.logits = (float*)data[6];
  c.sampling = {float(temperature), int32_t(next()), float(top_p)};
  c.finish();
  const int bytes = next();
  if (TransformerPlaces(c).bytes != bytes) return -TransformerPlaces(c).bytes;
  int clusters = 0;
  if (c.blocks > 1 && (transformer_clusters_cuda(c.blocks, bytes, &clusters) || clusters < 1)) return -1;
  return transformer_generate_cuda(c, bytes, nullptr);
}
"""


@cache
def kernel() -> str:
    """The kernel with its room's headers in it, each where it is included first."""
    text, included = (CSRC / "transformer_generate_cuda.cu").read_text(), set()

    def insert(found: re.Match) -> str:
        there = found[1] in included
        included.add(found[1])
        return "" if there else (CSRC / found[1]).read_text().replace("#pragma once", "")

    while '#include "transformer_' in text:
        text = re.sub(r'#include "(transformer_\w+\.h)"', insert, text, count=1)
    return text


def on_host(pack, state, uniforms, *, blocks=1, kept=None, seed=0, threads=128, edit=None, **options):
    """The same as transformer_generate; `edit` changes (this, to that) in the kernel and its headers.

    kept: (resident, staged) of a plan; by default as much as an H100 has room for.
    A block has 512 threads on a GPU. No sum depends on their number, and 128 are four times as quick here.
    """
    codes, condition = options.get("codes"), options.get("condition")
    shape, (batch, n) = pack.shape, uniforms.shape
    out = torch.full((batch, n), 99, dtype=shape.code_dtype)
    logits = torch.full((batch, n, shape.n_class), torch.nan) if options.get("return_logits") else None
    assert condition is None or condition.shape[1] >= condition_frames(shape, state, n)
    numbers = [*shape.to_ints()[:15], *shape.widths, len(shape.haar) // 2, *shape.haar, blocks]
    aligned = transformer_plan.aligned(shape, state)
    resident, staged = kept or transformer_plan.kept(shape, blocks, H100.shared_memory)
    staged = staged if aligned else 0
    numbers += [resident, staged, aligned]
    numbers += [batch, n, 4 * sum(shape.table_floats()), state.stride(0), *uniforms.stride()]
    numbers += [0, 0, 0, 1] if codes is None else [*codes.stride(), codes.shape[1], codes.element_size()]
    numbers += [0, 0, 0, 0] if condition is None else [*condition.stride(), condition.shape[1]]
    tensors = [pack.data, state, uniforms, codes, condition, out, logits]
    pointers = torch.tensor([0 if t is None else t.data_ptr() for t in tensors])
    text = kernel()
    for before, after in (("kTransformerThreads = 512", f"kTransformerThreads = {threads}"), *([edit] if edit else [])):
        if before not in text:
            raise ValueError(f"not in the kernel: {before}")
        text = text.replace(before, after)
    sampling = [float(options.get(name, 1.0)) for name in ("temperature", "top_p")]
    with mock.patch.object(transformer_plan, "THREADS", threads):
        n_bytes = transformer_plan.shared_bytes(shape, blocks, resident, staged)
    numbers = torch.tensor([*numbers, options.get("top_k", 0), n_bytes])
    build(text + SOURCE).call("generate", numbers, pointers, *sampling, seed=seed)
    return out if logits is None else (out, logits)
