// Softmax attention on the tensor cores, over tokens (samples, T, heads, d) of bfloat16, or of float32 that is rounded to TF32 on its way
// into a product. Sums, softmax and statistics are float32. Never stores the T x T scores: FlashAttention-2 (Dao 2023), dq in a pass of its
// own instead of by atomics.
//
// A warp owns 16 tokens, the rows (queries, or keys in the pass that makes dk and dv), and meets the others a tile at a time. Its products
// with the tile, 16 x TILE, become in the registers where they lie the left factor of the second product, 16 x TILE by TILE x D, whose sums
// stay in registers too. Rows and tiles lie in shared memory, D features each (zeros past d), and 16 bytes between them: an odd number of
// 16-byte words from row to row, so that neither eight rows' words (ldmatrix) nor a row's neighbours meet in a bank.
//
// g = lane / 4 and t = lane % 4, as in mma.cuh.
#include "common.cuh"
#include "mma.cuh"

const int OWN = 16;  // tokens of a warp
const float LOG2_E = 1.44269504088896f, LN_2 = 0.693147180559945f;

template <class T, int D> __device__ constexpr int pitch() { return D * (int)sizeof(T) + 16; }  // bytes from token to token

// Tokens of a tile: fewer where their features need the room, and the registers for two products
template <class T, int D, bool BACK> __device__ constexpr int tile_of() {
  return D * sizeof(T) >= 1024 ? 16 : BACK || D * sizeof(T) >= 512 ? 32 : 64;
}

struct Head {
  int tokens, d;
  int64 first, stride;  // element (token, i) lies at first + token * stride + i
  int64 scores;         // where this head's tokens begin in lse and delta, (samples, heads, T)
  int start;            // the block's first row
  bool wide;            // every token begins at a multiple of 16 bytes, and is a number of those long

  // blockIdx.x = (sample, head, block of rows), the last fastest
  static __device__ __forceinline__ Head make(int rows, int tokens, int heads, int d, int wide) {
    int blocks = (tokens + rows - 1) / rows, which = blockIdx.x / blocks;
    Head h;
    h.tokens = tokens;
    h.d = d;
    h.stride = (int64)heads * d;
    h.first = (int64)(which / heads) * tokens * h.stride + (int64)(which % heads) * d;
    h.scores = (int64)which * tokens;
    h.start = blockIdx.x % blocks * rows;
    h.wide = wide;
    return h;
  }
};

// body(token, chunk) for each of the CHUNKS 16 bytes of `count` tokens, a multiple of 8, by warp `warp` of `warps`: neighbouring lanes at
// neighbouring chunks. With 4 to a token, eight lanes take two tokens that lie four apart, in other banks.
template <int CHUNKS, class Body> __device__ __forceinline__ void for_chunks(int count, int warp, int warps, Body body) {
  const int LANES = CHUNKS < 32 ? CHUNKS : 32, AT_ONCE = 32 / LANES;
  int lane = threadIdx.x % 32, of_lane = CHUNKS == 4 ? lane / 4 % 2 * 4 + lane / 8 : lane / LANES;
#pragma unroll 1
  for (int token = warp * AT_ONCE + of_lane; token < count; token += warps * AT_ONCE)
#pragma unroll
    for (int chunk = lane % LANES; chunk < CHUNKS; chunk += LANES) body(token, chunk);
}

// Begin to bring `count` tokens from `start` on, by all warps of the block; zeros past the last token and feature.
template <class T, int D> __device__ __forceinline__ void bring(unsigned char* to, const T* from, const Head& h, int start, int count) {
  const int EACH = Mma<T>::PER_CHUNK;
  for_chunks<D / EACH>(count, threadIdx.x / 32, blockDim.x / 32, [&](int place, int chunk) {
    unsigned char* at = to + place * pitch<T, D>() + chunk * 16;
    const T* source = from + h.first + (start + place) * h.stride + chunk * EACH;
    bool inside = start + place < h.tokens && chunk * EACH < h.d;
    if (h.wide) {
      copy16(shared_address(at), source, inside);
    } else {
#pragma unroll
      for (int e = 0; e < EACH; ++e) reinterpret_cast<T*>(at)[e] = inside && chunk * EACH + e < h.d ? source[e] : T(0);
    }
  });
}

