"""wavenet_generate by its kernels for GPUs, run on the host: the arguments of wavenet_generate, and which kernel."""

import re

import torch
from cuda_on_host import CSRC, build

from audiokernels._generation import condition_frames
from audiokernels._packing import LANES, round_up

SOURCE = """
#include "wavenet_{kernel}_cuda.cu"
{launch}
CUDA_ON_HOST_EXPORT int generate(const int64_t* n, void** data, double temperature, double top_p) {{
  using namespace audiokernels;
  WaveNetCall c{{}};
  const auto next = [&] {{ return *n++; }};
  c.dtype = next(), c.residual = next(), c.hidden = next(), c.skip = next(), c.head = next(), c.n_class = next();
  c.width = next(), c.condition = next(), c.hop = next(), c.n_layer = next();
  for (int i = 0; i < c.n_layer; i++) c.dilations[i] = next();
  const auto pad = [](int rows) {{ return (rows + 15) / 16 * 16; }};
  c.x_rows = pad(c.residual), c.h_rows = pad(c.hidden), c.skip_rows = pad(c.skip), c.head_rows = pad(c.head);
  c.class_rows = pad(c.n_class);
  c.batch = next(), c.n = next(), c.table_bytes = next(), c.state_stride = next();
  for (auto& stride : c.uniforms_stride) stride = next();
  for (auto& stride : c.codes_stride) stride = next();
  c.forced = next(), c.code_bytes = next();
  for (auto& stride : c.frames_stride) stride = next();
  c.n_frames = next();
  c.pack = (uint8_t*)data[0], c.state = (float*)data[1], c.uniforms = (float*)data[2], c.codes = data[3];
  c.frames = (float*)data[4], c.base = (float*)data[5], c.out = data[6], c.logits = (float*)data[7];
  c.sampling = {{float(temperature), int32_t(next()), float(top_p)}};
  c.stages = (unsigned long long*)data[8];
  const int plan[4] = {{int(next()), int(next()), int(next()), int(next())}};
  return launch(c, plan);
}}
"""

LAUNCH = {
    "general": "return audiokernels::wavenet_general_cuda(c, plan[0], plan[1], nullptr);",
    "cluster": """
      const audiokernels::WaveNetCluster k{plan[0], plan[1], plan[2]};
      if (plan[3] != audiokernels::Places(c, k).bytes) return -1;
      audiokernels::WaveNetCall sizes = c;  // as the planner asks, of a shape alone
      sizes.batch = 0;
      int clusters = 0;
      if (audiokernels::wavenet_cluster_most(sizes, k, &clusters) || clusters < 1) return -2;
      return audiokernels::wavenet_cluster_cuda(c, k, nullptr);""",
}


def on_host(kernel, plan, pack, state, uniforms, *, seed=0, edit=None, **options):
    """The same as wavenet_generate; `plan` is that of the private op; `edit` changes (this, to that) in the kernel."""
    codes, condition = options.get("codes"), options.get("condition")
    shape, (batch, n) = pack.shape, uniforms.shape
    z_rows, layers = 2 * round_up(shape.hidden, LANES), len(shape.dilations)
    base = None if condition is None else torch.full((batch, layers, z_rows), torch.nan)
    out = torch.full((batch, n), 99, dtype=shape.code_dtype)
    logits = torch.full((batch, n, shape.n_class), torch.nan) if options.get("return_logits") else None
    assert condition is None or condition.shape[1] >= condition_frames(shape, state, n)
    numbers = [*shape.to_ints()[:9], layers, *shape.dilations, batch, n, 4 * sum(shape.table_floats())]
    numbers += [state.stride(0), *uniforms.stride()]
    numbers += [0, 0, 0, 1] if codes is None else [*codes.stride(), codes.shape[1], codes.element_size()]
    numbers += [0, 0, 0, 0] if condition is None else [*condition.stride(), condition.shape[1]]
    tensors = [pack.data, state, uniforms, codes, condition, base, out, logits, options.get("stages")]
    pointers = torch.tensor([0 if t is None else t.data_ptr() for t in tensors])
    launch = f"static int launch(const audiokernels::WaveNetCall& c, const int* plan) {{ {LAUNCH[kernel]} }}"
    source = SOURCE.format(kernel=kernel, launch=launch)
    if edit is not None:
        text = (CSRC / f"wavenet_{kernel}_cuda.cu").read_text()
        seen = set()
        while header := re.search(r'#include "(wavenet_cluster\w*\.h)"', text):
            own = "" if header[1] in seen else (CSRC / header[1]).read_text().replace("#pragma once", "")
            text = text.replace(header[0], own, 1)
            seen.add(header[1])
        if edit[0] not in text:
            raise ValueError(f"not in the kernel: {edit[0]}")
        source = source.replace(f'#include "wavenet_{kernel}_cuda.cu"', text.replace(*edit))
    sampling = [float(options.get(name, 1.0)) for name in ("temperature", "top_p")]
    numbers = torch.tensor([*numbers, options.get("top_k", 0), *plan])
    build(source).call("generate", numbers, pointers, *sampling, seed=seed)
    return out if logits is None else (out, logits)
