// Multi-scale deformable attention on the CPU, where the points of a query lie: found for several heads at once, in
// vectors over [head, point].
#pragma once

#include "load.h"

namespace dcn::tiles::attention {

// What the points of all queries have in common, [head, point].
struct PointTable {
  std::vector<Index> height, width;
  std::vector<int64_t> value, grad;  // where the point's level begins in its head: bytes in the value, in its gradient

  template <typename S>
  explicit PointTable(const Call<S>& call) {
    const AttentionGeometry& g = call.g;
    const int64_t size = padded(g.heads * g.points) + lanes;
    height.assign(size, 1), width.assign(size, 1), value.assign(size, 0), grad.assign(size, 0);
    for (int64_t m = 0; m < g.heads; ++m)
      for (int64_t l = 0; l < g.levels; ++l) {
        const AttentionLevel& level = g.level[l];
        for (int64_t k = level.first_point; k < level.first_point + level.points; ++k) {
          const int64_t i = m * g.points + k;
          height[i] = static_cast<Index>(level.height), width[i] = static_cast<Index>(level.width);
          value[i] = (level.first_row * call.value.c + m * call.value.h) * static_cast<int64_t>(sizeof(S));
          grad[i] = (level.first_row * g.heads + m) * g.channels * static_cast<int64_t>(sizeof(Accumulate<S>));
        }
      }
  }
};

// Finds the points of some heads of one query after the other.
template <typename S, bool Backward>
struct PointFinder {
  using A = Accumulate<S>;
  const Call<S>& call;
  const PointTable& table;
  Points<A>& points;
  int64_t zeros;  // address of a row of them

  // Fills in what no query changes, and what lies beyond the last point.
  DCN_HOST_DEVICE void prepare(int64_t heads) const {
    const int64_t count = padded(heads * call.g.points);
    for (int64_t i = 0; i < count; ++i) {
      points.given_x[i] = points.given_y[i] = 0;
      points.start_x[i] = points.start_y[i] = A(-0.5);
      points.unit_x[i] = call.reference.data ? A(1) : static_cast<A>(table.width[i]);
      points.unit_y[i] = call.reference.data ? A(1) : static_cast<A>(table.height[i]);
      points.attention[i] = 1;
    }
  }

  DCN_HOST_DEVICE void find(int64_t n, int64_t q, HeadRange heads) const {
    const AttentionGeometry& g = call.g;
    const int64_t count = padded(heads.count * g.points), first = heads.first * g.points;
    call.locations.template with_type<S>([&](auto t) DCN_INLINE_LAMBDA {
      load_pairs<decltype(t)>(call.locations, n, q, heads, g.points, points.given_x, points.given_y);
    });
    if (call.weights.data) {
      call.weights.template with_type<S>([&](auto t) DCN_INLINE_LAMBDA {
        load_weights<decltype(t)>(call.weights, n, q, heads, g.points, points.attention);
      });
      if (g.softmax) softmax(points.attention, heads.count, g.points);
    }
    if (call.reference.data)
      call.reference.template with_type<S>([&](auto t) DCN_INLINE_LAMBDA {
        using T = decltype(t);
        const Stored& r = call.reference;
        load_frames(AttentionPoints<A, T>{g, {}, 0, {}, {static_cast<const T*>(r.data), r.n, r.q, r.m, r.k}, nullptr},
                    n, q, heads.count, points);
      });
    const Index* const width = table.width.data();  // all heads have the same
    Points<A>& p = points;
    // Apart from the sum that follows, so that the product is rounded as in the definition: a position on a pixel
    // stays there.
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      p.scaled_x[i] = p.given_x[i] * p.unit_x[i];
      p.scaled_y[i] = p.given_y[i] * p.unit_y[i];
    }
    const auto position = [&p](int64_t i) DCN_INLINE_LAMBDA {
      return Place<A>{p.start_y[i] + p.scaled_y[i], p.start_x[i] + p.scaled_x[i]};
    };
    find_points<Backward>(p, position, p.attention, table.height.data(), width, count);
    // The backward asks for the slopes of corners without weight, too.
    point_corners(points, Backward ? 0 : 4, width, table.value.data() + first,
                  reinterpret_cast<int64_t>(call.value.data + n * call.value.n),
                  call.value.c * static_cast<int64_t>(sizeof(S)), zeros, count, points.value);
  }
};

}  // namespace dcn::tiles::attention