// Begin to bring the lse and delta of `count` queries into the 16 bytes behind their features.
template <class T, int D>
__device__ __forceinline__ void bring_scores(unsigned char* to, const float* lse, const float* delta, const Head& h, int start, int count) {
  for (int k = threadIdx.x; k < count; k += blockDim.x) {
    int64 place = h.scores + start + k;
    unsigned at = shared_address(to + k * pitch<T, D>() + D * sizeof(T));
#pragma unroll
    for (int which = 0; which < 2; ++which)
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at + 4 * which), "l"((which ? delta : lse) + place),
                   "r"(start + k < h.tokens ? 4 : 0)
                   : "memory");
  }
}

// Round what this thread has brought, as the products want it.
template <int D> __device__ __forceinline__ void settle(const bf16*, unsigned char*, int) {}
template <int D> __device__ __forceinline__ void settle(const float*, unsigned char* tokens, int count) {
  for_chunks<D / 4>(count, threadIdx.x / 32, blockDim.x / 32, [&](int place, int chunk) {
    uint4 *at = reinterpret_cast<uint4*>(tokens + place * pitch<float, D>() + chunk * 16), v = *at;
    *at = make_uint4(Mma<float>::operand(v.x), Mma<float>::operand(v.y), Mma<float>::operand(v.z), Mma<float>::operand(v.w));
  });
}

// A factor of the first product, as it goes into that.
__device__ __forceinline__ float rounded(const bf16*, float v) { return v; }
__device__ __forceinline__ float rounded(const float*, float v) { return __uint_as_float(Mma<float>::operand(__float_as_uint(v))); }

// s[n] = the warp's rows . the tile's tokens 8 n .. 8 n + 7
template <class T, int D, int N>
__device__ __forceinline__ void products(float (&s)[N][4], const unsigned char* rows, const unsigned char* tile) {
  const int PITCH = pitch<T, D>(), lane = threadIdx.x % 32;
  unsigned left = shared_address(rows + lane % 16 * PITCH + lane / 16 * 16);
  unsigned right = shared_address(tile + (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 16);
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = 0.0f;
#pragma unroll 4
  for (int i = 0; i < D * (int)sizeof(T); i += 32) {
    unsigned a[4];
    load_matrices(a, left + i);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      unsigned b[4];
      load_matrices(b, right + n * 8 * PITCH + i);
      Mma<T>::product(s[n], a, b[0], b[1]);
      Mma<T>::product(s[n + 1], a, b[2], b[3]);
    }
  }
}

// sum[n] += the weights, 16 rows x the tile's tokens, times the tokens' features. bf16: features 8 n .. 8 n + 7.
template <int D, int N>
__device__ __forceinline__ void accumulate(const bf16*, float (&sum)[D / 8][4], const float (&weight)[N][4], const unsigned char* tile) {
  const int PITCH = pitch<bf16, D>(), lane = threadIdx.x % 32;
  unsigned right = shared_address(tile + lane % 16 * PITCH + lane / 16 * 16);
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    unsigned a[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) a[e] = pack_bf16(weight[j + e / 2][e % 2 * 2], weight[j + e / 2][e % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      unsigned b[4];
      load_matrices_turned(b, right + j * 8 * PITCH + n * 16);
      Mma<bf16>::product(sum[n], a, b[0], b[1]);
      Mma<bf16>::product(sum[n + 1], a, b[2], b[3]);
    }
  }
}

// float32: the k of a product may stand for any token, its column for any feature. Here k = t and t + 4 are tokens 2 t and 2 t + 1, as a lane
// holds them, and column g of sum[4 m + i] is feature 32 m + 4 g + i: four products' words come with one access.
template <int D, int N>
__device__ __forceinline__ void accumulate(const float*, float (&sum)[D / 8][4], const float (&weight)[N][4], const unsigned char* tile) {
  const int PITCH = pitch<float, D>(), lane = threadIdx.x % 32;
  const unsigned char* mine = tile + lane % 4 * 2 * PITCH + lane / 4 * 16;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    unsigned a[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) a[e] = Mma<float>::operand(__float_as_uint(weight[j][e % 2 * 2 + e / 2]));
#pragma unroll
    for (int m = 0; m < D / 32; ++m) {
      uint4 even = *reinterpret_cast<const uint4*>(mine + j * 8 * PITCH + m * 128);
      uint4 odd = *reinterpret_cast<const uint4*>(mine + (j * 8 + 1) * PITCH + m * 128);
      Mma<float>::product(sum[4 * m], a, even.x, odd.x);
      Mma<float>::product(sum[4 * m + 1], a, even.y, odd.y);
      Mma<float>::product(sum[4 * m + 2], a, even.z, odd.z);
      Mma<float>::product(sum[4 * m + 3], a, even.w, odd.w);
    }
  }
}

