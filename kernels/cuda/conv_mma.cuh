// Convolution on the tensor cores, as a matrix product whose left operand is read out of the image where it stands: no patches are stored.
//   forward         y[place, cout] = sum over (tap, cin)  x'[place + tap, cin] w[tap, cin, cout] + bias[cout] + shift[image, cout] + residual
//   input gradient  dx[place, cin] = sum over (tap, cout) dy[place - tap, cout] w[tap, cin, cout]
// x' is x, or silu(a x + b) with a and b of the image and channel: a group norm whose statistics are known. Padding is zeros of x'.
//
// A block makes a tile of the result and goes through the sum in steps of one tap and 64 bytes of channels (a slab: 32 of bf16, 16 of float32,
// which are rounded to TF32). Copies run ahead of the products by all steps but one that are held. Where a 3 x 3 kernel keeps the image's
// size, the pixels under a block's lines are one run of memory, which is brought once a slab for all nine taps, and normalised there once; taps
// beyond the image's edge read zeros. Otherwise each step gathers its own lines. Sums are added in an order that depends on sizes alone.
//
// What limits it, by count, for large blocks (128 x 128 by warps of 64 x 32): a step of a warp is 64 Ki multiplications of bf16, or 32 Ki of
// TF32, and reads 6 KiB of shared memory. For the eight warps that is 384 cycles of shared memory at 128 bytes a cycle, and 512 cycles of
// products on sm_80, 256 on sm_90 at the full rate, which mma.sync does not reach. For sm_90 the compiler makes 150 to 195 instructions of a
// step, 32 of them products (TF32: 250 to 305, of which 96 round): 300 to 390 cycles of the four schedulers (TF32: 500 to 610). So bf16 waits
// for shared memory, products and issue about alike, TF32 for issue. From the second cache a step brings 8 KiB of weights, and 8 KiB of
// lines or (130 + 2 width) x 64 / 9 bytes of a run (1.4 KiB at width 32): 43 and 25 bytes a cycle of 384.
#include "common.cuh"
#include "mma.cuh"

const int CHUNKS = 4, SLAB_BYTES = 16 * CHUNKS;  // of a line
const int ZEROS = 128;                           // bytes that stand for what lies beyond an image's edge
const int KEPT = 128;                            // bytes at the start of shared memory, for what the end of a block needs again

// A block makes 32 tiles x 32 tiles of the result by groups of 2 x `tiles` warps. Each group goes through slabs of its own, and holds the
// operands of `stages` steps; in the end their sums are added in order.
template <int tiles, int groups, int stages> struct Block {
  static const int TILES = tiles, GROUPS = groups, STAGES = stages, LINES = 32 * tiles, THREADS = 64 * tiles;  // threads of a group
  static const int ALL = groups * THREADS, RESIDENT = 512 / ALL;  // 16 warps of 128 registers fill a multiprocessor
  static __device__ __forceinline__ int thread() { return groups == 1 ? threadIdx.x : threadIdx.x % THREADS; }
  static __device__ __forceinline__ int group() { return groups == 1 ? 0 : threadIdx.x / THREADS; }
};
typedef Block<4, 1, 4> Large;
typedef Block<2, 1, 4> Small;
typedef Block<2, 4, 3> Split;

struct Conv {
  int batch, height, width, channels, first;  // what is read, (batch, height, width, channels): `first` channels from x, the others from tail
  int rows, cols, columns;                    // what is written, (batch, rows, cols, columns)
  // Row r of the result reads by tap u, for each copy a < copies, row q >> halved, q = r scale + offset + a + sign u; where `even`, if q is.
  // Columns alike. Of two phases each block has one: its rows (and columns) are all even or all odd, so that each tap that it takes reads.
  int kernel, scale, offset, sign, halved, even, copies, phases;
  int wide;                                                  // whether columns can be reached 16 bytes at a time
  int down = 0, right = 0, high = 0, across = 0, lines = 0;  // this block's phase; how many rows, columns and places it has

  __device__ __forceinline__ void enter() {
    int halve = phases - 1;
    down = blockIdx.z >> halve;
    right = blockIdx.z & halve;
    high = (rows - down + halve) >> halve;
    across = (cols - right + halve) >> halve;
    lines = batch * high * across;
  }
};

