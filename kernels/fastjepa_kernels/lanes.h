// What our C++ for AVX-512 has in common: sixteen lanes of float32, and how heads lie in memory.

#pragma once

#include <immintrin.h>

#include <cstdint>

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

using Lanes = __m512;
using Words = __m512i;

constexpr int LANES = 16;

// What a function that is called from Python returns.
constexpr int DONE = 0, OUT_OF_MEMORY = -1;

// A tensor of heads [B, H, K, C]: how many values lie between neighbours of the first three axes.
struct View {
  void* at;
  int64_t batch, head, token;

  template <class Value>
  Value* of(int64_t b, int64_t h, int64_t token_number = 0) const {
    return static_cast<Value*>(at) + b * batch + h * head + token_number * token;
  }
};

// Whether the processor rounds to bfloat16 and multiplies it.
extern "C" int has_bfloat16() { return __builtin_cpu_supports("avx512bf16"); }