// The sums of row g + 8 r, times factor[r], where that row lay in shared memory.
template <int D> __device__ __forceinline__ void put(bf16*, unsigned char* rows, const float (&sum)[D / 8][4], const float (&factor)[2]) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<unsigned*>(rows + (lane / 4 + 8 * r) * pitch<bf16, D>() + n * 16 + lane % 4 * 4) =
          pack_bf16(sum[n][2 * r] * factor[r], sum[n][2 * r + 1] * factor[r]);
}
template <int D> __device__ __forceinline__ void put(float*, unsigned char* rows, const float (&sum)[D / 8][4], const float (&factor)[2]) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int m = 0; m < D / 8; m += 4)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        *reinterpret_cast<float4*>(rows + (lane / 4 + 8 * r) * pitch<float, D>() + m * 32 + lane % 4 * 32 + e * 16) =
            make_float4(sum[m][2 * r + e] * factor[r], sum[m + 1][2 * r + e] * factor[r], sum[m + 2][2 * r + e] * factor[r],
                        sum[m + 3][2 * r + e] * factor[r]);
}

// The warp's sums to the array, by way of its rows in shared memory, which nobody reads any more.
template <class T, int D>
__device__ __forceinline__ void save_rows(T* to, unsigned char* rows, const float (&sum)[D / 8][4], const float (&factor)[2], const Head& h,
                                          int first) {
  const int EACH = Mma<T>::PER_CHUNK;
  put<D>(to, rows, sum, factor);
  __syncwarp();
  for_chunks<D / EACH>(OWN, 0, 1, [&](int place, int chunk) {
    const unsigned char* at = rows + place * pitch<T, D>() + chunk * 16;
    T* target = to + h.first + (first + place) * h.stride + chunk * EACH;
    if (first + place >= h.tokens || chunk * EACH >= h.d) return;
    if (h.wide) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(at);
    } else {
#pragma unroll 1
      for (int e = 0; e < EACH && chunk * EACH + e < h.d; ++e) target[e] = reinterpret_cast<const T*>(at)[e];
    }
  });
}

// Over the four lanes of a row
__device__ __forceinline__ float row_sum(float v) {
  v += __shfl_xor_sync(EVERY_LANE, v, 1);
  return v + __shfl_xor_sync(EVERY_LANE, v, 2);
}
__device__ __forceinline__ float row_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(EVERY_LANE, v, 1));
  return fmaxf(v, __shfl_xor_sync(EVERY_LANE, v, 2));
}

// The others' tokens, a tile of two arrays at a time: body(first, second, start) for each of them. With two `stages` the next tile comes
// meanwhile, into a buffer of its own. Shared memory: `rows` rows, whose copies have begun, then the buffers.
template <class T, int D, int TILE, class Bring, class Body>
__device__ __forceinline__ void for_tiles(unsigned char* shared, int rows, int tokens, int stages, Bring bring_tile, Body body) {
  const int SIZE = TILE * pitch<T, D>();
  unsigned char *buffers = shared + rows * pitch<T, D>(), *first = buffers, *other = stages == 2 ? first + 2 * SIZE : first;
  commit_copies();
  bring_tile(first, first + SIZE, 0);
  commit_copies();
  wait_copies<1>();
  settle<D>((const T*)nullptr, shared, rows);
  for (int start = 0; start < tokens; start += TILE) {
    bool more = start + TILE < tokens;
    wait_copies<0>();
    settle<D>((const T*)nullptr, first, 2 * TILE);
    __syncthreads();
    if (more && stages == 2) bring_tile(other, other + SIZE, start + TILE);
    body(first, first + SIZE, start);
    if (more && stages == 1) {
      __syncthreads();
      bring_tile(first, first + SIZE, start + TILE);
    }
    commit_copies();
    unsigned char* last = first;
    first = other, other = last;
  }
}