struct Place {  // a line of the result
  int image, row, col;
  __device__ __forceinline__ Place(const Conv& s, int line) {
    int all = line / s.across;
    image = all / s.high;
    row = (all - image * s.high) * s.phases + s.down;
    col = (line - all * s.across) * s.phases + s.right;
  }
};

struct Corner {  // where a line reads: q of tap (0, 0)
  int image, row, col;
  __device__ __forceinline__ Corner(const Conv& s, int line) {
    Place p(s, min(line, s.lines - 1));
    image = p.image;
    row = line < s.lines ? p.row * s.scale + s.offset : -(1 << 20);  // no tap leads from there into the image
    col = p.col * s.scale + s.offset;
  }
  // The pixel of a copy and tap, or -1
  __device__ __forceinline__ int pixel(const Conv& s, int copy, int u, int v) const {
    int q = row + copy / 2 + s.sign * u, p = col + copy % 2 + s.sign * v;
    bool inside = q >= 0 && p >= 0 && !((q | p) & s.even) && q >> s.halved < s.height && p >> s.halved < s.width;
    return inside ? (image * s.height + (q >> s.halved)) * s.width + (p >> s.halved) : -1;
  }
};

struct Step {  // through the sum: taps within copies within slabs, which are `stride` channels apart
  int channel, copy, u, v;
  __device__ __forceinline__ Step(const Conv& s, int begin) : channel(begin), copy(0), u(first(s, s.down)), v(first(s, s.right)) {}
  static __device__ __forceinline__ int first(const Conv& s, int phase) { return (phase * s.scale + s.offset) & (s.phases - 1); }
  static __device__ __forceinline__ int taps(const Conv& s, int phase) { return (s.kernel - first(s, phase) + s.phases - 1) / s.phases; }
  static __device__ __forceinline__ int count(const Conv& s, int stride) {
    return (s.channels + stride - 1) / stride * s.copies * s.copies * taps(s, s.down) * taps(s, s.right);
  }
  __device__ __forceinline__ int tap(const Conv& s) const { return u * s.kernel + v; }
  __device__ __forceinline__ void next(const Conv& s, int stride) {
    if ((v += s.phases) < s.kernel) return;
    v = first(s, s.right);
    if ((u += s.phases) < s.kernel) return;
    u = first(s, s.down);
    if (++copy < s.copies * s.copies) return;
    copy = 0;
    channel += stride;
  }
};

template <class T> struct Operands {
  const T *x, *tail, *w;
  const float *a, *b;  // (batch, channels) of the norm; null: none
  int silu;

  __device__ __forceinline__ float normalised(float v, float scale, float offset) const {
    v = fmaf(scale, v, offset);
    return silu ? v * sigmoid(v) : v;
  }
  // 16 bytes of shared memory: the channels from `at` (image, channel) on
  __device__ __forceinline__ void normalise(unsigned char* chunk, int64 at) const {
    const int N = Mma<T>::PER_CHUNK;
    T* place = reinterpret_cast<T*>(chunk);
    float v[N];
    load<N>(v, static_cast<const T*>(place));
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      float scale[4], offset[4];
      load<4>(scale, a + at + i);
      load<4>(offset, b + at + i);
#pragma unroll
      for (int k = 0; k < 4; ++k) v[i + k] = normalised(v[i + k], scale[k], offset[k]);
    }
    save<N>(place, v);
  }
};

// Channel `channel`, of the slab that begins at `slab`, of a pixel
template <class T> struct Channels {
  const T* from;
  int pitch;
  __device__ __forceinline__ Channels(const Conv& s, const Operands<T>& o, int slab, int channel) {
    bool second = slab >= s.first;
    pitch = second ? s.channels - s.first : s.first;
    from = second ? o.tail + (channel - s.first) : o.x + channel;
  }
  __device__ __forceinline__ const T* of(int pixel) const { return from + (int64)pixel * pitch; }
};

__device__ __forceinline__ unsigned bits(float v) { return __float_as_uint(v); }
__device__ __forceinline__ unsigned bits(bf16 v) { return v; }

// 16 bytes of shared memory from single elements, element(i) the i-th: where the elements of an array cannot be reached 16 bytes at a time
template <class T, class Element> __device__ __forceinline__ void put(unsigned char* chunk, Element element) {
  unsigned word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    word[i] = sizeof(T) == 4 ? bits(element(i)) : bits(element(2 * i)) | bits(element(2 * i + 1)) << 16;
  *reinterpret_cast<uint4*>(chunk) = make_uint4(word[0], word[1], word[2], word[3]);
}

