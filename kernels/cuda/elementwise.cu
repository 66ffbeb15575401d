// Sums and copies between the large kernels, on rows of channels: each thread moves N = 4 neighbouring floats (`wide`) or one (`any`), and
// sizes along the channels are counted in floats. Every sum has a fixed order. Where there is a type T it is float or bf16, of which sums
// are made in float and rounded once; copies of an even number of bf16 are those of half as many floats.
#include "common.cuh"

// All i = 0, N, 2N, ... below n, which is a multiple of N below 2^31.
#define EVERY(i, N, n) (unsigned i = N * (blockIdx.x * blockDim.x + threadIdx.x); i < (unsigned)n; i += N * (gridDim.x * blockDim.x))

template <class T> struct Fill {
  T* out;
  float value;
  template <int N> __device__ __forceinline__ void run(int64 i) {
    float v[N];
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = value;
    save<N>(out + i, v);
  }
};

// to = from + more
template <int N, class T> __device__ __forceinline__ void add_up(T* to, const T* from, const T* more) {
  float v[N], w[N];
  load<N>(v, from);
  load<N>(w, more);
#pragma unroll
  for (int k = 0; k < N; ++k) v[k] += w[k];
  save<N>(to, v);
}

template <class T> struct Add {
  const T *a, *b;
  T* out;
  template <int N> __device__ __forceinline__ void run(int64 i) {
    add_up<N>(out + i, a + i, b + i);
  }
};

// out = a x + b y, both products rounded before they are added
struct WeightedSum {
  const float *x, *y;
  float *out, a, b;
  template <int N> __device__ __forceinline__ void run(int64 i) {
    float v[N], w[N];
    load<N>(v, x + i);
    load<N>(w, y + i);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = __fadd_rn(__fmul_rn(a, v[k]), __fmul_rn(b, w[k]));
    save<N>(out + i, v);
  }
};

template <int N, class To, class From> __device__ __forceinline__ void copy(To* to, const From* from) {
  float v[N];
  load<N>(v, from);
  save<N>(to, v);
}

template <class To, class From> struct Cast {
  const From* x;
  To* out;
  template <int N> __device__ __forceinline__ void run(int64 i) {
    copy<N>(out + i, x + i);
  }
};

// out[r, c] = x[r, at + c] for c < count; rows of x are `width` long
template <int N, class T> __device__ __forceinline__ void channels(const T* x, T* out, int at, int width, int count, int n) {
  for EVERY(i, N, n) {
    unsigned row = i / (unsigned)count, c = i - row * count;
    copy<N>(out + i, x + (int64)row * width + at + c);
  }
}

// out[r, at + c] += x[r, c]; rows of out are `width` long
template <int N> __device__ __forceinline__ void add_columns(const float* x, float* out, int at, int width, int count, int n) {
  for EVERY(i, N, n) {
    unsigned row = i / (unsigned)count, c = i - row * count;
    float* to = out + (int64)row * width + at + c;
    add_up<N>(to, to, x + i);
  }
}

// out[r] = [a[r], b[r]]
template <int N, class T> __device__ __forceinline__ void concat(const T* a, const T* b, T* out, int first, int second, int n) {
  for EVERY(i, N, n) {
    unsigned row = i / (unsigned)(first + second), c = i - row * (first + second);
    copy<N>(out + i, c < (unsigned)first ? a + (int64)row * first + c : b + (int64)row * second + (c - first));
  }
}

// out[s, p, c] = x[s, p, c] + emb[s, at + c]; a sample has `size` floats, rows of emb are `width` long
template <int N>
__device__ __forceinline__ void add_channels(const float* x, const float* emb, float* out, int at, int width, int count, int size, int n) {
  for EVERY(i, N, n) add_up<N>(out + i, x + i, emb + (int64)(i / (unsigned)size) * width + at + i % (unsigned)count);
}

