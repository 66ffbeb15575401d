// Softmax attention over tokens (samples, T, heads, d), forward and backward, never storing the T x T scores.
//
// A warp owns ROWS tokens (queries, or keys in the pass that makes dk and dv) and meets the other tokens 32 at a time in shared memory:
// for the scores lane j stands for token j of the tile, for the sums over tokens lane i stands for the features i, i + 32, ...
#include "common.cuh"

const int WARPS = 8;

struct Head {
  int tokens, d;
  int64 first, stride;  // element (token, i) lies at first + token * stride + i
  int64 scores;         // where this head's tokens begin in lse and delta, (samples, heads, T)
  int row;              // the warp's first token

  // blockIdx.x = (sample, head, block of tokens), the last fastest
  template <int ROWS> static __device__ __forceinline__ Head make(int tokens, int heads, int d) {
    int blocks = (tokens + WARPS * ROWS - 1) / (WARPS * ROWS), which = blockIdx.x / blocks;
    Head h;
    h.tokens = tokens;
    h.d = d;
    h.stride = (int64)heads * d;
    h.first = (int64)(which / heads) * tokens * h.stride + (int64)(which % heads) * d;
    h.scores = (int64)which * tokens;
    h.row = (blockIdx.x % blocks * WARPS + threadIdx.x / 32) * ROWS;
    return h;
  }
};

// tile[j * pitch + i] = feature i of token start + j, 0 past the end
__device__ __forceinline__ void load_tile(float* tile, const float* from, const Head& h, int start, int pitch) {
  for (int j = threadIdx.x / 32; j < 32; j += WARPS)
    for (int i = threadIdx.x % 32; i < h.d; i += 32)
      tile[j * pitch + i] = start + j < h.tokens ? from[h.first + (start + j) * h.stride + i] : 0.0f;
}

// rows[r * d + i] = feature i of the warp's token r, 0 past the end
template <int ROWS> __device__ __forceinline__ void load_rows(float* rows, const float* from, const Head& h) {
  for (int r = 0; r < ROWS; ++r)
    for (int i = threadIdx.x % 32; i < h.d; i += 32)
      rows[r * h.d + i] = h.row + r < h.tokens ? from[h.first + (h.row + r) * h.stride + i] : 0.0f;
}

// s[r] = row r . token `lane` of the tile
template <int ROWS> __device__ __forceinline__ void products(float (&s)[ROWS], const float* rows, const float* tile, int d, int pitch) {
  const float* mine = tile + threadIdx.x % 32 * pitch;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) s[r] = 0.0f;
  for (int i = 0; i < d; ++i) {
    float v = mine[i];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) s[r] = fmaf(rows[r * d + i], v, s[r]);
  }
}

// sum[r][c] += sum over the tile's tokens j of weight[r] (of lane j) * feature lane + 32 c of token j
template <int ROWS, int CHUNKS>
__device__ __forceinline__ void accumulate(float (&sum)[ROWS][CHUNKS], const float (&weight)[ROWS], const float* tile, int d, int pitch) {
  int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int j = 0; j < 32; ++j) {
    float v[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) v[c] = lane + 32 * c < d ? tile[j * pitch + lane + 32 * c] : 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float w = __shfl_sync(EVERY_LANE, weight[r], j);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) sum[r][c] = fmaf(w, v[c], sum[r][c]);
    }
  }
}

template <int ROWS, int CHUNKS>
__device__ __forceinline__ void save_rows(float* to, const float (&sum)[ROWS][CHUNKS], const float (&factor)[ROWS], const Head& h) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
      if (h.row + r < h.tokens && lane + 32 * c < h.d) to[h.first + (h.row + r) * h.stride + lane + 32 * c] = sum[r][c] * factor[r];
}

template <int ROWS, int CHUNKS>
__device__ __forceinline__ void forward(const float* q, const float* k, const float* v, float* out, float* lse, int tokens, int heads,
                                        int d, float scale) {
  extern __shared__ float shared[];
  Head h = Head::make<ROWS>(tokens, heads, d);
  int lane = threadIdx.x % 32, pitch = d | 1;
  float *keys = shared, *values = keys + 32 * pitch, *queries = values + 32 * pitch + threadIdx.x / 32 * ROWS * d;
  load_rows<ROWS>(queries, q, h);
  float sum[ROWS][CHUNKS] = {}, top[ROWS], total[ROWS], factor[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) top[r] = __int_as_float(0xff800000), total[r] = 0.0f;  // -infinity

  for (int start = 0; start < tokens; start += 32) {
    __syncthreads();
    load_tile(keys, k, h, start, pitch);
    load_tile(values, v, h, start, pitch);
    __syncthreads();
    float s[ROWS];
    products<ROWS>(s, queries, keys, d, pitch);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float score = start + lane < tokens ? s[r] * scale : __int_as_float(0xff800000);
      float higher = fmaxf(top[r], warp_max(score)), shrink = expf(top[r] - higher);
      s[r] = expf(score - higher);
      total[r] = fmaf(total[r], shrink, warp_sum(s[r]));
      top[r] = higher;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) sum[r][c] *= shrink;
    }
    accumulate(sum, s, values, d, pitch);
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    factor[r] = 1.0f / total[r];
    if (lane == 0 && h.row + r < tokens) lse[h.scores + h.row + r] = top[r] + logf(total[r]);
  }
  save_rows(out, sum, factor, h);
}