// --------------------------------------------------------------------------------------------------- the left operand, staged three ways
//
// begin(step) starts copies before the first step, fetch(step, slot) those of a step to come; landed(step, slot) follows when the copies of
// the step at hand have landed, before other threads may see them, and ahead(step) when all may. Reader tells where a warp's fragments lie:
// after aim(lines, step, slot), address(i, k) is what this lane gives to load_matrices for the i-th 16 lines and the k-th half of the slab.

// Each step has a tile of its own: the pixels of its tap.
template <class T, class B> struct Gathered {
  static const int TILE = B::LINES * SLAB_BYTES, APART = B::THREADS / CHUNKS;
  static const bool ASIDE = false;
  const Conv& s;
  const Operands<T>& o;
  unsigned char* tiles;
  unsigned base;   // their address
  int chunk, own;  // a thread stages chunk `chunk` of two lines, the first of them `own` bytes from the tile's start
  Corner one, two;

  __device__ __forceinline__ Gathered(const Conv& conv, const Operands<T>& operands, unsigned char* memory, unsigned address, int m0)
      : s(conv), o(operands), tiles(memory), base(address), chunk(B::thread() % CHUNKS),
        own(16 * swizzled<CHUNKS>(B::thread() / CHUNKS, chunk)), one(conv, m0 + B::thread() / CHUNKS),
        two(conv, m0 + B::thread() / CHUNKS + APART) {
    static_assert(B::LINES == 2 * APART && APART % 8 == 0, "two lines to a thread, swizzled alike");
  }
  static __device__ __forceinline__ int bytes(const Conv&) { return B::STAGES * TILE; }

  __device__ __forceinline__ void begin(const Step&) {}
  __device__ __forceinline__ void fetch(const Step& at, int slot) {
    int c = at.channel + chunk * Mma<T>::PER_CHUNK, first = one.pixel(s, at.copy, at.u, at.v), second = two.pixel(s, at.copy, at.u, at.v);
    Channels<T> channels(s, o, at.channel, c);
    unsigned to = base + slot * TILE + own;
    bool there = first >= 0 && c < s.channels;
    copy16(to, there ? channels.of(first) : o.x, there);
    there = second >= 0 && c < s.channels;
    copy16(to + APART * SLAB_BYTES, there ? channels.of(second) : o.x, there);
  }
  __device__ __forceinline__ void landed(const Step& at, int slot) {
    int c = at.channel + chunk * Mma<T>::PER_CHUNK;
    if (!o.a || c >= s.channels) return;
    unsigned char* to = tiles + slot * TILE + own;
    if (one.pixel(s, at.copy, at.u, at.v) >= 0) o.normalise(to, (int64)one.image * s.channels + c);
    if (two.pixel(s, at.copy, at.u, at.v) >= 0) o.normalise(to + APART * SLAB_BYTES, (int64)two.image * s.channels + c);
  }
  __device__ __forceinline__ void ahead(const Step&) {}

  struct Reader {
    unsigned own, tile;
    __device__ __forceinline__ Reader(const Gathered& lines, int, int first)
        : own(lines.base + 16 * swizzled<CHUNKS>(first + threadIdx.x % 16, threadIdx.x % 32 / 16)) {}
    __device__ __forceinline__ void aim(const Gathered&, const Step&, int slot) { tile = own + slot * TILE; }
    // The other half of the slab: chunks 2 further, and 2 is a bit. 16 lines further chunks are swizzled alike.
    __device__ __forceinline__ unsigned address(int i, int k) const { return (tile + i * 16 * SLAB_BYTES) ^ 32 * k; }
  };
};