template <class T, int D>
__device__ __forceinline__ void forward(const T* q, const T* k, const T* v, T* out, float* lse, int tokens, int heads, int d, float scale,
                                        int wide, int stages) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int TILE = tile_of<T, D, false>(), N = TILE / 8, PITCH = pitch<T, D>();
  const float NOTHING = __int_as_float(0xff800000);  // -infinity
  int rows = blockDim.x / 32 * OWN, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Head h = Head::make(rows, tokens, heads, d, wide);
  unsigned char* queries = shared + warp * OWN * PITCH;
  float sum[D / 8][4] = {}, top[2] = {NOTHING, NOTHING}, total[2] = {};  // top and scores: of powers of 2
  scale *= LOG2_E;
  bring<T, D>(shared, q, h, h.start, rows);

  auto bring_tile = [&](unsigned char* keys, unsigned char* values, int start) {
    bring<T, D>(keys, k, h, start, TILE);
    bring<T, D>(values, v, h, start, TILE);
  };
  for_tiles<T, D, TILE>(shared, rows, tokens, stages, bring_tile, [&](unsigned char* keys, unsigned char* values, int start) {
    float s[N][4];
    products<T, D, N>(s, queries, keys);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float higher = top[r];
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          s[n][e] = start + 8 * n + lane % 4 * 2 + e % 2 < tokens ? s[n][e] * scale : NOTHING;
          higher = fmaxf(higher, s[n][e]);
        }
      higher = row_max(higher);
      float shrink = exp2f(top[r] - higher);
      top[r] = higher;
      total[r] *= shrink;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          s[n][e] = exp2f(s[n][e] - higher);
          total[r] += s[n][e];
        }
#pragma unroll
      for (int n = 0; n < D / 8; ++n) sum[n][2 * r] *= shrink, sum[n][2 * r + 1] *= shrink;
    }
    accumulate<D, N>(q, sum, s, values);
  });
  int first = h.start + warp * OWN;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int row = first + lane / 4 + 8 * r;
    total[r] = row_sum(total[r]);
    if (lane % 4 == 0 && row < tokens) lse[h.scores + row] = (top[r] + log2f(total[r])) * LN_2;
    total[r] = 1.0f / total[r];
  }
  save_rows<T, D>(out, queries, sum, total, h, first);
}

// With P = exp(scale q k - lse), delta = sum over features of do o and dS = P (do v - delta): dq = scale sum_keys dS k and delta (KEYS false:
// the rows are queries), or dk = scale sum_queries dS q and dv = sum_queries P do (KEYS true: the rows are keys). Where D is so large that a
// warp's registers hold one of the two sums, two warps own the same keys: half of the block's make dk, half dv.
template <bool KEYS, class T, int D>
__device__ __forceinline__ void backward(const T* dout, const T* q, const T* k, const T* v, const T* out, const float* lse, float* delta,
                                         T* first_out, T* second_out, int tokens, int heads, int d, float scale, int wide, int stages) {
  extern __shared__ __align__(16) unsigned char shared[];
  const bool HALVES = KEYS && D > 128, BOTH = KEYS && !HALVES;
  const int TILE = tile_of<T, D, true>(), N = TILE / 8, PITCH = pitch<T, D>(), EACH = Mma<T>::PER_CHUNK;
  int warps = blockDim.x / 32 / (HALVES ? 2 : 1), warp = threadIdx.x / 32 % warps, lane = threadIdx.x % 32, rows = warps * OWN;
  bool of_values = HALVES && threadIdx.x / 32 >= warps;  // this warp makes dv
  Head h = Head::make(rows, tokens, heads, d, wide);
  unsigned char *rows1 = shared + warp * OWN * PITCH, *rows2 = rows1 + rows * PITCH;
  int first = h.start + warp * OWN;
  bring<T, D>(shared, KEYS ? k : q, h, h.start, rows);
  bring<T, D>(shared + rows * PITCH, KEYS ? v : dout, h, h.start, rows);

  float sum[D / 8][4] = {}, more[BOTH ? D / 8 : 1][4] = {}, log_total[2] = {}, offset[2] = {};
  if (!KEYS) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int row = first + lane / 4 + 8 * r;
      bool inside = row < tokens;
      int64 place = h.first + row * h.stride;
      if (wide) {
#pragma unroll (D * sizeof(T) >= 256 ? 4 : 1)
        for (int i = lane % 4 * EACH; inside && i < d; i += 4 * EACH) {
          float x[EACH], y[EACH];
          load<EACH>(x, dout + place + i), load<EACH>(y, out + place + i);
#pragma unroll
          for (int e = 0; e < EACH; ++e) offset[r] = fmaf(rounded(dout, x[e]), y[e], offset[r]);
        }
      } else {
#pragma unroll 1
        for (int i = lane % 4; inside && i < d; i += 4)
          offset[r] = fmaf(rounded(dout, load_one(dout + place + i)), load_one(out + place + i), offset[r]);
      }
      offset[r] = row_sum(offset[r]);
      if (inside) log_total[r] = lse[h.scores + row] * LOG2_E;
      if (inside && lane % 4 == 0) delta[h.scores + row] = offset[r];
    }
  }

  auto bring_tile = [&](unsigned char* tile1, unsigned char* tile2, int start) {
    bring<T, D>(tile1, KEYS ? q : k, h, start, TILE);
    bring<T, D>(tile2, KEYS ? dout : v, h, start, TILE);
    if (KEYS) bring_scores<T, D>(tile1, lse, delta, h, start, TILE);
  };
  for_tiles<T, D, TILE>(shared, 2 * rows, tokens, stages, bring_tile, [&](unsigned char* tile1, unsigned char* tile2, int start) {
    float p[N][4], ds[N][4];
    products<T, D, N>(p, rows1, tile1);
    if (!of_values) products<T, D, N>(ds, rows2, tile2);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int token = 8 * n + lane % 4 * 2 + e;
        bool inside = start + token < tokens;
        float2 scores = make_float2(0.0f, 0.0f);
        if (KEYS) scores = *reinterpret_cast<const float2*>(tile1 + token * PITCH + D * sizeof(T));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& at = p[n][2 * r + e];
          at = inside ? exp2f(fmaf(at, scale * LOG2_E, -(KEYS ? scores.x * LOG2_E : log_total[r]))) : 0.0f;
          ds[n][2 * r + e] = of_values ? at : at * (ds[n][2 * r + e] - (KEYS ? scores.y : offset[r]));
        }
      }
    accumulate<D, N>(q, sum, ds, of_values ? tile2 : tile1);
    if constexpr (BOTH) accumulate<D, N>(q, more, p, tile2);
  });
  __syncthreads();
  float factor[2] = {of_values ? 1.0f : scale, of_values ? 1.0f : scale};
  save_rows<T, D>(of_values ? second_out : first_out, of_values ? rows2 : rows1, sum, factor, h, first);
  if constexpr (BOTH) {
    factor[0] = factor[1] = 1.0f;
    save_rows<T, D>(second_out, rows2, more, factor, h, first);
  }
}

