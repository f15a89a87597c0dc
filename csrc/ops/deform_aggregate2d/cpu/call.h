// Deformable aggregation on the CPU, a call as its loops see it: pointers and strides, and the order in which pixels
// are visited.
#pragma once

#include <algorithm>

#include "../../../runtime/cpu_points.h"
#include "../../../runtime/cpu_rows.h"
#include "../arguments.h"

namespace dcn::tiles::aggregate {

using attention::Index;

// Pixels that are served together, side by side in vectors: the lanes of the widest, or a multiple of others'.
constexpr int64_t lanes = attention::lanes;

// The image of one group as its loops read it (map.h): a border of one pixel all around, and pixels as wide as whole
// vectors of 8.
struct MapShape {
  int64_t height, width, channels;

  explicit MapShape(const AttentionGeometry& g)
      : height(g.level[0].height), width(g.level[0].width), channels((g.channels + 7) / 8 * 8) {}

  // In numbers: a row, all of them, and where pixel (0, 0) lies.
  DCN_HOST_DEVICE int64_t row() const { return (width + 2) * channels; }
  DCN_HOST_DEVICE int64_t numbers() const { return (height + 2) * row(); }
  DCN_HOST_DEVICE int64_t origin() const { return row() + channels; }
};

// Why the tuned path does not serve a call: the taps of a group are to have room, and an Index is to reach everywhere
// on such a map, in bytes. Null: it does.
inline const char* why_portable(const AttentionGeometry& g) {
  static_assert(attention::points_at_once == 1024, "the words below");
  if (g.points > attention::points_at_once) return "offset: expected at most 1024 taps of a group";
  const MapShape map(g);
  return (map.height + 2) * (map.width + 2) <= (int64_t{1} << 30) / (map.channels * 8)
             ? nullptr
             : "value: expected images of a group below 2^30 bytes in float64";
}

struct PixelRange {
  int64_t first, count;
};

// Chunks of at most `lanes` pixels: one after the other where rows are short, else in strips of some columns from top
// to bottom, so that what a row of a strip reads is still in the nearest cache when the next one comes.
struct Visits {
  int64_t width, height;

  DCN_HOST_DEVICE bool in_strips() const { return width > 64; }
  DCN_HOST_DEVICE int64_t count() const {
    if (!in_strips()) return divide_up(width * height, lanes);
    return divide_up(width, strip * lanes) * strip * height;
  }
  // Of a chunk beyond the end of its row the count is 0.
  DCN_HOST_DEVICE PixelRange at(int64_t i) const {
    const int64_t chunk = i % strip, y = i / strip % height, x = (i / strip / height * strip + chunk) * lanes;
    const int64_t first = in_strips() ? y * width + x : i * lanes;
    const int64_t left = in_strips() ? width - x : width * height - first;
    return {first, left < 0 ? 0 : left < lanes ? left : lanes};
  }

 private:
  static constexpr int64_t strip = 3;  // in chunks
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
  MapShape map;
  Visits visits;
  Tensor held;          // what `value` points into: the argument, or a copy whose channels lie together
  View<const S> value;  // [N, H W, G, D]
  Given<T> pairs, weights;

  Call(const AggregateArguments& a, const AggregateGeometry& geometry)
      : g(geometry.g),
        taps(geometry.taps),
        map(g),
        visits{taps.out_width, geometry.out_height},
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

}  // namespace dcn::tiles::aggregate
