// Rows of predictions compared with target rows, |z - norm(y)|, on an x86 CPU with AVX-512: the
// target row is normalised where it is read, and the gradient written where the difference is.
//
// Predictions and targets are float32 or (AVX-512 BF16) bfloat16, all is computed in float32 in
// registers. Threads are OpenMP's, of the runtime that PyTorch has loaded; no sum crosses rows.
//
// Shapes: R rows, L levels, D width of a level, M target rows.

#include "../rows.h"

namespace {

// Levels side by side in a prediction's row; each level's targets are a tensor of their own.
struct Rows {
  const void* z;
  void* dz;  // null if not asked for
  const void* const* targets;
  int64_t z_row, dz_row;
  const int64_t* target_row;  // of each level, how many values apart
  const int64_t* index;       // [R]
  const float *slope, *beta;  // [R], [L]: their product weighs the gradient
  float* sums;                // [L][R]
  int64_t sums_level;
  int64_t rows, levels, width;
};

// A row as it is, where Unit is it less its mean over its deviation.
template <class Y>
struct Plain {
  const typename Y::Value* row;

  INLINE Lanes operator()(int64_t i, Mask mask) const { return Y::load(row + i, mask); }
};

// The sum of the sizes of differences; writes their signs times `steep` to dz, which may be z.
template <class Z, class Target>
INLINE float compare_row(const typename Z::Value* z, const Target& target, int64_t width,
                         float steep, typename Z::Value* dz) {
  Lanes sum = _mm512_setzero_ps(), none = sum;
  Lanes up = _mm512_set1_ps(steep), down = _mm512_set1_ps(-steep);
  over(width, [&](int64_t i, Mask mask) {
    Lanes apart = _mm512_maskz_sub_ps(mask, Z::load(z + i, mask), target(i, mask));
    sum = _mm512_add_ps(sum, _mm512_abs_ps(apart));
    if (!dz) return;
    Lanes slope = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(apart, none, _CMP_GT_OQ), up);
    slope = _mm512_mask_mov_ps(slope, _mm512_cmp_ps_mask(apart, none, _CMP_LT_OQ), down);
    Z::store(dz + i, mask, slope);
  });
  return _mm512_reduce_add_ps(sum);
}

template <class Z, class Y>
void compare_of(const Rows& all, bool normalize, float eps, int threads) {
  using ZValue = typename Z::Value;
  using YValue = typename Y::Value;
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < all.rows; ++r)
    for (int64_t l = 0; l < all.levels; ++l) {
      auto y = static_cast<const YValue*>(all.targets[l]) + all.index[r] * all.target_row[l];
      auto z = static_cast<const ZValue*>(all.z) + r * all.z_row + l * all.width;
      auto dz = static_cast<ZValue*>(all.dz);
      if (dz) dz += r * all.dz_row + l * all.width;
      float steep = all.slope[r] * all.beta[l];
      all.sums[l * all.sums_level + r] =
          normalize ? compare_row<Z>(z, Unit<Y>(y, all.width, eps), all.width, steep, dz)
                    : compare_row<Z>(z, Plain<Y>{y}, all.width, steep, dz);
    }
}

}  // namespace

// values: how many of them fill a word, which tells their kind: 1 float32, 2 bfloat16.
extern "C" int compare(int z_values, int y_values, Rows all, int normalize, float eps,
                        int threads) {
  auto wide = y_values == 1 ? compare_of<Float32, Float32> : compare_of<Float32, Bfloat16>;
  auto narrow = y_values == 1 ? compare_of<Bfloat16, Float32> : compare_of<Bfloat16, Bfloat16>;
  (z_values == 1 ? wide : narrow)(all, normalize, eps, threads);
  return DONE;
}
