// GroupNorm, then (1 + scale) v + shift, then SiLU; x is (samples, places, channels). Forward and backward, without atomics.
//
// A block owns `span` neighbouring groups of one sample, so that a row of its channels fills 32-byte sectors. Channels are counted in
// vectors of N floats that do not cross a group. A thread keeps to one column of vectors (or, where the block's one group is wider than
// the block, to every blockDim-th column) and walks down the places.
#include "common.cuh"

const int THREADS = 512;

struct Tile {
  int sample, first_group, group_size, width;  // width: vectors in a row of this block
  int lanes, lane, row, rows;                  // threads in a row, this thread's place among them, its first place and its stride
  int lanes_of_group;
  bool active;
  int64 base;

  template <int N> static __device__ __forceinline__ Tile make(int places, int channels, int groups, int span) {
    Tile t;
    int sets = groups / span, set = blockIdx.x % sets;
    t.sample = blockIdx.x / sets;
    t.group_size = channels / groups;
    t.first_group = set * span;
    t.width = span * t.group_size / N;
    t.lanes = min(t.width, (int)blockDim.x);
    t.lane = threadIdx.x % t.lanes;
    t.row = threadIdx.x / t.lanes;
    t.rows = blockDim.x / t.lanes;
    t.active = t.row < t.rows;
    t.lanes_of_group = span == 1 ? t.lanes : t.group_size / N;
    t.base = (int64)t.sample * places * channels;
    return t;
  }

  __device__ __forceinline__ int channel(int column, int n) const { return first_group * group_size + column * n; }
};

// (1 + scale) gamma and (1 + scale) beta + shift for the channels from c on
template <int N>
__device__ __forceinline__ void affine(float (&slope)[N], float (&offset)[N], const float* gamma, const float* beta, const float* scale,
                                       const float* shift, int64 of_sample, int c) {
  load<N>(slope, gamma + c);
  load<N>(offset, beta + c);
  if (!scale) return;
  float factor[N], term[N];
  load<N>(factor, scale + of_sample + c);
  load<N>(term, shift + of_sample + c);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    slope[i] *= 1.0f + factor[i];
    offset[i] = fmaf(offset[i], 1.0f + factor[i], term[i]);
  }
}

struct Moments {
  float n, mean, m2;  // count, mean, sum of squared deviations
};

// Chan, Golub & LeVeque: the moments of the union
__device__ __forceinline__ Moments joined(const Moments& a, const Moments& b) {
  float n = a.n + b.n, delta = b.mean - a.mean, share = n > 0.0f ? __fdividef(b.n, n) : 0.0f;
  return {n, fmaf(delta, share, a.mean), a.m2 + b.m2 + delta * delta * a.n * share};
}

// The moments of the thread's elements, about its first one: that lies among the data, so nothing cancels.
template <int N> __device__ __forceinline__ Moments thread_moments(const Tile& t, const float* x, int places, int channels) {
  float shift = 0.0f, sum = 0.0f, squares = 0.0f;
  int count = 0;
  for (int column = t.lane; t.active && column < t.width; column += t.lanes)
    for (int place = t.row; place < places; place += t.rows) {
      float v[N];
      load<N>(v, x + t.base + (int64)place * channels + t.channel(column, N));
      if (count == 0) shift = v[0];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float d = v[i] - shift;
        sum += d;
        squares = fmaf(d, d, squares);
      }
      count += N;
    }
  if (count == 0) return {0.0f, 0.0f, 0.0f};
  float n = (float)count, mean = __fdividef(sum, n);
  return {n, shift + mean, fmaxf(squares - sum * mean, 0.0f)};
}

