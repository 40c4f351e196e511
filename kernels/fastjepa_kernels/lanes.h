// What our C++ for AVX-512 has in common: sixteen lanes of float32.

#pragma once

#include <immintrin.h>

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

using Lanes = __m512;
using Words = __m512i;

constexpr int LANES = 16;

// Whether the processor rounds to bfloat16 and multiplies it.
extern "C" int has_bfloat16() { return __builtin_cpu_supports("avx512bf16"); }
