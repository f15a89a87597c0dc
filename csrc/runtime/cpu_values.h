// Stored values on the CPU: widened to the accumulator type, and results rounded to
// the stored one, by arithmetic without branches, which becomes vectors for every instruction set.
#pragma once

#include <cstring>

#include "cpu.h"

namespace dcn::tiles {

DCN_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
DCN_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

DCN_HOST_DEVICE double widen(double value) { return value; }
DCN_HOST_DEVICE float widen(float value) { return value; }

// Of 16 bits, whatever stands above them.
DCN_HOST_DEVICE float widen_bits(uint32_t bits, BFloat16) { return float_of(bits << 16); }

// A normal number keeps its 10 bits of fraction and gets float's exponent; infinity and NaN get the largest one. What
// is below is a whole number of the smallest steps, counted by an integer: no float is ever denormal here, which
// processors take long for, or may have been told to take for 0.
DCN_HOST_DEVICE float widen_bits(uint32_t bits, Half) {
  const uint32_t magnitude = bits & 0x7FFFu, rebias = 112u << 23;
  const float normal = float_of((magnitude << 13) + rebias + (magnitude >= 0x7C00u ? rebias : 0u));
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  return float_of(bits_of(magnitude < 0x400u ? small : normal) | (bits & 0x8000u) << 16);
}

DCN_HOST_DEVICE float widen(BFloat16 value) { return widen_bits(value.x, BFloat16()); }
DCN_HOST_DEVICE float widen(Half value) { return widen_bits(value.x, Half()); }

// Rounded to the nearest, ties to even: as 16 bits.
DCN_HOST_DEVICE uint32_t narrow_bits(float value, BFloat16) {
  const uint32_t bits = bits_of(value), rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return value != value ? 0x7FC0u : rounded;
}

// The sum with a number so large that its last bit is worth what half's last bit is worth does the rounding.
DCN_HOST_DEVICE uint32_t narrow_bits(float value, Half) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t small = bits_of(float_of(magnitude < 0x38800000u ? magnitude : 0u) + 0.5f) - 0x3F000000u;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  const uint32_t large = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  return sign | (magnitude >= 0x477FF000u ? large : finite);
}

template <typename S>
DCN_HOST_DEVICE S narrow(Accumulate<S> value) {
  if constexpr (sizeof(S) == 2)
    return S(static_cast<uint16_t>(narrow_bits(value, S())), S::from_bits());
  else
    return value;
}

}  // namespace dcn::tiles

namespace dcn::tiles::attention {

// Two half values side by side, read as one number: loops over pairs have no lanes to move about.
typedef uint32_t Pair __attribute__((aligned(2), may_alias));

template <typename S>
DCN_HOST_DEVICE float first_of(Pair pair) {
  return widen_bits(pair, S());
}
template <typename S>
DCN_HOST_DEVICE float second_of(Pair pair) {
  if constexpr (std::is_same_v<S, BFloat16>)
    return float_of(pair & 0xFFFF0000u);
  else
    return widen_bits(pair >> 16, S());
}

}  // namespace dcn::tiles::attention
