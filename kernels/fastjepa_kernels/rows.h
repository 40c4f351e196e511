// Rows of float32 or bfloat16, of any width, as our C++ for AVX-512 reads and writes them.

#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace {

using Mask = __mmask16;

struct Float32 {
  using Value = float;

  static INLINE Lanes load(const Value* from, Mask mask) {
    return _mm512_maskz_loadu_ps(mask, from);
  }
  static INLINE void store(Value* to, Mask mask, Lanes x) { _mm512_mask_storeu_ps(to, mask, x); }
};

struct Bfloat16 {
  using Value = uint16_t;

  static INLINE Lanes load(const Value* from, Mask mask) {
    Words words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  }
  static INLINE void store(Value* to, Mask mask, Lanes x) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
  }
};

// Calls `run` for every LANES values of a row, with the mask of those that there are.
template <class Run>
INLINE void over(int64_t width, Run run) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) run(i, Mask(0xffff));
  if (i < width) run(i, Mask((1 << (width - i)) - 1));
}

// A row less its mean over its deviation.
template <class X>
class Unit {
  const typename X::Value* row;
  Lanes mean, inverse;

 public:
  INLINE Unit(const typename X::Value* row, int64_t width, float eps) : row(row) {
    Lanes sum = _mm512_setzero_ps(), squares = sum;
    over(width, [&](int64_t i, Mask mask) { sum = _mm512_add_ps(sum, X::load(row + i, mask)); });
    mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / float(width));
    over(width, [&](int64_t i, Mask mask) {
      Lanes centred = _mm512_maskz_sub_ps(mask, X::load(row + i, mask), mean);
      squares = _mm512_fmadd_ps(centred, centred, squares);
    });
    float variance = _mm512_reduce_add_ps(squares) / float(width);
    inverse = _mm512_set1_ps(1 / std::sqrt(variance + eps));
  }
  INLINE Lanes operator()(int64_t i, Mask mask) const {
    return _mm512_mul_ps(_mm512_sub_ps(X::load(row + i, mask), mean), inverse);
  }
  INLINE Lanes over_deviation(Lanes x) const { return _mm512_mul_ps(x, inverse); }
};

}  // namespace
