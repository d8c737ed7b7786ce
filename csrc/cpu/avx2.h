// Loops by hand, for compilers that know AVX2, where they make too little of the plain ones.
#pragma once
#include "cpu/clones.h"

#if defined(SLIMSTATE_LEVELS) && (defined(__AVX2__) || !defined(SLIMSTATE_NATIVE))
#define SLIMSTATE_AVX2
#include <immintrin.h>

#ifdef SLIMSTATE_NATIVE
#define AVX2_FUNCTION
#else
#define AVX2_FUNCTION __attribute__((target("arch=x86-64-v3")))
#endif

namespace slimstate {

// Whether the machine has it.
inline bool has_avx2() {
#ifdef SLIMSTATE_NATIVE
  return true;
#else
  static const bool here = __builtin_cpu_supports("x86-64-v3");
  return here;
#endif
}

}  // namespace slimstate

#endif
