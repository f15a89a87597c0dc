// A 4-D tensor by its strides (in elements), without torch.
#pragma once

#include "sampling.h"

namespace dcn {

template <typename S>
struct View {
  S* data;
  int64_t n, c, h, w;
  DCN_HOST_DEVICE S& at(int64_t in, int64_t ic, int64_t ih, int64_t iw) const {
    return data[in * n + ic * c + ih * h + iw * w];
  }
};

// Where element (n, c, y, x) of a view lies, from its first.
template <typename I, typename S>
DCN_HOST_DEVICE I place_in(const View<S>& v, I n, I c, I y, I x) {
  return n * static_cast<I>(v.n) + c * static_cast<I>(v.c) + y * static_cast<I>(v.h) + x * static_cast<I>(v.w);
}

}  // namespace dcn