// out[i] = table[index[i]]; NaN where there is no such row
template <int N>
__device__ __forceinline__ void take_rows(const float* table, const int64* index, float* out, int rows, int width, int n) {
  for EVERY(i, N, n) {
    unsigned place = i / (unsigned)width, c = i - place * width;
    int64 row = index[place];
    float v[N];
    if (row >= 0 && row < rows) load<N>(v, table + row * width + c);
    else
#pragma unroll
      for (int k = 0; k < N; ++k) v[k] = __int_as_float(0x7fc00000);
    save<N>(out + i, v);
  }
}

// A block of 256 threads: `lanes` of them (a power of two up to 32) side by side along the channels, the others along the places of one slice
// of one sample. parts[s, slice, c] = the sum over its places; the threads' sums are added in halves, always the same.
template <int N, class T>
__device__ __forceinline__ void sum_places(const T* x, float* parts, int places, int channels, int lanes, int tiles, int slices, int of_slice) {
  __shared__ __align__(16) float sums[256][N];
  int tile = blockIdx.x % tiles, slice = blockIdx.x / tiles % slices, sample = blockIdx.x / tiles / slices;
  int lane = threadIdx.x % lanes, line = threadIdx.x / lanes, lines = 256 / lanes, c = (tile * lanes + lane) * N;
  float total[N] = {};
  if (c < channels) {
    const T* from = x + (int64)sample * places * channels + c;
    int end = min(places, (slice + 1) * of_slice);
#pragma unroll 4
    for (int p = slice * of_slice + line; p < end; p += lines) {
      float v[N];
      load<N>(v, from + (int64)p * channels);
#pragma unroll
      for (int k = 0; k < N; ++k) total[k] += v[k];
    }
  }
  save<N>(sums[threadIdx.x], total);
  for (int half = 128; half >= lanes; half >>= 1) {
    __syncthreads();
    if (threadIdx.x < half) add_up<N>(sums[threadIdx.x], sums[threadIdx.x], sums[threadIdx.x + half]);
  }
  if (threadIdx.x < lanes && c < channels) copy<N>(parts + ((int64)sample * slices + slice) * channels + c, sums[threadIdx.x]);
}

// out[s, c] = the slices of a sample, in order
extern "C" __global__ void __launch_bounds__(256) sum_slices(const float* __restrict__ parts, float* __restrict__ out, int slices, int channels, int n) {
  for EVERY(i, 1, n) {
    unsigned sample = i / (unsigned)channels, c = i - sample * channels;
    const float* from = parts + (int64)sample * slices * channels + c;
    float total = 0.0f;
#pragma unroll 4
    for (int k = 0; k < slices; ++k) total += from[(int64)k * channels];
    out[i] = total;
  }
}

// Block (r, tile of columns): out[r] = the sum of x[i] over index[i] = r, in the order of i. 256 indices at a time are looked at, one by a
// thread; those that are r are listed in their order, and each thread adds up its columns of the listed rows.
template <int N> __device__ __forceinline__ void sum_into_rows(const float* x, const int64* index, float* out, int n, int width) {
  __shared__ int found[256], before[8];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = (blockIdx.y * 256 + threadIdx.x) * N;
  float total[N] = {};
  for (int start = 0; start < n; start += 256) {
    int i = start + threadIdx.x;
    bool mine = i < n && index[i] == blockIdx.x;
    unsigned lanes = __ballot_sync(EVERY_LANE, mine);
    if (lane == 0) before[warp] = __popc(lanes);
    __syncthreads();
    int place = __popc(lanes & ((1u << lane) - 1u)), count = 0;
#pragma unroll
    for (int w = 0; w < 8; ++w) {
      place += w < warp ? before[w] : 0;
      count += before[w];
    }
    if (mine) found[place] = i;
    __syncthreads();
    if (c >= width) continue;
    float part[N] = {};
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
      float v[N];
      load<N>(v, x + (int64)found[k] * width + c);
#pragma unroll
      for (int j = 0; j < N; ++j) part[j] += v[j];
    }
#pragma unroll
    for (int j = 0; j < N; ++j) total[j] += part[j];
  }
  if (c < width) save<N>(out + (int64)blockIdx.x * width + c, total);
}

