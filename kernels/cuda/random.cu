// Fill an array (samples, size) with standard normals.
#include "common.cuh"
#include "random.cuh"

template <bool WIDE>
__device__ __forceinline__ void fill(float* out, int items, int lanes, int size, const Draw& draw, unsigned first_sample) {
  for EVERY_ITEM(item, items) {
    Walk at(item, lanes, size);
    float z[4][4];
    normals16(z, draw, first_sample + at.sample, at.lane);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      int e = at.first + RUN * word;
      if (e < size) save4<WIDE>(out + at.base + e, z[word], size - e);
    }
  }
}

#define NORMALS(name, WIDE)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                                                                  \
      name(float* __restrict__ out, int items, int lanes, int size, unsigned seed_low, unsigned seed_high, unsigned step,            \
           unsigned stream, unsigned first_sample, const int* __restrict__ counter) {                                                \
    fill<WIDE>(out, items, lanes, size, counted(Draw{seed_low, seed_high, step, stream}, counter), first_sample);                    \
  }

NORMALS(normals_wide, true)
NORMALS(normals_any, false)
