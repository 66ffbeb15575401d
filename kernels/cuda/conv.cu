// Convolution (kernels 1 and 3, stride 1 and 2, nearest-neighbour doubling of the input, padding before and after) as a matrix product whose
// left operand is read out of the image where it stands. One product makes a 64 x 64 tile of the result, 16 deep at a time:
//   forward          y[place, cout]    = sum over (tap, cin)  x[place + tap, cin] w[tap, cin, cout] + bias[cout] + shift[image, cout] + residual
//   input gradient   dx[place, cin]    = sum over (tap, cout) dy[place - tap, cout] w[tap, cin, cout]
//   weight gradient  dw[tap cin, cout] = sum over places      x[place + tap, cin] dy[place, cout]    (in slices of places, added in order)
#include "common.cuh"

const int TILE = 64, DEPTH = 16, PITCH = TILE + 4;
const int LEVEL = 64;  // products added up before they join the total: the error of a long sum grows with the root of its number of levels
typedef float Slab[DEPTH][PITCH];

struct Conv {
  int batch, height, width, cin, rows, cols, cout;  // x (batch, height, width, cin), y (batch, rows, cols, cout)
  int kernel, stride, before, up;                   // up: 1, or 2 where the input is doubled
};

struct Place {
  int image, row, col;
  __device__ __forceinline__ Place(int m, int rows, int cols) {
    int line = m / cols;
    col = m - line * cols;
    image = line / rows;
    row = line - image * rows;
  }
};

// Two ways in which 256 threads fetch a slab of 64 x 16 values, four neighbours in memory each.
struct AcrossDepth {  // neighbours lie along the sum
  int line, depth;
  __device__ __forceinline__ AcrossDepth() : line(threadIdx.x / 4), depth(threadIdx.x % 4 * 4) {}
  __device__ __forceinline__ void put(Slab& slab, const float (&v)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) slab[depth + i][line] = v[i];
  }
};

struct AcrossLines {  // neighbours lie along the result
  int line, depth;
  __device__ __forceinline__ AcrossLines() : line(threadIdx.x % 16 * 4), depth(threadIdx.x / 16) {}
  __device__ __forceinline__ void put(Slab& slab, const float (&v)[4]) const { save<4>(&slab[depth][line], v); }
};

__device__ __forceinline__ void zero(float (&v)[4]) { v[0] = v[1] = v[2] = v[3] = 0.0f; }

// Where tap (u, v) of the output place reads the input image, or -1 in the padding.
__device__ __forceinline__ int64 input_place(const Conv& s, const Place& p, int tap) {
  int u = tap / s.kernel, v = tap - u * s.kernel;
  int row = p.row * s.stride + u - s.before, col = p.col * s.stride + v - s.before;
  if (row < 0 || col < 0 || row >= s.height * s.up || col >= s.width * s.up) return -1;
  return ((int64)p.image * s.height + row / s.up) * s.width + col / s.up;
}

// Where the output place stands that reads input place p by this tap, or -1. A doubled input place counts as four.
__device__ __forceinline__ int64 output_place(const Conv& s, const Place& p, int tap) {
  int taps = s.kernel * s.kernel, copy = tap / taps;
  tap -= copy * taps;
  int u = tap / s.kernel, v = tap - u * s.kernel;
  int row = p.row * s.up + copy / 2 + s.before - u, col = p.col * s.up + copy % 2 + s.before - v;
  if (row < 0 || col < 0 || row % s.stride || col % s.stride) return -1;
  row /= s.stride;
  col /= s.stride;
  return row < s.rows && col < s.cols ? ((int64)p.image * s.rows + row) * s.cols + col : -1;
}

// Lines are places, the sum runs over (tap, channel): the patches of an image, of `channels` channels, that `find` leads to.
template <bool WIDE, bool GRADIENT> struct Patches : AcrossDepth {
  const Conv& s;
  const float* image;
  int channels, depths;
  bool inside;
  Place place;

  __device__ __forceinline__ Patches(const Conv& conv, const float* from, int line0, int lines)
      : s(conv), image(from), channels(GRADIENT ? conv.cout : conv.cin), inside(line0 + line < lines),
        place(min(line0 + line, lines - 1), GRADIENT ? conv.height : conv.rows, GRADIENT ? conv.width : conv.cols) {
    depths = conv.kernel * conv.kernel * (GRADIENT ? conv.up * conv.up : 1) * channels;
  }
  __device__ __forceinline__ void fetch(float (&v)[4], int k0) const {
    zero(v);
    int k = k0 + depth;
    if (!inside || k >= depths) return;
    int tap = k / channels, c = k - tap * channels;
    int64 from = GRADIENT ? output_place(s, place, tap) : input_place(s, place, tap);
    if (WIDE) {
      if (from >= 0) load<4>(v, image + from * channels + c);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (from >= 0 && k + i < depths) v[i] = image[from * channels + c];
      if (++c == channels && i < 3) {
        c = 0, ++tap;
        from = GRADIENT ? output_place(s, place, tap) : input_place(s, place, tap);
      }
    }
  }
};