// Any numbers of channels, any addresses: (copy, tap, channel) is one long axis of one tap, fetched element by element.
template <class T, class B> struct Scattered : Gathered<T, B> {
  typedef Gathered<T, B> Base;

  __device__ __forceinline__ Scattered(const Conv& conv, const Operands<T>& operands, unsigned char* memory, unsigned address, int m0)
      : Base(conv, operands, memory, address, m0) {}

  __device__ __forceinline__ T element(const Corner& corner, int k) const {
    const Conv& s = Base::s;
    int tap = k / s.channels, c = k - tap * s.channels, taps = s.kernel * s.kernel, copy = tap / taps;
    tap -= copy * taps;
    int u = tap / s.kernel, pixel = copy < s.copies * s.copies ? corner.pixel(s, copy, u, tap - u * s.kernel) : -1;
    if (pixel < 0) return T();
    T v = *Channels<T>(s, Base::o, c, c).of(pixel);
    if (!Base::o.a) return v;
    int64 at = (int64)corner.image * s.channels + c;
    save_one(&v, Base::o.normalised(load_one(&v), Base::o.a[at], Base::o.b[at]));
    return v;
  }
  __device__ __forceinline__ void fetch(const Step& at, int slot) {
    int k = at.channel + Base::chunk * Mma<T>::PER_CHUNK;
    unsigned char* to = Base::tiles + slot * Base::TILE + Base::own;
    put<T>(to, [&](int i) { return element(Base::one, k + i); });
    put<T>(to + Base::APART * SLAB_BYTES, [&](int i) { return element(Base::two, k + i); });
  }
  __device__ __forceinline__ void landed(const Step&, int) {}
};

// A 3 x 3 kernel that keeps the size: the pixels from a row and a column before the block's first line to as much after its last, one slab at
// a time, while those of the next slab come in.
template <class T, class B> struct Run {
  static const int STRIDE = B::GROUPS * CHUNKS * Mma<T>::PER_CHUNK, APART = B::THREADS / CHUNKS, LATEST = B::STAGES - 1;
  static const bool ASIDE = true;  // whether the block's place is put aside while it is at its sums
  const Conv& s;
  const Operands<T>& o;
  unsigned char* memory;  // zeros, and two runs
  unsigned base;          // its address
  int from, length;       // the first pixel and how many
  int line, chunk;        // a thread stages chunk `chunk` of every APART-th pixel, from `line` on
  int here, there;        // bytes from `memory` to the slab at hand and to the next

  __device__ __forceinline__ Run(const Conv& conv, const Operands<T>& operands, unsigned char* own, unsigned address, int m0)
      : s(conv), o(operands), memory(own), base(address), from(m0 - conv.width - 1), length(pixels(conv)), line(B::thread() / CHUNKS),
        chunk(B::thread() % CHUNKS), here(ZEROS), there(ZEROS + length * SLAB_BYTES) {
    if (B::thread() < ZEROS / 16) reinterpret_cast<uint4*>(memory)[B::thread()] = make_uint4(0, 0, 0, 0);
  }
  static __device__ __forceinline__ int pixels(const Conv& s) { return B::LINES + 2 * s.width + 2; }
  static __device__ __forceinline__ int bytes(const Conv& s) { return ZEROS + 2 * pixels(s) * SLAB_BYTES; }

  __device__ __forceinline__ bool exists(int p, int c) const { return from + p >= 0 && from + p < s.lines && c < s.channels; }
  __device__ __forceinline__ void copy(int slab, int to) const {
    int c = slab + chunk * Mma<T>::PER_CHUNK;
    Channels<T> channels(s, o, slab, c);
#pragma unroll 1
    for (int p = line; p < length; p += APART) {
      bool some = exists(p, c);
      copy16(base + to + 16 * swizzled<CHUNKS>(p, chunk), some ? channels.of(from + p) : o.x, some);
    }
  }
  // Every `share`-th of what this thread has copied, from the first-th on
  __device__ __forceinline__ void normalise(int slab, int to, int first, int share) const {
    int c = slab + chunk * Mma<T>::PER_CHUNK, all = s.height * s.width;
#pragma unroll 1
    for (int p = line + first * APART; p < length; p += share * APART)
      if (exists(p, c)) o.normalise(memory + to + 16 * swizzled<CHUNKS>(p, chunk), (int64)((from + p) / all) * s.channels + c);
  }

  __device__ __forceinline__ void begin(const Step& at) { copy(at.channel, here); }
  __device__ __forceinline__ void fetch(const Step&, int) {}
  // The next slab is asked for at tap 0, in the group of the step LATEST later. From then on it is normalised, a part at a tap.
  __device__ __forceinline__ void landed(const Step& at, int) {
    int tap = at.tap(s);
    if (tap == 0 && at.channel >= STRIDE) {
      int old = here;
      here = there, there = old;
    }
    if (!o.a) return;
    if (tap == 0 && at.channel < STRIDE) normalise(at.channel, here, 0, 1);
    if (tap >= LATEST) normalise(at.channel + STRIDE, there, tap - LATEST, 9 - LATEST);
  }
  // As long as the first group has a slab: what others lack is then zeros.
  __device__ __forceinline__ void ahead(const Step& at) const {
    int next = at.channel + STRIDE;
    if (at.u == 0 && at.v == 0 && next - B::group() * (STRIDE / B::GROUPS) < s.channels) copy(next, there);
  }

  struct Reader {
    int line;                       // of the first fragment
    unsigned inside[B::TILES / 2];  // bit 16 (i % 2) + tap: whether the tap of this lane's line of fragment i lies in the image
    unsigned first, zero;           // where its chunk lies, and zeros in the same banks
    int tap;

    __device__ __forceinline__ Reader(const Run& lines, int m0, int first) : line(first + threadIdx.x % 16) {
#pragma unroll
      for (int i = 0; i < B::TILES; ++i) {
        Corner corner(lines.s, m0 + line + 16 * i);
        unsigned taps = 0;
#pragma unroll
        for (int t = 0; t < 9; ++t) taps |= (unsigned)(corner.pixel(lines.s, 0, t / 3, t % 3) >= 0) << t;
        inside[i / 2] = i % 2 ? inside[i / 2] | taps << 16 : taps;
      }
    }
    __device__ __forceinline__ void aim(const Run& lines, const Step& at, int) {
      const Conv& s = lines.s;
      int pixel = line + (1 + s.offset + s.sign * at.u) * s.width + 1 + s.offset + s.sign * at.v;
      tap = at.tap(s);
      first = lines.base + lines.here + 16 * swizzled<CHUNKS>(pixel, threadIdx.x % 32 / 16);
      zero = lines.base + first % ZEROS;
    }
    __device__ __forceinline__ unsigned address(int i, int k) const {
      bool there = inside[i / 2] >> (16 * (i % 2) + tap) & 1;
      return (there ? first + i * 16 * SLAB_BYTES : zero) ^ 32 * k;
    }
  };
};

