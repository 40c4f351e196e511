// What lies between a block's products on an x86 CPU with AVX-512: each one pass over its rows.
//
// Rows are float32 or (AVX-512 BF16) bfloat16, of any width, all computed in float32 in registers.
// Threads are OpenMP's, of the runtime that PyTorch has loaded. Sums over rows are those of blocks
// of rows, added up in float64, so threads change no bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "../rows.h"

namespace {

constexpr int BLOCK = 32;  // rows whose sums are added up by themselves

// A function that is 0 far below and 1 far above: polynomials of degree 5 on parts that are 1 / 2.4
// wide, in the distance to their middle, to 1e-7. From the outermost parts on it is 0 or 1.
class Sigmoid {
  static constexpr int OUTERMOST = 15, DEGREE = 5;
  static constexpr float PARTS = 2.4f, SHIFT = 12582912;  // 1.5 * 2^23: its last bits count ones
  alignas(64) float factors[DEGREE + 1][2 * LANES] = {};

 public:
  // Interpolates at Chebyshev's points, by divided differences.
  explicit Sigmoid(double (*function)(double)) {
    for (int part = -OUTERMOST; part <= OUTERMOST; ++part) {
      double at[DEGREE + 1], value[DEGREE + 1], power[DEGREE + 1] = {};
      bool outermost = std::abs(part) == OUTERMOST;
      for (int i = 0; i <= DEGREE; ++i) {
        at[i] = std::cos(M_PI * (i + 0.5) / (DEGREE + 1)) / 2;
        value[i] = outermost ? part > 0 : function((part + at[i]) / PARTS);
      }
      for (int order = 1; order <= DEGREE; ++order)
        for (int i = DEGREE; i >= order; --i)
          value[i] = (value[i] - value[i - 1]) / (at[i] - at[i - order]);
      for (int i = DEGREE; i >= 0; --i) {
        for (int n = DEGREE; n > 0; --n) power[n] = power[n - 1] - at[i] * power[n];
        power[0] = value[i] - at[i] * power[0];
      }
      for (int n = 0; n <= DEGREE; ++n) factors[n][part & (2 * LANES - 1)] = float(power[n]);
    }
  }

  INLINE Lanes operator()(Lanes x) const {
    Lanes edge = _mm512_set1_ps(OUTERMOST / PARTS), parts = _mm512_set1_ps(PARTS);
    Lanes shift = _mm512_set1_ps(SHIFT);
    // What is no number is the second of the two and stays.
    x = _mm512_max_ps(_mm512_set1_ps(-OUTERMOST / PARTS), _mm512_min_ps(edge, x));
    Lanes part = _mm512_fmadd_ps(x, parts, shift);
    Lanes rest = _mm512_fmsub_ps(x, parts, _mm512_sub_ps(part, shift));
    auto factor = [&](int n) {
      return _mm512_permutex2var_ps(_mm512_load_ps(factors[n]), _mm512_castps_si512(part),
                                    _mm512_load_ps(factors[n] + LANES));
    };
    Lanes sum = factor(DEGREE);
    UNROLL for (int n = DEGREE - 1; n >= 0; --n) sum = _mm512_fmadd_ps(sum, rest, factor(n));
    return sum;
  }
};

// The normal distribution's mass below x; GELU is x times it.
double mass_below(double x) { return std::erfc(-x * M_SQRT1_2) / 2; }

double slope_of_gelu(double x) {
  return mass_below(x) + x * std::exp(-x * x / 2) * (M_2_SQRTPI * M_SQRT1_2 / 2);
}

const Sigmoid below(mass_below), slope(slope_of_gelu);

INLINE void add_to(float* sums, Mask mask, Lanes x) {
  Float32::store(sums, mask, _mm512_add_ps(Float32::load(sums, mask), x));
}

int64_t blocks_of(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }

// Calls `run` for every block of rows: its number, its first row and the row behind its last.
template <class Run>
void over_blocks(int64_t rows, int threads, Run run) {
  int64_t blocks = blocks_of(rows);
#pragma omp parallel for num_threads(threads)
  for (int64_t block = 0; block < blocks; ++block)
    run(block, block * BLOCK, std::min(rows, (block + 1) * BLOCK));
}

// Sums over rows, `width` of them, from those of blocks of rows.
class Sums {
  int64_t width, blocks;
  std::unique_ptr<float[]> parts;

