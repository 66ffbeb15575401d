// The weight gradient of a convolution on the tensor cores: dw[tap, cin, cout] = sum over places x'[place + tap, cin] dy[place, cout], as TF32
// products of float32 arrays or products of bf16, added up in float32. x' is x, or silu(a[image, cin] x + b[image, cin]) that is made on the way;
// outside of the image it is 0. dbias[cout] = sum of dy.
//
// A block holds all taps of some input channels times some output channels in registers, and goes through a slice of the places, a tile at
// a time: `images` x `tall` x `broad` places of the result and what of x their taps read. So x is fetched, and made to x', once for the taps
// together: a tap reads the tile at other rows. The sums of the slices are added in order by conv_mma_weight_sum.
#include "common.cuh"
#include "mma.cuh"

const int THREADS = 256, WARPS = 8, STAGES = 3;
const int COLUMNS = 4;  // products of 8 output channels, side by side in a warp
const int GAP = 8;      // elements after a row of a tile: neighbouring rows begin in other banks

struct Conv {
  int batch, height, width, cin, head;  // x (batch, height, width, cin): its first `head` channels lie in one array, the others in another
  int rows, cols, cout;                 // dy (batch, rows, cols, cout)
  int stride, before, up;               // up: 1, or 2 where the input is doubled
};

// A tile. Row `picture` i + `line` r + (the place of c) of its part of x holds input place (r, c) of its image i.
struct Cut {
  int images, tall, broad;
  int depth;  // images tall broad, rounded up: the rest counts as zero
  int line, picture;
  int across;  // warps side by side along the output channels: 1, 2 or 4; the others lie along the input channels
};

struct Place {
  int image, row, col;
};
__device__ __forceinline__ int packed(int image, int row, int col) { return image << 20 | row << 10 | col; }
__device__ __forceinline__ Place unpacked(int word) { return {word >> 20, word >> 10 & 1023, word & 1023}; }

// What a thread fetches: its chunk (16 bytes) of every `step`-th row of a tile.
struct Share {
  int chunk, first, step;
  __device__ __forceinline__ Share(int chunks) : chunk(threadIdx.x % chunks), first(threadIdx.x / chunks), step(THREADS / chunks) {}
};