// ---------------------------------------------------------------------------------------------------------------- the right operand

// The weights of a step: slab x columns as they lie (tap, cin, cout) for the forward pass, columns x slab for the gradient, whose sum runs
// over cout.
// `s` has the one long axis where there are no taps, `whole` the convolution's own sizes.
template <class T, bool BACK, bool ANY, class B> struct Weights {
  static const int PER = Mma<T>::PER_CHUNK, TILE = B::LINES * SLAB_BYTES, ROW = BACK ? CHUNKS : B::LINES / PER, APART = B::THREADS / ROW;
  static const bool WORDS = !BACK && PER == 4;  // ldmatrix cannot turn words: they are read one by one
  const Conv &s, &whole;
  const T* w;
  unsigned char* tiles;
  unsigned base;      // their address
  int k, n;           // a thread stages the chunk that begins at channel k of the slab and column n, and that APART rows on
  int own;            // where that lies in the tile, in bytes
  unsigned fragment;  // where this lane's part of the first fragments lies in the first tile: an address, or of WORDS in bytes

  __device__ __forceinline__ Weights(const Conv& conv, const Conv& all, const T* weights, unsigned char* memory, unsigned address, int n0,
                                     int column)
      : s(conv), whole(all), w(weights), tiles(memory), base(address) {
    static_assert(APART % 8 == 0 && 2 * APART * ROW == B::LINES * CHUNKS, "two chunks to a thread, swizzled alike");
    int row = B::thread() / ROW, chunk = B::thread() % ROW, lane = threadIdx.x % 32, matrix = lane / 8;
    k = BACK ? chunk * PER : row;
    n = n0 + (BACK ? row : chunk * PER);
    own = WORDS ? 4 * swizzled_words<WORDS ? ROW : 8>(row, 4 * chunk) : 16 * swizzled<ROW>(row, chunk);
    if (WORDS) fragment = 4 * swizzled_words<WORDS ? ROW : 8>(lane % 4, column + lane / 4);
    else if (BACK) fragment = base + 16 * swizzled<ROW>(column + matrix / 2 * 8 + lane % 8, matrix % 2);
    else fragment = base + 16 * swizzled<ROW>(matrix % 2 * 8 + lane % 8, column / 8 + matrix / 2);
  }

  __device__ __forceinline__ T element(int at, int column) const {  // of the long axis
    int tap = at / whole.channels, c = at - tap * whole.channels;
    if (at >= s.channels || column >= s.columns) return T();
    return w[(tap % (whole.kernel * whole.kernel) * s.columns + column) * whole.channels + c];
  }
  __device__ __forceinline__ void fetch(const Step& at, int slot) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int channel = at.channel + k + (BACK ? 0 : i * APART), column = n + (BACK ? i * APART : 0);
      int to = slot * TILE + own + i * APART * ROW * 16;
      if (BACK && ANY) {
        put<T>(tiles + to, [&](int e) { return element(channel + e, column); });
        continue;
      }
      bool there = channel < s.channels && column < s.columns;
      int from = BACK ? (at.tap(s) * s.columns + column) * s.channels + channel : (at.tap(s) * s.channels + channel) * s.columns + column;
      const T* chunk = there ? w + from : w;
      if (BACK || s.wide) copy16(base + to, chunk, there);
      else put<T>(tiles + to, [&](int e) { return there && column + e < s.columns ? chunk[e] : T(); });
    }
  }
  // The fragments of a warp's 32 columns and of half `half` of the slab. Sums in a swizzled place are made bit by bit.
  __device__ __forceinline__ void fragments(unsigned (&b)[4][2], int slot, int half) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      unsigned word[4], at = fragment + slot * TILE;
      if (BACK) {
        load_matrices(word, (at + j * 16 * ROW * 16) ^ half * 32);
      } else if (PER == 8) {
        load_matrices_turned(word, (at ^ j * 32) + half * 16 * ROW * 16);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          word[i] = *reinterpret_cast<const unsigned*>(tiles + (at ^ (j * 64 + i / 2 * 32)) + (half * 8 + i % 2 * 4) * ROW * 16);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) b[2 * j + i / 2][i % 2] = Mma<T>::operand(word[i]);
    }
  }
};