// The features of a head, at most D. `stages`: buffers for tiles, 1 or 2
#define ATTENTION(NAME, T, D, KEY_THREADS, KEY_BLOCKS)                                                                                      \
  extern "C" __global__ void __launch_bounds__(128, D <= 64 ? 3 : 2)                                                                        \
      attention_##NAME##_forward_##D(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* __restrict__ out,        \
                                     float* __restrict__ lse, int tokens, int heads, int d, float scale, int wide, int stages) {            \
    forward<T, D>(q, k, v, out, lse, tokens, heads, d, scale, wide, stages);                                                                \
  }                                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(128, D <= 64 ? 3 : 2) attention_##NAME##_dq_##D(                                             \
      const T* __restrict__ dout, const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ out,     \
      const float* __restrict__ lse, float* __restrict__ delta, T* __restrict__ dq, int tokens, int heads, int d, float scale, int wide,    \
      int stages) {                                                                                                                         \
    backward<false, T, D>(dout, q, k, v, out, lse, delta, dq, nullptr, tokens, heads, d, scale, wide, stages);                              \
  }                                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(KEY_THREADS, KEY_BLOCKS) attention_##NAME##_dkv_##D(                                         \
      const T* __restrict__ dout, const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,                                \
      const float* __restrict__ lse, float* __restrict__ delta, T* __restrict__ dk, T* __restrict__ dv, int tokens, int heads, int d,       \
      float scale, int wide, int stages) {                                                                                                  \
    backward<true, T, D>(dout, q, k, v, nullptr, lse, delta, dk, dv, tokens, heads, d, scale, wide, stages);                                \
  }

ATTENTION(bf16, bf16, 32, 128, 3)
ATTENTION(bf16, bf16, 64, 128, 2)
ATTENTION(bf16, bf16, 128, 128, 2)
ATTENTION(bf16, bf16, 256, 256, 1)
ATTENTION(tf32, float, 32, 128, 3)
ATTENTION(tf32, float, 64, 128, 3)
ATTENTION(tf32, float, 128, 128, 2)
ATTENTION(tf32, float, 256, 128, 2)
