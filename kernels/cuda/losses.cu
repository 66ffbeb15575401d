// Training losses with the gradients of their batch means. A thread writes a gradient only where it alone reads the operands, so that
// the gradient may lie where the network's output does.
#include "common.cuh"
#include "rows.cuh"

const int STEPS = 4;  // accesses to each operand that a thread has under way at a time

// value = w <(o - t)^2>, gradient = slope w (o - t): a block for each run of a sample's elements, STEPS accesses for each thread. A
// sample of several runs has their sums in `parts` (samples, runs), to be added by the next kernel.
template <int N>
__device__ __forceinline__ void squared_error(const float* output, const float* target, const float* weight, float* gradient, float* value,
                                              float* parts, int size, int runs, float slope, float share) {
  int sample = blockIdx.x / runs, first = blockIdx.x % runs * (STEPS * N * (int)blockDim.x) + threadIdx.x * N;
  int64 at = (int64)sample * size + first;
  float factor = weight ? weight[sample] : 1.0f, sum = 0.0f, o[STEPS][N], t[STEPS][N];
  int left = size - first, step = N * blockDim.x;
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    if (s * step >= left) continue;
    load<N>(o[s], output + at + s * step);
    load<N>(t[s], target + at + s * step);
  }
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    if (s * step >= left) continue;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      float d = o[s][k] - t[s][k];
      sum = fmaf(d, d, sum);
      o[s][k] = slope * factor * d;
    }
    save<N>(gradient + at + s * step, o[s]);
  }
  sum = Block::sum(sum);
  if (threadIdx.x) return;
  if (runs == 1)
    value[sample] = sum * share * factor;
  else
    parts[blockIdx.x] = sum;
}

#define SQUARED_ERROR(suffix, N)                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256)                                                                              \
      squared_error_##suffix(const float* output, const float* target, const float* weight, float* gradient, float* value,       \
                             float* parts, int size, int runs, float slope, float share) {                                       \
    squared_error<N>(output, target, weight, gradient, value, parts, size, runs, slope, share);                                  \
  }

SQUARED_ERROR(wide, 4)
SQUARED_ERROR(any, 1)

// value = w share (sum of the runs), a warp for each sample
extern "C" __global__ void __launch_bounds__(256)
    squared_error_fold(const float* parts, const float* weight, float* value, int samples, int runs, float share) {
  int sample = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (sample >= samples) return;
  float sum = 0.0f;
  for (int run = lane; run < runs; run += 32) sum += parts[(int64)sample * runs + run];
  sum = warp_sum(sum) * share;
  if (lane == 0) value[sample] = weight ? sum * weight[sample] : sum;
}

// value = log(sum of e^x) - x[label], gradient = rate (softmax - onehot); not a number where there is no such label. The label's own
// element is read before the team's sums, and so before any thread writes a gradient there.
struct Label {
  int64 label;
  bool known;
  float chosen, rate;

  __device__ __forceinline__ Label(const float* logits, const int64* labels, int64 row, int columns, float rate_) : rate(rate_) {
    label = columns ? labels[row] : -1;
    known = label >= 0 && label < columns;
    chosen = known ? logits[label] : 0.0f;
  }
  __device__ __forceinline__ float factor(float whole) const { return known ? __fdividef(rate, whole) : not_a_number(); }
  __device__ __forceinline__ float gradient(float part, int place) const { return place == label ? part - rate : part; }
  __device__ __forceinline__ float value(Weights w) const { return known ? logf(w.whole) - (chosen - w.shift) : not_a_number(); }
};

template <class Team, int N, int STEPS>
__device__ __forceinline__ void cross_entropy_short(const float* logits, const int64* labels, float* gradient, float* value, int64 rows,
                                                    int columns, float rate) {
  for (int64 first = Team::first(); first < rows; first += Team::stride()) {
    int64 row = Team::row(first), at = row * columns;
    int count = row < rows ? columns : 0;
    Label label(logits + at, labels, row, count, rate);
    Part<Team, N, STEPS> all(0, count);
    all.read(logits + at, minus_infinity());
    float shift = shift_of(Team::largest(all.largest()));
    Weights w = {shift, Team::sum(all.weigh(shift))};
    float factor = label.factor(w.whole);
    all.write(gradient + at, [&](float e, int s, int k) { return label.gradient(e * factor, all.place(s) + k); });
    if (count && Team::rank() == 0) value[row] = label.value(w);
  }
}

template <class Team, int N, int STEPS>
__device__ __forceinline__ void cross_entropy_long(const float* logits, const int64* labels, float* gradient, float* value, int64 rows,
                                                   int columns, float rate) {
  typedef Part<Team, N, STEPS> Piece;
  for (int64 row = Team::first(); row < rows; row += Team::stride()) {
    int64 at = row * columns;
    Label label(logits + at, labels, row, columns, rate);
    Weights w = weigh<Team, N, STEPS>(logits + at, columns);
    float factor = label.factor(w.whole);
#pragma unroll 1
    for (int c = 0; c < columns; c += Piece::size()) {
      Piece piece(c, columns);
      piece.read(logits + at, 0.0f);
      piece.weigh(w.shift);
      piece.write(gradient + at, [&](float e, int s, int k) { return label.gradient(e * factor, piece.place(s) + k); });
    }
    if (Team::rank() == 0) value[row] = label.value(w);
  }
}

#define CROSS_ENTROPY(way, Team, N, STEPS, threads, length)                                                                   \
  extern "C" __global__ void __launch_bounds__(threads)                                                                       \
      cross_entropy_##way(const float* logits, const int64* labels, float* gradient, float* value, int64 rows, int columns,   \
                          float rate) {                                                                                       \
    cross_entropy_##length<Team, N, STEPS>(logits, labels, gradient, value, rows, columns, rate);                             \
  }

FOR_EVERY_TEAM(CROSS_ENTROPY)
