// WaveNet generation on any GPU from sm_80 on, any sizes: a block runs all samples of one or four streams, the weights
// come from L2. Compiled, not yet run on a GPU.
//
// A thread has four outputs (one 16-byte load reads their weights for a step of inputs) and one of several slices of
// the inputs; the slices' sums are added in order, so that a sum has one tree whatever the batch.
#include "generation_device.h"
#include "wavenet_generate_cuda.h"

namespace audiokernels {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kRowsOfThread = 4;

// tanh(a) * sigmoid(b)
__device__ inline float gate(float a, float b) {
  const float ea = exp_clamped(-2.0f * a, 30.0f), eb = exp_clamped(-b, 30.0f);
  return (1.0f - ea) / ((1.0f + ea) * (1.0f + eb));
}

// ---- shared memory; vectors of all streams side by side, element i of stream b at [i * NB + b]

template <int NB>
struct Vectors {
  float *in, *z, *x, *skip, *partial, *scale;  // skip follows x
  int *packed, *slots, *codes;                 // packed: int8 inputs, four in one

  // Returns the bytes that it takes. audiokernels/wavenet_plan.py knows the same sum.
  __host__ __device__ int carve(const WaveNetCall& c, char* at) {
    int floats = 0;
    const auto take = [&](int n) {
      const int offset = floats;
      floats += (n + 3) / 4 * 4;
      return offset;
    };
    const int inputs = most(most(c.width * c.x_rows, c.h_rows), most(c.skip_rows, c.head_rows)) * NB;
    const int in_at = take(inputs), z_at = take(most(most(2 * c.h_rows, c.head_rows), c.class_rows) * NB);
    const int x_at = take(c.x_rows * NB), skip_at = take(c.skip_rows * NB);
    const int partial_at = take(kThreads * kRowsOfThread * NB);
    const int packed_at = take(c.dtype == kInt8 ? inputs / 4 : 0), scale_at = take(c.width * NB);
    const int slots_at = take(c.n_layer * NB), codes_at = take(NB);
    if (at) {
      float* f = reinterpret_cast<float*>(at);
      in = f + in_at, z = f + z_at, x = f + x_at, skip = f + skip_at, partial = f + partial_at, scale = f + scale_at;
      int* i = reinterpret_cast<int*>(at);
      packed = i + packed_at, slots = i + slots_at, codes = i + codes_at;
    }
    return 4 * floats;
  }
  static __host__ __device__ int most(int a, int b) { return a > b ? a : b; }
};

// Slices of the inputs of a pass over `steps` with `quads` threads a slice.
struct Split {
  int quads, slices, per_slice;
  __device__ Split(int quads_left, int steps) {
    quads = quads_left < kThreads ? quads_left : kThreads;
    slices = kThreads / quads;
    if (slices > steps) slices = steps;
    per_slice = (steps + slices - 1) / slices;
  }
};

// partial[slice][row][b]: this thread's four rows and slice of `steps` steps.
template <class Dot, int NB>
__device__ void sum_slice(const uint4* lanes, int row_quads, int quad, int begin, int end, const typename Dot::In* in,
                          typename Dot::Sum* partial) {
  typename Dot::Sum sums[kRowsOfThread][NB] = {};
  constexpr int kWords = Dot::kByTap ? 1 : Dot::kGroup;  // of the input vector a step
#pragma unroll 4
  for (int s = begin; s < end; s++) {
    const uint4 w = __ldg(lanes + int64_t(s) * row_quads + quad);
    const typename Dot::In* at = in + s * kWords * NB;
    for (int b = 0; b < NB; b++) {
      sums[0][b] = Dot::add(sums[0][b], w.x, at + b, NB);
      sums[1][b] = Dot::add(sums[1][b], w.y, at + b, NB);
      sums[2][b] = Dot::add(sums[2][b], w.z, at + b, NB);
      sums[3][b] = Dot::add(sums[3][b], w.w, at + b, NB);
    }
  }
  for (int i = 0; i < kRowsOfThread; i++)
    for (int b = 0; b < NB; b++) partial[i * NB + b] = sums[i][b];
}

template <class Dot, int NB>
struct Net {
  using Sum = typename Dot::Sum;
  const WaveNetCall& c;
  Vectors<NB> v;
  int64_t first;  // the block's streams: first .. first + active - 1
  int active;

