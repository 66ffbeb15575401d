// x_t = signal[t] x0 + noise[t] eps for a batch of samples, each with its own t; eps is given or made here.
#include "common.cuh"
#include "random.cuh"

template <bool MADE, bool WIDE>
__device__ __forceinline__ void noised(const float* x0, const int64* t, const float* signal, const float* noise, int levels,
                                       const float* eps, float* out, float* eps_out, int items, int lanes, int size,
                                       const Draw& draw, unsigned first_sample) {
  for EVERY_ITEM(item, items) {
    Walk at(item, lanes, size);
    int64 level = t[at.sample];
    bool known = level >= 0 && level < levels;  // a time that does not exist gives NaN, not a stray read
    float a = known ? signal[level] : __int_as_float(0x7fc00000);
    float s = known ? noise[level] : __int_as_float(0x7fc00000);
    float z[4][4];
    if (MADE) normals16(z, draw, first_sample + at.sample, at.lane);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      int e = at.first + RUN * word;
      if (e >= size) continue;
      float x[4], y[4];
      load4<WIDE>(x, x0 + at.base + e, size - e);
      if (!MADE) load4<WIDE>(z[word], eps + at.base + e, size - e);
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = fmaf(a, x[i], s * z[word][i]);
      save4<WIDE>(out + at.base + e, y, size - e);
      if (eps_out) save4<WIDE>(eps_out + at.base + e, z[word], size - e);
    }
  }
}

#define Q_SAMPLE(name, MADE, WIDE)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256)                                                                          \
      name(const float* x0, const int64* t, const float* signal, const float* noise, int levels, const float* eps, float* out, \
           float* eps_out, int items, int lanes, int size, unsigned seed_low, unsigned seed_high, unsigned step,             \
           unsigned stream, unsigned first_sample, const int* counter) {                                                     \
    noised<MADE, WIDE>(x0, t, signal, noise, levels, eps, out, eps_out, items, lanes, size,                                  \
                       counted(Draw{seed_low, seed_high, step, stream}, counter), first_sample);                             \
  }

Q_SAMPLE(q_sample_made_wide, true, true)
Q_SAMPLE(q_sample_made_any, true, false)
Q_SAMPLE(q_sample_given_wide, false, true)
Q_SAMPLE(q_sample_given_any, false, false)
