// What a captured training step does beside its network: the levels of the batch, the noised images with what the network should
// answer, and whether the step counts. All that changes from step to step is read from memory.
#include "common.cuh"
#include "random.cuh"

// t = 1 + floor(u T) of a 64-bit word for each sample, two words of a counter, with the host's bits: the
// product is rounded once. Then the row of that level, a column of `levels` (columns, samples).
extern "C" __global__ void __launch_bounds__(256)
    draw_levels(const float* __restrict__ rows, const int* __restrict__ step, unsigned seed_low, unsigned seed_high, unsigned stream,
                double* __restrict__ t, float* __restrict__ levels, int samples, int steps, int columns) {
  for (int k = blockIdx.x * blockDim.x + threadIdx.x; k < samples; k += gridDim.x * blockDim.x) {
    uint4 r = philox(make_uint4((unsigned)k / 2, 0, (unsigned)*step, stream), seed_low, seed_high);
    unsigned high = k % 2 ? r.z : r.x, low = k % 2 ? r.w : r.y;
    unsigned long long word = (unsigned long long)high << 32 | low;
    double share = (double)(int64)(word >> 11) * 1.1102230246251565e-16;  // 2^-53: exact
    int level = 1 + (int)(share * steps);  // nothing is added to the product, so nothing can be fused with it
    t[k] = (double)level;
    const float* row = rows + (int64)level * columns;
    for (int c = 0; c < columns; ++c) levels[(int64)c * samples + k] = row[c];
  }
}

// Four neighbouring bytes as numbers, of which only the first n exist.
template <bool WIDE> __device__ __forceinline__ void load_bytes(float (&to)[4], const unsigned char* from, int n) {
  unsigned four = WIDE ? *reinterpret_cast<const unsigned*>(from) : 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = WIDE ? (float)(four >> 8 * i & 255u) : i < n ? (float)from[i] : 0.0f;
}

// x = scale (signal x0 + noise eps), target = on_x0 x0 + on_eps eps; every operation is rounded once, so that the bits are the host's.
template <bool WIDE>
__device__ __forceinline__ void example(const unsigned char* images, const float* levels, float* x, float* target, int samples, int items,
                                        int lanes, int size, const Draw& draw) {
  for EVERY_ITEM(item, items) {
    Walk at(item, lanes, size);
    const float* level = levels + at.sample;
    float signal = level[0], noise = level[samples], scale = level[2 * (int64)samples];
    float on_x0 = level[3 * (int64)samples], on_eps = level[4 * (int64)samples];
    float z[4][4];
    normals16(z, draw, at.sample, at.lane);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      int e = at.first + RUN * word;
      if (e >= size) continue;
      float u[4], y[4], w[4];
      load_bytes<WIDE>(u, images + at.base + e, size - e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x0 = add(mul(u[i], 1.0f / 127.5f), -1.0f);
        y[i] = mul(scale, add(mul(signal, x0), mul(noise, z[word][i])));
        w[i] = add(mul(on_x0, x0), mul(on_eps, z[word][i]));
      }
      save4<WIDE>(x + at.base + e, y, size - e);
      save4<WIDE>(target + at.base + e, w, size - e);
    }
  }
}

#define EXAMPLE(name, WIDE)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(256)                                                                                \
      name(const unsigned char* images, const float* levels, const int* step, unsigned seed_low, unsigned seed_high, unsigned stream, \
           float* x, float* target, int samples, int items, int lanes, int size) {                                                 \
    example<WIDE>(images, levels, x, target, samples, items, lanes, size, Draw{seed_low, seed_high, (unsigned)*step, stream});     \
  }

EXAMPLE(example_wide, true)
EXAMPLE(example_any, false)

// One block. A step counts where its mean loss and the sum of squares are finite and none before it was skipped: then the tally
// (sum of mean losses, steps, last mean loss, last norm) takes it in, else the sum of squares becomes NaN.
extern "C" __global__ void __launch_bounds__(256)
    verdict(const float* __restrict__ value, double* __restrict__ norm_sq, const int* __restrict__ skipped, double* __restrict__ tally, int samples) {
  __shared__ double part[8];
  double mean = 0.0;
  for (int k = threadIdx.x; k < samples; k += blockDim.x) mean += value[k];
  mean = warp_sum(mean);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = mean;
  __syncthreads();
  if (threadIdx.x) return;
  mean = 0.0;
#pragma unroll
  for (int w = 0; w < 8; ++w) mean += part[w];
  mean /= samples;
  if (*skipped == 0 && mean - mean == 0.0 && *norm_sq - *norm_sq == 0.0) {
    tally[0] += mean;
    tally[1] += 1.0;
    tally[2] = mean;
    tally[3] = sqrt(*norm_sq);
  } else {
    *norm_sq = __int_as_float(0x7fc00000);
  }
}
