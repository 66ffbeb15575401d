// Softmax attention over tokens (samples, T, heads, d), forward and backward, never storing the T x T scores.
//
// A warp owns 4 ROWS tokens (queries, or keys in the pass that makes dk and dv) and meets the other tokens a TILE at a time, from shared
// memory. Lane l stands in row group l / 8 and column l % 8: of the products it makes those of the rows l / 8 + 4 r with the tile's tokens
// l % 8 + 8 c, of the sums over tokens the same rows' features, an eighth of them. So a float read from shared memory is used by 2 or more
// multiplications. Heads of d features are filled up with zeros to D.
#include "common.cuh"

const int TILE = 32;            // tokens
const int COLUMNS = TILE / 8;   // of a lane
const int WEIGHTS = TILE + 8;   // pitch of a warp's weights: its four row groups write to different banks

// Pitch of tokens in shared memory: an odd number of 16-byte words, so that eight tokens' lie in different banks.
template <int D> __device__ constexpr int pitch() { return D + 4; }

struct Head {
  int tokens, d, warp, lane;
  int64 first, stride;  // element (token, i) lies at first + token * stride + i
  int64 scores;         // where this head's tokens begin in lse and delta, (samples, heads, T)
  int row;              // the warp's first token
  bool wide;            // every token begins at a multiple of 16 bytes, and d is one of 4

  // blockIdx.x = (sample, head, block of tokens), the last fastest
  template <int ROWS> static __device__ __forceinline__ Head make(int tokens, int heads, int d, int wide) {
    int own = blockDim.x / 8 * ROWS, blocks = (tokens + own - 1) / own, which = blockIdx.x / blocks;
    Head h;
    h.tokens = tokens;
    h.d = d;
    h.warp = threadIdx.x / 32;
    h.lane = threadIdx.x % 32;
    h.stride = (int64)heads * d;
    h.first = (int64)(which / heads) * tokens * h.stride + (int64)(which % heads) * d;
    h.scores = (int64)which * tokens;
    h.row = blockIdx.x % blocks * own + h.warp * 4 * ROWS;
    h.wide = wide;
    return h;
  }

  __device__ __forceinline__ int group() const { return lane / 8; }
  __device__ __forceinline__ int column() const { return lane % 8; }
};

// The features of `count` tokens from `start` on into shared memory, zeros past the end, by `threads` threads of which this is one; four
// reads of a thread are under way at once.
template <int D>
__device__ __forceinline__ void load_tokens(float* to, const float* from, const Head& h, int start, int count, int thread, int threads) {
  for (int first = thread; first < count * (D / 4); first += 4 * threads) {
    float v[4][4] = {};
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      int k = first + u * threads, token = start + k / (D / 4), i = k % (D / 4) * 4;
      const float* at = from + h.first + token * h.stride + i;
      bool inside = k < count * (D / 4) && token < h.tokens;
      if (h.wide) {
        if (inside && i < h.d) load<4>(v[u], at);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (inside && i + e < h.d) v[u][e] = at[e];
      }
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      int k = first + u * threads;
      if (k < count * (D / 4)) save<4>(to + k / (D / 4) * pitch<D>() + k % (D / 4) * 4, v[u]);
    }
  }
}

// s[r][c] = row r . column c
template <int D, int ROWS>
__device__ __forceinline__ void products(float (&s)[ROWS][COLUMNS], const float* rows, const float* tile, const Head& h) {
  const float *mine = rows + h.group() * pitch<D>(), *other = tile + h.column() * pitch<D>();
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) s[r][c] = 0.0f;
#pragma unroll (D >= 64 ? 1 : 2)
  for (int i = 0; i < D; i += 4) {
    float a[ROWS][4], b[COLUMNS][4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) load<4>(a[r], mine + 4 * r * pitch<D>() + i);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) load<4>(b[c], other + 8 * c * pitch<D>() + i);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[r][c] = fmaf(a[r][e], b[c][e], s[r][c]);
  }
}

// A lane's features of a row: RUN neighbours from feature<D>(lane, k) on, for k = 0, RUN, ..., D / 8 - RUN
template <int D> __device__ constexpr int run() { return D >= 32 ? 4 : D / 8; }
template <int D> __device__ __forceinline__ int feature(const Head& h, int k) { return k * 8 + h.column() * run<D>(); }

// sum[r] += sum over the tile's first `count` tokens of weight[r] (token) * features. The warp's weights go through shared memory, where
// nothing else lies between two barriers of the block.
template <int D, int ROWS>
__device__ __forceinline__ void accumulate(float (&sum)[ROWS][D / 8], const float (&weight)[ROWS][COLUMNS], float* weights,
                                           const float* tile, int count, const Head& h) {
  const int RUN = run<D>();
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) weights[(h.group() + 4 * r) * WEIGHTS + h.column() + 8 * c] = weight[r][c];
  __syncwarp();
