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
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
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
CUSIM_VECTOR2(unsigned, uint2, 8)
CUSIM_VECTOR4(float, float4, 16)
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
// Give `bytes` bytes at `value` to the lanes of `mask`, wait for them, and take those of lane `source` (none if it is negative).
void warp_exchange(unsigned mask, const void* value, int bytes, int source, void* result);
unsigned warp_ballot(unsigned mask, int predicate);

inline int lane() { return runtime.thread->linear % 32; }

template <class T> CUSIM_UNSEEN T shuffle(unsigned mask, T value, int source) {
  T result;
  warp_exchange(mask, &value, sizeof(T), source, &result);
  return result;
}

// The letter and size of a parameter's type, p in front of a pointer's: "f4", "i8", "pf4".
template <class T> struct Code {
  static void append(char* text) {
    if (std::is_pointer<T>::value) {
      strcat(text, "p");
      Code<std::remove_cv_t<std::remove_pointer_t<T>>>::append(text);
      return;
    }
    char code[3] = {std::is_floating_point<T>::value ? 'f' : std::is_signed<T>::value ? 'i' : 'u', char('0' + sizeof(T)), 0};
    strcat(text, code);
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
#define __syncthreads() cusim::block_barrier(__LINE__ + (__COUNTER__ << 16))

inline void __syncwarp(unsigned mask = 0xffffffffu) { cusim::warp_exchange(mask, nullptr, 0, -1, nullptr); }
template <class T> inline T __shfl_sync(unsigned mask, T v, int source) { return cusim::shuffle(mask, v, source & 31); }
template <class T> inline T __shfl_xor_sync(unsigned mask, T v, int bits) { return cusim::shuffle(mask, v, cusim::lane() ^ bits); }
template <class T> inline T __shfl_down_sync(unsigned mask, T v, unsigned delta) {
  int source = cusim::lane() + (int)delta;
  return cusim::shuffle(mask, v, source < 32 ? source : cusim::lane());
}
template <class T> inline T __shfl_up_sync(unsigned mask, T v, unsigned delta) {
  int source = cusim::lane() - (int)delta;
  return cusim::shuffle(mask, v, source >= 0 ? source : cusim::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return cusim::warp_ballot(mask, predicate); }

// ------------------------------------------------------------------------------------------------------------------------ atomics

#if defined(CUSIM_CHECK) || defined(CUSIM_RUNTIME)
extern "C" void cusim_atomic(void* place, size_t bytes);
#else
#define cusim_atomic(place, bytes) ((void)0)
#endif

template <class T> CUSIM_UNSEEN T cusim_add(T* place, T value) {
  cusim_atomic(place, sizeof(T));
  T old = *place;
  *place = old + value;
  return old;
}
template <class T, class U> inline T atomicAdd(T* place, U value) { return cusim_add(place, (T)value); }

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
inline int __ffs(int v) { return __builtin_ffs(v); }
template <class T> __forceinline__ T __ldg(const T* p) { return *p; }
inline float __fdividef(float a, float b) { return a / b; }
// Built with -ffp-contract=off, so each of these rounds once, as on the device.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
using std::max;
using std::min;
