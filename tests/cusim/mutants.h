// All mutants of a file in one library: each changed place asks whether its mutant is the one that is switched on.
//
// The mutator (mutants.py) writes `a + b` as `a + cusim::Plus{7} + b`, which binds as the operator itself does; what stands between two
// brackets it wraps. A place also notes that it was passed, so that a mutant is tried only on the cases that reach it.
#pragma once

namespace cusim {

extern int mutant;                  // the one that is switched on; 0 for none
extern unsigned char passed[];      // by number

#ifdef CUSIM_CHECK
__attribute__((no_sanitize("thread"), noinline))
#endif
inline bool changed(int number) {
  passed[number] = 1;
  return mutant == number;
}

// What a mutated operator gives. A pointer has no product; a sum with one goes the other way.
template <class Result> struct Other {
  template <class A, class B> static __forceinline__ Result Plus(A a, B b) { return (Result)(a - b); }
  template <class A, class B> static __forceinline__ Result Minus(A a, B b) { return (Result)(a + b); }
  template <class A, class B> static __forceinline__ Result Times(A a, B b) { return (Result)(a / b); }
  template <class A, class B> static __forceinline__ Result Over(A a, B b) { return (Result)(a * b); }
  template <class A, class B> static __forceinline__ Result Rest(A a, B b) { return (Result)(a / b); }
  template <class A, class B> static __forceinline__ Result Left(A a, B b) { return (Result)(a >> b); }
  template <class A, class B> static __forceinline__ Result Right(A a, B b) { return (Result)(a << b); }
  template <class A, class B> static __forceinline__ Result And(A a, B b) { return (Result)(a | b); }
  template <class A, class B> static __forceinline__ Result Or(A a, B b) { return (Result)(a & b); }
  template <class A, class B> static __forceinline__ Result Xor(A a, B b) { return (Result)(a & b); }
  template <class A, class B> static __forceinline__ Result Less(A a, B b) { return a <= b; }
  template <class A, class B> static __forceinline__ Result More(A a, B b) { return a >= b; }
  template <class A, class B> static __forceinline__ Result AtMost(A a, B b) { return a < b; }
  template <class A, class B> static __forceinline__ Result AtLeast(A a, B b) { return a > b; }
  template <class A, class B> static __forceinline__ Result Same(A a, B b) { return a != b; }
  template <class A, class B> static __forceinline__ Result Differs(A a, B b) { return a == b; }
};

#define CUSIM_OPERATOR(NAME, OPERATOR)                                                                    \
  struct NAME {                                                                                           \
    int number;                                                                                           \
  };                                                                                                      \
  template <class A> struct NAME##Left {                                                                  \
    A left;                                                                                               \
    int number;                                                                                           \
  };                                                                                                      \
  template <class A> __forceinline__ NAME##Left<A> operator OPERATOR(A left, NAME swap) {                 \
    return {left, swap.number};                                                                           \
  }                                                                                                       \
  template <class A, class B>                                                                             \
  __forceinline__ auto operator OPERATOR(NAME##Left<A> l, B right) -> decltype(l.left OPERATOR right) {   \
    typedef decltype(l.left OPERATOR right) Result;                                                       \
    return changed(l.number) ? Other<Result>::NAME(l.left, right) : l.left OPERATOR right;                \
  }

CUSIM_OPERATOR(Plus, +)
CUSIM_OPERATOR(Minus, -)
CUSIM_OPERATOR(Times, *)
CUSIM_OPERATOR(Over, /)
CUSIM_OPERATOR(Rest, %)
CUSIM_OPERATOR(Left, <<)
CUSIM_OPERATOR(Right, >>)
CUSIM_OPERATOR(And, &)
CUSIM_OPERATOR(Or, |)
CUSIM_OPERATOR(Xor, ^)
CUSIM_OPERATOR(Less, <)
CUSIM_OPERATOR(More, >)
CUSIM_OPERATOR(AtMost, <=)
CUSIM_OPERATOR(AtLeast, >=)
CUSIM_OPERATOR(Same, ==)
CUSIM_OPERATOR(Differs, !=)

}  // namespace cusim
