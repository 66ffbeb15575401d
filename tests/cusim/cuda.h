// Enough of CUDA C for g++: the project's kernel files are compiled with this header in front and run on the host.
//
// One CUDA thread is one fiber (scheduler.cpp). Blocks run one after another on one operating-system thread, so a kernel without barriers is
// a plain loop. Static __shared__ variables become static variables of the compiled library: one block at a time uses them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __grid_constant__
#define CUSIM 1
#define __launch_bounds__(...)
#ifdef CUSIM_COVERAGE
#define __forceinline__ inline  // each function keeps its own counters
#else
#define __forceinline__ inline __attribute__((always_inline))
#endif
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
// Helpers whose own memory accesses the checker must not see.
#define CUSIM_UNSEEN __attribute__((no_sanitize("thread"), noinline))
// The loader writes `extern __shared__ T name[];` as this.
#define CUSIM_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(cusim::runtime.dynamic)

// ------------------------------------------------------------------------------------------------------------------- vector types

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

#define CUSIM_VECTOR2(T, NAME, ALIGN)       \
  struct alignas(ALIGN) NAME { T x, y; };   \
  inline NAME make_##NAME(T x, T y) { return {x, y}; }
#define CUSIM_VECTOR4(T, NAME, ALIGN)             \
  struct alignas(ALIGN) NAME { T x, y, z, w; };   \
  inline NAME make_##NAME(T x, T y, T z, T w) { return {x, y, z, w}; }
CUSIM_VECTOR2(float, float2, 8)
CUSIM_VECTOR2(int, int2, 8)
CUSIM_VECTOR2(unsigned, uint2, 8)
CUSIM_VECTOR2(double, double2, 16)
CUSIM_VECTOR4(float, float4, 16)
CUSIM_VECTOR4(int, int4, 16)
CUSIM_VECTOR4(unsigned, uint4, 16)

// ------------------------------------------------------------------------------------------------------------------------ runtime

namespace cusim {

struct Thread {
  uint3 index;      // threadIdx
  unsigned linear;  // its number in the block
};

struct Runtime {
  Thread* thread;
  uint3 block;
  dim3 block_size, grid_size;
  unsigned char* dynamic;
};
extern Runtime runtime;

typedef void (*Body)(void* arguments);
int run(Body body, void* arguments, dim3 grid, dim3 block, size_t shared_bytes);  // 0, or 1 with an error text

void block_barrier(int site);
int block_vote(int site, int predicate, int kind);  // a barrier; kind 0 counts, 1 asks for all, 2 for any
// Give `bytes` bytes at `value` to the lanes of `mask`, wait for them, and take those of lane `source` (none if it is negative).
void warp_exchange(unsigned mask, const void* value, int bytes, int source, void* result);
unsigned warp_ballot(unsigned mask, int predicate);
unsigned warp_lanes();  // those that have not exited

struct Operand {  // of a PTX instruction
  void* place;
  size_t bytes;
};
void ptx(const char* text, const Operand* operands, int count, uintptr_t code);
size_t shared_address(const void* p);

inline int lane() { return runtime.thread->linear % 32; }

template <class T> CUSIM_UNSEEN T shuffle(unsigned mask, T value, int source) {
  T result;
  warp_exchange(mask, &value, sizeof(T), source, &result);
  return result;
}

// The letter and size of a parameter's type, p in front of a pointer's: "f4", "i8", "pf4"; "s16" a struct of 16 bytes.
template <class T> struct Code {
  static void append(char* text) {
    if (std::is_pointer<T>::value) {
      strcat(text, "p");
      Code<std::remove_cv_t<std::remove_pointer_t<T>>>::append(text);
      return;
    }
    const char* letter = std::is_class<T>::value            ? "s"
                         : std::is_same<T, bool>::value     ? "b"
                         : std::is_floating_point<T>::value ? "f"
                         : std::is_signed<T>::value         ? "i"
                                                            : "u";
    sprintf(text + strlen(text), "%s%d", letter, (int)sizeof(T));
  }
};

// A kernel as a function of an array of pointers to its arguments.
template <auto KERNEL> struct Launch;
template <class... A, void (*KERNEL)(A...)> struct Launch<KERNEL> {
  template <size_t... I> __attribute__((no_sanitize("thread"))) static void call(void** arguments, std::index_sequence<I...>) {
    KERNEL(*reinterpret_cast<A*>(arguments[I])...);
  }
  static void body(void* arguments) { call(static_cast<void**>(arguments), std::index_sequence_for<A...>{}); }
  static int launch(const unsigned* sizes, size_t shared_bytes, void** arguments) {
    return run(body, arguments, {sizes[0], sizes[1], sizes[2]}, {sizes[3], sizes[4], sizes[5]}, shared_bytes);
  }
  static const char* signature() {
    static char text[1024];
    text[0] = 0;
    ((Code<A>::append(text), strcat(text, " ")), ...);
    return text;
  }
};

}  // namespace cusim

