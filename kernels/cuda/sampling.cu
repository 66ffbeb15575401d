// What a captured row of a sampler does beside the network and the step.
#include "common.cuh"

// t[k] = times[min(*counter, last)] for every sample k: the time that the model is told at the row which the counter stands at.
extern "C" __global__ void __launch_bounds__(256)
    tell_time(const double* __restrict__ times, int last, const int* __restrict__ counter, double* __restrict__ t, int samples) {
  double time = times[min(*counter, last)];
  for (int k = blockIdx.x * blockDim.x + threadIdx.x; k < samples; k += gridDim.x * blockDim.x) t[k] = time;
}

// Words i..i+N of [a, b], each of n words; N divides n, or the words come one by one.
struct Stack {
  const float *a, *b;
  float* out;
  int64 n;
  template <int N> __device__ __forceinline__ void run(int64 i) {
    float v[N];
    load<N>(v, i < n ? a + i : b + (i - n));
    save<N>(out + i, v);
  }
};

#define STACK(name, N)                                                                                            \
  extern "C" __global__ void __launch_bounds__(256) name(const float* a, const float* b, float* out, int64 n) { \
    Stack body{a, b, out, n};                                                                                     \
    for_each<N>(2 * n, body);                                                                                     \
  }

STACK(stack_wide, 4)
STACK(stack_any, 1)