template <class T, int KERNEL> struct Block {
  static const int N = Mma<T>::PER_CHUNK, LINES = KERNEL == 3 ? 9 : 4;  // LINES: products of 16 lines, one below the other in a warp
  static const int CHANNELS = KERNEL == 3 ? 16 : 16 * LINES;            // input channels of a warp

  const Conv& s;
  const Cut& cut;
  const T *x, *tail, *dy;
  const float *a, *b;
  bool silu, x_wide, dy_wide;
  int x_pitch, dy_pitch, first_in, first_out;  // channels
  Share of_x, of_dy;
  int high, wide, half;         // input places of a tile's image, its lines and columns; half: of a line those that are even
  int cells, down, over;        // input places of a tile; tiles of an image, one below another and side by side
  int *rows, *places, *inputs;  // shared memory: by place its row of x's tile, times the pitch; itself, or -1; by cell the input place
  T* stages;

  __device__ __forceinline__ Block(const Conv& conv, const Cut& tile, const T* x_, const T* tail_, const T* dy_, const float* a_,
                                   const float* b_, bool activate, bool x_aligned, bool dy_aligned, void* memory)
      : s(conv), cut(tile), x(x_), tail(tail_), dy(dy_), a(a_), b(b_), silu(activate), x_wide(x_aligned), dy_wide(dy_aligned),
        x_pitch(WARPS / tile.across * CHANNELS + GAP), dy_pitch(tile.across * COLUMNS * 8 + GAP),
        first_in(blockIdx.x * (x_pitch - GAP)), first_out(blockIdx.y * (dy_pitch - GAP)),
        of_x((x_pitch - GAP) / N), of_dy((dy_pitch - GAP) / N) {
    int step = KERNEL == 3 ? s.stride : 1;  // a single tap reads every stride-th input place: the others are not there
    high = (cut.tall - 1) * step + KERNEL;
    wide = (cut.broad - 1) * step + KERNEL;
    half = (wide + 1) / 2;
    cells = cut.images * high * wide;
    down = (s.rows + cut.tall - 1) / cut.tall;
    over = (s.cols + cut.broad - 1) / cut.broad;
    rows = static_cast<int*>(memory);
    places = rows + cut.depth;
    inputs = places + cut.depth;
    stages = reinterpret_cast<T*>(rows + (2 * cut.depth + cells + 3) / 4 * 4);
    for (int p = threadIdx.x; p < cut.depth; p += THREADS) {
      int row = p / cut.broad, col = p - row * cut.broad, image = row / cut.tall;
      row -= image * cut.tall;
      bool there = image < cut.images;
      places[p] = there ? packed(image, row, col) : -1;
      rows[p] = there ? (image * cut.picture + row * step * cut.line + col) * x_pitch : 0;
    }
    for (int cell = threadIdx.x; cell < cells; cell += THREADS) {
      int row = cell / wide, col = cell - row * wide, image = row / high;
      inputs[cell] = packed(image, row - image * high, col);
    }
  }

  // Where the even columns of a line lie before the odd ones, a tap's rows of neighbouring places are neighbours also at stride 2.
  __device__ __forceinline__ int column(int col) const { return KERNEL == 3 && s.stride == 2 ? col / 2 + col % 2 * half : col; }

  __device__ __forceinline__ T* x_tile(int stage) const {
    return stages + stage % STAGES * (cut.images * cut.picture * x_pitch + cut.depth * dy_pitch);
  }
  __device__ __forceinline__ T* dy_tile(int stage) const { return x_tile(stage) + cut.images * cut.picture * x_pitch; }

  // The first place of a tile.
  __device__ __forceinline__ Place origin(int tile) const {
    int line = tile / over, group = line / down;
    return {group * cut.images, (line - group * down) * cut.tall, (tile - line * over) * cut.broad};
  }

  // The input place that a cell takes, or -1 outside of the image; `at`: its row of the tile, `image`: its image.
  __device__ __forceinline__ int64 input(const Place& o, int cell, int& at, int& image) const {
    Place p = unpacked(inputs[cell]);
    at = p.image * cut.picture + p.row * cut.line + column(p.col);
    int row = (KERNEL == 3 ? o.row * s.stride + p.row : (o.row + p.row) * s.stride) - s.before;
    int col = (KERNEL == 3 ? o.col * s.stride + p.col : (o.col + p.col) * s.stride) - s.before;
    image = o.image + p.image;
    if (image >= s.batch || row < 0 || col < 0 || row >= s.height * s.up || col >= s.width * s.up) return -1;
    return ((int64)image * s.height + (row >> (s.up - 1))) * s.width + (col >> (s.up - 1));
  }

  // A chunk from the elements *at(0), *at(1), ... of `array`, of which the first `left` exist, or of zeros
  template <class At> __device__ __forceinline__ void fetch(T* to, const T* array, bool inside, int left, bool aligned, At at) const {
    inside = inside && left > 0;
    if (aligned) return copy16(shared_address(to), inside ? at(0) : array, inside);
    for (int i = 0; i < N; ++i) to[i] = inside && i < left ? *at(i) : T(0);
  }

  __device__ __forceinline__ void begin(int tile, int stage) const {
    Place o = origin(tile);
    int c = first_in + of_x.chunk * N, n = first_out + of_dy.chunk * N;
    for (int cell = of_x.first, at, image; cell < cells; cell += of_x.step) {
      int64 from = input(o, cell, at, image);
      fetch(x_tile(stage) + at * x_pitch + of_x.chunk * N, x, from >= 0, s.cin - c, x_wide, [&](int i) {
        bool behind = c + i >= s.head;
        return (behind ? tail + (from * (s.cin - s.head) - s.head) : x + from * s.head) + (c + i);
      });
    }
    for (int k = of_dy.first; k < cut.depth; k += of_dy.step) {
      Place p = unpacked(max(places[k], 0));
      int image = o.image + p.image, row = o.row + p.row, col = o.col + p.col;
      bool inside = places[k] >= 0 && image < s.batch && row < s.rows && col < s.cols;
      const T* from = dy + (((int64)image * s.rows + row) * s.cols + col) * s.cout + n;
      fetch(dy_tile(stage) + k * dy_pitch + of_dy.chunk * N, dy, inside, s.cout - n, dy_wide, [&](int i) { return from + i; });
    }
  }

  // v: N channels of a place of x become those of x'
  __device__ __forceinline__ void normalise(float (&v)[N], int image, int channel) const {
    int64 at = (int64)image * s.cin + channel;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      float slope[4] = {}, offset[4] = {};
      if (x_wide) {
        load<4>(slope, a + at + i), load<4>(offset, b + at + i);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (channel + i + k < s.cin) slope[k] = a[at + i + k], offset[k] = b[at + i + k];
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float u = fmaf(v[i + k], slope[k], offset[k]);
        v[i + k] = silu ? u * sigmoid(u) : u;
      }
    }
  }

  static __device__ __forceinline__ void put(T* to, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __uint_as_float(Mma<T>::operand(__float_as_uint(v[i])));
    save<N>(to, v);
  }

  // What the thread fetched of a tile becomes what the products take; `sum` gets its channels of dy where the block is asked for them.
  __device__ __forceinline__ void finish(int tile, int stage, bool summed, float (&sum)[N]) const {
    const bool ROUND = sizeof(T) == 4;
    float v[N];
    if (ROUND || a) {
      Place o = origin(tile);
      for (int cell = of_x.first, at, image; cell < cells; cell += of_x.step) {
        bool inside = input(o, cell, at, image) >= 0 && first_in + of_x.chunk * N < s.cin;
        if (!inside) continue;
        T* chunk = x_tile(stage) + at * x_pitch + of_x.chunk * N;
        load<N>(v, chunk);
        if (a) normalise(v, image, first_in + of_x.chunk * N);
        put(chunk, v);
      }
    }
    if (!ROUND && !summed) return;
    for (int k = of_dy.first; k < cut.depth; k += of_dy.step) {
      T* chunk = dy_tile(stage) + k * dy_pitch + of_dy.chunk * N;
      load<N>(v, chunk);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += summed ? v[i] : 0.0f;
      if (ROUND) put(chunk, v);
    }
  }
};

