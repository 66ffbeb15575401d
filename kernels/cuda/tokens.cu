// What a Transformer does to its tokens (samples, tokens, channels) between the matrix products: one pass over memory each.
// Sums over the tokens of a sample are made in runs, and the runs added in their order by a second kernel: no atomics.
#include "common.cuh"
#include "rows.cuh"

struct Silu {
  const float* x;
  float* y;

  template <int N> __device__ __forceinline__ void run(int64 i) {
    float v[N];
    load<N>(v, x + i);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] *= sigmoid(v[k]);
    save<N>(y + i, v);
  }
};

struct SiluGradient {
  const float *dy, *x;
  float* dx;

  template <int N> __device__ __forceinline__ void run(int64 i) {
    float v[N], d[N];
    load<N>(v, x + i);
    load<N>(d, dy + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      float s = sigmoid(v[k]);
      d[k] *= s * fmaf(v[k], 1.0f - s, 1.0f);
    }
    save<N>(dx + i, d);
  }
};

#define SILU(suffix, N)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(256) silu_##suffix(const float* x, float* y, int64 n) {                       \
    Silu body{x, y};                                                                                                          \
    for_each<N>(n, body);                                                                                                     \
  }                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(256) silu_backward_##suffix(const float* dy, const float* x, float* dx, int64 n) { \
    SiluGradient body{dy, x, dx};                                                                                             \
    for_each<N>(n, body);                                                                                                     \
  }

SILU(wide, 4)
SILU(any, 1)

// A warp for each token, which stays in its registers: mean, variance about it, result.
template <int N, int STEPS>
__device__ __forceinline__ void normalise_short(const float* x, const float* gamma, const float* beta, const float* scale,
                                                const float* shift, float* y, float* mean, float* rstd, int samples, int tokens, int channels,
                                                float eps) {
  int warps = blockDim.x / 32;
  for (int64 i = (int64)blockIdx.x * warps + threadIdx.x / 32; i < (int64)samples * tokens; i += (int64)gridDim.x * warps) {
    Part<Lanes<32>, N, STEPS> token(0, channels);
    token.read(x + i * channels, 0.0f);
    float total = 0.0f, squares = 0.0f;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      if (token.ends(s)) break;
#pragma unroll
      for (int k = 0; k < N; ++k) total += token.v[s][k];
    }
    float m = warp_sum(total) / channels;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      if (token.place(s) >= channels) break;
#pragma unroll
      for (int k = 0; k < N; ++k) squares = fmaf(token.v[s][k] - m, token.v[s][k] - m, squares);
    }
    float r = 1.0f / sqrtf(warp_sum(squares) / channels + eps);
    int64 of_sample = i / tokens * channels;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      int c = token.place(s);
      if (c >= channels) break;
      float v[N], slope[N], offset[N], factor[N], term[N];
      load<N>(slope, gamma + c);
      load<N>(offset, beta + c);
      if (scale) {
        load<N>(factor, scale + of_sample + c);
        load<N>(term, shift + of_sample + c);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) {
        v[k] = fmaf((token.v[s][k] - m) * r, slope[k], offset[k]);
        if (scale) v[k] = fmaf(v[k], 1.0f + factor[k], term[k]);
      }
      save_whole(y + i * channels + c, v);
    }
    if (threadIdx.x % 32 == 0) mean[i] = m, rstd[i] = r;
  }
}

// The same for more channels; the second and third reading of the token come from the cache.
template <int N>
__device__ __forceinline__ void normalise_long(const float* x, const float* gamma, const float* beta, const float* scale, const float* shift,
                                               float* y, float* mean, float* rstd, int samples, int tokens, int channels, float eps) {
  int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  for (int64 i = (int64)blockIdx.x * warps + threadIdx.x / 32; i < (int64)samples * tokens; i += (int64)gridDim.x * warps) {
    const float* row = x + i * channels;
    float v[N], total = 0.0f, squares = 0.0f;
#pragma unroll 4
    for (int c = lane * N; c < channels; c += 32 * N) {
      load<N>(v, row + c);
#pragma unroll
      for (int k = 0; k < N; ++k) total += v[k];
    }
    float m = warp_sum(total) / channels;
#pragma unroll 4
    for (int c = lane * N; c < channels; c += 32 * N) {
      load<N>(v, row + c);
#pragma unroll
      for (int k = 0; k < N; ++k) squares = fmaf(v[k] - m, v[k] - m, squares);
    }
    float r = 1.0f / sqrtf(warp_sum(squares) / channels + eps);
    int64 of_sample = i / tokens * channels;
#pragma unroll 2
    for (int c = lane * N; c < channels; c += 32 * N) {
      float slope[N], offset[N], factor[N], term[N];
      load<N>(v, row + c);
      load<N>(slope, gamma + c);
      load<N>(offset, beta + c);
      if (scale) {
        load<N>(factor, scale + of_sample + c);
        load<N>(term, shift + of_sample + c);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) {
        v[k] = fmaf((v[k] - m) * r, slope[k], offset[k]);
        if (scale) v[k] = fmaf(v[k], 1.0f + factor[k], term[k]);
      }
      save_whole(y + i * channels + c, v);
    }
    if (lane == 0) mean[i] = m, rstd[i] = r;
  }
}

