// What is left of a group norm where the convolution behind it makes it while it reads: the statistics of the groups, and the numbers a and b of
// each sample and channel with a x + b = ((x - mean) rstd gamma + beta) (1 + scale) + shift. The moments of parts of the places come from
// norm_moments; here a warp puts together those of its group.
#include "common.cuh"

struct Moments {
  float mean, m2;  // m2: the sum of squared deviations
};

// Of all places, from those of `parts` runs of `share` places of `size` channels, as norm_apply has it
__device__ __forceinline__ Moments together(const Moments* of_parts, int step, int parts, int places, int share, int size) {
  auto count = [&](int k) { return (float)max(min(places - k * share, share), 0) * size; };
  float base = of_parts[0].mean, n = 0.0f, sum = 0.0f, m2 = 0.0f;
#pragma unroll 1
  for (int k = threadIdx.x % 32; k < parts; k += 32) {
    n += count(k);
    sum = fmaf(count(k), of_parts[(int64)k * step].mean - base, sum);
  }
  n = warp_sum(n);
  float mean = base + __fdividef(warp_sum(sum), n);
#pragma unroll 1
  for (int k = threadIdx.x % 32; k < parts; k += 32) {
    Moments p = of_parts[(int64)k * step];
    float d = p.mean - mean;
    m2 += fmaf(count(k) * d, d, p.m2);
  }
  return {mean, __fdividef(warp_sum(m2), n)};
}

// mean and rstd (samples, groups), from partial (samples, parts, groups, 2) or, where that is null, given; then a and b (samples, groups size)
// unless they are null. A warp for each sample and group.
extern "C" __global__ void __launch_bounds__(128)
    norm_affine(const float* partial, float* mean, float* rstd, const float* gamma, const float* beta, const float* scale, const float* shift,
                float* a, float* b, int samples, int groups, int size, int places, int parts, float eps) {
  int of_all = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (of_all >= samples * groups) return;
  int sample = of_all / groups, group = of_all - sample * groups;
  float m, r;
  if (partial) {
    const Moments* first = reinterpret_cast<const Moments*>(partial) + (int64)sample * parts * groups + group;
    Moments all = together(first, groups, parts, places, (places + parts - 1) / parts, size);
    m = all.mean, r = rsqrtf(all.m2 + eps);
    if (lane == 0) mean[of_all] = m, rstd[of_all] = r;
  } else {
    m = mean[of_all], r = rstd[of_all];
  }
  if (!a) return;
  for (int i = lane; i < size; i += 32) {
    int c = group * size + i;
    int64 at = (int64)sample * groups * size + c;
    float slope = r * gamma[c], offset = fmaf(-m, slope, beta[c]);
    if (scale) {
      float factor = 1.0f + scale[at];
      slope *= factor;
      offset = fmaf(offset, factor, shift[at]);
    }
    a[at] = slope, b[at] = offset;
  }
}