  // Inputs as the pack type wants them. int8: each tap of each stream scaled by its largest one, as on the CPU.
  __device__ const typename Dot::In* prepare(const PackedMatrix& m) {
    if constexpr (Dot::kByTap) {
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
      for (int task = warp; task < m.taps * NB; task += kWarps) {
        const int tap = task / NB, b = task % NB, inputs = 4 * m.steps;
        const float* in = v.in + tap * inputs * NB + b;
        float largest = 0.0f;
        for (int i = lane; i < inputs; i += 32) largest = fmaxf(largest, fabsf(in[i * NB]));
        largest = warp_max(largest);
        const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        if (lane == 0) v.scale[task] = largest / 127.0f;
        for (int s = lane; s < m.steps; s += 32) {
          uint32_t four = 0;
          for (int j = 0; j < 4; j++)
            four |= (uint32_t(__float2int_rn(in[(4 * s + j) * NB] * inverse)) & 0xff) << 8 * j;
          v.packed[(tap * m.steps + s) * NB + b] = int(four);
        }
      }
      __syncthreads();
      return v.packed;
    } else {
      return v.in;
    }
  }

  // to[row] = sum + bias[row], plus to[row] itself if it accumulates; stream b's biases lie bias_stride * b further on.
  // int8 goes tap by tap, each adding to the one before. Ends synchronised.
  __device__ void product(const PackedMatrix& m, int64_t bias_stride, float* to, bool accumulates) {
    const typename Dot::In* in = prepare(m);
    Sum* partial = reinterpret_cast<Sum*>(v.partial);
    const int passes = Dot::kByTap ? m.taps : 1, steps = Dot::kByTap ? m.steps : m.taps * m.steps;
    for (int quad = 0; quad < m.rows / 4; quad += kThreads)
      for (int pass = 0; pass < passes; pass++) {
        const Split split(m.rows / 4 - quad, steps);
        const int mine = threadIdx.x % split.quads, slice = threadIdx.x / split.quads;
        const int begin = slice * split.per_slice;
        const int end = begin + split.per_slice < steps ? begin + split.per_slice : steps;
        if (slice < split.slices)
          sum_slice<Dot, NB>(m.lanes + int64_t(pass) * steps * (m.rows / 4), m.rows / 4, quad + mine, begin, end,
                             in + pass * steps * NB, partial + (slice * split.quads + mine) * 4 * NB);
        __syncthreads();
        for (int i = threadIdx.x; i < 4 * split.quads * NB; i += kThreads) {
          const int row = 4 * quad + i / NB, b = i % NB < active ? i % NB : 0;
          float& out = to[4 * quad * NB + i];
          float from = pass > 0 ? 0.0f : m.bias[row + b * bias_stride];
          if (pass > 0 || accumulates) from += out;
          Sum sum = partial[i];
          for (int s = 1; s < split.slices; s++) sum += partial[s * split.quads * 4 * NB + i];
          if constexpr (Dot::kByTap)
            out = fmaf(float(sum), __ldg(m.scale + pass * m.rows + row) * v.scale[pass * NB + i % NB], from);
          else
            out = sum + from;
        }
        __syncthreads();
      }
  }

  // Biases plus the projection of the frame that stream b is in, for every layer; by the whole block.
  __device__ void project_condition(int b, int64_t frame) const {
    const int z_rows = 2 * c.h_rows;
    const float* table = reinterpret_cast<const float*>(c.pack) + c.n_class * c.x_rows;
    const float* values = c.frames + (first + b) * c.frames_stride[0] + frame * c.frames_stride[1];
    const uint8_t* p = c.pack + c.table_bytes;
    for (int layer = 0; layer < c.n_layer; layer++) {
      const PackedMatrix conv = read_matrix<Dot>(p, z_rows, c.width, c.residual);
      read_matrix<Dot>(p, c.skip_rows + (layer + 1 < c.n_layer ? c.x_rows : 0), 1, c.hidden);
      for (int row = threadIdx.x; row < z_rows; row += kThreads) {
        float sum = __ldg(conv.bias + row);
        for (int k = 0; k < c.condition; k++)
          sum = fmaf(__ldg(table + (int64_t(layer) * c.condition + k) * z_rows + row), values[k * c.frames_stride[2]],
                     sum);
        c.base[((first + b) * c.n_layer + layer) * z_rows + row] = sum;
      }
    }
  }