// parts (samples, runs, 2, channels) = what each warp has left in shared memory, its sums of dy and of dy x_hat, added up
__device__ __forceinline__ void add_warps(const float* shared, float* parts, int channels) {
  __syncthreads();
  for (int c = threadIdx.x; c < 2 * channels; c += blockDim.x) {
    float total = 0.0f;
    for (int k = 0; k < (int)blockDim.x / 32; ++k) total += shared[2 * k * channels + c];
    parts[2 * (int64)blockIdx.x * channels + c] = total;
  }
}

// A block for each run of tokens of one sample, a warp for each token, which stays in its registers beside the sums of its channels.
// With g = dy (1 + scale) gamma: dx = rstd (g - <g> - x_hat <g x_hat>).
template <int N, int STEPS>
__device__ __forceinline__ void normalise_gradient_short(const float* dy, const float* x, const float* gamma, const float* mean,
                                                         const float* rstd, const float* scale, float* dx, float* parts, int tokens,
                                                         int channels, int runs, int run) {
  extern __shared__ float shared[];
  int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  int sample = blockIdx.x / runs, first = blockIdx.x % runs * run, last = min(tokens, first + run);
  typedef Part<Lanes<32>, N, STEPS> Token;
  Token by(0, channels), factor(0, channels);
  by.read(gamma, 0.0f);
  if (scale) factor.read(scale + (int64)sample * channels, 0.0f);
  float sums[STEPS][N] = {}, products[STEPS][N] = {};
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    if (!scale || by.ends(s)) break;
#pragma unroll
    for (int k = 0; k < N; ++k) by.v[s][k] *= 1.0f + factor.v[s][k];
  }
  for (int t = first + warp; t < last; t += warps) {
    int64 i = (int64)sample * tokens + t;
    float m = mean[i], r = rstd[i], a = 0.0f, b = 0.0f;
    Token token(0, channels), d(0, channels);
    token.read(x + i * channels, 0.0f);
    d.read(dy + i * channels, 0.0f);
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      if (token.ends(s)) break;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        float x_hat = (token.v[s][k] - m) * r, g = d.v[s][k] * by.v[s][k];
        sums[s][k] += d.v[s][k];
        products[s][k] = fmaf(d.v[s][k], x_hat, products[s][k]);
        a += g;
        b = fmaf(g, x_hat, b);
        token.v[s][k] = x_hat;
      }
    }
    a = warp_sum(a) / channels;
    b = warp_sum(b) / channels;
    d.write(dx + i * channels, [&](float v, int s, int k) { return r * (fmaf(v, by.v[s][k], -a) - token.v[s][k] * b); });
  }
  float* mine = shared + 2 * warp * channels;
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    if (by.place(s) >= channels) break;
    save<N>(mine + by.place(s), sums[s]);
    save<N>(mine + channels + by.place(s), products[s]);
  }
  add_warps(shared, parts, channels);
}