// [sin(omega_i (t - origin)), cos(...)] in double precision, or the cosines first; with `single` t - origin and its products are float32's.
extern "C" __global__ void __launch_bounds__(256) time_features(const double* __restrict__ t, const double* __restrict__ omega, float* __restrict__ out,
                                                                double origin, int single, int cos_first, int half, int n) {
  for EVERY(i, 1, n) {
    unsigned sample = i / (unsigned)half, k = i - sample * half;
    double since = t[sample] - origin, angle = since * omega[k];
    if (single) angle = __fmul_rn((float)since, (float)omega[k]);
    // angle = quarters pi/2 + r with r in [-pi/4, pi/4]; pi/2 in two parts
    double quarters = rint(angle * 0.63661977236758134308);
    double r = fma(-quarters, 6.123233995736766036e-17, fma(-quarters, 1.57079632679489655800, angle)), z = r * r;
    double s = -2.5052108385441720e-8, c = -2.7557319223985888e-7;  // the series of sine and cosine: -1/11!, -1/10!
    s = fma(s, z, 2.7557319223985893e-6), c = fma(c, z, 2.4801587301587302e-5);
    s = fma(s, z, -1.9841269841269841e-4), c = fma(c, z, -1.3888888888888889e-3);
    s = fma(s, z, 8.3333333333333333e-3), c = fma(c, z, 4.1666666666666667e-2);
    s = fma(s, z, -1.6666666666666667e-1), c = fma(c, z, -0.5);
    s = fma(s, z * r, r), c = fma(c, z, 1.0);
    int quadrant = (int)((int64)quarters & 3);
    double sine = quadrant & 1 ? c : s, cosine = quadrant & 1 ? s : c;
    float* to = out + 2 * (int64)sample * half + k;
    to[cos_first ? half : 0] = (float)(quadrant & 2 ? -sine : sine);
    to[cos_first ? 0 : half] = (float)((quadrant + 1) & 2 ? -cosine : cosine);
  }
}

// Where the first of the four places is that place i of an image, with lines of `line` floats, becomes when it is doubled.
__device__ __forceinline__ int64 doubled(unsigned i, int line, int channels) {
  unsigned row = i / (unsigned)line, rest = i - row * line;
  return (int64)row * 4 * line + rest + rest / (unsigned)channels * channels;
}

// Each place becomes four.
template <int N, class T> __device__ __forceinline__ void upsample(const T* x, T* out, int line, int channels, int n) {
  for EVERY(i, N, n) {
    float v[N];
    load<N>(v, x + i);
    T* to = out + doubled(i, line, channels);
#pragma unroll 1  // unrolled, the compiler takes some of the sixteen stores apart
    for (int row = 0; row < 2; ++row, to += 2 * (int64)line) {
      save<N>(to, v);
      save<N>(to + channels, v);
    }
  }
}

// Its transpose: the sum of the four.
template <int N, class T> __device__ __forceinline__ void upsample_backward(const T* dy, T* out, int line, int channels, int n) {
  for EVERY(i, N, n) {
    const T* from = dy + doubled(i, line, channels);
    float a[N], b[N], c[N], d[N];
    load<N>(a, from);
    load<N>(b, from + channels);
    load<N>(c, from + 2 * (int64)line);
    load<N>(d, from + 2 * (int64)line + channels);
#pragma unroll
    for (int k = 0; k < N; ++k) a[k] = (a[k] + b[k]) + (c[k] + d[k]);
    save<N>(out + i, a);
  }
}

