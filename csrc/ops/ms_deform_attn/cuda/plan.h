// Which calls the fused kernels serve; the portable path serves all.
#pragma once

#include <limits>

#include "../arguments.h"
#include "records.h"

namespace dcn {

template <typename S>
bool has_aligned_rows(const View<const S>& rows, const std::vector<int64_t>& sizes) {
  const int64_t strides[] = {rows.n, rows.c, rows.h};
  for (int d = 0; d < 3; ++d)
    if (sizes[d] > 1 && strides[d] % kVectorValues<S>) return false;
  return rows.w == 1 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
}

// The value of a call, if 16 bytes of a head's channels are one access anywhere in it, and its rows are counted in 32
// bits (a kernel finds their addresses in 64).
template <typename S>
bool can_fuse_attention(const View<const S>& value, const AttentionGeometry& g) {
  constexpr int64_t limit = 1 << 30;
  return g.channels % kVectorValues<S> == 0 && has_aligned_rows(value, {g.batch, g.rows, g.heads}) && g.rows <= limit &&
         g.query_heads() > 0 && value.c <= limit / static_cast<int64_t>(sizeof(S)) && g.channels <= limit / 4 / g.heads;
}

template <typename S>
AttentionLanes lanes_of(const AttentionGeometry& g) {
  return {g.query_heads(), g.channels / kVectorValues<S>};
}

}  // namespace dcn
