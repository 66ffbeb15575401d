// The softmax of rows and its gradient. A thread writes only where it alone has read: the result may lie where an operand does.
#include "common.cuh"
#include "rows.cuh"

template <class Team, int N, int STEPS>
__device__ __forceinline__ void softmax_short(const float* x, float* y, int64 rows, int columns) {
  for (int64 first = Team::first(); first < rows; first += Team::stride()) {
    int64 row = Team::row(first), at = row * columns;
    Part<Team, N, STEPS> all(0, row < rows ? columns : 0);
    all.read(x + at, minus_infinity());
    float whole = Team::sum(all.weigh(shift_of(Team::largest(all.largest())))), factor = __fdividef(1.0f, whole);
    all.write(y + at, [=](float e, int, int) { return e * factor; });
  }
}

template <class Team, int N, int STEPS>
__device__ __forceinline__ void softmax_long(const float* x, float* y, int64 rows, int columns) {
  typedef Part<Team, N, STEPS> Piece;
  for (int64 row = Team::first(); row < rows; row += Team::stride()) {
    Weights w = weigh<Team, N, STEPS>(x + row * columns, columns);
    float factor = __fdividef(1.0f, w.whole);
#pragma unroll 1
    for (int c = 0; c < columns; c += Piece::size()) {
      Piece piece(c, columns);
      piece.read(x + row * columns, 0.0f);
      piece.write(y + row * columns, [=](float v, int, int) { return expf(v - w.shift) * factor; });
    }
  }
}

// dx = y (dy - sum y dy)
template <class Team, int N, int STEPS>
__device__ __forceinline__ void softmax_backward_short(const float* dy, const float* y, float* dx, int64 rows, int columns) {
  for (int64 first = Team::first(); first < rows; first += Team::stride()) {
    int64 row = Team::row(first), at = row * columns;
    int count = row < rows ? columns : 0;
    Part<Team, N, STEPS> p(0, count), d(0, count);
    p.read(y + at, 0.0f);
    d.read(dy + at, 0.0f);
    float mean = Team::sum(p.dot(d));
    p.write(dx + at, [&](float v, int s, int k) { return v * (d.v[s][k] - mean); });
  }
}

template <class Team, int N, int STEPS>
__device__ __forceinline__ void softmax_backward_long(const float* dy, const float* y, float* dx, int64 rows, int columns) {
  typedef Part<Team, N, STEPS> Piece;
  for (int64 row = Team::first(); row < rows; row += Team::stride()) {
    int64 at = row * columns;
    float mean = 0.0f;
#pragma unroll 1
    for (int c = 0; c < columns; c += Piece::size()) {
      Piece p(c, columns), d(c, columns);
      p.read(y + at, 0.0f);
      d.read(dy + at, 0.0f);
      mean += p.dot(d);
    }
    mean = Team::sum(mean);
#pragma unroll 1
    for (int c = 0; c < columns; c += Piece::size()) {
      Piece p(c, columns), d(c, columns);
      p.read(y + at, 0.0f);
      d.read(dy + at, 0.0f);
      p.write(dx + at, [&](float v, int s, int k) { return v * (d.v[s][k] - mean); });
    }
  }
}

#define SOFTMAX(way, Team, N, STEPS, threads, length)                                                                         \
  extern "C" __global__ void __launch_bounds__(threads) softmax_##way(const float* x, float* y, int64 rows, int columns) {    \
    softmax_##length<Team, N, STEPS>(x, y, rows, columns);                                                                    \
  }                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(threads)                                                                       \
      softmax_backward_##way(const float* dy, const float* y, float* dx, int64 rows, int columns) {                           \
    softmax_backward_##length<Team, N, STEPS>(dy, y, dx, rows, columns);                                                      \
  }

FOR_EVERY_TEAM(SOFTMAX)
