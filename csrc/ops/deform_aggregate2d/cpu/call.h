// Deformable aggregation on the CPU, a call as its loops see it: pointers and strides, and the order in which pixels
// are visited.
#pragma once

#include <algorithm>
#include <vector>

#include "../../../runtime/cpu_points.h"
#include "../arguments.h"

namespace dcn::tiles::aggregate {

using attention::HeadRange;
using attention::Index;
using attention::lanes;
using attention::narrow;
using attention::padded;
using attention::widen;

// How many taps are found at once at most, unless one pixel and group has more: their arrays, the pixels that they read
// and the results are to stay in the nearest cache.
constexpr int64_t taps_at_once = 512;

// Whether an Index reaches everywhere on the map and on its gradient, in bytes, and the taps of a group have room.
inline bool is_served(const AggregateArguments& a, const AttentionGeometry& g) {
  const int64_t pixel = std::max(std::abs(pixel_stride(a.value)), a.value.size(3)) * 8;
  return g.points <= attention::points_at_once && g.rows < (int64_t{1} << 31) / pixel;
}

// How many pixels of a row, and groups, are served at once: several pixels only with all of their groups.
struct Chunk {
  int64_t pixels, groups;

  Chunk(const AttentionGeometry& g, const TapGrid& taps, int64_t all_groups)
      : pixels(1), groups(std::min(all_groups, std::max<int64_t>(1, attention::points_at_once / g.points))) {
    if (groups == all_groups)
      pixels = std::clamp<int64_t>(taps_at_once / (groups * g.points), 1, std::min<int64_t>(taps.out_width, 64));
  }
};

// Numbers of each tap by their strides, where they begin, and how many of them lie side by side in memory.
template <typename T>
struct Given {
  const T* data = nullptr;  // null: there are none
  int64_t n = 0, pixel = 0, group = 0, tap = 0, axis = 0;

  DCN_HOST_DEVICE const T* at(int64_t in, int64_t q, int64_t m) const { return data + in * n + q * pixel + m * group; }
};

template <typename S, typename T>
struct Call {
  AttentionGeometry g;
  TapGrid taps;
  Tensor held;          // what `value` points into: the argument, or a copy whose channels lie together
  View<const S> value;  // [N, H W, G, D]
  Given<T> pairs, weights;

  Call(const AggregateArguments& a, const AggregateGeometry& geometry)
      : g(geometry.g),
        taps(geometry.taps),
        held(a.value.stride(3) == 1 || a.value.size(3) == 1 ? a.value : torch::stable::contiguous(a.value)),
        value(view_of_groups<const S>(held, g)) {
    const Tensor& t = a.offset;
    const int64_t axis = t.stride(geometry.packed ? 4 : 5);
    pairs = {static_cast<const T*>(t.data_ptr()),      t.stride(0), pixel_stride(t), t.stride(3),
             geometry.packed ? 2 * axis : t.stride(4), axis};
    if (geometry.packed) weights = {pairs.data + 2 * g.points * axis, pairs.n, pairs.pixel, pairs.group, axis};
    if (!a.weight) return;
    const Tensor& w = *a.weight;
    weights = {static_cast<const T*>(w.data_ptr()), w.stride(0), pixel_stride(w), w.stride(3), w.stride(4)};
  }
};

// Strips of a chunk's width, from top to bottom: what a row of a strip reads is still in the cache when the next one
// comes. Calls f(first pixel, how many) for the rows [first, last) of all strips. A matter of speed alone.
template <typename F>
DCN_HOST_DEVICE void for_each_row_of_strips(const TapGrid& taps, int64_t out_height, int64_t width, int64_t first,
                                            int64_t last, const F& f) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t x = i / out_height * width, y = i % out_height, left = taps.out_width - x;
    f(y * taps.out_width + x, left < width ? left : width);
  }
}

}  // namespace dcn::tiles::aggregate