// --------------------------------------------------------------------------------------------------------------------- the result

// What is added to a result where it is stored (null: nothing), and where that is: y, or y32 in float32.
template <class T> struct Result {
  const float *bias, *shift;  // (columns), (images, columns)
  const T* residual;          // (lines, columns): may be what the result is written over
  T* y;
  float* y32;
};

// Row g = lane / 4 (or with `half` g + 8) of four neighbouring fragments lies in four lanes, columns 8 j + 2 t and the next in lane 4 g + t.
// After this, lane 4 g + t has in v[p] four neighbours, from column 16 p + 8 (t % 2) + 4 (t / 2) on: 16 bytes of float32.
__device__ __forceinline__ void join_two(float (&v)[2][4], const float (&sum)[4][4], int half, int lane) {
  bool odd = lane & 1;
#pragma unroll
  for (int p = 0; p < 2; ++p)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float first = sum[2 * p][2 * half + e], second = sum[2 * p + 1][2 * half + e];
      float mine = odd ? second : first, got = __shfl_xor_sync(EVERY_LANE, odd ? first : second, 1);
      v[p][e] = odd ? got : mine;
      v[p][2 + e] = odd ? mine : got;
    }
}
// And after this eight, from column 8 t on: 16 bytes of bfloat16.
__device__ __forceinline__ void join_four(float (&v)[8], const float (&two)[2][4], int lane) {
  bool upper = lane & 2;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    float mine = upper ? two[1][e] : two[0][e], got = __shfl_xor_sync(EVERY_LANE, upper ? two[0][e] : two[1][e], 2);
    v[e] = upper ? got : mine;
    v[4 + e] = upper ? mine : got;
  }
}

__device__ __forceinline__ void load_row(float (&to)[8], const bf16* from) { load<8>(to, from); }
__device__ __forceinline__ void save_row(bf16* to, const float (&from)[8]) { save<8>(to, from); }
template <int N> __device__ __forceinline__ void load_row(float (&to)[N], const float* from) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    float4 v = *reinterpret_cast<const float4*>(from + i);
    to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
  }
}
template <int N> __device__ __forceinline__ void save_row(float* to, const float (&from)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) *reinterpret_cast<float4*>(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
}