// The same for more channels: the token is read again from the cache, the sums of its channels stay in shared memory.
template <int N>
__device__ __forceinline__ void normalise_gradient_long(const float* dy, const float* x, const float* gamma, const float* mean,
                                                        const float* rstd, const float* scale, float* dx, float* parts, int tokens,
                                                        int channels, int runs, int run) {
  extern __shared__ float shared[];
  int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int sample = blockIdx.x / runs, first = blockIdx.x % runs * run, last = min(tokens, first + run);
  int64 of_sample = (int64)sample * channels;
  float *sums = shared + 2 * warp * channels, *products = sums + channels, none[N] = {};
  for (int c = lane * N; c < channels; c += 32 * N) {
    save<N>(sums + c, none);
    save<N>(products + c, none);
  }
  for (int t = first + warp; t < last; t += warps) {
    int64 i = (int64)sample * tokens + t;
    float m = mean[i], r = rstd[i], a = 0.0f, b = 0.0f, v[N], d[N], slope[N], factor[N], s[N], p[N];
    for (int c = lane * N; c < channels; c += 32 * N) {
      load<N>(v, x + i * channels + c);
      load<N>(d, dy + i * channels + c);
      load<N>(slope, gamma + c);
      if (scale) load<N>(factor, scale + of_sample + c);
      load<N>(s, sums + c);
      load<N>(p, products + c);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        float x_hat = (v[k] - m) * r, g = d[k] * (scale ? slope[k] * (1.0f + factor[k]) : slope[k]);
        s[k] += d[k];
        p[k] = fmaf(d[k], x_hat, p[k]);
        a += g;
        b = fmaf(g, x_hat, b);
      }
      save<N>(sums + c, s);
      save<N>(products + c, p);
    }
    a = warp_sum(a) / channels;
    b = warp_sum(b) / channels;
    for (int c = lane * N; c < channels; c += 32 * N) {
      load<N>(v, x + i * channels + c);
      load<N>(d, dy + i * channels + c);
      load<N>(slope, gamma + c);
      if (scale) load<N>(factor, scale + of_sample + c);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        float by = scale ? slope[k] * (1.0f + factor[k]) : slope[k];
        d[k] = r * (fmaf(d[k], by, -a) - (v[k] - m) * r * b);
      }
      save_whole(dx + i * channels + c, d);
    }
  }
  add_warps(shared, parts, channels);
}

#define LAYER_NORM(way, length, FORWARD, BACKWARD)                                                                                \
  extern "C" __global__ void __launch_bounds__(256)                                                                               \
      layer_norm_##way(const float* x, const float* gamma, const float* beta, const float* scale, const float* shift, float* y,   \
                       float* mean, float* rstd, int samples, int tokens, int channels, float eps) {                              \
    normalise_##length<FORWARD>(x, gamma, beta, scale, shift, y, mean, rstd, samples, tokens, channels, eps);                     \
  }                                                                                                                               \
  extern "C" __global__ void __launch_bounds__(256)                                                                               \
      layer_norm_backward_##way(const float* dy, const float* x, const float* gamma, const float* mean, const float* rstd,        \
                                const float* scale, float* dx, float* parts, int tokens, int channels, int runs, int run) {       \
    normalise_gradient_##length<BACKWARD>(dy, x, gamma, mean, rstd, scale, dx, parts, tokens, channels, runs, run);               \
  }
#define EACH(floats, accesses) floats, accesses

LAYER_NORM(short_wide, short, EACH(4, 8), EACH(4, 4))
LAYER_NORM(short_any, short, EACH(1, 16), EACH(1, 8))
LAYER_NORM(long_wide, long, 4, 4)
LAYER_NORM(long_any, long, 1, 1)

// From the sums of the runs, with S1 = sum of dy, S2 = sum of dy x_hat over a sample and k = 1 + scale: dshift = S1,
// dscale = gamma S2 + beta S1, and this sample's shares of dbeta = k S1 and dgamma = k S2.
extern "C" __global__ void __launch_bounds__(256)
    layer_norm_fold(const float* parts, const float* gamma, const float* beta, const float* scale, float* dscale, float* dshift,
                    float* dgammas, float* dbetas, int samples, int channels, int runs) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= samples * channels) return;
  int sample = i / channels, c = i % channels;
  float sum = 0.0f, product = 0.0f, factor = 1.0f;
  for (int run = 0; run < runs; ++run) {
    const float* part = parts + 2 * ((int64)sample * runs + run) * channels + c;
    sum += part[0];
    product += part[channels];
  }
  if (scale) {
    dshift[i] = sum;
    dscale[i] = fmaf(gamma[c], product, beta[c] * sum);
    factor += scale[i];
  }
  dbetas[i] = factor * sum;
  dgammas[i] = factor * product;
}

