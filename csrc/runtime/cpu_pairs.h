// Operands of products of bfloat16 on the CPU (runtime/cpu_product.h): float values rounded to bfloat16, to nearest
// with ties to even, as pairs of terms that lie side by side. By the processor's own instructions, or by arithmetic.
#pragma once

#include "cpu_product.h"
#include "cpu_values.h"

namespace dcn::tiles {

using product::Pair;

// What products take columns of type P for.
template <typename P>
using ProductOf = std::conditional_t<std::is_same_v<P, BFloat16>, Pair, P>;

struct PairRows {
  const float *first, *second;
  int64_t count;
  Pair* to;
  DCN_HOST_DEVICE void operator()() const {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t low = narrow_bits(first[i], BFloat16());
      to[i] = static_cast<Pair>(low | (second ? narrow_bits(second[i], BFloat16()) << 16 : 0u));
    }
  }
};

struct RoundRow {
  const float* from;
  int64_t count;
  BFloat16* to;
  DCN_HOST_DEVICE void operator()() const {
    for (int64_t i = 0; i < count; ++i) to[i] = narrow<BFloat16>(from[i]);
  }
};

#if defined(DCN_X86_LEVELS)
// The first `count` of 16 lanes.
DCN_TARGET_BFLOAT16 inline __mmask16 lanes_of(int64_t count) {
  return static_cast<__mmask16>(count < 16 ? (1u << count) - 1 : 0xFFFFu);
}

// Some processors take several times as long to store with a mask.
DCN_TARGET_BFLOAT16 inline void store_rounded(__m512 values, __mmask16 some, BFloat16* to) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
  if (some == 0xFFFF)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
  else
    _mm256_mask_storeu_epi16(to, some, rounded);
}

DCN_TARGET_BFLOAT16 inline void pair_rows_natively(const PairRows& p) {
  // Both rows are rounded into one vector, one behind the other, and its halves then interleaved.
  alignas(64) static constexpr uint16_t interleaved[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(interleaved);
  for (int64_t i = 0; i < p.count; i += 16) {
    const __mmask16 some = lanes_of(p.count - i);
    const __m512 first = _mm512_maskz_loadu_ps(some, p.first + i);
    const __m512 second = p.second ? _mm512_maskz_loadu_ps(some, p.second + i) : _mm512_setzero_ps();
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    const __m512i pairs = _mm512_permutexvar_epi16(order, both);
    if (some == 0xFFFF)
      _mm512_storeu_si512(p.to + i, pairs);
    else
      _mm512_mask_storeu_epi32(p.to + i, some, pairs);
  }
}

DCN_TARGET_BFLOAT16 inline void round_row_natively(const RoundRow& r) {
  for (int64_t i = 0; i < r.count; i += 16) {
    const __mmask16 some = lanes_of(r.count - i);
    store_rounded(_mm512_maskz_loadu_ps(some, r.from + i), some, r.to + i);
  }
}
#endif

// to[i] = (first[i], second[i]); `second` may be null: zeros. `to` may lie where `first` does.
inline void pair_rows(const float* first, const float* second, int64_t count, Pair* to) {
  const PairRows rows{first, second, count, to};
#if defined(DCN_X86_LEVELS)
  if (has_bfloat16_products()) return pair_rows_natively(rows);
#endif
  run_vectorised(rows);
}

// to[i] = from[i], rounded.
inline void round_row(const float* from, int64_t count, BFloat16* to) {
  const RoundRow row{from, count, to};
#if defined(DCN_X86_LEVELS)
  if (has_bfloat16_products()) return round_row_natively(row);
#endif
  run_vectorised(row);
}

}  // namespace dcn::tiles