#define CUSIM_EXPORT(NAME)                                                                                     \
  extern "C" int cusim_launch_##NAME(const unsigned* sizes, size_t shared_bytes, void** arguments) {           \
    return cusim::Launch<NAME>::launch(sizes, shared_bytes, arguments);                                        \
  }                                                                                                            \
  extern "C" const char* cusim_signature_##NAME() { return cusim::Launch<NAME>::signature(); }

// ------------------------------------------------------------------------------------------------------- coordinates and barriers

#ifndef CUSIM_RUNTIME
#define threadIdx (cusim::runtime.thread->index)
#define blockIdx (cusim::runtime.block)
#define blockDim (cusim::runtime.block_size)
#define gridDim (cusim::runtime.grid_size)
#endif
// The counter tells apart two barriers on one line (of a macro).
#define CUSIM_SITE (__LINE__ + (__COUNTER__ << 16))
#define __syncthreads() cusim::block_barrier(CUSIM_SITE)
#define __syncthreads_count(predicate) cusim::block_vote(CUSIM_SITE, predicate, 0)
#define __syncthreads_and(predicate) cusim::block_vote(CUSIM_SITE, predicate, 1)
#define __syncthreads_or(predicate) cusim::block_vote(CUSIM_SITE, predicate, 2)

inline void __syncwarp(unsigned mask = 0xffffffffu) { cusim::warp_exchange(mask, nullptr, 0, -1, nullptr); }
inline unsigned __activemask() { return cusim::warp_lanes(); }

// A width below 32 cuts the warp into pieces that shuffle among themselves.
template <class T> inline T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  return cusim::shuffle(mask, v, (cusim::lane() & ~(width - 1)) | (source & (width - 1)));
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  int lane = cusim::lane(), source = lane ^ bits;
  return cusim::shuffle(mask, v, source / width <= lane / width ? source : lane);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  int lane = cusim::lane(), source = lane + (int)delta;
  return cusim::shuffle(mask, v, source / width == lane / width ? source : lane);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  int lane = cusim::lane(), source = lane - (int)delta;
  return cusim::shuffle(mask, v, source >= 0 && source / width == lane / width ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return cusim::warp_ballot(mask, predicate); }
