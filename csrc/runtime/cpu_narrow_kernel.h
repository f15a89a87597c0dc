// The sums of narrow groups for one instruction set. No `#pragma once`: cpu_narrow.h includes this file once for each,
// with DCN_ISA (a namespace), DCN_TARGET (the functions' attribute) and DCN_VECTOR_BYTES. Plain vector types of the
// compiler.

namespace dcn::narrow::DCN_ISA {

template <typename T>
struct Vector {
  typedef T Type __attribute__((vector_size(DCN_VECTOR_BYTES)));
  typedef T Stored __attribute__((vector_size(DCN_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Lane __attribute__((vector_size(DCN_VECTOR_BYTES)));
  static constexpr int lanes = DCN_VECTOR_BYTES / sizeof(T);
};

// Each lane gets the value of member `I` of its group.
template <int Group, int I, typename T, int... Lane>
DCN_TARGET inline __attribute__((always_inline)) typename Vector<T>::Type spread(typename Vector<T>::Type v,
                                                                                 std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, (Lane / Group * Group + I)...);
#else
  return __builtin_shuffle(v, typename Vector<T>::Lane{(Lane / Group * Group + I)...});
#endif
}

template <typename T, int Group, int... I>
DCN_TARGET inline __attribute__((always_inline)) void spread_all(const T* from, typename Vector<T>::Type (&to)[Group],
                                                                 std::integer_sequence<int, I...>) {
  const typename Vector<T>::Type v = *reinterpret_cast<const typename Vector<T>::Stored*>(from);
  ((to[I] = spread<Group, I, T>(v, std::make_integer_sequence<int, Vector<T>::lanes>())), ...);
}

template <typename T, int Group>
DCN_TARGET void forward(const Sums<T>& s) {
  using Stored = typename Vector<T>::Stored;
  for (int64_t c = 0; c < s.channels; c += Vector<T>::lanes)
    for (int64_t q = 0; q < s.count; ++q) {
      Stored* const to = reinterpret_cast<Stored*>(s.rows + q * s.row + c);
      // Two sums, so that one need not wait for the other.
      typename Vector<T>::Type sums[2] = {*to, {}}, members[Group];
      for (int64_t k = 0; k < s.taps; ++k) {
        spread_all<T, Group>(s.columns + k * s.tap + q * s.pixel + c, members,
                             std::make_integer_sequence<int, Group>());
        const T* const weight = s.weight + k * Group * s.channels + c;
#pragma GCC unroll 16
        for (int i = 0; i < Group; ++i)
          sums[i % 2] += members[i] * *reinterpret_cast<const Stored*>(weight + i * s.channels);
      }
      *to = sums[0] + sums[1];
    }
}

template <typename T, int Group>
DCN_TARGET void columns(const Sums<T>& s) {
  using Stored = typename Vector<T>::Stored;
  for (int64_t c = 0; c < s.channels; c += Vector<T>::lanes)
    for (int64_t q = 0; q < s.count; ++q) {
      typename Vector<T>::Type members[Group];
      spread_all<T, Group>(s.rows + q * s.row + c, members, std::make_integer_sequence<int, Group>());
      for (int64_t k = 0; k < s.taps; ++k) {
        const T* const weight = s.weight + k * Group * s.channels + c;
        typename Vector<T>::Type sum = {};
#pragma GCC unroll 16
        for (int i = 0; i < Group; ++i) sum += members[i] * *reinterpret_cast<const Stored*>(weight + i * s.channels);
        *reinterpret_cast<Stored*>(s.columns + k * s.tap + q * s.pixel + c) = sum;
      }
    }
}

template <typename T, int Group>
DCN_TARGET void gradient(const Sums<T>& s) {
  using Stored = typename Vector<T>::Stored;
  for (int64_t k = 0; k < s.taps; ++k)
    for (int64_t c = 0; c < s.channels; c += Vector<T>::lanes) {
      typename Vector<T>::Type sums[Group] = {}, members[Group];
      for (int64_t q = 0; q < s.count; ++q) {
        spread_all<T, Group>(s.rows + q * s.row + c, members, std::make_integer_sequence<int, Group>());
        const auto column = *reinterpret_cast<const Stored*>(s.columns + k * s.tap + q * s.pixel + c);
#pragma GCC unroll 16
        for (int i = 0; i < Group; ++i) sums[i] += members[i] * column;
      }
#pragma GCC unroll 16
      for (int i = 0; i < Group; ++i) {
        Stored* const to = reinterpret_cast<Stored*>(s.gradient + (k * Group + i) * s.channels + c);
        *to = *to + sums[i];
      }
    }
}

template <typename T, int Log>
constexpr void list_sums(Kernels<T>& kernels) {
  if constexpr (1 << Log < Vector<T>::lanes) {
    kernels.forward[Log] = forward<T, 1 << Log>;
    kernels.columns[Log] = columns<T, 1 << Log>;
    kernels.gradient[Log] = gradient<T, 1 << Log>;
  }
}

template <typename T>
constexpr Kernels<T> kernels() {
  Kernels<T> found{Vector<T>::lanes, {}, {}, {}};
  list_sums<T, 1>(found), list_sums<T, 2>(found), list_sums<T, 3>(found);
  return found;
}

}  // namespace dcn::narrow::DCN_ISA