  // The taps of a layer into v.in, the newest last; the newest also takes the oldest one's place in the ring.
  __device__ void gather(int layer, int tap_inputs, int64_t ring_at, int length) const {
    const int d = c.dilations[layer];
    for (int i = threadIdx.x; i < c.x_rows * NB; i += kThreads) {
      const int row = i % c.x_rows, b = i / c.x_rows;
      const float x = v.x[row * NB + b];
      if (length > 0) {
        float* ring = c.state + (first + b) * c.state_stride + ring_at + row;
        const int oldest = v.slots[layer * NB + b];
        int slot = oldest;
        for (int tap = 0; tap + 1 < c.width; tap++) {
          const float past = b < active ? ring[int64_t(slot) * c.x_rows] : 0.0f;
          if (row < tap_inputs) v.in[(tap * tap_inputs + row) * NB + b] = past;
          slot += d;
          if (slot >= length) slot -= length;
        }
        if (b < active) ring[int64_t(oldest) * c.x_rows] = x;
      }
      if (row < tap_inputs) v.in[((c.width - 1) * tap_inputs + row) * NB + b] = x;
    }
  }

  __device__ void relu(const float* sums, int rows) const {
    for (int i = threadIdx.x; i < rows * NB; i += kThreads) v.in[i] = fmaxf(sums[i], 0.0f);
  }

  // The products of one step, in the pack's order: conv and mix of each layer, then head and out. One loop over all,
  // so that the code of a product exists once.
  __device__ void step(int n_products) {
    const uint8_t* p = c.pack + c.table_bytes;
    const int z_rows = 2 * c.h_rows;
    int64_t ring_at = kStateHeader;
    for (int i = 0; i < n_products; i++) {
      const int layer = i / 2, length = layer < c.n_layer ? (c.width - 1) * c.dilations[layer] : 0;
      const bool last = layer + 1 >= c.n_layer, top = layer == c.n_layer;
      PackedMatrix m;
      float* to = v.z;
      int64_t bias_stride = 0;
      if (i % 2 == 0) {
        m = top ? read_matrix<Dot>(p, c.head_rows, 1, c.skip) : read_matrix<Dot>(p, z_rows, c.width, c.residual);
        if (top)
          relu(v.skip, c.skip_rows);
        else
          gather(layer, m.steps * Dot::kGroup, ring_at, length);
        if (!top && c.base) {
          m.bias = c.base + (first * c.n_layer + layer) * z_rows;
          bias_stride = int64_t(c.n_layer) * z_rows;
        }
      } else if (top) {
        m = read_matrix<Dot>(p, c.class_rows, 1, c.head);
        relu(v.z, c.head_rows);
      } else {
        m = read_matrix<Dot>(p, c.skip_rows + (last ? 0 : c.x_rows), 1, c.hidden);
        for (int j = threadIdx.x; j < c.h_rows * NB; j += kThreads) v.in[j] = gate(v.z[j], v.z[c.h_rows * NB + j]);
        to = last ? v.skip : v.x;  // the last layer leaves the residual alone
        if (threadIdx.x < NB && length > 0) {
          int& slot = v.slots[layer * NB + threadIdx.x];
          slot = slot + 1 == length ? 0 : slot + 1;
        }
        ring_at += int64_t(length) * c.x_rows;
      }
      __syncthreads();
      product(m, bias_stride, to, to != v.z);
    }
  }

