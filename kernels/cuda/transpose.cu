// Transposes of matrices: the weights (k, k, Cin, Cout) are one of k k Cin rows, and (Cout, k, k, Cin) is what cuDNN wants.

#include "common.cuh"

const int TILE = 32;

// x (rows, columns), y (columns, rows). A block of 256 threads makes a tile of 32 x 32: a thread reads four neighbours of a row and
// writes four of a column. Rows of the tile begin one bank after another, so that either way no two lanes want the same bank.
template <bool WIDE, class T>
__device__ __forceinline__ void transpose(const T* x, T* y, int rows, int columns) {
  __shared__ float tile[TILE][TILE + 1];
  int across = (columns + TILE - 1) / TILE, first_row = blockIdx.x / across * TILE, first_column = blockIdx.x % across * TILE;
  int line = threadIdx.x / 8, four = threadIdx.x % 8 * 4;
  int row = first_row + line, column = first_column + four;
  if (row < rows && column < columns) {
    float v[4];
    load4<WIDE>(v, x + (int64)row * columns + column, columns - column);
#pragma unroll
    for (int i = 0; i < 4; ++i) tile[line][four + i] = v[i];
  }
  __syncthreads();
  row = first_row + four, column = first_column + line;
  if (row < rows && column < columns) {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = WIDE || row + i < rows ? tile[four + i][line] : 0.0f;
    save4<WIDE>(y + (int64)column * rows + row, v, rows - row);
  }
}

extern "C" __global__ void __launch_bounds__(256) transpose_wide(const float* x, float* y, int rows, int columns) {
  transpose<true>(x, y, rows, columns);
}
extern "C" __global__ void __launch_bounds__(256) transpose_any(const float* x, float* y, int rows, int columns) {
  transpose<false>(x, y, rows, columns);
}
extern "C" __global__ void __launch_bounds__(256) transpose_bf16_wide(const bf16* x, bf16* y, int rows, int columns) {
  transpose<true>(x, y, rows, columns);
}
extern "C" __global__ void __launch_bounds__(256) transpose_bf16_any(const bf16* x, bf16* y, int rows, int columns) {
  transpose<false>(x, y, rows, columns);
}