// The operands of a product, out of tiles whose rows are its k. Left: 16 channels from `channel` on, of the places of rows[0 .. DEPTH - 1].
struct Left16 {
  unsigned at;
  __device__ __forceinline__ Left16(const bf16* tile, const int* rows, int channel) {
    int lane = threadIdx.x % 32;
    at = shared_address(tile + rows[lane % 8 + lane / 16 * 8] + channel + lane / 8 % 2 * 8);
  }
  __device__ __forceinline__ void get(unsigned (&word)[4], int more) const { load_matrices_turned(word, at + 2 * more); }
};
struct Left8 {
  const float *early, *late;
  __device__ __forceinline__ Left8(const float* tile, const int* rows, int channel) {
    int lane = threadIdx.x % 32;
    early = tile + rows[lane % 4] + channel + lane / 4;
    late = tile + rows[lane % 4 + 4] + channel + lane / 4;
  }
  __device__ __forceinline__ void get(unsigned (&word)[4], int more) const {
    word[0] = __float_as_uint(early[more]), word[1] = __float_as_uint(early[more + 8]);
    word[2] = __float_as_uint(late[more]), word[3] = __float_as_uint(late[more + 8]);
  }
};
template <class T> struct Left;
template <> struct Left<bf16> : Left16 { using Left16::Left16; };
template <> struct Left<float> : Left8 { using Left8::Left8; };

