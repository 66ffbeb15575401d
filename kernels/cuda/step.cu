// One row of a sampler table, the only update there is:
//   x0 = clip(p x + q m)
//   x' = a x + b x0 + e m + h1 y1 + h2 y2 + h3 y3 + g guidance + c z
//   y  = u x + w x0 + r m          (to `store`)
// rows[row] = p q a b e h1 h2 h3 g c u w r, and z is made with the step `step` of the generator; where a counter is given, its value is added
// to both, so that a captured graph walks the table by itself, up to its row `last`. Where `words` are given they stand for the seed's
// two words and for first_sample. A pointer that is null leaves its term out, infinite limits the clipping. Every array may be one
// of the others.
#include "common.cuh"
#include "random.cuh"

enum Noise { NONE, GIVEN, MADE };

// Two instructions; NaN stays NaN, as it does not in fmaxf and fminf.
__device__ __forceinline__ float clipped(float v, float low, float high) {
#ifdef __CUDA_ARCH__
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(v), "f"(low));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(v), "f"(high));
  return v;
#else
  return v < low ? low : v > high ? high : v;
#endif
}

template <bool WIDE> __device__ __forceinline__ void add_term(float (&y)[4], float k, const float* from, int64 at, int n) {
  if (!from) return;
  float v[4];
  load4<WIDE>(v, from + at, n);
#pragma unroll
  for (int i = 0; i < 4; ++i) y[i] = fmaf(k, v[i], y[i]);
}

template <Noise NOISE, bool WIDE>
__device__ __forceinline__ void advance(const float* x, const float* m, const float* rows, int row, int last, unsigned step,
                                        const int* counter, const unsigned* words, const float* y1, const float* y2, const float* y3,
                                        const float* guidance, const float* noise, float low, float high, float* out, float* store,
                                        int items, int lanes, int size, unsigned seed_low, unsigned seed_high, unsigned stream,
                                        unsigned first_sample) {
  if (counter) row = min(row + *counter, last), step += *counter;
  if (NOISE == MADE && words) seed_low = words[0], seed_high = words[1], first_sample = words[2];
  const float* k = rows + 13 * row;
  float p = k[0], q = k[1], a = k[2], b = k[3], e = k[4], h1 = k[5], h2 = k[6], h3 = k[7], g = k[8], c = k[9];
  float u = k[10], w = k[11], r = k[12];
  for EVERY_ITEM(item, items) {
    Walk at(item, lanes, size);
    float z[4][4];
    if (NOISE == MADE) normals16(z, Draw{seed_low, seed_high, step, stream}, first_sample + at.sample, at.lane);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      int first = at.first + RUN * word, n = size - first;
      if (n <= 0) continue;
      int64 place = at.base + first;
      float xs[4], ms[4], x0[4], y[4];
      load4<WIDE>(xs, x + place, n);
      load4<WIDE>(ms, m + place, n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x0[i] = clipped(fmaf(p, xs[i], q * ms[i]), low, high);
        y[i] = fmaf(e, ms[i], fmaf(b, x0[i], a * xs[i]));
      }
      add_term<WIDE>(y, h1, y1, place, n);
      add_term<WIDE>(y, h2, y2, place, n);
      add_term<WIDE>(y, h3, y3, place, n);
      add_term<WIDE>(y, g, guidance, place, n);
      if (NOISE == GIVEN) add_term<WIDE>(y, c, noise, place, n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (NOISE == MADE) y[i] = fmaf(c, z[word][i], y[i]);
        x0[i] = fmaf(r, ms[i], fmaf(w, x0[i], u * xs[i]));
      }
      save4<WIDE>(out + place, y, n);
      if (store) save4<WIDE>(store + place, x0, n);
    }
  }
}

#define STEP(name, NOISE, WIDE)                                                                                                      \
  extern "C" __global__ void __launch_bounds__(256)                                                                                 \
      name(const float* x, const float* m, const float* rows, int row, int last, unsigned step, const int* counter,                 \
           const unsigned* words, const float* y1, const float* y2, const float* y3, const float* guidance, const float* noise,     \
           float low, float high, float* out, float* store, int items, int lanes, int size, unsigned seed_low, unsigned seed_high,  \
           unsigned stream, unsigned first_sample) {                                                                                \
    advance<NOISE, WIDE>(x, m, rows, row, last, step, counter, words, y1, y2, y3, guidance, noise, low, high, out, store, items,    \
                         lanes, size, seed_low, seed_high, stream, first_sample);                                                   \
  }

STEP(step_none_wide, NONE, true)
STEP(step_none_any, NONE, false)
STEP(step_given_wide, GIVEN, true)
STEP(step_given_any, GIVEN, false)
STEP(step_made_wide, MADE, true)
STEP(step_made_any, MADE, false)