#pragma unroll (D >= 64 ? 1 : 2)
  for (int j = 0; j < count; j += 4) {
    float w[ROWS][4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) load<4>(w[r], weights + (h.group() + 4 * r) * WEIGHTS + j);
#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
      for (int k = 0; k < D / 8; k += RUN) {
        float v[RUN];
        load<RUN>(v, tile + (j + e) * pitch<D>() + feature<D>(h, k));
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
          for (int i = 0; i < RUN; ++i) sum[r][k + i] = fmaf(w[r][e], v[i], sum[r][k + i]);
      }
  }
}

template <int D, int ROWS>
__device__ __forceinline__ void save_rows(float* to, const float (&sum)[ROWS][D / 8], const float (&factor)[ROWS], const Head& h) {
  const int RUN = run<D>();
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    int row = h.row + h.group() + 4 * r;
    if (row >= h.tokens) continue;
#pragma unroll
    for (int k = 0; k < D / 8; k += RUN) {
      int first = feature<D>(h, k);
      float* at = to + h.first + row * h.stride + first;
      float v[RUN];
#pragma unroll
      for (int i = 0; i < RUN; ++i) v[i] = sum[r][k + i] * factor[r];
      if (h.wide) {
        if (first < h.d) save<RUN>(at, v);
      } else {
#pragma unroll
        for (int i = 0; i < RUN; ++i)
          if (first + i < h.d) at[i] = v[i];
      }
    }
  }
}

// Over the eight columns of a row
__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
  for (int offset = 4; offset; offset >>= 1) v += __shfl_xor_sync(EVERY_LANE, v, offset);
  return v;
}
__device__ __forceinline__ float row_max(float v) {
#pragma unroll
  for (int offset = 4; offset; offset >>= 1) v = fmaxf(v, __shfl_xor_sync(EVERY_LANE, v, offset));
  return v;
}

template <int D, int ROWS>
__device__ __forceinline__ void forward(const float* q, const float* k, const float* v, float* out, float* lse, int tokens, int heads,
                                        int d, float scale, int wide) {
  extern __shared__ float shared[];
  const float NOTHING = __int_as_float(0xff800000);  // -infinity
  Head h = Head::make<ROWS>(tokens, heads, d, wide);
  float *keys = shared, *values = keys + TILE * pitch<D>();
  float *queries = values + TILE * pitch<D>() + h.warp * 4 * ROWS * (pitch<D>() + WEIGHTS), *weights = queries + 4 * ROWS * pitch<D>();
  load_tokens<D>(queries, q, h, h.row, 4 * ROWS, h.lane, 32);
  float sum[ROWS][D / 8] = {}, top[ROWS], total[ROWS] = {};
#pragma unroll
  for (int r = 0; r < ROWS; ++r) top[r] = NOTHING;

  for (int start = 0; start < tokens; start += TILE) {
    __syncthreads();
    load_tokens<D>(keys, k, h, start, TILE, threadIdx.x, blockDim.x);
    load_tokens<D>(values, v, h, start, TILE, threadIdx.x, blockDim.x);
    __syncthreads();
    float s[ROWS][COLUMNS];
    products<D, ROWS>(s, queries, keys, h);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float higher = top[r];
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        s[r][c] = start + h.column() + 8 * c < tokens ? s[r][c] * scale : NOTHING;
        higher = fmaxf(higher, s[r][c]);
      }
      higher = row_max(higher);
      float shrink = expf(top[r] - higher);
      top[r] = higher;
      total[r] *= shrink;
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        s[r][c] = expf(s[r][c] - higher);
        total[r] += s[r][c];
      }
#pragma unroll
      for (int i = 0; i < D / 8; ++i) sum[r][i] *= shrink;
    }
    accumulate<D, ROWS>(sum, s, weights, values, min(TILE, tokens - start), h);
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    int row = h.row + h.group() + 4 * r;
    float all = row_sum(total[r]);
    if (h.column() == 0 && row < tokens) lse[h.scores + row] = top[r] + logf(all);
    total[r] = 1.0f / all;
  }
  save_rows<D, ROWS>(out, sum, total, h);
}

