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

template <bool Backward, typename A>
DCN_HOST_DEVICE void find_points(Points<A>& p, const Index* height, const Index* width, int64_t count) {
  // Apart from the sum that follows, so that the product is rounded as in the definition: a position on a pixel stays
  // there.
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    p.scaled_x[i] = p.given_x[i] * p.unit_x[i];
    p.scaled_y[i] = p.given_y[i] * p.unit_y[i];
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A m = p.attention[i];
    const Sample<A, Index> s =
        make_sample<A, Index>(p.start_y[i] + p.scaled_y[i], p.start_x[i] + p.scaled_x[i], height[i], width[i]);
    const A a0 = s.weight(0), a1 = s.weight(1), a2 = s.weight(2), a3 = s.weight(3);
    const Index r0 = s.has(0) & (a0 != 0), r1 = s.has(1) & (a1 != 0), r2 = s.has(2) & (a2 != 0),
                r3 = s.has(3) & (a3 != 0);
    const A none = s.origin();
    // A weight that is not finite shows even where nothing is read.
    p.weight[0][i] = r0 ? a0 * m : none + (s.corners ? A(0) : 0 * m);
    p.weight[1][i] = r1 ? a1 * m : none;
    p.weight[2][i] = r2 ? a2 * m : none;
    p.weight[3][i] = r3 ? a3 * m : none;
    p.pixel[i] = s.y0 * width[i] + s.x0;
    p.corners[i] = static_cast<Index>(s.corners) | r0 << 4 | r1 << 5 | r2 << 6 | r3 << 7;
    if constexpr (Backward) {
      p.fraction_x[i] = s.lx;
      p.fraction_y[i] = s.ly;
    }
  }
}

// Addresses of the corners that have their bit, from number `bit` on; `other` for those that have not.
template <typename A>
DCN_HOST_DEVICE void point_corners(const Points<A>& p, int bit, const Index* width, const int64_t* level, int64_t image,
                                   int64_t pixel, int64_t other, int64_t count, int64_t (&to)[4][points_room]) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = image + level[i] + p.pixel[i] * pixel, below = first + width[i] * pixel;
    const Index bits = p.corners[i] >> bit;
    to[0][i] = bits & 1 ? first : other;
    to[1][i] = bits & 2 ? first + pixel : other;
    to[2][i] = bits & 4 ? below : other;
    to[3][i] = bits & 8 ? below + pixel : other;
  }
}

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
    find_points<Backward>(points, table.height.data(), width, count);
    // The backward asks for the slopes of corners without weight, too.
    point_corners(points, Backward ? 0 : 4, width, table.value.data() + first,
                  reinterpret_cast<int64_t>(call.value.data + n * call.value.n),
                  call.value.c * static_cast<int64_t>(sizeof(S)), zeros, count, points.value);
  }
};

}  // namespace dcn::tiles::attention
