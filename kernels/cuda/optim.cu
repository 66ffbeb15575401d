// The optimiser over flat buffers: the global norm (two stages, so that the order of the sum is fixed) and AdamW with the running average.
#include "common.cuh"

// The sum over a block of 256 threads, on thread 0.
__device__ __forceinline__ double block_sum(double v) {
  __shared__ double part[8];
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  return warp_sum(threadIdx.x < 8 ? part[threadIdx.x] : 0.0);
}

template <int N> __device__ __forceinline__ void add_squares(double& total, const float (&v)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) total = fma((double)v[k], (double)v[k], total);
}

// Four accesses of a thread are under way at a time.
template <int N> __device__ __forceinline__ void squares(const float* x, double* parts, int64 n) {
  int64 i = N * ((int64)blockIdx.x * blockDim.x + threadIdx.x), threads = (int64)N * gridDim.x * blockDim.x;
  double total = 0.0;
  float v[4][N], one[1];
  for (; i + 3 * threads + N <= n; i += 4 * threads) {
#pragma unroll
    for (int j = 0; j < 4; ++j) load<N>(v[j], x + i + j * threads);
#pragma unroll
    for (int j = 0; j < 4; ++j) add_squares(total, v[j]);
  }
#pragma unroll 1
  for (; i + N <= n; i += threads) {
    load<N>(v[0], x + i);
    add_squares(total, v[0]);
  }
#pragma unroll 1
  for (; i < n; ++i) {  // fewer than N
    load<1>(one, x + i);
    add_squares(total, one);
  }
  total = block_sum(total);
  if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(256) squares_wide(const float* __restrict__ x, double* __restrict__ parts, int64 n) {
  squares<4>(x, parts, n);
}

extern "C" __global__ void __launch_bounds__(256) squares_any(const float* __restrict__ x, double* __restrict__ parts, int64 n) {
  squares<1>(x, parts, n);
}

// One block: the sum of n parts.
extern "C" __global__ void __launch_bounds__(256) sum_parts(const double* __restrict__ parts, double* __restrict__ out, int n) {
  double total = 0.0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) total += parts[i];
  total = block_sum(total);
  if (threadIdx.x == 0) out[0] = total;
}

// rest1, rest2 = 1 - beta1, 1 - beta2
struct Adam {
  float *param, *m, *v, *ema;
  const float* grad;
  float factor, beta1, rest1, beta2, rest2, eps;
  float keep, rate, bias2, decay, rest;  // 1 - lr weight_decay, lr / (1 - beta1^step), 1 - beta2^step, decay, 1 - decay
  bf16* low;                             // the new weights rounded, or null

  template <int N> __device__ __forceinline__ void run(int64 i) {
    float ps[N], gs[N], ms[N], vs[N], es[N];
    load<N>(ps, param + i);
    load<N>(gs, grad + i);
    load<N>(ms, m + i);
    load<N>(vs, v + i);
    load<N>(es, ema + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float g = gs[j] * factor;
      ms[j] = fmaf(beta1, ms[j], rest1 * g);
      vs[j] = fmaf(beta2, vs[j], rest2 * g * g);
      ps[j] = fmaf(keep, ps[j], -rate * (ms[j] / (sqrtf(vs[j] / bias2) + eps)));
      es[j] = fmaf(decay, es[j], rest * ps[j]);
    }
    save<N>(param + i, ps);
    save<N>(m + i, ms);
    save<N>(v + i, vs);
    save<N>(ema + i, es);
    if (low) save<N>(low + i, ps);
  }
};

// min(1, max_norm / (sqrt(norm_sq) + 1e-6)); a norm that is not a number must show
__device__ __forceinline__ float clip_factor(const double* norm_sq, float max_norm) {
  if (!norm_sq) return 1.0f;
  float ratio = (float)(max_norm / (sqrt(*norm_sq) + 1e-6));
  return ratio >= 1.0f ? 1.0f : ratio;
}

__device__ __forceinline__ bool finite(const double* norm_sq) { return !norm_sq || *norm_sq - *norm_sq == 0.0; }

// The five numbers of a step: those given, or for a captured graph row *counter of a table, the last one where it has ended. There a
// gradient that is not finite changes nothing.
__device__ __forceinline__ bool take_row(Adam& body, const float* rows, int last, const int* counter, const double* norm_sq) {
  if (!rows) return true;
  const float* row = rows + 5 * (int64)min(*counter, last);
  body.keep = row[0], body.rate = row[1], body.bias2 = row[2], body.decay = row[3], body.rest = row[4];
  return finite(norm_sq);
}

#define ADAMW(name, N)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                                                             \
      name(float* __restrict__ param, const float* __restrict__ grad, float* __restrict__ m, float* __restrict__ v,             \
           float* __restrict__ ema, const double* __restrict__ norm_sq, float max_norm, int64 n, float beta1, float rest1,      \
           float beta2, float rest2, float eps, float keep, float rate, float bias2, float decay, float rest,                   \
           const float* __restrict__ rows, int last, const int* __restrict__ counter, bf16* __restrict__ low) {                 \
    float factor = clip_factor(norm_sq, max_norm);                                                                              \
    Adam body{param, m, v, ema, grad, factor, beta1, rest1, beta2, rest2, eps, keep, rate, bias2, decay, rest, low};            \
    if (take_row(body, rows, last, counter, norm_sq)) for_each<N>(n, body);                                                     \
  }

ADAMW(adamw_wide, 4)
ADAMW(adamw_any, 1)

// One thread: the counter of the steps made goes up by one, or that of the steps skipped where the sum of squares is not a finite number.
extern "C" __global__ void count(int* made, int* skipped, const double* __restrict__ norm_sq) {
  if (finite(norm_sq)) *made += 1;
  else if (skipped) *skipped += 1;
}
