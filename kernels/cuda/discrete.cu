// Draws of categorical laws. A warp goes through one row of logits at a time, a lane for each weight of a chunk of 32; it has `span`
// elements, whose words, states and results lie one in each lane. The sums are those of the definition, so that the states are.
#include "common.cuh"
#include "random.cuh"

const int CHUNK = 32;

// The row of an element: the largest logit, the weights relative to it, the tree of one chunk and the sum of all.
struct Row {
  const float* logits;
  int columns, hidden;  // a column that has no weight, or -1
  float top, whole;
  float sums[6];        // sums[k]: over the lanes that agree with this one modulo 2^k; sums[5] is the lane's own weight

  __device__ __forceinline__ Row(const float* row, int columns_, int hidden_) : logits(row), columns(columns_), hidden(hidden_), whole(0.0f) {
    top = -__int_as_float(0x7f800000);
    for (int j = threadIdx.x & 31; j < columns; j += CHUNK) {
      float v = row[j];
      if (j != hidden && v > top) top = v;
    }
    top = warp_max(top);
    for (int first = 0; first < columns; first += CHUNK) {
      grow(first);
      whole = add(whole, sums[0]);
    }
  }

  __device__ __forceinline__ float weight(int j) const { return exp_below_0(add(logits[j], -top)); }

  __device__ __forceinline__ void grow(int first) {
    int j = first + (threadIdx.x & 31);
    sums[5] = j < columns && j != hidden ? weight(j) : 0.0f;
#pragma unroll
    for (int k = 4; k >= 0; --k) sums[k] = add(sums[k + 1], __shfl_xor_sync(EVERY_LANE, sums[k + 1], 1 << k));
  }

  // The column where the running sum passes r, in every lane; -1 where it never does.
  __device__ __forceinline__ int seek(float r) {
    if (!(r < whole)) return -1;
    int first = 0;
    float before = 0.0f;
    if (columns > CHUNK) {
      for (;; first += CHUNK) {
        grow(first);
        float with = add(before, sums[0]);
        if (r < with) break;
        before = with;
      }
      r = add(r, -before);
    }
    int place = 0;
#pragma unroll
    for (int k = 0; k < 5; ++k) {
      int half = 1 << k;
      float left = __shfl_sync(EVERY_LANE, sums[k + 1], place), right = __shfl_sync(EVERY_LANE, sums[k + 1], place + half);
      if (r >= left && right > 0.0f) r = add(r, -left), place += half;
    }
    return first + place;
  }
};

// The elements of a warp: lane i < span has element `first` + i.
struct Elements {
  int64 first;
  int mine, sample, e;
  bool live;
  __device__ __forceinline__ Elements(int64 warp, int span, int count, int size) : first(warp * span) {
    int lane = threadIdx.x & 31;
    live = lane < span && first + lane < count;
    mine = live ? (int)first + lane : 0;
    sample = mine / size;
    e = mine - sample * size;
  }
};

extern "C" __global__ void __launch_bounds__(256)
    categorical(const float* logits, int* out, int count, int size, int columns, int span, unsigned seed_low, unsigned seed_high,
                unsigned step, unsigned stream, unsigned first_sample, const int* counter) {
  Draw draw = counted(Draw{seed_low, seed_high, step, stream}, counter);
  int lane = threadIdx.x & 31, warps = gridDim.x * (blockDim.x / 32);
  for (int64 warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; warp * span < count; warp += warps) {
    Elements at(warp, span, count, size);
    float u = uniform(word(draw, first_sample + at.sample, at.e));
    int state = -1;
    for (int k = 0; k < span && at.first + k < count; ++k) {
      Row row(logits + (at.first + k) * columns, columns, -1);
      int found = row.seek(mul(__shfl_sync(EVERY_LANE, u, k), row.whole));
      if (lane == k) state = found;
    }
    if (at.live) out[at.mine] = state;
  }
}