// N neighbours of which the first n exist; all, and 16 bytes at a time, where `wide`.
template <int N, class A> __device__ __forceinline__ void add_row(float (&v)[N], const A* from, bool wide, int n) {
  float more[N];
  if (wide) {
    load_row(more, from);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) more[e] = e < n ? load_one(from + e) : 0.0f;
  }
#pragma unroll
  for (int e = 0; e < N; ++e) v[e] += more[e];
}
template <int N, class A> __device__ __forceinline__ void save_some(A* to, const float (&v)[N], bool wide, int n) {
  if (wide) return save_row(to, v);
#pragma unroll
  for (int e = 0; e < N; ++e)
    if (e < n) save_one(to + e, v[e]);
}

// Store N columns of a line, from n on, where it and they exist.
template <int N, class T> __device__ __forceinline__ void store(const Conv& s, const Result<T>& r, float (&v)[N], int line, int n) {
  if (line >= s.lines || n >= s.columns) return;
  Place p(s, line);
  int left = s.columns - n;
  int64 at = (((int64)p.image * s.rows + p.row) * s.cols + p.col) * s.columns + n;
  if (r.bias) add_row(v, r.bias + n, s.wide, left);
  if (r.shift) add_row(v, r.shift + (int64)p.image * s.columns + n, s.wide, left);
  if (r.residual) add_row(v, r.residual + at, s.wide, left);
  if (r.y32) save_some(r.y32 + at, v, s.wide, left);
  else save_some(r.y + at, v, s.wide, left);
}
__device__ __forceinline__ void store_row(const Conv& s, const Result<float>& r, float (&two)[2][4], int line, int n, int lane) {
  n += lane % 2 * 8 + lane / 2 % 2 * 4;
  store(s, r, two[0], line, n);
  store(s, r, two[1], line, n + 16);
}
__device__ __forceinline__ void store_row(const Conv& s, const Result<bf16>& r, float (&two)[2][4], int line, int n, int lane) {
  float v[8];
  join_four(v, two, lane);
  store(s, r, v, line, n + lane % 4 * 8);
}

// ------------------------------------------------------------------------------------------------------------------------ products

template <int TILES, class Body> __device__ __forceinline__ void visit(float (&sum)[TILES][4][4], Body body) {
#pragma unroll
  for (int i = 0; i < 16 * TILES; ++i) body(sum[i / 16][i / 4 % 4][i % 4], i);
}

// blockIdx.x counts the tiles, those of columns first; z the phases.
template <class T, bool BACK, bool ANY, class B, template <class, class> class Lines>
__device__ __forceinline__ void convolve(Conv s, const Operands<T>& o, const Result<T>& result) {
  typedef Weights<T, BACK, ANY, B> Right;
  const int TILES = B::TILES, STAGES = B::STAGES, SLAB = CHUNKS * Mma<T>::PER_CHUNK, STRIDE = B::GROUPS * SLAB, RING = STAGES * Right::TILE;
  s.enter();
  int tiles = (s.columns + B::LINES - 1) / B::LINES, m0 = blockIdx.x / tiles * B::LINES, n0 = blockIdx.x % tiles * B::LINES;
  if (m0 >= s.lines) return;  // of two phases one may have fewer
  Conv steps = s;
  if (ANY) steps.channels = s.kernel * s.kernel * s.copies * s.copies * s.channels, steps.kernel = steps.copies = 1;

  extern __shared__ __align__(128) unsigned char shared[];
  int warp = B::thread() / 32, m = warp / TILES * 16 * TILES, n = warp % TILES * 32, count = Step::count(steps, STRIDE);
  if (Lines<T, B>::ASIDE && threadIdx.x == 0) *reinterpret_cast<int2*>(shared) = make_int2(m0, n0);
  unsigned char* memory = shared + KEPT + B::group() * (RING + Lines<T, B>::bytes(s));
  unsigned base = __shfl_sync(EVERY_LANE, shared_address(memory), 0);  // else the compiler would make the address again at each use
  Lines<T, B> left(s, o, memory + RING, base + RING, m0);
  Right right(steps, s, o.w, memory, base, n0, n);
  typename Lines<T, B>::Reader reader(left, m0, m);
  float sum[TILES][4][4] = {};
  Step next(steps, B::group() * SLAB), now = next;
  if (count) left.begin(now);
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; ++i) {
    if (i < count) {
      left.fetch(next, i);
      right.fetch(next, i);
      next.next(steps, STRIDE);
    }
    commit_copies();
  }
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    int slot = i % STAGES;
    wait_copies<STAGES - 2>();
    left.landed(now, slot);
    __syncthreads();
    if (i + STAGES - 1 < count) {
      int free = (i + STAGES - 1) % STAGES;
      left.fetch(next, free);
      right.fetch(next, free);
      next.next(steps, STRIDE);
    }
    left.ahead(now);
    commit_copies();
    reader.aim(left, now, slot);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      unsigned a[4], b[4][2];
      right.fragments(b, slot, k);
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        load_matrices(a, reader.address(t, k));
#pragma unroll
        for (int j = 0; j < 4; ++j) a[j] = Mma<T>::operand(a[j]);