// With P = exp(scale q k - lse), delta = sum over features of do o and dS = P (do v - delta): dq = scale sum_keys dS k and delta (KEYS false:
// a warp owns queries), or dk = scale sum_queries dS q and dv = sum_queries P do (KEYS true: a warp owns keys).
template <bool KEYS, int D, int ROWS>
__device__ __forceinline__ void backward(const float* dout, const float* q, const float* k, const float* v, const float* out,
                                         const float* lse, float* delta, float* first, float* second, int tokens, int heads, int d,
                                         float scale, int wide) {
  extern __shared__ float shared[];
  Head h = Head::make<ROWS>(tokens, heads, d, wide);
  float *tile1 = shared, *tile2 = tile1 + TILE * pitch<D>();
  float* rows1 = tile2 + TILE * pitch<D>() + h.warp * 4 * ROWS * (2 * pitch<D>() + (KEYS ? 2 : 1) * WEIGHTS);
  float *rows2 = rows1 + 4 * ROWS * pitch<D>(), *weights = rows2 + 4 * ROWS * pitch<D>();
  load_tokens<D>(rows1, KEYS ? k : q, h, h.row, 4 * ROWS, h.lane, 32);
  load_tokens<D>(rows2, KEYS ? v : dout, h, h.row, 4 * ROWS, h.lane, 32);
  float sum1[ROWS][D / 8] = {}, sum2[ROWS][D / 8] = {}, log_total[ROWS] = {}, offset[ROWS] = {};
  if (!KEYS) {
    __syncwarp();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      int row = h.row + h.group() + 4 * r;
      bool inside = row < tokens;
      for (int i = h.column(); inside && i < d; i += 8)
        offset[r] = fmaf(rows2[(h.group() + 4 * r) * pitch<D>() + i], out[h.first + row * h.stride + i], offset[r]);
      offset[r] = row_sum(offset[r]);
      if (inside) log_total[r] = lse[h.scores + row];
      if (inside && h.column() == 0) delta[h.scores + row] = offset[r];
    }
  }
  for (int start = 0; start < tokens; start += TILE) {
    __syncthreads();
    load_tokens<D>(tile1, KEYS ? q : k, h, start, TILE, threadIdx.x, blockDim.x);
    load_tokens<D>(tile2, KEYS ? dout : v, h, start, TILE, threadIdx.x, blockDim.x);
    __syncthreads();
    float p[ROWS][COLUMNS], ds[ROWS][COLUMNS];
    products<D, ROWS>(p, rows1, tile1, h);
    products<D, ROWS>(ds, rows2, tile2, h);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      int token = start + h.column() + 8 * c;
      bool inside = token < tokens;
      float tile_log = KEYS && inside ? lse[h.scores + token] : 0.0f, tile_delta = KEYS && inside ? delta[h.scores + token] : 0.0f;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        p[r][c] = inside ? expf(fmaf(p[r][c], scale, -(KEYS ? tile_log : log_total[r]))) : 0.0f;
        ds[r][c] = inside ? p[r][c] * (ds[r][c] - (KEYS ? tile_delta : offset[r])) : 0.0f;
      }
    }
    int count = min(TILE, tokens - start);
    accumulate<D, ROWS>(sum1, ds, weights, tile1, count, h);
    if (KEYS) accumulate<D, ROWS>(sum2, p, weights + 4 * ROWS * WEIGHTS, tile2, count, h);
  }
  float factor[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) factor[r] = scale;
  save_rows<D, ROWS>(first, sum1, factor, h);
  if (!KEYS) return;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) factor[r] = 1.0f;
  save_rows<D, ROWS>(second, sum2, factor, h);
}

// The features of a head, at most D; the rows of a lane keep its sums in registers.
#define ATTENTION(D, FORWARD_ROWS, BACKWARD_ROWS)                                                                                      \
  extern "C" __global__ void __launch_bounds__(128, D <= 64 ? 3 : 2)                                                                   \
      attention_forward_##D(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,                     \
                            float* __restrict__ out, float* __restrict__ lse, int tokens, int heads, int d, float scale, int wide) {   \
    forward<D, FORWARD_ROWS>(q, k, v, out, lse, tokens, heads, d, scale, wide);                                                        \
  }                                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(128, D <= 64 ? 3 : 2)                                                                   \
      attention_dq_##D(const float* __restrict__ dout, const float* __restrict__ q, const float* __restrict__ k,                       \
                       const float* __restrict__ v, const float* __restrict__ out, const float* __restrict__ lse,                      \
                       float* __restrict__ delta, float* __restrict__ dq, int tokens, int heads, int d, float scale, int wide) {       \
    backward<false, D, BACKWARD_ROWS>(dout, q, k, v, out, lse, delta, dq, nullptr, tokens, heads, d, scale, wide);                     \
  }                                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(128, D <= 32 ? 3 : 2)                                                                   \
      attention_dkv_##D(const float* __restrict__ dout, const float* __restrict__ q, const float* __restrict__ k,                      \
                        const float* __restrict__ v, const float* __restrict__ lse, float* __restrict__ delta, float* __restrict__ dk, \
                        float* __restrict__ dv, int tokens, int heads, int d, float scale, int wide) {                                 \
    backward<true, D, BACKWARD_ROWS>(dout, q, k, v, nullptr, lse, delta, dk, dv, tokens, heads, d, scale, wide);                       \
  }

ATTENTION(8, 4, 4)
ATTENTION(16, 4, 4)
ATTENTION(32, 4, 4)
ATTENTION(64, 4, 4)
ATTENTION(128, 4, 2)
ATTENTION(256, 2, 2)
