// V channels that lie side by side, for bodies that take both: V = 1 for any memory, and as many as are 16 bytes, read
// and written in one access, for memory that is aligned to that. Values are summed in the accumulator type.
#pragma once

#include "gpu_values.h"

namespace dcn {

template <typename S>
struct SingleValue {
  S value;
};

template <typename A, typename S>
DCN_HOST_DEVICE void add_scaled(A (&sums)[1], A weight, const SingleValue<S>& one) {
  sums[0] += weight * static_cast<A>(one.value);
}
template <typename A, typename S>
DCN_HOST_DEVICE A dot(const A (&a)[1], const SingleValue<S>& one) {
  return a[0] * static_cast<A>(one.value);
}

// Values j * V to (j + 1) * V - 1.
template <int V, typename A, int N>
DCN_HOST_DEVICE A (&part_of(A (&values)[N], int j)) [V] { return reinterpret_cast<A(&)[V]>(values[j * V]); }

template <typename S, int V>
using Channels = std::conditional_t<V == 1, SingleValue<S>, ChannelVector<S>>;

template <typename S, int V>
DCN_HOST_DEVICE Channels<S, V> load_channels(const S* from) {
  static_assert(V == 1 || V == kVectorValues<S>, "a value or 16 bytes");
  if constexpr (V == 1)
    return {*from};
  else
    return *reinterpret_cast<const Channels<S, V>*>(from);
}

// In the accumulator type, which may be wider than what is stored: then in several accesses.
template <int V, typename A, typename S>
DCN_HOST_DEVICE void load_values(A (&to)[V], const S* from) {
  constexpr int each = V == 1 ? 1 : kVectorValues<S>;
  static_assert(V % each == 0, "whole accesses");
  DCN_UNROLL
  for (int v = 0; v < V; v += each) {
    const Channels<S, each> some = load_channels<S, each>(from + v);
    if constexpr (each == 1) {
      to[v] = static_cast<A>(some.value);
    } else if constexpr (std::is_same_v<S, A>) {
      DCN_UNROLL
      for (int e = 0; e < each; ++e) to[v + e] = some.values[e];
    } else {
      DCN_UNROLL
      for (int e = 0; e < each; e += 2) unpack<S>(some.words[e / 2], to[v + e], to[v + e + 1]);
    }
  }
}
template <int V, typename A, typename S>
DCN_HOST_DEVICE void store_values(S* to, const A (&from)[V]) {
  constexpr int each = V == 1 ? 1 : kVectorValues<S>;
  DCN_UNROLL
  for (int v = 0; v < V; v += each) {
    if constexpr (V == 1) {
      to[0] = static_cast<S>(from[0]);
    } else {
      A some[each];
      DCN_UNROLL
      for (int e = 0; e < each; ++e) some[e] = from[v + e];
      *reinterpret_cast<Channels<S, each>*>(to + v) = pack<S>(some);
    }
  }
}

}  // namespace dcn
