// Rows of a matrix, each the work of a team: a part of a warp, a warp or a block. All threads of a team get the same sums, added in
// the same order. Include it after common.cuh.

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// COUNT neighbours of a warp. The teams of a warp go on together, so that none is missing where they exchange: some may have no row.
template <int COUNT> struct Lanes {
  static __device__ __forceinline__ int size() { return COUNT; }
  static __device__ __forceinline__ int rank() { return threadIdx.x % COUNT; }
  static __device__ __forceinline__ int64 first() {  // row of the first team of this thread's warp
    return ((int64)blockIdx.x * blockDim.x + threadIdx.x) / 32 * (32 / COUNT);
  }
  static __device__ __forceinline__ int64 row(int64 first) { return first + threadIdx.x % 32 / COUNT; }
  static __device__ __forceinline__ int64 stride() { return (int64)gridDim.x * blockDim.x / COUNT; }

  static __device__ __forceinline__ float sum(float v) {
#pragma unroll
    for (int offset = COUNT / 2; offset; offset >>= 1) v += __shfl_xor_sync(EVERY_LANE, v, offset);
    return v;
  }
  static __device__ __forceinline__ float largest(float v) {
#pragma unroll
    for (int offset = COUNT / 2; offset; offset >>= 1) v = fmaxf(v, __shfl_xor_sync(EVERY_LANE, v, offset));
    return v;
  }
};

struct Block {
  static __device__ __forceinline__ int size() { return blockDim.x; }
  static __device__ __forceinline__ int rank() { return threadIdx.x; }
  static __device__ __forceinline__ int64 first() { return blockIdx.x; }
  static __device__ __forceinline__ int64 row(int64 first) { return first; }
  static __device__ __forceinline__ int64 stride() { return gridDim.x; }

  static __device__ __forceinline__ float sum(float v) {
    __shared__ float part[32];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    v = warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x % 32] : 0.0f);
    __syncthreads();  // the next sum writes there
    return v;
  }
  static __device__ __forceinline__ float largest(float v) {
    __shared__ float part[32];
    v = warp_max(v);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    v = warp_max(threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x % 32] : minus_infinity());
    __syncthreads();
    return v;
  }
};

// What a row's weights e^(x - shift) are relative to, and their sum.
struct Weights {
  float shift, whole;
};

// 0 where nothing finite has been met: -inf - -inf would not be a number.
__device__ __forceinline__ float shift_of(float top) { return top == minus_infinity() ? 0.0f : top; }

// __stwb: out of a loop over parts the compiler would make four stores of one float4.
__device__ __forceinline__ void save_whole(float* to, const float (&from)[1]) { *to = from[0]; }
__device__ __forceinline__ void save_whole(float* to, const float (&from)[4]) {
  __stwb(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
}

// STEPS accesses of each thread of a team to its row, from column `first` on: neighbours in a team are neighbours in the row.
template <class Team, int N, int STEPS> struct Part {
  float v[STEPS][N];
  int first, columns;

  __device__ __forceinline__ Part(int first_, int columns_) : first(first_), columns(columns_) {}

  static __device__ __forceinline__ int size() { return STEPS * N * Team::size(); }
  __device__ __forceinline__ int place(int s) const { return first + (s * Team::size() + Team::rank()) * N; }
  __device__ __forceinline__ bool ends(int s) const { return first + s * Team::size() * N >= columns; }  // the same for the whole team

  __device__ __forceinline__ void read(const float* row, float beyond) {
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      if (ends(s)) break;
#pragma unroll
      for (int k = 0; k < N; ++k) v[s][k] = beyond;
      if (place(s) < columns) load<N>(v[s], row + place(s));
    }
  }

  __device__ __forceinline__ float largest() const {
    float top = minus_infinity();
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      if (ends(s)) break;
#pragma unroll
      for (int k = 0; k < N; ++k) top = fmaxf(top, v[s][k]);
    }
    return top;
  }

  // v = e^(v - shift); the sum
  __device__ __forceinline__ float weigh(float shift) {
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      if (ends(s)) break;
#pragma unroll
      for (int k = 0; k < N; ++k) sum += v[s][k] = expf(v[s][k] - shift);
    }
    return sum;
  }

  __device__ __forceinline__ float dot(const Part& other) const {
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      if (ends(s)) break;
#pragma unroll
      for (int k = 0; k < N; ++k) sum = fmaf(v[s][k], other.v[s][k], sum);
    }
    return sum;
  }

  // of(v, s, k) to memory
  template <class Of> __device__ __forceinline__ void write(float* row, const Of& of) {
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      if (ends(s)) break;
      if (place(s) >= columns) continue;
      float made[N];
#pragma unroll
      for (int k = 0; k < N; ++k) made[k] = of(v[s][k], s, k);
      save_whole(row + place(s), made);
    }
  }
};

// One reading of a row that is longer than a part: each thread's sum is relative to the largest that it has met so far.
template <class Team, int N, int STEPS> __device__ __forceinline__ Weights weigh(const float* row, int columns) {
  typedef Part<Team, N, STEPS> Piece;
  float top = minus_infinity(), sum = 0.0f;
#pragma unroll 1
  for (int c = 0; c < columns; c += Piece::size()) {
    Piece piece(c, columns);
    piece.read(row, minus_infinity());
    float next = fmaxf(top, piece.largest()), shift = shift_of(next);
    sum = sum * expf(top - shift) + piece.weigh(shift);
    top = next;
  }
  float shift = shift_of(Team::largest(top));
  return {shift, Team::sum(sum * expf(top - shift))};
}

// Every way to share rows: ALL(name, team, floats of an access, accesses of a thread, most threads of a block, length of the rows). A
// short row, of at most COUNT N STEPS columns, stays in the registers of a part of a warp; a block reads its long row twice.
#define FOR_EVERY_TEAM(ALL)                 \
  ALL(8_wide, Lanes<8>, 4, 2, 256, short)   \
  ALL(8_any, Lanes<8>, 1, 8, 256, short)    \
  ALL(32_wide, Lanes<32>, 4, 8, 256, short) \
  ALL(32_any, Lanes<32>, 1, 16, 256, short) \
  ALL(block_wide, Block, 4, 2, 1024, long)  \
  ALL(block_any, Block, 1, 8, 1024, long)