// mean and 1/sqrt(var + eps) of each of the block's groups
__device__ __forceinline__ void group_moments(const Tile& t, const Moments& mine, int span, float eps, float* mean, float* rstd) {
  __shared__ Moments part[THREADS];
  part[threadIdx.x] = mine;
  __syncthreads();
  for (int g = threadIdx.x / 32; g < span; g += blockDim.x / 32) {
    Moments all = {0.0f, 0.0f, 0.0f};
    for (int k = threadIdx.x % 32; k < t.rows * t.lanes_of_group; k += 32)
      all = joined(all, part[k / t.lanes_of_group * t.lanes + g * t.lanes_of_group + k % t.lanes_of_group]);
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) {
      Moments other = {__shfl_down_sync(EVERY_LANE, all.n, offset), __shfl_down_sync(EVERY_LANE, all.mean, offset),
                       __shfl_down_sync(EVERY_LANE, all.m2, offset)};
      all = joined(all, other);
    }
    if (threadIdx.x % 32 == 0) {
      mean[g] = all.mean;
      rstd[g] = 1.0f / sqrtf(all.m2 / all.n + eps);
    }
  }
  __syncthreads();
}

template <int N>
__device__ __forceinline__ void forward(const float* x, const float* gamma, const float* beta, const float* scale, const float* shift,
                                        float* y, float* mean_out, float* rstd_out, int places, int channels, int groups, int span,
                                        float eps, int silu) {
  __shared__ float mean[THREADS], rstd[THREADS];
  Tile t = Tile::make<N>(places, channels, groups, span);
  group_moments(t, thread_moments<N>(t, x, places, channels), span, eps, mean, rstd);
  for (int g = threadIdx.x; g < span; g += blockDim.x) {
    mean_out[t.sample * groups + t.first_group + g] = mean[g];
    rstd_out[t.sample * groups + t.first_group + g] = rstd[g];
  }
  for (int column = t.lane; t.active && column < t.width; column += t.lanes) {
    int c = t.channel(column, N), g = column * N / t.group_size;
    float slope[N], offset[N], mu = mean[g], r = rstd[g];
    affine<N>(slope, offset, gamma, beta, scale, shift, (int64)t.sample * channels, c);
    for (int place = t.row; place < places; place += t.rows) {
      int64 at = t.base + (int64)place * channels + c;
      float v[N];
      load<N>(v, x + at);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        v[i] = fmaf((v[i] - mu) * r, slope[i], offset[i]);
        if (silu) v[i] *= sigmoid(v[i]);
      }
      save<N>(y + at, v);
    }
  }
}

// dv: the gradient before the activation
__device__ __forceinline__ float before_silu(float dy, float v, int silu) {
  if (!silu) return dy;
  float s = sigmoid(v);
  return dy * (s * fmaf(v, 1.0f - s, 1.0f));
}

