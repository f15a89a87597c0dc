// The softmax over the points of a head, on the CPU.
#pragma once

#include <cmath>

#include "cpu_values.h"

namespace dcn::tiles::attention {

// e^x for x <= 0, to 2 units in the last place; 0 where float has no normal number for it. 2^n times e^r, where r is
// what n ln(2) leaves of x, at most ln(2) / 2, and e^r = 1 + r + r^2 times a polynomial with an error of 3e-9.
DCN_HOST_DEVICE float exp_below_zero(float x) {
  const float lowest = -87.3f, shift = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer
  const float bounded = x < lowest ? lowest : x;
  const float shifted = bounded * 1.44269504f + shift, n = shifted - shift;
  const float r = (bounded - n * 0.693145752f) - n * 1.42860677e-6f;  // ln(2) in two parts: the first product is exact
  float p = 0.00138145837f;
  p = p * r + 0.00836872403f;
  p = p * r + 0.041668389f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r + 1.0f;
  const float result = float_of(bits_of(p) + (bits_of(shifted) << 23));
  return x < lowest ? 0.0f : (x == x ? result : x);
}
DCN_HOST_DEVICE double exp_below_zero(double x) { return std::exp(x); }

// In place, of each head's logits. The powers of all heads are found in one loop: those of one would wait for its sums.
template <typename A>
DCN_HOST_DEVICE void softmax(A* logits, int64_t heads, int64_t points) {
  for (int64_t m = 0; m < heads; ++m) {
    A *row = logits + m * points, most = row[0];
#pragma omp simd reduction(max : most)
    for (int64_t k = 0; k < points; ++k) most = row[k] > most ? row[k] : most;
#pragma omp simd
    for (int64_t k = 0; k < points; ++k) row[k] -= most;
  }
  const int64_t count = heads * points;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) logits[i] = exp_below_zero(logits[i]);
  for (int64_t m = 0; m < heads; ++m) {
    A *row = logits + m * points, sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < points; ++k) sum += row[k];
    const A inverse = 1 / sum;
#pragma omp simd
    for (int64_t k = 0; k < points; ++k) row[k] *= inverse;
  }
}

}  // namespace dcn::tiles::attention
