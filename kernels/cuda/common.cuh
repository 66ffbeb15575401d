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

typedef unsigned short bf16;  // the upper half of a float

// The nearest bf16, of two the even one; a NaN stays one.
__device__ __forceinline__ unsigned round_bf16(float v) {
  unsigned word = __float_as_uint(v);
  return v == v ? (word + 0x7fff + (word >> 16 & 1)) >> 16 : 0x7fff;
}

// One element of either type
__device__ __forceinline__ float load_one(const float* from) { return *from; }
__device__ __forceinline__ float load_one(const bf16* from) { return __uint_as_float((unsigned)*from << 16); }
__device__ __forceinline__ void save_one(float* to, float v) { *to = v; }
__device__ __forceinline__ void save_one(bf16* to, float v) { *to = round_bf16(v); }

// Two bf16 in a word, the first in its lower half
__device__ __forceinline__ float2 unpack_bf16(unsigned pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}
__device__ __forceinline__ unsigned pack_bf16(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return round_bf16(first) | round_bf16(second) << 16;
#else
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#endif
}

// N neighbours to and from registers, in one access where N is more than 1 (the address must then be a multiple of its bytes).
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

template <int N> __device__ __forceinline__ void load(float (&to)[N], const bf16* from);
template <> __device__ __forceinline__ void load<1>(float (&to)[1], const bf16* from) { to[0] = load_one(from); }
template <> __device__ __forceinline__ void load<4>(float (&to)[4], const bf16* from) {
  uint2 pairs = *reinterpret_cast<const uint2*>(from);
  float2 v = unpack_bf16(pairs.x), w = unpack_bf16(pairs.y);
  to[0] = v.x, to[1] = v.y, to[2] = w.x, to[3] = w.y;
}
template <> __device__ __forceinline__ void load<8>(float (&to)[8], const bf16* from) {
  uint4 pairs = *reinterpret_cast<const uint4*>(from);
  float2 v = unpack_bf16(pairs.x), w = unpack_bf16(pairs.y);
  to[0] = v.x, to[1] = v.y, to[2] = w.x, to[3] = w.y;
  v = unpack_bf16(pairs.z), w = unpack_bf16(pairs.w);
  to[4] = v.x, to[5] = v.y, to[6] = w.x, to[7] = w.y;
}

template <int N> __device__ __forceinline__ void save(float* to, const float (&from)[N]);
template <> __device__ __forceinline__ void save<1>(float* to, const float (&from)[1]) { *to = from[0]; }
template <> __device__ __forceinline__ void save<2>(float* to, const float (&from)[2]) {
  *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
}
template <> __device__ __forceinline__ void save<4>(float* to, const float (&from)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}

template <int N> __device__ __forceinline__ void save(bf16* to, const float (&from)[N]);
template <> __device__ __forceinline__ void save<1>(bf16* to, const float (&from)[1]) { save_one(to, from[0]); }
template <> __device__ __forceinline__ void save<4>(bf16* to, const float (&from)[4]) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3]));
}
template <> __device__ __forceinline__ void save<8>(bf16* to, const float (&from)[8]) {
  unsigned first = pack_bf16(from[0], from[1]), second = pack_bf16(from[2], from[3]);
  *reinterpret_cast<uint4*>(to) = make_uint4(first, second, pack_bf16(from[4], from[5]), pack_bf16(from[6], from[7]));
}

// Four neighbours of which only the first n exist. WIDE promises n >= 4 and an address that is a multiple of the four's bytes.
template <bool WIDE, class T> __device__ __forceinline__ void load4(float (&to)[4], const T* from, int n) {
  if (WIDE) return load<4>(to, from);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = i < n ? load_one(from + i) : 0.0f;
}

template <bool WIDE, class T> __device__ __forceinline__ void save4(T* to, const float (&from)[4], int n) {
  if (WIDE) return save<4>(to, from);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < n) save_one(to + i, from[i]);
}

// Call body.run<N>(i) for every i = 0, N, 2N, ... and body.run<1>(i) for the n % N elements that are left.
template <int N, class Body> __device__ __forceinline__ void for_each(int64 n, Body& body) {
  int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x, threads = (int64)gridDim.x * blockDim.x;
  for (int64 i = N * thread; i + N <= n; i += N * threads) body.template run<N>(i);
  if (N > 1 && thread < n % N) body.template run<1>(n - n % N + thread);
}
