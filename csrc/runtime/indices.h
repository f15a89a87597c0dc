// How a call's bodies number elements, and whether they take channels in vectors: found on the host, from its tensors.
#pragma once

#include <algorithm>

#include "channels.h"
#include "tensor.h"

namespace dcn {

// How far the elements of `images` images lie apart at most.
inline int64_t extent(const Tensor& t, int64_t images) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d)
    last += (std::min(t.size(d), d == 0 ? images : t.size(d)) - 1) * (t.size(d) > 1 ? t.stride(d) : 0);
  return last;
}

// Whether every pixel has its channels side by side, from a multiple of 16 bytes on.
template <typename S>
bool is_in_vectors(const Tensor& t) {
  if (t.stride(1) != 1 || reinterpret_cast<uintptr_t>(t.data_ptr()) % 16) return false;
  for (int d : {0, 2, 3})
    if (t.size(d) > 1 && t.stride(d) % kVectorValues<S>) return false;
  return true;
}

// Calls f(I{}, vectors) with the type of numbers of elements, and whether channels are taken in vectors. Those of 64
// bits are rare enough to go without.
template <typename F>
void dispatch_indices(bool in_int, bool in_vectors, const F& f) {
  if (in_int && in_vectors) return f(int32_t{}, std::true_type{});
  if (in_int) return f(int32_t{}, std::false_type{});
  f(int64_t{}, std::false_type{});
}

}  // namespace dcn