 public:
  Sums(int64_t rows, int64_t width)
      : width(width), blocks(blocks_of(rows)),
        parts(new (std::nothrow) float[blocks * width]) {}

  explicit operator bool() const { return bool(parts); }

  float* of(int64_t block) {
    float* part = parts.get() + block * width;
    std::fill(part, part + width, 0.0f);
    return part;
  }
  void write(float* sums, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t low = 0; low < width; low += LANES) {
      int64_t count = std::min<int64_t>(LANES, width - low);
      double sum[LANES] = {};
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t i = 0; i < count; ++i) sum[i] += parts[block * width + low + i];
      for (int64_t i = 0; i < count; ++i) sums[low + i] = float(sum[i]);
    }
  }
};

template <class K>
int gelu_of(const void* h_RF, void* a_RF, int64_t rows, int64_t width, int threads) {
  auto h = static_cast<const typename K::Value*>(h_RF);
  auto a = static_cast<typename K::Value*>(a_RF);
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; ++row)
    over(width, [&](int64_t i, Mask mask) {
      Lanes x = K::load(h + row * width + i, mask);
      K::store(a + row * width + i, mask, _mm512_mul_ps(x, below(x)));
    });
  return DONE;
}

template <class K>
int gelu_backward_of(const void* h_RF, void* a_RF, void* da_RF, float* sum_F, int64_t rows,
                     int64_t width, int threads) {
  auto h = static_cast<const typename K::Value*>(h_RF);
  auto a = static_cast<typename K::Value*>(a_RF);
  auto da = static_cast<typename K::Value*>(da_RF);
  Sums sums(rows, width);
  if (!sums) return OUT_OF_MEMORY;
  over_blocks(rows, threads, [&](int64_t block, int64_t low, int64_t high) {
    float* sum = sums.of(block);
    for (int64_t start = low * width; start < high * width; start += width)
      over(width, [&](int64_t i, Mask mask) {
        int64_t at = start + i;
        Lanes x = K::load(h + at, mask), dh = _mm512_mul_ps(K::load(da + at, mask), slope(x));
        K::store(a + at, mask, _mm512_mul_ps(x, below(x)));
        K::store(da + at, mask, dh);
        add_to(sum + i, mask, dh);
      });
  });
  sums.write(sum_F, threads);
  return DONE;
}

template <class X, class N>
int norm_of(const void* x_RD, const float* weight_D, const float* bias_D, float eps, void* n_RD,
            int64_t rows, int64_t width, int threads) {
  auto x = static_cast<const typename X::Value*>(x_RD);
  auto n = static_cast<typename N::Value*>(n_RD);
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    Unit<X> unit(x + row * width, width, eps);
    over(width, [&](int64_t i, Mask mask) {
      Lanes weight = Float32::load(weight_D + i, mask), bias = Float32::load(bias_D + i, mask);
      N::store(n + row * width + i, mask, _mm512_fmadd_ps(unit(i, mask), weight, bias));
    });
  }
  return DONE;
}