  // The codes of step t: a warp a stream.
  __device__ void choose(int64_t t) {
    const int b = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (b < active) {
      if (c.logits)
        for (int i = lane; i < c.n_class; i += 32) c.logits[((first + b) * c.n + t) * c.n_class + i] = v.z[i * NB + b];
      __syncwarp();
      const float u = c.uniforms[(first + b) * c.uniforms_stride[0] + t * c.uniforms_stride[1]];
      const int code = t < c.forced ? forced_code(c, first + b, t)
                                    : draw(c, v.z + b, NB, v.partial + b * kThreads * kRowsOfThread, u);
      if (lane == 0) {
        v.codes[b] = code;
        write_code(c, first + b, t, code);
      }
    }
    __syncthreads();
  }

  __device__ void run() {
    const float* embedding = reinterpret_cast<const float*>(c.pack);
    for (int i = threadIdx.x; i < c.n_layer * NB; i += kThreads) {
      const int b = i % NB, layer = i / NB, length = (c.width - 1) * c.dilations[layer];
      const int64_t position = b < active ? read_position(c.state + (first + b) * c.state_stride) : 0;
      v.slots[i] = length > 0 ? int(position % length) : 0;
    }
    if (threadIdx.x < NB)
      v.codes[threadIdx.x] = threadIdx.x < active ? read_code(c, c.state + (first + threadIdx.x) * c.state_stride) : 0;
    __syncthreads();
    for (int64_t t = 0; t < c.n; t++) {
      for (int i = threadIdx.x; i < c.x_rows * NB; i += kThreads)
        v.x[i] = __ldg(embedding + v.codes[i % NB] * c.x_rows + i / NB);
      for (int i = threadIdx.x; i < c.skip_rows * NB; i += kThreads) v.skip[i] = 0.0f;
      for (int b = 0; c.base && b < active; b++) {
        const int64_t start = read_position(c.state + (first + b) * c.state_stride);
        if (t == 0 || (start + t) % c.hop == 0) project_condition(b, frame_of(c, start, start + t));
      }
      __syncthreads();
      step(2 * c.n_layer + (c.logits || t >= c.forced ? 2 : 0));
      choose(t);
    }
    if (threadIdx.x < active) {
      float* state = c.state + (first + threadIdx.x) * c.state_stride;
      write_header(state, read_position(state) + c.n, v.codes[threadIdx.x]);
    }
  }
};

template <class Dot, int NB>
__global__ void __launch_bounds__(kThreads, 1) general_kernel(const __grid_constant__ WaveNetCall c) {
  Vectors<NB> v;
  v.carve(c, ptx::dynamic_shared());
  const int64_t first = int64_t(blockIdx.x) * NB, left = c.batch - first;
  Net<Dot, NB>{c, v, first, int(left < NB ? left : NB)}.run();
}

template <class Dot, int NB>
cudaError_t launch(const WaveNetCall& c, int shared_bytes, cudaStream_t stream) {
  if (Vectors<NB>{}.carve(c, nullptr) > shared_bytes) return cudaErrorInvalidValue;
  const cudaError_t error = allow_all_shared(general_kernel<Dot, NB>);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned((c.batch + NB - 1) / NB));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, general_kernel<Dot, NB>, c);
}

template <class Dot>
cudaError_t launch_streams(const WaveNetCall& c, int streams, int shared_bytes, cudaStream_t stream) {
  switch (streams) {
    case 1: return launch<Dot, 1>(c, shared_bytes, stream);
    case 4: return launch<Dot, 4>(c, shared_bytes, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t wavenet_general_cuda(const WaveNetCall& call, int streams, int shared_bytes, cudaStream_t stream) {
  switch (call.dtype) {
    case kFloat32: return launch_streams<DotFloat32>(call, streams, shared_bytes, stream);
    case kBFloat16: return launch_streams<DotBFloat16>(call, streams, shared_bytes, stream);
    case kFloat16: return launch_streams<DotFloat16>(call, streams, shared_bytes, stream);
    default: return launch_streams<DotInt8>(call, streams, shared_bytes, stream);
  }
}

}  // namespace audiokernels
