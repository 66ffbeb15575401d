// Kernels that are wrong on purpose: the tests demand that the runner names each fault.

extern "C" __global__ void beyond_the_end(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i] = x[i];
}

extern "C" __global__ void missing_atomic(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[0] += x[i];
}

extern "C" __global__ void with_atomic(const float* x, float* y, int n) {  // not a fault
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) atomicAdd(y, x[i]);
}

extern "C" __global__ void missing_barrier(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = s[63 - threadIdx.x];
}

extern "C" __global__ void divergent_barrier(float* y) {
  if (threadIdx.x < 16) __syncthreads();
  else y[threadIdx.x] = 1.0f;
  __syncthreads();
}

extern "C" __global__ void half_a_warp(float* y) {
  float v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  y[threadIdx.x] = v;
}

extern "C" __global__ void unwritten_shared(float* y) {
  __shared__ float s[64];
  if (threadIdx.x < 32) s[threadIdx.x] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void unwritten_dynamic(float* y) {
  extern __shared__ float s[];
  y[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void misaligned(const float* x, float* y) {
  int i = threadIdx.x;
  reinterpret_cast<float4*>(y)[i] = reinterpret_cast<const float4*>(x + 1)[i];
}

extern "C" __global__ void strided(const float* x, float* y, int n, int stride) {  // right, but it wastes most of each sector
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[(long long)i * stride];
}

extern "C" __global__ void beyond_an_array(float* y, int n) {
  float v[4] = {};
  for (int i = 0; i < n; ++i) v[i] += threadIdx.x;
  y[threadIdx.x] = v[0] + v[3];
}

extern "C" __global__ void spills(const float* x, float* y, int k) {  // a local array indexed at run time
  float a[96], sum = 0.0f;
  for (int i = 0; i < 96; ++i) a[i] = x[i * 1024 + threadIdx.x];
  for (int i = 0; i < 96; ++i) sum += a[(i * k) % 96] * a[i];
  y[threadIdx.x] = sum;
}
