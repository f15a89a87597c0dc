// Values as a GPU moves them: 16 bytes at a time between memory and registers, half ones two to a register. Host and
// device.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../core/sampling.h"

// What a kernel calls: on the device compiled for it alone, since barriers and matrix products exist only there. The
// tests compile the same source for the host, with an emulated thread block (tests/emulation).
#if defined(__CUDACC__)
#define DCN_DEVICE __device__ __forceinline__
#define DCN_UNROLL _Pragma("unroll")
#define DCN_KEEP_LOOP _Pragma("unroll 1")
#else
#define DCN_DEVICE inline
#define DCN_UNROLL
#define DCN_KEEP_LOOP
#endif

namespace dcn {

// One 16-byte access. In words, since a compiler gives each of eight short values a register.
template <typename S>
struct alignas(16) Vector8 {
  uint32_t words[4];
};

template <typename S>
DCN_HOST_DEVICE Vector8<S> zeros() {
  return {{0, 0, 0, 0}};
}

// The value at the lower address of two, and the other.
template <typename S>
DCN_HOST_DEVICE void unpack(uint32_t both, float& low, float& high) {
  if constexpr (std::is_same_v<S, torch::headeronly::BFloat16>) {
    const uint32_t bits[2] = {both << 16, both & 0xffff0000u};
    std::memcpy(&low, &bits[0], sizeof(low));
    std::memcpy(&high, &bits[1], sizeof(high));
  } else {
    S pair[2];
    std::memcpy(pair, &both, sizeof(pair));
    low = static_cast<float>(pair[0]), high = static_cast<float>(pair[1]);
  }
}

// sums += weight * values
template <typename S>
DCN_HOST_DEVICE void add_scaled(float (&sums)[8], float weight, Vector8<S> values) {
  DCN_UNROLL
  for (int i = 0; i < 4; ++i) {
    float low, high;
    unpack<S>(values.words[i], low, high);
    sums[2 * i] += weight * low;
    sums[2 * i + 1] += weight * high;
  }
}

// The same 16 bytes of float values.
struct alignas(16) Vector4 {
  float values[4];
};

// And of double ones.
struct alignas(16) Vector2 {
  double values[2];
};

// 16 bytes of values of type S, and how many these are.
template <typename S>
using ChannelVector = std::conditional_t<std::is_same_v<S, float>, Vector4,
                                         std::conditional_t<std::is_same_v<S, double>, Vector2, Vector8<S>>>;
template <typename S>
constexpr int kVectorValues = 16 / sizeof(S);

template <typename S>
DCN_HOST_DEVICE void unpack(float (&values)[8], const Vector8<S>& from) {
  DCN_UNROLL
  for (int i = 0; i < 4; ++i) unpack<S>(from.words[i], values[2 * i], values[2 * i + 1]);
}
DCN_HOST_DEVICE void unpack(float (&values)[4], const Vector4& from) {
  DCN_UNROLL
  for (int i = 0; i < 4; ++i) values[i] = from.values[i];
}

// In one instruction: of a struct the compiler makes four.
template <typename S>
DCN_HOST_DEVICE void store_vector(S* to, const ChannelVector<S>& vector) {
#if defined(__CUDA_ARCH__)
  uint4 words;
  std::memcpy(&words, &vector, sizeof(words));
  *reinterpret_cast<uint4*>(to) = words;
#else
  *reinterpret_cast<ChannelVector<S>*>(to) = vector;
#endif
}

// Of global memory that nobody writes meanwhile. The compiler does not see by itself that a computed address is global.
template <typename S>
DCN_HOST_DEVICE ChannelVector<S> load_global(const void* from) {
#if defined(__CUDA_ARCH__)
  const uint4 words = __ldg(static_cast<const uint4*>(from));
  ChannelVector<S> found;
  std::memcpy(&found, &words, sizeof(found));
  return found;
#else
  return *static_cast<const ChannelVector<S>*>(from);
#endif
}

DCN_HOST_DEVICE void add_scaled(float (&sums)[4], float weight, const Vector4& values) {
  DCN_UNROLL
  for (int i = 0; i < 4; ++i) sums[i] += weight * values.values[i];
}

DCN_HOST_DEVICE void add_scaled(double (&sums)[2], double weight, const Vector2& values) {
  DCN_UNROLL
  for (int i = 0; i < 2; ++i) sums[i] += weight * values.values[i];
}

DCN_HOST_DEVICE float dot(const float (&a)[4], const Vector4& b) {
  float sum = 0;
  DCN_UNROLL
  for (int i = 0; i < 4; ++i) sum += a[i] * b.values[i];
  return sum;
}

DCN_HOST_DEVICE double dot(const double (&a)[2], const Vector2& b) { return a[0] * b.values[0] + a[1] * b.values[1]; }

template <typename S>
DCN_HOST_DEVICE float dot(const float (&a)[8], Vector8<S> b) {
  float sum = 0;
  DCN_UNROLL
  for (int i = 0; i < 4; ++i) {
    float low, high;
    unpack<S>(b.words[i], low, high);
    sum += a[2 * i] * low;
    sum += a[2 * i + 1] * high;
  }
  return sum;
}

// Rounds two sums to S, `low` at the lower address.
template <typename S>
DCN_HOST_DEVICE uint32_t pack(float low, float high) {
  uint32_t both;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<S, torch::headeronly::BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  const S pair[2] = {static_cast<S>(low), static_cast<S>(high)};
  std::memcpy(&both, pair, sizeof(both));
#endif
  return both;
}

// Rounded as the tensor cores multiply float: to 11 significant bits (TF32), to nearest, ties away from zero.
DCN_HOST_DEVICE float to_tf32(float value) {
  uint32_t bits;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#else
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
#endif
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename S>
DCN_HOST_DEVICE Vector4 pack(const float (&sums)[4]) {
  return {{sums[0], sums[1], sums[2], sums[3]}};
}

template <typename S>
DCN_HOST_DEVICE Vector2 pack(const double (&sums)[2]) {
  return {{sums[0], sums[1]}};
}

template <typename S>
DCN_HOST_DEVICE Vector8<S> pack(const float (&sums)[8]) {
  Vector8<S> e;
  DCN_UNROLL
  for (int i = 0; i < 4; ++i) e.words[i] = pack<S>(sums[2 * i], sums[2 * i + 1]);
  return e;
}

// Sums as operands of a matrix product: half values, or float in TF32.
template <typename S>
DCN_HOST_DEVICE ChannelVector<S> pack_operand(const float (&sums)[kVectorValues<S>]) {
  if constexpr (std::is_same_v<S, float>)
    return {{to_tf32(sums[0]), to_tf32(sums[1]), to_tf32(sums[2]), to_tf32(sums[3])}};
  else
    return pack<S>(sums);
}

}  // namespace dcn
