// Deformable aggregation on the CPU, where the taps of some pixels of a row lie: found in vectors over [pixel, group,
// tap].
#pragma once

#include "../../../runtime/cpu_gather.h"
#include "load.h"

namespace dcn::tiles::aggregate {

using attention::Points;

// The same for every tap, as an array would have it.
template <typename T>
struct Same {
  T value;
  DCN_HOST_DEVICE T operator[](int64_t) const { return value; }
};

// What all chunks have in common, [pixel, group, tap]: the tap from the centre of the chunk's first pixel, and where
// its group begins in a pixel, in bytes.
template <typename S>
struct TapTable {
  using A = Accumulate<S>;
  std::vector<A> x, y;
  std::vector<Index> value, grad;

  TapTable(const AttentionGeometry& g, const TapGrid& taps, const Chunk& chunk, const View<const S>& values) {
    const int64_t size = padded(chunk.pixels * chunk.groups * g.points) + lanes;
    x.assign(size, 0), y.assign(size, 0), value.assign(size, 0), grad.assign(size, 0);
    int64_t i = 0;
    for (int64_t p = 0; p < chunk.pixels; ++p)
      for (int64_t m = 0; m < chunk.groups; ++m)
        for (int64_t k = 0; k < g.points; ++k, ++i) {
          x[i] = static_cast<A>(p * taps.stride[0]) + taps.place<A>(k, 0);
          y[i] = taps.place<A>(k, 1);
          value[i] = static_cast<Index>(m * values.h * static_cast<int64_t>(sizeof(S)));
          grad[i] = static_cast<Index>(m * g.channels * static_cast<int64_t>(sizeof(A)));
        }
  }
};

// What the pixels below those of a chunk need, which are next in its strip: what is given for them, and the row of the
// map that comes into reach. It is fetched group by group, since steps of a strip are too long for what the processor
// foresees by itself.
template <typename S, typename T>
struct Ahead {
  Given<T> pairs, weights;
  View<const S> value;
  int64_t step;  // along the row of the map

  // From a chunk that begins at pixel q, and at one of the groups.
  DCN_HOST_DEVICE Ahead(const Call<S, T>& call, int64_t n, int64_t q, int64_t m)
      : pairs(call.pairs), weights(call.weights), value(call.value), step(call.taps.stride[0] * call.value.c) {
    const TapGrid& taps = call.taps;
    const int64_t below = q + taps.out_width < call.g.queries ? q + taps.out_width : q;
    pairs.data = pairs.at(n, below, m);
    if (weights.data) weights.data = weights.at(n, below, m);
    const AttentionLevel& map = call.g.level[0];
    const int64_t y = (q / taps.out_width + 2) * taps.stride[1] + taps.origin[1] + taps.centre[1];
    const int64_t x = q % taps.out_width * taps.stride[0];
    value.data = &value.at(n, (y < map.height ? y : map.height - 1) * map.width + (x < map.width ? x : 0), m, 0);
  }

  // For pixel p and group m of the chunk. A fetch may reach beyond the end: it is no access.
  DCN_HOST_DEVICE void fetch(int64_t p, int64_t m) const {
    const T* const own = pairs.data + p * pairs.pixel + m * pairs.group;
    prefetch(own);
    prefetch(own + 64 / sizeof(T));
    if (weights.data) prefetch(weights.data + p * weights.pixel + m * weights.group);
    prefetch(value.data + p * step + m * value.h);
  }
};

// Finds the taps of one chunk after the other.
template <typename S, typename T, bool Backward>
struct TapFinder {
  using A = Accumulate<S>;
  const Call<S, T>& call;
  const TapTable<S>& table;
  Points<A>& points;
  T* room;  // for the offsets and weights of a chunk

  // Corners whose bits begin at `bit`.
  DCN_HOST_DEVICE attention::CornersOnMap corners(int64_t n, int64_t first_group, int bit) const {
    const S* const image = call.value.data + n * call.value.n + first_group * call.value.h;
    const int64_t right = call.value.c * static_cast<int64_t>(sizeof(S));
    return {reinterpret_cast<int64_t>(image), points.offset, points.corners, bit, right, right * call.g.level[0].width};
  }

  // The weights where none are given.
  DCN_HOST_DEVICE void prepare(int64_t taps) const {
    for (int64_t i = 0; i < taps; ++i) points.attention[i] = 1;
  }

  // The weights of the taps after their softmax: where they lie, if they need nothing. The backward finds them among
  // the points.
  DCN_HOST_DEVICE const A* weights(int64_t n, int64_t q, int64_t pixels, HeadRange groups) const {
    A* const to = points.attention;
    if (!call.weights.data) return to;
    const int64_t taps = call.g.points, count = pixels * groups.count * taps;
    const T* const from = side_by_side(call.weights, n, q, pixels, groups, taps, 1, room + 2 * attention::points_room);
    if constexpr (std::is_same_v<T, A> && !Backward) {
      if (!call.g.softmax) return from;
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
    if (call.g.softmax) attention::softmax(to, pixels * groups.count, taps);
    return to;
  }

  DCN_HOST_DEVICE void find(int64_t n, int64_t q, int64_t pixels, HeadRange groups) const {
    const AttentionGeometry& g = call.g;
    Points<A>& p = points;
    const int64_t taps = pixels * groups.count * g.points;
    const A* const weight = weights(n, q, pixels, groups);
    const T* const pairs = side_by_side(call.pairs, n, q, pixels, groups, g.points, 2, room);
    const T *const from_x = call.taps.x_first ? pairs : pairs + 1, *const from_y =
                                                                       call.taps.x_first ? pairs + 1 : pairs;
    const A start_x = call.taps.template start<A>(q, 0), start_y = call.taps.template start<A>(q, 1);
    const A scale = static_cast<A>(call.taps.scale), *const x = table.x.data(), *const y = table.y.data();
    const auto position = [&](int64_t i) DCN_INLINE_LAMBDA {
      return attention::Place<A>{start_y + y[i] + widen(from_y[2 * i]) * scale,
                                 start_x + x[i] + widen(from_x[2 * i]) * scale};
    };
    const Same<Index> height{static_cast<Index>(g.level[0].height)}, width{static_cast<Index>(g.level[0].width)};
    attention::find_points<Backward>(p, position, weight, height, width, taps);
    const Index pixel = static_cast<Index>(call.value.c * static_cast<int64_t>(sizeof(S)));
    attention::find_offsets(p, table.value.data(), pixel, taps, p.offset);
  }
};

}  // namespace dcn::tiles::aggregate