// With S1 = sum of dv and S2 = sum of dv x_hat over the places of a sample, per channel, and k = 1 + scale:
//   dshift = S1, dscale = gamma S2 + beta S1, this sample's share of dbeta = k S1 and of dgamma = k S2 (kept in dbetas, dgammas),
//   and dx = rstd (dv k gamma - <k gamma S1> - x_hat <k gamma S2>), <> the sum over a group by its number of elements.
template <int N>
__device__ __forceinline__ void backward(const float* dy, const float* x, const float* gamma, const float* beta, const float* mean,
                                         const float* rstd, const float* scale, const float* shift, float* dx, float* dgammas,
                                         float* dbetas, float* dscale, float* dshift, int places, int channels, int groups, int span,
                                         int silu) {
  __shared__ float part1[THREADS * N], part2[THREADS * N], mean1[THREADS], mean2[THREADS];
  Tile t = Tile::make<N>(places, channels, groups, span);
  int64 of_sample = (int64)t.sample * channels;

  for (int start = 0; start < t.width; start += t.lanes) {  // once, but for a group wider than the block
    int column = start + t.lane, c = t.channel(column, N);
    float sum1[N] = {}, sum2[N] = {};
    if (t.active && column < t.width) {
      int g = t.sample * groups + t.first_group + column * N / t.group_size;
      float slope[N], offset[N], mu = mean[g], r = rstd[g];
      affine<N>(slope, offset, gamma, beta, scale, shift, of_sample, c);
      for (int place = t.row; place < places; place += t.rows) {
        float v[N], d[N];
        load<N>(v, x + t.base + (int64)place * channels + c);
        load<N>(d, dy + t.base + (int64)place * channels + c);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float x_hat = (v[i] - mu) * r, dv = before_silu(d[i], fmaf(x_hat, slope[i], offset[i]), silu);
          sum1[i] += dv;
          sum2[i] = fmaf(dv, x_hat, sum2[i]);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) part1[threadIdx.x * N + i] = sum1[i], part2[threadIdx.x * N + i] = sum2[i];
    __syncthreads();
    for (int k = threadIdx.x; k < t.lanes * N && start * N + k < t.width * N; k += blockDim.x) {
      float s1 = 0.0f, s2 = 0.0f;
      for (int row = 0; row < t.rows; ++row) s1 += part1[row * t.lanes * N + k], s2 += part2[row * t.lanes * N + k];
      int64 ch = t.channel(start, N) + k;
      float factor = 1.0f;
      if (scale) {
        factor += scale[of_sample + ch];
        dscale[of_sample + ch] = fmaf(gamma[ch], s2, beta[ch] * s1);
        dshift[of_sample + ch] = s1;
      }
      dbetas[of_sample + ch] = factor * s1;
      dgammas[of_sample + ch] = factor * s2;
    }
  }
  __syncthreads();

  for (int g = threadIdx.x / 32; g < span; g += blockDim.x / 32) {
    float s1 = 0.0f, s2 = 0.0f;
    for (int k = threadIdx.x % 32; k < t.group_size; k += 32) {
      int64 ch = (t.first_group + g) * t.group_size + k;
      s1 = fmaf(gamma[ch], dbetas[of_sample + ch], s1);
      s2 = fmaf(gamma[ch], dgammas[of_sample + ch], s2);
    }
    s1 = warp_sum(s1), s2 = warp_sum(s2);
    if (threadIdx.x % 32 == 0) {
      float n = (float)places * t.group_size;
      mean1[g] = s1 / n;
      mean2[g] = s2 / n;
    }
  }
  __syncthreads();

  for (int column = t.lane; t.active && column < t.width; column += t.lanes) {
    int c = t.channel(column, N), local = column * N / t.group_size, g = t.sample * groups + t.first_group + local;
    float slope[N], offset[N], mu = mean[g], r = rstd[g], m1 = mean1[local], m2 = mean2[local];
    affine<N>(slope, offset, gamma, beta, scale, shift, of_sample, c);
    for (int place = t.row; place < places; place += t.rows) {
      int64 at = t.base + (int64)place * channels + c;
      float v[N], d[N];
      load<N>(v, x + at);
      load<N>(d, dy + at);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float x_hat = (v[i] - mu) * r, dv = before_silu(d[i], fmaf(x_hat, slope[i], offset[i]), silu);
        d[i] = r * (fmaf(dv, slope[i], -m1) - x_hat * m2);
      }
      save<N>(dx + at, d);
    }
  }
}

// out[c] = sum over samples of parts[sample, c]. A block of 32 x 16 threads makes 32 channels.
extern "C" __global__ void __launch_bounds__(THREADS) norm_sum(const float* __restrict__ parts, float* __restrict__ out, int samples,
                                                               int channels) {
  __shared__ float part[16][32];
  int c = blockIdx.x * 32 + threadIdx.x;
  float total = 0.0f;
  if (c < channels)
    for (int sample = threadIdx.y; sample < samples; sample += 16) total += parts[(int64)sample * channels + c];
  part[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || c >= channels) return;
  for (int row = 1; row < 16; ++row) total += part[row][threadIdx.x];
  out[c] = total;
}

#define NORM(N)                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                          \
      norm_forward_##N(const float* x, const float* gamma, const float* beta, const float* scale, const float* shift, float* y,    \
                       float* mean, float* rstd, int places, int channels, int groups, int span, float eps, int silu) {            \
    forward<N>(x, gamma, beta, scale, shift, y, mean, rstd, places, channels, groups, span, eps, silu);                            \
  }                                                                                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                          \
      norm_backward_##N(const float* dy, const float* x, const float* gamma, const float* beta, const float* mean,                 \
                        const float* rstd, const float* scale, const float* shift, float* dx, float* dgammas, float* dbetas,       \
                        float* dscale, float* dshift, int places, int channels, int groups, int span, int silu) {                  \
    backward<N>(dy, x, gamma, beta, mean, rstd, scale, shift, dx, dgammas, dbetas, dscale, dshift, places, channels, groups, span, \
                silu);                                                                                                             \
  }

NORM(1)
NORM(2)
NORM(4)