#pragma unroll
        for (int j = 0; j < 4; ++j) Mma<T>::product(sum[t][j], a, b[j][0], b[j][1]);
      }
    }
    now.next(steps, STRIDE);
  }

  __syncthreads();
  if (B::GROUPS > 1) {
    float* parts = reinterpret_cast<float*>(shared + KEPT) + B::thread();
    if (B::group()) visit<TILES>(sum, [&](float& v, int i) { parts[((B::group() - 1) * 16 * TILES + i) * B::THREADS] = v; });
    __syncthreads();
    if (B::group()) return;
#pragma unroll 1
    for (int group = 1; group < B::GROUPS; ++group)
      visit<TILES>(sum, [&](float& v, int i) { v += parts[((group - 1) * 16 * TILES + i) * B::THREADS]; });
  }
  // What a run would else hold, or spill, while the products have the registers
  int2 corner = Lines<T, B>::ASIDE ? *reinterpret_cast<const int2*>(shared) : make_int2(m0, n0);
  int thread = __shfl_sync(EVERY_LANE, B::thread(), threadIdx.x % 32), lane = thread % 32;
  int line = corner.x + thread / 32 / TILES * 16 * TILES + lane / 4, column = corner.y + thread / 32 % TILES * 32;
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float two[2][4];
      join_two(two, sum[t], half, lane);
      store_row(s, result, two, line + 16 * t + 8 * half, column, lane);
    }
}

#define CONV_PARAMETERS                                                                                                                     \
  int batch, int height, int width, int channels, int first, int rows, int cols, int columns, int kernel, int scale, int offset, int sign,   \
      int halved, int even, int copies, int phases, int wide
#define CONV                                                                                                                               \
  Conv { batch, height, width, channels, first, rows, cols, columns, kernel, scale, offset, sign, halved, even, copies, phases, wide }
#define FORWARD(T, NAME, ANY, B, LINES)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(B::ALL, B::RESIDENT)                                                                        \
      conv_forward_##NAME(const T* __restrict__ x, const T* __restrict__ tail, const T* __restrict__ w, const float* __restrict__ a,       \
                          const float* __restrict__ b, int silu, const float* __restrict__ bias, const float* __restrict__ shift,          \
                          const T* residual, T* y, float* y32, CONV_PARAMETERS) {                                                          \
    convolve<T, false, ANY, B, LINES>(CONV, Operands<T>{x, tail, w, a, b, silu}, Result<T>{bias, shift, residual, y, y32});                \
  }
#define INPUT_GRADIENT(T, NAME, ANY, B, LINES)                                                                                             \
  extern "C" __global__ void __launch_bounds__(B::ALL, B::RESIDENT)                                                                        \
      conv_input_##NAME(const T* __restrict__ dy, const T* __restrict__ w, T* __restrict__ dx, CONV_PARAMETERS) {                          \
    convolve<T, true, ANY, B, LINES>(CONV, Operands<T>{dy, nullptr, w, nullptr, nullptr, 0},                                               \
                                     Result<T>{nullptr, nullptr, nullptr, dx, nullptr});                                                   \
  }
#define CONVOLUTION(PASS, T, NAME)                         \
  PASS(T, NAME##_run_large, false, Large, Run)             \
  PASS(T, NAME##_run_small, false, Small, Run)             \
  PASS(T, NAME##_run_split, false, Split, Run)             \
  PASS(T, NAME##_gathered_large, false, Large, Gathered)   \
  PASS(T, NAME##_gathered_small, false, Small, Gathered)   \
  PASS(T, NAME##_gathered_split, false, Split, Gathered)   \
  PASS(T, NAME##_any, true, Small, Scattered)