// Lines are (tap, channel), the sum runs over places.
template <bool WIDE> struct PatchesByTap : AcrossLines {
  const Conv& s;
  const float* x;
  int tap[4], c[4], lines, end;

  __device__ __forceinline__ PatchesByTap(const Conv& conv, const float* from, int line0, int last) : s(conv), x(from), end(last) {
    lines = conv.kernel * conv.kernel * conv.cin - line0 - line;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      tap[i] = (line0 + line + i) / conv.cin;
      c[i] = (line0 + line + i) % conv.cin;
    }
  }
  __device__ __forceinline__ void fetch(float (&v)[4], int k0) const {
    zero(v);
    if (k0 + depth >= end) return;
    Place place(k0 + depth, s.rows, s.cols);
    if (WIDE) {
      int64 from = lines > 0 ? input_place(s, place, tap[0]) : -1;
      if (from >= 0) load<4>(v, x + from * s.cin + c[0]);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int64 from = i < lines ? input_place(s, place, tap[i]) : -1;
      if (from >= 0) v[i] = x[from * s.cin + c[i]];
    }
  }
};

// A matrix stored row by row, (depth, line).
template <bool WIDE> struct Matrix : AcrossLines {
  const float* from;
  int lines, left, end;  // left: lines from this thread's first on

  __device__ __forceinline__ Matrix(const float* matrix, int line0, int all, int last)
      : from(matrix + line0 + line), lines(all), left(all - line0 - line), end(last) {}
  __device__ __forceinline__ void fetch(float (&v)[4], int k0) const {
    zero(v);
    if (k0 + depth < end && left > 0) load4<WIDE>(v, from + (int64)(k0 + depth) * lines, left);
  }
};

// w[tap, cin, cout] with cin as the line and the sum over (tap, cout); the taps repeat for the copies of a doubled input.
template <bool WIDE> struct WeightsBack : AcrossDepth {
  const Conv& s;
  const float* w;
  int channel, taps;
  __device__ __forceinline__ WeightsBack(const Conv& conv, const float* from, int line0)
      : s(conv), w(from), channel(line0 + line), taps(conv.kernel * conv.kernel) {}
  __device__ __forceinline__ void fetch(float (&v)[4], int k0) const {
    zero(v);
    int k = k0 + depth;
    if (channel >= s.cin) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int tap = (k + i) / s.cout, c = k + i - tap * s.cout;
      if (tap >= taps * s.up * s.up) return;
      const float* at = w + ((int64)(tap % taps) * s.cin + channel) * s.cout + c;
      if (WIDE) return load<4>(v, at);
      v[i] = *at;
    }
  }
};

// sum[i][j] += sum over k in [begin, end) of left(line 4 y + i, k) right(k, line 4 x + j), with y = thread / 16 and x = thread % 16;
// `column` gets the sums of right's lines, on the threads of y = 0 of a block that asks for them.
template <class Left, class Right>
__device__ __forceinline__ void multiply(float (&sum)[4][4], float (&column)[4], bool columns, const Left& left, const Right& right,
                                         int begin, int end) {
  __shared__ __align__(16) Slab a, b;
  int y = threadIdx.x / 16 * 4, x = threadIdx.x % 16 * 4;
  float next_a[4], next_b[4], part[4][4] = {};
  left.fetch(next_a, begin);
  right.fetch(next_b, begin);
  for (int k0 = begin; k0 < end; k0 += DEPTH) {
    __syncthreads();
    left.put(a, next_a);
    right.put(b, next_b);
    __syncthreads();
    if (k0 + DEPTH < end) {
      left.fetch(next_a, k0 + DEPTH);
      right.fetch(next_b, k0 + DEPTH);
    }
#pragma unroll
    for (int k = 0; k < DEPTH; ++k) {
      float l[4], r[4];
      load<4>(l, &a[k][y]);
      load<4>(r, &b[k][x]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) part[i][j] = fmaf(l[i], r[j], part[i][j]);
      if (columns && y == 0)
#pragma unroll
        for (int j = 0; j < 4; ++j) column[j] += r[j];
    }
    if ((k0 - begin) % LEVEL != LEVEL - DEPTH && k0 + DEPTH < end) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += part[i][j], part[i][j] = 0.0f;
  }
}

// What is added to a result where it is stored; a null pointer adds nothing.
struct Epilogue {
  const float* bias;      // (columns)
  const float* shift;     // (images, columns): the time embedding of an image, for its `places` lines
  const float* residual;  // (lines, columns): may be what the result is written over
  int places;
};

template <bool WIDE> __device__ __forceinline__ void add_row(float (&v)[4], const float* from, int n) {
  float more[4];
  load4<WIDE>(more, from, n);
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] += more[j];
}

// The block's tile to its place in (m, n).
template <bool WIDE>
__device__ __forceinline__ void save_tile(float* to, float (&sum)[4][4], const Epilogue& e, int m0, int n0, int m, int n) {
  int y = m0 + threadIdx.x / 16 * 4, x = n0 + threadIdx.x % 16 * 4;
  if (x >= n) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (y + i >= m) return;
    int64 at = (int64)(y + i) * n + x;
    if (e.bias) add_row<WIDE>(sum[i], e.bias + x, n - x);
    if (e.shift) add_row<WIDE>(sum[i], e.shift + (int64)((y + i) / e.places) * n + x, n - x);
    if (e.residual) add_row<WIDE>(sum[i], e.residual + at, n - x);
    save4<WIDE>(to + at, sum[i], n - x);
  }
}