template <class X, class N>
int norm_backward_of(const void* dn_RD, const void* x_RD, const void* residual_RD,
                     const float* weight_D, const float* bias_D, float eps, void* dx_RD, void* n_RD,
                     float* sum_3D, int64_t rows, int64_t width, int threads) {
  auto x = static_cast<const typename X::Value*>(x_RD);
  auto residual = static_cast<const typename X::Value*>(residual_RD);
  auto dx = static_cast<typename X::Value*>(dx_RD);
  auto dn = static_cast<const typename N::Value*>(dn_RD);
  auto n = static_cast<typename N::Value*>(n_RD);
  Sums sums(rows, 3 * width);
  if (!sums) return OUT_OF_MEMORY;
  over_blocks(rows, threads, [&](int64_t block, int64_t low, int64_t high) {
    float* sum = sums.of(block);
    for (int64_t start = low * width; start < high * width; start += width) {
      Unit<X> unit(x + start, width, eps);
      Lanes all = _mm512_setzero_ps(), along = all;
      over(width, [&](int64_t i, Mask mask) {
        Lanes u = unit(i, mask), d = N::load(dn + start + i, mask);
        Lanes weight = Float32::load(weight_D + i, mask), scaled = _mm512_mul_ps(d, weight);
        all = _mm512_add_ps(all, scaled);
        along = _mm512_fmadd_ps(scaled, u, along);
        add_to(sum + i, mask, _mm512_mul_ps(d, u));
        add_to(sum + width + i, mask, d);
        Lanes bias = Float32::load(bias_D + i, mask);
        N::store(n + start + i, mask, _mm512_fmadd_ps(u, weight, bias));
      });
      Lanes mean = _mm512_set1_ps(_mm512_reduce_add_ps(all) / float(width));
      Lanes share = _mm512_set1_ps(_mm512_reduce_add_ps(along) / float(width));
      over(width, [&](int64_t i, Mask mask) {
        Lanes d = N::load(dn + start + i, mask), weight = Float32::load(weight_D + i, mask);
        Lanes rest = _mm512_fnmadd_ps(unit(i, mask), share, _mm512_fmsub_ps(d, weight, mean));
        Lanes beside = X::load(residual + start + i, mask);
        X::store(dx + start + i, mask, _mm512_add_ps(unit.over_deviation(rest), beside));
        add_to(sum + 2 * width + i, mask, beside);
      });
    }
  });
  sums.write(sum_3D, threads);
  return DONE;
}

}  // namespace

extern "C" {

// values: how many of them fill a word, which tells their kind: 1 float32, 2 bfloat16.

int gelu(int values, const void* h_RF, void* a_RF, int64_t rows, int64_t width, int threads) {
  return (values == 1 ? gelu_of<Float32> : gelu_of<Bfloat16>)(h_RF, a_RF, rows, width, threads);
}

// da becomes h's gradient; a may be h.
int gelu_backward(int values, const void* h_RF, void* a_RF, void* da_RF, float* sum_F, int64_t rows,
                  int64_t width, int threads) {
  auto run = values == 1 ? gelu_backward_of<Float32> : gelu_backward_of<Bfloat16>;
  return run(h_RF, a_RF, da_RF, sum_F, rows, width, threads);
}

int norm(int x_values, int n_values, const void* x_RD, const float* weight_D, const float* bias_D,
         float eps, void* n_RD, int64_t rows, int64_t width, int threads) {
  auto wide = n_values == 1 ? norm_of<Float32, Float32> : norm_of<Float32, Bfloat16>;
  auto narrow = n_values == 1 ? norm_of<Bfloat16, Float32> : norm_of<Bfloat16, Bfloat16>;
  return (x_values == 1 ? wide : narrow)(x_RD, weight_D, bias_D, eps, n_RD, rows, width, threads);
}

// sum_3D: the gradients of weight and bias, and the residual over all rows.
int norm_backward(int x_values, int n_values, const void* dn_RD, const void* x_RD,
                  const void* residual_RD, const float* weight_D, const float* bias_D, float eps,
                  void* dx_RD, void* n_RD, float* sum_3D, int64_t rows, int64_t width,
                  int threads) {
  auto wide = n_values == 1 ? norm_backward_of<Float32, Float32>
                            : norm_backward_of<Float32, Bfloat16>;
  auto narrow = n_values == 1 ? norm_backward_of<Bfloat16, Float32>
                              : norm_backward_of<Bfloat16, Bfloat16>;
  return (x_values == 1 ? wide : narrow)(dn_RD, x_RD, residual_RD, weight_D, bias_D, eps, dx_RD,
                                         n_RD, sum_3D, rows, width, threads);
}

}