// Right: COLUMNS times 8 channels from `tile` on
__device__ __forceinline__ void right(unsigned (&b)[COLUMNS][2], const bf16* tile, int pitch) {
  int lane = threadIdx.x % 32;
  unsigned at = shared_address(tile + lane % 16 * pitch + lane / 16 * 8), word[4];
#pragma unroll
  for (int j = 0; j < COLUMNS; j += 2) {
    load_matrices_turned(word, at + 16 * j);
    b[j][0] = word[0], b[j][1] = word[1], b[j + 1][0] = word[2], b[j + 1][1] = word[3];
  }
}
__device__ __forceinline__ void right(unsigned (&b)[COLUMNS][2], const float* tile, int pitch) {
  int lane = threadIdx.x % 32;
  const float* at = tile + lane % 4 * pitch + lane / 4;
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) b[j][0] = __float_as_uint(at[8 * j]), b[j][1] = __float_as_uint(at[4 * pitch + 8 * j]);
}

// blockIdx.x counts the tiles of input channels, blockIdx.y those of output channels, blockIdx.z the slices of `share` tiles of places.
template <class T, int KERNEL>
__device__ __forceinline__ void weight_gradient(const T* x, const T* tail, const T* dy, const float* a, const float* b, float* slices,
                                                float* columns, const Conv& s, const Cut& cut, int share, bool silu, bool x_wide, bool dy_wide,
                                                bool slices_wide) {
  extern __shared__ __align__(16) unsigned char memory[];
  typedef Block<T, KERNEL> Block_;
  const int LINES = Block_::LINES, N = Block_::N, DEPTH = Mma<T>::DEPTH;
  Block_ block(s, cut, x, tail, dy, a, b, silu, x_wide, dy_wide, memory);
  __syncthreads();
  int tiles = (s.batch + cut.images - 1) / cut.images * block.down * block.over;
  int first = blockIdx.z * share, count = min(share, tiles - first);
  int warp = threadIdx.x / 32, in = warp / cut.across * Block_::CHANNELS, out = warp % cut.across * COLUMNS * 8;
  bool idle = block.first_in + in >= s.cin || block.first_out + out >= s.cout;

  float sum[LINES][COLUMNS][4] = {}, of_dy[N] = {};
#pragma unroll 1
  for (int j = 0; j < STAGES - 1; ++j) {
    if (j < count) block.begin(first + j, j);
    commit_copies();
  }
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    wait_copies<STAGES - 2>();
    block.finish(first + j, j, (first + j) % gridDim.x == blockIdx.x, of_dy);  // the blocks of a channel take turns with the sum of dy
    __syncthreads();
    if (j + STAGES - 1 < count) block.begin(first + j + STAGES - 1, j + STAGES - 1);
    commit_copies();
    if (idle) continue;
    const T *xs = block.x_tile(j), *dys = block.dy_tile(j) + out;
    int beside = block.column(1) * block.x_pitch, behind = block.column(2) * block.x_pitch, below = cut.line * block.x_pitch;
#pragma unroll 1
    for (int k = 0; k < cut.depth; k += DEPTH) {
      unsigned r[COLUMNS][2];
      right(r, dys + k * block.dy_pitch, block.dy_pitch);
      Left<T> left(xs, block.rows + k, in);
#pragma unroll
      for (int i = 0; i < LINES; ++i) {
        unsigned l[4];
        left.get(l, KERNEL == 3 ? i / 3 * below + (i % 3 == 0 ? 0 : i % 3 == 1 ? beside : behind) : 16 * i);
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) Mma<T>::product(sum[i][n], l, r[n][0], r[n][1]);
      }
    }
  }

  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < LINES; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int tap = KERNEL == 3 ? i : 0, c = block.first_in + in + (KERNEL == 3 ? 0 : 16 * i) + 8 * h + lane / 4;
      float* line = slices + (((int64)blockIdx.z * KERNEL * KERNEL + tap) * s.cin + c) * s.cout;
#pragma unroll
      for (int n = 0; n < COLUMNS; ++n) {
        int channel = block.first_out + out + 8 * n + lane % 4 * 2;
        if (c >= s.cin || channel >= s.cout) continue;
        float pair[2] = {sum[i][n][2 * h], sum[i][n][2 * h + 1]};
        if (slices_wide) {
          save<2>(line + channel, pair);
        } else {
          line[channel] = pair[0];
          if (channel + 1 < s.cout) line[channel + 1] = pair[1];
        }
      }
    }

  // the threads' sums of dy, by channel
  __syncthreads();
  float* parts = reinterpret_cast<float*>(block.stages);
