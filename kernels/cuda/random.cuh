// Random numbers from Philox4x32-10 with the same bits on every machine. Only integer operations and multiplications, additions and
// square roots that are each rounded once are used: no fused multiply-add, no library function, no subnormal number.
//
// Element e of a sample takes word (e / 256) % 4 of counter (256 (e / 1024) + e % 256, sample, step, stream). A thread makes four
// neighbouring counters, so its 16 normals are four neighbours in each of four runs of 256.

const int RUN = 256;         // elements of one counter word that lie side by side
const int BLOCK = 4 * RUN;   // elements made by RUN counters

struct Draw {                // what a normal depends on besides the sample and the element
  unsigned seed_low, seed_high, step, stream;
};

// The draw of a step counted from what a counter on the device holds, where there is one: a captured graph draws anew each time.
__device__ __forceinline__ Draw counted(Draw draw, const int* counter) {
  if (counter) draw.step += *counter;
  return draw;
}

__device__ __forceinline__ uint4 philox(uint4 counter, unsigned key0, unsigned key1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    unsigned high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    unsigned high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
    counter = make_uint4(high1 ^ counter.y ^ key0, low1, high0 ^ counter.w ^ key1, low0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }

// 2 ln u with u = (r / 256 + 1) 2^-24 in (0, 1]. Powers of two may stand where the definition, -2 ln u, has them not, and a product that is
// exact may join the addition behind it: fmaf rounds as the two would.
__device__ __forceinline__ float log_2(unsigned r) {
  const float unit = 1.1920928955078125e-7f;  // 2^-23
  unsigned f = __float_as_uint((float)((r >> 8) + 1u)), power = (f - 0x4B3504F3u) & 0xFF800000u;
  float q = (float)(int)power;                                     // 2^23 times the exponent
  float x = add(__uint_as_float(f - power - 0x0C000000u), -1.0f);  // u = 2^exponent (1 + x), sqrt(1/2) <= 1 + x < sqrt(2)
  float y = add(mul(2 * 7.0376836292e-2f, x), 2 * -1.1514610310e-1f);
  y = add(mul(y, x), 2 * 1.1676998740e-1f);
  y = add(mul(y, x), 2 * -1.2420140846e-1f);
  y = add(mul(y, x), 2 * 1.4249322787e-1f);
  y = add(mul(y, x), 2 * -1.6668057665e-1f);
  y = add(mul(y, x), 2 * 2.0000714765e-1f);
  y = add(mul(y, x), 2 * -2.4999993993e-1f);
  y = add(mul(y, x), 2 * 3.3333331174e-1f);
  float z = mul(x, x);
  y = mul(mul(y, x), z);
  y = add(y, mul(q, 2 * unit * -2.12194440e-4f));
  y = add(y, -z);
  return fmaf(q, 2 * unit * 0.693359375f, fmaf(2.0f, x, y));
}

// sqrt(-v), rounded once, for v = 0 and for 2^-30 < -v < 2^30: what the library does where it needs no scaling, without its branch.
__device__ __forceinline__ float root_of_minus(float v) {
  float y = rsqrtf(add(1e-30f, -v));  // finite at 0, and elsewhere of v itself
  float s = mul(-v, y);
  return fmaf(fmaf(-s, s, -v), mul(0.5f, y), s);
}

// (cos, sin) of a uniform angle: the octant from the top 3 bits of r, the angle in it from the next 24
__device__ __forceinline__ float2 cos_sin(unsigned r) {
  float t = mul((float)(int)(r & 0x1FFFFFE0u), 4.6813379e-8f * 0.03125f);  // [0, pi/4)
  float z = mul(t, t);
  float s = add(mul(-1.9515295891e-4f, z), 8.3321608736e-3f);
  s = add(mul(s, z), -1.6666654611e-1f);
  s = add(mul(mul(s, z), t), t);
  float c = add(mul(2.443315711809948e-5f, z), -1.388731625493765e-3f);
  c = add(mul(c, z), 4.166664568298827e-2f);
  c = add(fmaf(-0.5f, z, mul(mul(c, z), z)), 1.0f);
  float a, b;  // (c, s), in odd octants (s, c)
#ifdef __CUDA_ARCH__
  asm("{ .reg .pred odd; .reg .b32 bit; and.b32 bit, %4, 0x20000000; setp.ne.b32 odd, bit, 0; selp.f32 %0, %3, %2, odd; selp.f32 %1, %2, %3, odd; }"
      : "=f"(a), "=f"(b) : "f"(c), "f"(s), "r"(r));
#else
  bool odd = r & 0x20000000u;
  a = odd ? s : c, b = odd ? c : s;
#endif
  return make_float2(__uint_as_float(__float_as_uint(a) ^ (r << 1 & 0x80000000u)), __uint_as_float(__float_as_uint(b) ^ (r & 0x80000000u)));
}

// The 16 normals of one thread: z[word][i] belongs to element 1024 (lane / 64) + 256 word + 4 (lane % 64) + i of the sample.
__device__ __forceinline__ void normals16(float (&z)[4][4], const Draw& draw, unsigned sample, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint4 r = philox(make_uint4(4u * lane + i, sample, draw.step, draw.stream), draw.seed_low, draw.seed_high);
    float radius0 = root_of_minus(log_2(r.x)), radius1 = root_of_minus(log_2(r.z));
    float2 angle0 = cos_sin(r.y), angle1 = cos_sin(r.w);
    z[0][i] = mul(radius0, angle0.x);
    z[1][i] = mul(radius0, angle0.y);
    z[2][i] = mul(radius1, angle1.x);
    z[3][i] = mul(radius1, angle1.y);
  }
}

