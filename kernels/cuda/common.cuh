// What every kernel file shares. The loader puts this text in place of the #include line: NVRTC has no include path.

typedef long long int64;

const unsigned EVERY_LANE = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(EVERY_LANE, v, offset);
  return v;
}

__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(EVERY_LANE, v, offset);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) v = fmaxf(v, __shfl_xor_sync(EVERY_LANE, v, offset));
  return v;
}

// __fdividef: two units in the last place, and without the slow path of a division, whose call would spill registers.
__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.0f, 1.0f + expf(-v)); }

// N neighbouring floats to and from registers, in one access of 4·N bytes where N is 2 or 4 (the address must then be a multiple of it).
template <int N> __device__ __forceinline__ void load(float (&to)[N], const float* from);
template <> __device__ __forceinline__ void load<1>(float (&to)[1], const float* from) { to[0] = *from; }
template <> __device__ __forceinline__ void load<2>(float (&to)[2], const float* from) {
  float2 v = *reinterpret_cast<const float2*>(from);
  to[0] = v.x, to[1] = v.y;
}
template <> __device__ __forceinline__ void load<4>(float (&to)[4], const float* from) {
  float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

template <int N> __device__ __forceinline__ void save(float* to, const float (&from)[N]);
template <> __device__ __forceinline__ void save<1>(float* to, const float (&from)[1]) { *to = from[0]; }
template <> __device__ __forceinline__ void save<2>(float* to, const float (&from)[2]) {
  *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
}
template <> __device__ __forceinline__ void save<4>(float* to, const float (&from)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}

// Four neighbours of which only the first n exist. WIDE promises n >= 4 and an address that is a multiple of 16.
template <bool WIDE> __device__ __forceinline__ void load4(float (&to)[4], const float* from, int n) {
  if (WIDE) return load<4>(to, from);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = i < n ? from[i] : 0.0f;
}

template <bool WIDE> __device__ __forceinline__ void save4(float* to, const float (&from)[4], int n) {
  if (WIDE) return save<4>(to, from);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < n) to[i] = from[i];
}

// Call body.run<N>(i) for every i = 0, N, 2N, ... and body.run<1>(i) for the n % N elements that are left.
template <int N, class Body> __device__ __forceinline__ void for_each(int64 n, Body& body) {
  int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x, threads = (int64)gridDim.x * blockDim.x;
  for (int64 i = N * thread; i + N <= n; i += N * threads) body.template run<N>(i);
  if (N > 1 && thread < n % N) body.template run<1>(n - n % N + thread);
}
