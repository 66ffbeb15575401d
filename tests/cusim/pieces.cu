// Kernels for the tests of the runner itself: the instructions that no kernel of the project uses yet.

extern "C" __global__ void product_bf16(const unsigned short* a, const unsigned short* b, float* d) {  // (16, 16) (16, 8)
  int lane = threadIdx.x, row = lane / 4, k = lane % 4 * 2;
  unsigned x[4], y[2];
  float c[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  for (int i = 0; i < 4; ++i) {
    const unsigned short* from = a + (row + i % 2 * 8) * 16 + k + i / 2 * 8;
    x[i] = from[0] | from[1] << 16;
  }
  for (int i = 0; i < 2; ++i) y[i] = b[(k + 8 * i) * 8 + row] | b[(k + 8 * i + 1) * 8 + row] << 16;
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + k + i % 2] = c[i];
}

extern "C" __global__ void product_tf32(const float* a, const float* b, float* d) {  // (16, 8) (8, 8)
  int lane = threadIdx.x, row = lane / 4, k = lane % 4;
  unsigned x[4], y[2];
  float c[4];
  for (int i = 0; i < 4; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(x[i]) : "f"(a[(row + i % 2 * 8) * 8 + k + i / 2 * 4]));
  for (int i = 0; i < 2; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y[i]) : "f"(b[(k + 4 * i) * 8 + row]));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]), "f"(0.0f));
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + 2 * k + i % 2] = c[i];
}

// Matrices of 8 x 8 in rows of 16 bytes, `pitch` halfwords apart; out: what each lane was given, register by register.
template <int COUNT, bool TURNED> __device__ __forceinline__ void matrices(const unsigned short* from, unsigned* to, int pitch) {
  extern __shared__ unsigned short tile[];
  for (int i = threadIdx.x; i < 256; i += 32) tile[i / 8 * pitch + i % 8] = from[i];
  __syncwarp();
  unsigned r[4], row = (unsigned)__cvta_generic_to_shared(tile + threadIdx.x % 32 * pitch);
  if (COUNT == 1) asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row));
  if (COUNT == 2) asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row));
  if (COUNT == 4 && !TURNED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
  if (COUNT == 4 && TURNED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
  for (int i = 0; i < COUNT; ++i) to[32 * i + threadIdx.x] = r[i];
}

#define MATRICES(NAME, COUNT, TURNED)                                                             \
  extern "C" __global__ void NAME(const unsigned short* from, unsigned* to, int pitch) {          \
    matrices<COUNT, TURNED>(from, to, pitch);                                                     \
  }
MATRICES(matrix_1, 1, false)
MATRICES(matrix_2, 2, false)
MATRICES(matrix_4, 4, false)
MATRICES(matrix_4_turned, 4, true)

// y = x reversed in runs of a block, each element brought by cp.async; `waits` and `meets` leave out what makes it right.
extern "C" __global__ void copied(const float* x, float* y, int n, int waits, int meets) {
  __shared__ __align__(16) float s[256];
  int i = 4 * threadIdx.x, base = 4 * blockIdx.x * blockDim.x, bytes = 4 * min(4, n - base - i);
  unsigned to = (unsigned)__cvta_generic_to_shared(s + i);
  if (bytes > 0) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(x + base + i), "r"(bytes) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");  // an empty group
  if (waits) asm volatile("cp.async.wait_group %0;" ::"n"(1) : "memory");
  if (meets) __syncthreads();
  int last = min(4 * (int)blockDim.x, n - base) - 1;
  for (int k = i; k < i + 4 && k <= last; ++k) y[base + k] = s[last - k];
}

extern "C" __global__ void converted(const float* x, unsigned* half2, unsigned* bfloat2, float* back, int n) {
  int i = threadIdx.x;
  if (2 * i + 1 >= n) return;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(half2[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bfloat2[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
  asm("cvt.f32.f16 %0, %1;" : "=f"(back[i]) : "h"((unsigned short)half2[i]));
}

// One warp, 8 results for each lane
extern "C" __global__ void shuffled(const int* x, int* y, int width) {
  int v = __ldg(x + threadIdx.x), *mine = y + 8 * threadIdx.x;
  mine[0] = width == 32 ? __shfl_sync(0xffffffffu, v, 5) : __shfl_sync(0xffffffffu, v, 5, 8);
  mine[1] = width == 32 ? __shfl_xor_sync(0xffffffffu, v, 3) : __shfl_xor_sync(0xffffffffu, v, 3, 8);
  mine[2] = width == 32 ? __shfl_down_sync(0xffffffffu, v, 2) : __shfl_down_sync(0xffffffffu, v, 2, 8);
  mine[3] = width == 32 ? __shfl_up_sync(0xffffffffu, v, 2) : __shfl_up_sync(0xffffffffu, v, 2, 8);
  mine[4] = __any_sync(0xffffffffu, v > 1000) + 2 * __all_sync(0xffffffffu, v >= 0);
  mine[5] = __popc(__ballot_sync(0xffffffffu, v % 3 == 0));
  mine[6] = __syncthreads_count(v % 2 == 0);
  __stcs(mine + 7, __ldcs(x + 31 - threadIdx.x));
}

// Every lane reads words of shared memory `stride` words apart, `bytes` at a time.
extern "C" __global__ void banks(float* y, int stride, int bytes) {
  extern __shared__ float s[];
  for (int i = threadIdx.x; i < 32 * stride + 4; i += 32) s[i] = i;
  __syncwarp();
  int i = threadIdx.x * stride;
  float v = 0.0f;
  if (bytes == 4) v = s[i];
  if (bytes == 8) {
    float2 two = *reinterpret_cast<float2*>(s + i);
    v = two.x + two.y;
  }
  if (bytes == 16) {
    float4 four = *reinterpret_cast<float4*>(s + i);
    v = four.x + four.y + four.z + four.w;
  }
  y[threadIdx.x] = v;
}