// The walk over (sample, lane): a sample of `size` elements has `lanes` = 64 (size / 1024) + min(64, ceil(size % 1024 / 4)) lanes.
struct Walk {
  int sample, lane, first;   // first: the lane's first element in run 0
  int64 base;                // where the sample begins
  __device__ __forceinline__ Walk(unsigned item, unsigned lanes, int size) {
    unsigned whole = item / lanes;  // divisions and products of unsigned numbers take fewer instructions
    sample = (int)whole;
    lane = (int)(item - whole * lanes);
    first = BLOCK * (lane >> 6) + 4 * (lane & 63);
    base = (int64)((unsigned long long)whole * (unsigned)size);
  }
};

// Every item of a walk of a thread, below 2^31
#define EVERY_ITEM(item, items) (unsigned item = blockIdx.x * blockDim.x + threadIdx.x; item < (unsigned)items; item += gridDim.x * blockDim.x)

// ---- draws of states: the words of the same counters, one for each element

// (r / 512 + 1/2) 2^-23 in (0, 1), exact
__device__ __forceinline__ float uniform(unsigned r) { return add(mul((float)(r >> 9), 1.1920928955078125e-7f), 5.9604644775390625e-8f); }

// floor(r states / 2^32)
__device__ __forceinline__ int evenly(unsigned r, unsigned states) { return (int)__umulhi(r, states); }

// The word of element e of a sample.
__device__ __forceinline__ unsigned word(const Draw& draw, unsigned sample, int e) {
  uint4 r = philox(make_uint4((unsigned)(RUN * (e / BLOCK) + e % RUN), sample, draw.step, draw.stream), draw.seed_low, draw.seed_high);
  int which = e / RUN % 4;
  return which == 0 ? r.x : which == 1 ? r.y : which == 2 ? r.z : r.w;
}

// The draw of an element's second word.
__device__ __forceinline__ Draw second(const Draw& draw) { return Draw{draw.seed_low, draw.seed_high, draw.step, draw.stream + 0x80000000u}; }

// e^x for x <= 0, within two units in the last place; 0 below -64
__device__ __forceinline__ float exp_below_0(float x) {
  bool far = x < -64.0f;
  x = far ? 0.0f : x;
  float t = add(mul(x, 1.44269504088896341f), 12582912.0f);  // 1.5 2^23: the sum is rounded to an integer n, which its low bits hold
  float n = add(t, -12582912.0f);
  float r = add(add(x, -mul(n, 0.693359375f)), -mul(n, -2.12194440e-4f));  // x - n ln 2
  float p = add(mul(1.9875691500e-4f, r), 1.3981999507e-3f);
  p = add(mul(p, r), 8.3334519073e-3f);
  p = add(mul(p, r), 4.1665795894e-2f);
  p = add(mul(p, r), 1.6666665459e-1f);
  p = add(mul(p, r), 5.0000001201e-1f);
  float y = add(add(mul(p, mul(r, r)), r), 1.0f);
  return far ? 0.0f : mul(y, __uint_as_float((__float_as_uint(t) + 127u) << 23));
}