// y = x + gate h, a thread for N channels of a token
template <int N>
__device__ __forceinline__ void gated(const float* x, const float* h, const float* gate, float* y, int64 rows, int tokens, int channels) {
  int width = channels / N;
  for (int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x; i < rows * width; i += (int64)gridDim.x * blockDim.x) {
    int row = (int)(i / width), c = (int)(i % width) * N;
    float v[N], u[N], g[N];
    load<N>(v, x + i * N);
    load<N>(u, h + i * N);
    load<N>(g, gate + (int64)(row / tokens) * channels + c);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = fmaf(g[k], u[k], v[k]);
    save<N>(y + i * N, v);
  }
}

// dh = gate dy and parts (samples, runs, channels) = sum of dy h over each run of tokens: a thread for N channels of a run, which reads
// AHEAD tokens before it writes, for dh may lie where dy does
template <int N>
__device__ __forceinline__ void gated_gradient(const float* dy, const float* h, const float* gate, float* dh, float* parts, int tokens,
                                               int channels, int runs, int run) {
  const int AHEAD = 4;
  int sample = blockIdx.x / runs, first = blockIdx.x % runs * run, last = min(tokens, first + run);
  for (int c = (int)threadIdx.x * N; c < channels; c += (int)blockDim.x * N) {
    float g[N], total[N] = {}, d[AHEAD][N], u[AHEAD][N];
    load<N>(g, gate + (int64)sample * channels + c);
#pragma unroll 1
    for (int t = first; t < last; t += AHEAD) {
      int64 at = ((int64)sample * tokens + t) * channels + c;
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (t + i >= last) break;
        load<N>(d[i], dy + at + (int64)i * channels);
        load<N>(u[i], h + at + (int64)i * channels);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (t + i >= last) break;
#pragma unroll
        for (int k = 0; k < N; ++k) {
          total[k] = fmaf(d[i][k], u[i][k], total[k]);
          d[i][k] *= g[k];
        }
        save_whole(dh + at + (int64)i * channels, d[i]);
      }
    }
    save<N>(parts + (int64)blockIdx.x * channels + c, total);
  }
}

#define GATED(suffix, N)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(256) add_gated_##suffix(const float* x, const float* h, const float* gate, float* y, \
                                                                       int64 rows, int tokens, int channels) {                 \
    gated<N>(x, h, gate, y, rows, tokens, channels);                                                                           \
  }                                                                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                                            \
      add_gated_backward_##suffix(const float* dy, const float* h, const float* gate, float* dh, float* parts, int tokens,     \
                                  int channels, int runs, int run) {                                                          \
    gated_gradient<N>(dy, h, gate, dh, parts, tokens, channels, runs, run);                                                    \
  }

GATED(wide, 4)
GATED(any, 1)

// out (samples, channels) = sum of parts (samples, runs, channels) over the runs
extern "C" __global__ void __launch_bounds__(256) sum_runs(const float* parts, float* out, int samples, int channels, int runs) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= samples * channels) return;
  const float* part = parts + (int64)(i / channels) * runs * channels + i % channels;
  float total = 0.0f;
  for (int run = 0; run < runs; ++run) total += part[(int64)run * channels];
  out[i] = total;
}

// Features j and j + half of each head turned by the angle of the token: a thread for N pairs
template <int N>
__device__ __forceinline__ void turn(const float* x, const float* cos, const float* sin, float* y, int64 rows, int tokens, int heads,
                                     int half) {
  int width = half / N;
  for (int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x; i < rows * heads * width; i += (int64)gridDim.x * blockDim.x) {
    int64 head = i / width;
    int j = (int)(i % width) * N, place = (int)(head / heads % tokens);
    int64 at = 2 * head * half + j;
    float a[N], b[N], c[N], s[N], p[N], q[N];
    load<N>(a, x + at);
    load<N>(b, x + at + half);
    load<N>(c, cos + (int64)place * half + j);
    load<N>(s, sin + (int64)place * half + j);
#pragma unroll
    for (int k = 0; k < N; ++k) p[k] = a[k] * c[k] - b[k] * s[k], q[k] = b[k] * c[k] + a[k] * s[k];
    save<N>(y + at, p);
    save<N>(y + at + half, q);
  }
}

#define ROTARY(suffix, N)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(256) rotary_##suffix(const float* x, const float* cos, const float* sin, float* y, \
                                                                    int64 rows, int tokens, int heads, int half) {               \
    turn<N>(x, cos, sin, y, rows, tokens, heads, half);                                                                          \
  }

ROTARY(wide, 4)
ROTARY(any, 1)