// rows[index] = (keep, spread, C, D), where a counter is given at its value behind that; mask < 0 for a uniform law. `out` may be `x_t`.
extern "C" __global__ void __launch_bounds__(256)
    categorical_posterior(const float* logits, const int* x_t, const float* rows, int index, int mask, int* out, int count, int size,
                          int columns, int span, unsigned seed_low, unsigned seed_high, unsigned step, unsigned stream,
                          unsigned first_sample, const int* counter) {
  Draw draw = counted(Draw{seed_low, seed_high, step, stream}, counter);
  if (counter) index += *counter;
  float keep = rows[4 * index], spread = rows[4 * index + 1], c = rows[4 * index + 2], d = rows[4 * index + 3];
  float move = add(c, d);
  float soft = mul(spread, c), even = mul(mul(spread, d), (float)columns);
  int lane = threadIdx.x & 31, warps = gridDim.x * (blockDim.x / 32);
  for (int64 warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; warp * span < count; warp += warps) {
    Elements at(warp, span, count, size);
    int x = at.live ? x_t[at.mine] : -1, state = -1;
    float u = uniform(word(draw, first_sample + at.sample, at.e));
    bool reads = at.live;
    if (mask < 0) {
      reads = reads && x >= 0 && x < columns;
    } else {
      float v = mul(u, move);
      state = x != mask ? x : v < move ? mask : -1;
      reads = reads && x == mask && v < c;
    }
    unsigned r = reads ? word(second(draw), first_sample + at.sample, at.e) : 0u;
    unsigned pending = __ballot_sync(EVERY_LANE, reads);
    for (; pending; pending &= pending - 1) {
      int k = __ffs(pending) - 1;
      Row row(logits + (at.first + k) * columns, columns, mask);
      unsigned rk = __shfl_sync(EVERY_LANE, r, k);
      float target = mul(uniform(rk), row.whole);
      int other = -1;
      if (mask < 0) {
        int xk = __shfl_sync(EVERY_LANE, x, k);
        float stays = mul(keep, add(mul(c, row.weight(xk)), mul(d, row.whole)));
        float until = add(stays, mul(soft, row.whole));
        float all = add(until, mul(even, row.whole));
        float v = mul(__shfl_sync(EVERY_LANE, u, k), all);
        other = v < stays ? xk : v >= until && v < all ? evenly(rk, columns) : -1;
        target = v >= stays && v < until ? target : row.whole;  // where nothing is sought, nothing is found
      }
      int found = max(row.seek(target), other);
      if (lane == k) state = found;
    }
    if (at.live) out[at.mine] = state;
  }
}

// x_t = x0 with probability keep[t], else any of `states`, or the mask where that is >= 0. A thread has one counter of a sample: four
// elements that lie a run apart. A time that does not exist gives -1. `out` may be `x0`.
extern "C" __global__ void __launch_bounds__(256)
    categorical_q_sample(const int* x0, const int64* t, const float* keep, int levels, int states, int mask, int* out, int items,
                         int walks, int size, unsigned seed_low, unsigned seed_high, unsigned step, unsigned stream,
                         unsigned first_sample, const int* counter) {
  Draw draw = counted(Draw{seed_low, seed_high, step, stream}, counter), other = second(draw);
  for (int64 item = blockIdx.x * blockDim.x + threadIdx.x; item < items; item += (int64)gridDim.x * blockDim.x) {
    int sample = (int)item / walks, walk = (int)item - sample * walks;
    int first = BLOCK * (walk / RUN) + walk % RUN;
    int64 level = t[sample], base = (int64)sample * size;
    bool known = level >= 0 && level < levels;
    float stay = known ? keep[level] : 0.0f;
    uint4 count = make_uint4((unsigned)walk, first_sample + sample, draw.step, draw.stream);
    uint4 r = philox(count, seed_low, seed_high), q = make_uint4(0u, 0u, 0u, 0u);
    count.w = other.stream;
    if (mask < 0) q = philox(count, seed_low, seed_high);
    unsigned one[4] = {r.x, r.y, r.z, r.w}, two[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int e = first + RUN * i;
      if (e >= size) continue;
      int state = uniform(one[i]) < stay ? x0[base + e] : mask < 0 ? evenly(two[i], states) : mask;
      out[base + e] = known ? state : -1;
    }
  }
}