#pragma unroll
  for (int i = 0; i < N; ++i) parts[i * THREADS + threadIdx.x] = of_dy[i];
  __syncthreads();
  int chunks = THREADS / block.of_dy.step;
  for (int c = threadIdx.x; c < chunks * N; c += THREADS) {
    float total = 0.0f;
    for (int k = 0; k < block.of_dy.step; ++k) total += parts[c % N * THREADS + k * chunks + c / N];
    if (block.first_out + c < s.cout) columns[((int64)blockIdx.z * gridDim.x + blockIdx.x) * s.cout + block.first_out + c] = total;
  }
}

// The slices added in order, to zero or to what is there.
struct Slices {
  const float* from;
  float* to;
  int count;
  int64 size;
  bool more;
  template <int N> __device__ __forceinline__ void run(int64 i) {
    float total[N] = {}, v[N];
    if (more) load<N>(total, to + i);
#pragma unroll 4
    for (int z = 0; z < count; ++z) {
      load<N>(v, from + z * size + i);
#pragma unroll
      for (int k = 0; k < N; ++k) total[k] += v[k];
    }
    save<N>(to + i, total);
  }
};

// dw: the sum of `count` slices. dbias: of `parts` sums of dy, by a warp for each channel.
template <int N>
__device__ __forceinline__ void sum_slices(const float* slices, const float* columns, float* dw, float* dbias, int count, int parts,
                                           int64 weights, int cout, bool more) {
  Slices all{slices, dw, count, weights, more};
  for_each<N>(weights, all);
  int lane = threadIdx.x % 32, warps = gridDim.x * (THREADS / 32);
  for (int c = blockIdx.x * (THREADS / 32) + threadIdx.x / 32; c < cout; c += warps) {
    float total = 0.0f;
#pragma unroll 1
    for (int k = lane; k < parts; k += 32) total += columns[(int64)k * cout + c];
    total = warp_sum(total);
    if (lane == 0) dbias[c] = more ? dbias[c] + total : total;
  }
}

#define WEIGHT_GRADIENT(NAME, T, KERNEL)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                                \
      NAME(const T* __restrict__ x, const T* __restrict__ tail, const T* __restrict__ dy, const float* __restrict__ a,                    \
           const float* __restrict__ b, float* __restrict__ slices, float* __restrict__ columns, int batch, int height, int width,        \
           int cin, int head, int rows, int cols, int cout, int stride, int before, int up, int images, int tall, int broad, int depth,   \
           int line, int picture, int across, int share, int silu, int x_wide, int dy_wide, int slices_wide) {                            \
    Conv shape{batch, height, width, cin, head, rows, cols, cout, stride, before, up};                                                    \
    Cut cut{images, tall, broad, depth, line, picture, across};                                                                           \
    weight_gradient<T, KERNEL>(x, tail, dy, a, b, slices, columns, shape, cut, share, silu, x_wide, dy_wide, slices_wide);                \
  }
#define SUM(NAME, N)                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME(const float* __restrict__ slices, const float* __restrict__ columns,      \
                                                             float* __restrict__ dw, float* __restrict__ dbias, int count, int parts,  \
                                                             int64 weights, int cout, int more) {                                      \
    sum_slices<N>(slices, columns, dw, dbias, count, parts, weights, cout, more);                                                      \
  }

WEIGHT_GRADIENT(conv_mma_weight_bf16_1, bf16, 1)
WEIGHT_GRADIENT(conv_mma_weight_bf16_3, bf16, 3)
WEIGHT_GRADIENT(conv_mma_weight_tf32_1, float, 1)
WEIGHT_GRADIENT(conv_mma_weight_tf32_3, float, 3)
SUM(conv_mma_weight_sum_wide, 4)
SUM(conv_mma_weight_sum_any, 1)
