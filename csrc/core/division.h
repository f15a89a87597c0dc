// Division by numbers that the host knows before a kernel starts. An integer division is some 20 instructions in 32
// bits and over 100 in 64; by a prepared divisor it is a product, a sum and a shift.
#pragma once

#include "sampling.h"

namespace dcn {

template <typename I>
struct Quotient {
  I quotient, remainder;
};

// Divides numbers from 0 on by one from 1 on.
template <typename I>
struct Divisor {
  I divisor = 1;

  Divisor() = default;
  explicit Divisor(int64_t by) : divisor(static_cast<I>(by)) {}
  DCN_HOST_DEVICE I divide(I n) const { return n / divisor; }
  DCN_HOST_DEVICE Quotient<I> operator()(I n) const {
    const I q = divide(n);
    return {q, n - q * divisor};
  }
};

// With 2^shift the first power of two that is not below the divisor, factor = 2^32 (2^shift / divisor - 1) rounded up:
// n / divisor = (n + n factor / 2^32) / 2^shift for all n below 2^31, where the sum stays below 2^32.
template <>
struct Divisor<int32_t> {
  int32_t divisor = 1;
  uint32_t factor = 1;
  int32_t shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t by) : divisor(static_cast<int32_t>(by)) {
    while ((int64_t{1} << shift) < by) ++shift;
    factor = static_cast<uint32_t>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - static_cast<uint64_t>(by))) / static_cast<uint64_t>(by) + 1);
  }
  DCN_HOST_DEVICE int32_t divide(int32_t n) const {
    const uint32_t number = static_cast<uint32_t>(n);
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(number) * factor >> 32);
    return static_cast<int32_t>((number + high) >> shift);
  }
  DCN_HOST_DEVICE Quotient<int32_t> operator()(int32_t n) const {
    const int32_t q = divide(n);
    return {q, n - q * divisor};
  }
};

}  // namespace dcn