inline int __any_sync(unsigned mask, int predicate) { return cusim::warp_ballot(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return cusim::warp_ballot(mask, !predicate) == 0; }
inline void __threadfence() {}
inline void __threadfence_block() {}

// ------------------------------------------------------------------------------------------------------------------------ atomics

#if defined(CUSIM_CHECK) || defined(CUSIM_RUNTIME)
extern "C" void cusim_atomic(void* place, size_t bytes, void* code);
#else
#define cusim_atomic(place, bytes, code) ((void)0)
#endif

// *place = change(*place); returns what was there
template <class T, class Change> CUSIM_UNSEEN T cusim_modify(T* place, Change change) {
  cusim_atomic(place, sizeof(T), __builtin_return_address(0));
  T old = *place;
  *place = change(old);
  return old;
}
#define CUSIM_ATOMIC(NAME, RESULT) \
  template <class T, class U> __forceinline__ T NAME(T* place, U value) { \
    T v = (T)value; \
    return cusim_modify(place, [v](T old) { return (T)(RESULT); }); \
  }
CUSIM_ATOMIC(atomicAdd, old + v)
CUSIM_ATOMIC(atomicSub, old - v)
CUSIM_ATOMIC(atomicMax, old > v ? old : v)
CUSIM_ATOMIC(atomicMin, old < v ? old : v)
CUSIM_ATOMIC(atomicAnd, old & v)
CUSIM_ATOMIC(atomicOr, old | v)
CUSIM_ATOMIC(atomicXor, old ^ v)
CUSIM_ATOMIC(atomicExch, v)
CUSIM_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
template <class T> __forceinline__ T atomicCAS(T* place, T expected, T value) {
  return cusim_modify(place, [=](T old) { return old == expected ? value : old; });
}

// -------------------------------------------------------------------------------------------------------------- bits and arithmetic

template <class To, class From> __forceinline__ To cusim_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned u) { return cusim_bits<float>(u); }
inline unsigned __float_as_uint(float f) { return cusim_bits<unsigned>(f); }
inline float __int_as_float(int i) { return cusim_bits<float>(i); }
inline int __float_as_int(float f) { return cusim_bits<int>(f); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
inline int __mulhi(int a, int b) { return (int)(((int64_t)a * b) >> 32); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
// Hints to a cache are plain accesses.
template <class T> __forceinline__ T __ldg(const T* p) { return *p; }
template <class T> __forceinline__ T __ldcg(const T* p) { return *p; }
template <class T> __forceinline__ T __ldcs(const T* p) { return *p; }
template <class T> __forceinline__ void __stcg(T* p, T v) { *p = v; }
template <class T> __forceinline__ void __stcs(T* p, T v) { *p = v; }
template <class T> __forceinline__ void __stwb(T* p, T v) { *p = v; }
// The fast functions of the device, here exact to a rounding.
inline float rsqrtf(float a) { return (float)(1.0 / sqrt((double)a)); }  // the best that a device could give
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
// Built with -ffp-contract=off, so each of these rounds once, as on the device.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fdiv_rn(float a, float b) { return a / b; }
using std::max;
using std::min;

// ---------------------------------------------------------------------------------------------------------------------- inline PTX

// A shared address as PTX has it, 32 bits wide: shared memory lies in the library, so distances from a place in it do.
CUSIM_UNSEEN inline size_t __cvta_generic_to_shared(const void* p) { return cusim::shared_address(p); }

namespace cusim {

// The loader writes  asm volatile("text" : "=f"(d) : "r"(a) : "memory");  as  cusim::Ptx("text").out(d).in(a).run();
class Ptx {
 public:
  CUSIM_UNSEEN explicit Ptx(const char* text) : text_(text) {}
  template <class T> CUSIM_UNSEEN Ptx& out(T& value) {
    operands_[count_++] = {&value, sizeof(T)};
    return *this;
  }
  template <class T> CUSIM_UNSEEN Ptx& in(T value) {
    memcpy(&values_[count_], &value, sizeof(T));
    operands_[count_] = {&values_[count_], sizeof(T)};
    ++count_;
    return *this;
  }
  CUSIM_UNSEEN void run() { ptx(text_, operands_, count_, (uintptr_t)__builtin_return_address(0)); }

 private:
  const char* text_;
  int count_ = 0;
  uint64_t values_[32] = {};
  Operand operands_[32];
};

}  // namespace cusim

#ifdef CUSIM_MUTANTS
#include "mutants.h"
#endif
