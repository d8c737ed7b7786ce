#pragma once

// Compilers that know the levels of x86-64: 2 has SSE 4.2, 3 has AVX2, 4 has AVX-512.
#if defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define SLIMSTATE_LEVELS
#endif

// A wheel must assume the baseline. In it the loader picks the widest version of each hot loop that the machine runs,
// twice as fast. A build for one machine needs one version.
#if defined(SLIMSTATE_LEVELS) && !defined(SLIMSTATE_NATIVE)
#define SLIMSTATE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SLIMSTATE_CLONES
#endif

// What the compiler was allowed to use everywhere.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define SLIMSTATE_LEVEL "x86-64-v4"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__BMI2__)
#define SLIMSTATE_LEVEL "x86-64-v3"
#elif defined(__SSE4_2__)
#define SLIMSTATE_LEVEL "x86-64-v2"
#elif defined(__x86_64__)
#define SLIMSTATE_LEVEL "x86-64"
#else
#define SLIMSTATE_LEVEL "baseline"
#endif

namespace slimstate {

// Whether this machine has that.
inline bool machine_suffices() {
#ifdef SLIMSTATE_LEVELS
  __builtin_cpu_init();
  return __builtin_cpu_supports(SLIMSTATE_LEVEL);
#else
  return true;
#endif
}

// What the hot loops use on this machine.
inline const char* level_used() {
#if defined(SLIMSTATE_LEVELS) && !defined(SLIMSTATE_NATIVE)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return SLIMSTATE_LEVEL;
}

}  // namespace slimstate