// blockIdx.x counts the tiles of lines, blockIdx.y the tiles of columns, blockIdx.z the slices of the sum.
template <bool WIDE> __device__ __forceinline__ void forward(const Conv& s, const float* x, const float* w, const Epilogue& e, float* y) {
  int places = s.batch * s.rows * s.cols, m0 = blockIdx.x * TILE, n0 = blockIdx.y * TILE, depths = s.kernel * s.kernel * s.cin;
  float sum[4][4] = {}, column[4] = {};
  multiply(sum, column, false, Patches<WIDE, false>(s, x, m0, places), Matrix<WIDE>(w, n0, s.cout, depths), 0, depths);
  save_tile<WIDE>(y, sum, e, m0, n0, places, s.cout);
}

template <bool WIDE> __device__ __forceinline__ void input_gradient(const Conv& s, const float* dy, const float* w, float* dx) {
  int places = s.batch * s.height * s.width, m0 = blockIdx.x * TILE, n0 = blockIdx.y * TILE;
  float sum[4][4] = {}, column[4] = {};
  multiply(sum, column, false, Patches<WIDE, true>(s, dy, m0, places), WeightsBack<WIDE>(s, w, n0), 0,
           s.kernel * s.kernel * s.up * s.up * s.cout);
  save_tile<WIDE>(dx, sum, Epilogue{}, m0, n0, places, s.cin);
}

// Slice z holds the products over its places as (tap cin + 1, cout): the last line is the sum of dy, the gradient of the bias.
template <bool WIDE>
__device__ __forceinline__ void weight_gradient(const Conv& s, const float* x, const float* dy, float* slices, int places_of_slice) {
  int places = s.batch * s.rows * s.cols, begin = blockIdx.z * places_of_slice, end = min(begin + places_of_slice, places);
  int lines = s.kernel * s.kernel * s.cin, m0 = blockIdx.x * TILE, n0 = blockIdx.y * TILE;
  float* slice = slices + (int64)blockIdx.z * (lines + 1) * s.cout;
  float sum[4][4] = {}, column[4] = {};
  multiply(sum, column, blockIdx.x == 0, PatchesByTap<WIDE>(s, x, m0, end), Matrix<WIDE>(dy, n0, s.cout, end), begin, end);
  save_tile<WIDE>(slice, sum, Epilogue{}, m0, n0, lines, s.cout);
  int n = n0 + threadIdx.x * 4;
  if (blockIdx.x == 0 && threadIdx.x < 16 && n < s.cout) save4<WIDE>(slice + (int64)lines * s.cout + n, column, s.cout - n);
}

// dw and dbias: the slices of the weight gradient added in order
extern "C" __global__ void __launch_bounds__(256) conv_sum(const float* __restrict__ slices, float* __restrict__ dw, float* __restrict__ dbias,
                                                           int count, int64 weights, int cout) {
  for (int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x; i < weights + cout; i += (int64)gridDim.x * blockDim.x) {
    float total = 0.0f;
    for (int z = 0; z < count; ++z) total += slices[z * (weights + cout) + i];
    if (i < weights) dw[i] = total;
    else dbias[i - weights] = total;
  }
}

#define CONV_PARAMETERS int batch, int height, int width, int cin, int rows, int cols, int cout, int kernel, int stride, int before, int up
#define CONV Conv{batch, height, width, cin, rows, cols, cout, kernel, stride, before, up}
#define CONVOLUTION(SUFFIX, WIDE)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                                                                        \
      conv_forward_##SUFFIX(const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ bias,                      \
                            const float* __restrict__ shift, const float* residual, float* y, CONV_PARAMETERS) {                           \
    Conv shape = CONV;                                                                                                                     \
    forward<WIDE>(shape, x, w, Epilogue{bias, shift, residual, rows * cols}, y);                                                           \
  }                                                                                                                                        \
  extern "C" __global__ void __launch_bounds__(256)                                                                                        \
      conv_input_##SUFFIX(const float* __restrict__ dy, const float* __restrict__ w, float* __restrict__ dx, CONV_PARAMETERS) {            \
    Conv shape = CONV;                                                                                                                     \
    input_gradient<WIDE>(shape, dy, w, dx);                                                                                                \
  }                                                                                                                                        \
  extern "C" __global__ void __launch_bounds__(256)                                                                                        \
      conv_weight_##SUFFIX(const float* __restrict__ x, const float* __restrict__ dy, float* __restrict__ slices, int places_of_slice,     \
                           CONV_PARAMETERS) {                                                                                              \
    Conv shape = CONV;                                                                                                                     \
    weight_gradient<WIDE>(shape, x, dy, slices, places_of_slice);                                                                          \
  }

CONVOLUTION(wide, true)
CONVOLUTION(any, false)