// delta = sum over features of do o, (samples, heads, T); one warp for each (sample, token, head)
extern "C" __global__ void __launch_bounds__(256) attention_delta(const float* __restrict__ dout, const float* __restrict__ out,
                                                                  float* __restrict__ delta, int samples, int tokens, int heads, int d) {
  int64 row = (int64)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= (int64)samples * tokens * heads) return;
  float sum = 0.0f;
  for (int i = threadIdx.x % 32; i < d; i += 32) sum = fmaf(dout[row * d + i], out[row * d + i], sum);
  sum = warp_sum(sum);
  int64 place = row / heads;
  int head = row % heads;
  if (threadIdx.x % 32 == 0) delta[(place / tokens * heads + head) * tokens + place % tokens] = sum;
}

// With P = exp(scale q k - lse) and dS = P (do v - delta): dq = scale sum_keys dS k (KEYS false: a warp owns queries), or
// dk = scale sum_queries dS q and dv = sum_queries P do (KEYS true: a warp owns keys).
template <bool KEYS, int ROWS, int CHUNKS>
__device__ __forceinline__ void backward(const float* dout, const float* q, const float* k, const float* v, const float* lse,
                                         const float* delta, float* first, float* second, int tokens, int heads, int d, float scale) {
  extern __shared__ float shared[];
  Head h = Head::make<ROWS>(tokens, heads, d);
  int lane = threadIdx.x % 32, pitch = d | 1;
  float *tile1 = shared, *tile2 = tile1 + 32 * pitch;
  float *rows1 = tile2 + 32 * pitch + threadIdx.x / 32 * 2 * ROWS * d, *rows2 = rows1 + ROWS * d;
  load_rows<ROWS>(rows1, KEYS ? k : q, h);
  load_rows<ROWS>(rows2, KEYS ? v : dout, h);
  float sum1[ROWS][CHUNKS] = {}, sum2[ROWS][CHUNKS] = {}, log_total[ROWS], offset[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    bool mine = !KEYS && h.row + r < tokens;
    log_total[r] = mine ? lse[h.scores + h.row + r] : 0.0f;
    offset[r] = mine ? delta[h.scores + h.row + r] : 0.0f;
  }
  for (int start = 0; start < tokens; start += 32) {
    __syncthreads();
    load_tile(tile1, KEYS ? q : k, h, start, pitch);
    load_tile(tile2, KEYS ? dout : v, h, start, pitch);
    __syncthreads();
    bool inside = start + lane < tokens;
    float tile_log = KEYS && inside ? lse[h.scores + start + lane] : 0.0f, tile_delta = KEYS && inside ? delta[h.scores + start + lane] : 0.0f;
    float p[ROWS], ds[ROWS];
    products<ROWS>(p, rows1, tile1, d, pitch);
    products<ROWS>(ds, rows2, tile2, d, pitch);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      p[r] = inside ? expf(fmaf(p[r], scale, -(KEYS ? tile_log : log_total[r]))) : 0.0f;
      ds[r] = inside ? p[r] * (ds[r] - (KEYS ? tile_delta : offset[r])) : 0.0f;
    }
    accumulate(sum1, ds, tile1, d, pitch);
    if (KEYS) accumulate(sum2, p, tile2, d, pitch);
  }
  float factor[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) factor[r] = scale;
  save_rows(first, sum1, factor, h);
  if (!KEYS) return;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) factor[r] = 1.0f;
  save_rows(second, sum2, factor, h);
}

// The features of a head, at most 32 CHUNKS; the number of rows keeps a warp's sums in registers.
#define ATTENTION(FEATURES, ROWS, CHUNKS)                                                                                              \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                                 \
      attention_forward_##FEATURES(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,              \
                                   float* __restrict__ out, float* __restrict__ lse, int tokens, int heads, int d, float scale) {      \
    forward<ROWS, CHUNKS>(q, k, v, out, lse, tokens, heads, d, scale);                                                                 \
  }                                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                                 \
      attention_dq_##FEATURES(const float* __restrict__ dout, const float* __restrict__ q, const float* __restrict__ k,                \
                              const float* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,             \
                              float* __restrict__ dq, int tokens, int heads, int d, float scale) {                                     \
    backward<false, ROWS, CHUNKS>(dout, q, k, v, lse, delta, dq, nullptr, tokens, heads, d, scale);                                    \
  }                                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                                 \
      attention_dkv_##FEATURES(const float* __restrict__ dout, const float* __restrict__ q, const float* __restrict__ k,               \
                               const float* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,            \
                               float* __restrict__ dk, float* __restrict__ dv, int tokens, int heads, int d, float scale) {            \
    backward<true, ROWS, CHUNKS>(dout, q, k, v, lse, delta, dk, dv, tokens, heads, d, scale);                                          \
  }

ATTENTION(32, 4, 1)
ATTENTION(64, 4, 2)
ATTENTION(128, 2, 4)
ATTENTION(256, 2, 8)