// What may be written over what is read is not __restrict__.
#define COPIES(SUFFIX, T, N)                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256) fill_##SUFFIX(T* __restrict__ out, float value, int64 n) {                              \
    Fill<T> body{out, value};                                                                                                               \
    for_each<N>(n, body);                                                                                                                   \
  }                                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                                                                         \
      channels_##SUFFIX(const T* __restrict__ x, T* __restrict__ out, int at, int width, int count, int n) {                                \
    channels<N>(x, out, at, width, count, n);                                                                                               \
  }                                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                                                                         \
      concat_##SUFFIX(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out, int first, int second, int n) {                \
    concat<N>(a, b, out, first, second, n);                                                                                                 \
  }                                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                                                                         \
      upsample_##SUFFIX(const T* __restrict__ x, T* __restrict__ out, int line, int channels, int n) {                                      \
    upsample<N>(x, out, line, channels, n);                                                                                                 \
  }

// FLAT: of arrays without rows
#define SUMS(SUFFIX, T, N, FLAT)                                                                                                            \
  extern "C" __global__ void __launch_bounds__(256) add_##SUFFIX(const T* a, const T* b, T* out, int64 n) {                                 \
    Add<T> body{a, b, out};                                                                                                                 \
    for_each<FLAT>(n, body);                                                                                                                \
  }                                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                                                                         \
      sum_places_##SUFFIX(const T* __restrict__ x, float* __restrict__ parts, int places, int channels, int lanes, int tiles, int slices,   \
                          int of_slice) {                                                                                                   \
    sum_places<N>(x, parts, places, channels, lanes, tiles, slices, of_slice);                                                              \
  }                                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                                                                         \
      upsample_backward_##SUFFIX(const T* __restrict__ dy, T* __restrict__ out, int line, int channels, int n) {                            \
    upsample_backward<N>(dy, out, line, channels, n);                                                                                       \
  }

#define OF_FLOATS(SUFFIX, N)                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256)                                                                                         \
      weighted_sum_##SUFFIX(const float* x, const float* y, float* out, float a, float b, int64 n) {                                        \
    WeightedSum body{x, y, out, a, b};                                                                                                      \
    for_each<N>(n, body);                                                                                                                   \
  }                                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                                                                         \
      to_bf16_##SUFFIX(const float* __restrict__ x, bf16* __restrict__ out, int64 n) {                                                      \
    Cast<bf16, float> body{x, out};                                                                                                         \
    for_each<N>(n, body);                                                                                                                   \
  }                                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                                                                         \
      to_float_##SUFFIX(const bf16* __restrict__ x, float* __restrict__ out, int64 n) {                                                     \
    Cast<float, bf16> body{x, out};                                                                                                         \
    for_each<N>(n, body);                                                                                                                   \
  }                                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                                                                         \
      add_columns_##SUFFIX(const float* x, float* out, int at, int width, int count, int n) {                                               \
    add_columns<N>(x, out, at, width, count, n);                                                                                            \
  }                                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                                                                         \
      add_channels_##SUFFIX(const float* x, const float* __restrict__ emb, float* out, int at, int width, int count, int size, int n) {     \
    add_channels<N>(x, emb, out, at, width, count, size, n);                                                                                \
  }                                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                                                                         \
      take_rows_##SUFFIX(const float* __restrict__ table, const int64* __restrict__ index, float* __restrict__ out, int rows, int width,    \
                         int n) {                                                                                                           \
    take_rows<N>(table, index, out, rows, width, n);                                                                                        \
  }                                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                                                                         \
      sum_into_rows_##SUFFIX(const float* __restrict__ x, const int64* __restrict__ index, float* __restrict__ out, int n, int width) {     \
    sum_into_rows<N>(x, index, out, n, width);                                                                                              \
  }

COPIES(wide, float, 4)
COPIES(any, float, 1)
COPIES(any_bf16, bf16, 1)
SUMS(wide, float, 4, 4)
SUMS(any, float, 1, 1)
SUMS(wide_bf16, bf16, 4, 8)
SUMS(any_bf16, bf16, 1, 1)
OF_FLOATS(wide, 4)
OF_FLOATS(any, 1)
