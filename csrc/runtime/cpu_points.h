// Points that are sampled on the CPU: some heads of some queries at once, in vectors over [head, point].
#pragma once

#include "../core/sampling.h"
#include "cpu_softmax.h"

namespace dcn::tiles::attention {

// Numbers of points as wide as float, so that they become vectors.
using Index = int32_t;

constexpr int64_t lanes = 16;  // of the widest vectors; loops over points run over a multiple of them
DCN_HOST_DEVICE int64_t padded(int64_t points) { return (points + lanes - 1) / lanes * lanes; }

// How many points are found at once at most, and room for them: not a power of two, since equal numbers of several
// arrays would then fall into few sets of the cache.
constexpr int64_t points_at_once = 1024, points_room = points_at_once + 3 * lanes;

// Some heads.
struct HeadRange {
  int64_t first, count;
};

// Some points of a query, [head, point]. Arrays of a fixed size lie at fixed distances, so that the loops over points
// need few registers for addresses. Arrays from `fraction_x` on are the backward's.
template <typename A>
struct alignas(64) Points {
  template <typename T>
  using Each = T[points_room];
  Each<A> given_x, given_y;                  // locations, or offsets
  Each<A> start_x, start_y, unit_x, unit_y;  // position in pixels = start + given * unit, as in AttentionFrame
  Each<A> scaled_x, scaled_y;                // given * unit
  Each<A> attention;                         // weight of the point
  Each<A> weight[4];                         // of each corner: bilinear times that
  Each<Index> pixel, corners;                // upper left corner on its map; those on the map, and those read
  Each<int64_t> value[4];                    // address of each corner's channels, or of a row of zeros
  Each<A> fraction_x, fraction_y;            // of the position between two pixels
  Each<A> by_x, by_y, by_weight;             // gradients of the position in pixels and of the weight
  Each<int64_t> grad[4];                     // address of each corner's gradient, or of a row that nobody reads
  A dot[4 * points_room];                    // [point, corner]: gradient of the result times the corner's channels
};

// A position on a map, in pixels.
template <typename A>
struct Place {
  A y, x;
};

// Weights and corners of the points [0, count). position(i) gives their (y, x) on a map of height[i] x width[i];
// attention[i] is the weight of the point itself.
template <bool Backward, typename A, typename Position, typename Sizes>
DCN_HOST_DEVICE void find_points(Points<A>& p, const Position& position, const A* attention, const Sizes& height,
                                 const Sizes& width, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A m = attention[i];
    const auto [y, x] = position(i);
    const Sample<A, Index> s = make_sample<A, Index>(y, x, height[i], width[i]);
    if constexpr (!Backward) {
      // Loops over weights become better vectors than loops over bits. A corner's weight is 0 where it is off the map.
      const A upper = (s.inside != 0) & (s.y0 >= 0) ? 1 - s.ly : A(0);
      const A lower = (s.inside != 0) & (s.y0 + 1 < height[i]) ? s.ly : A(0);
      const A left = s.x0 >= 0 ? 1 - s.lx : A(0), right = s.x0 + 1 < width[i] ? s.lx : A(0);
      const A b0 = upper * left, b1 = upper * right, b2 = lower * left, b3 = lower * right;
      const Index read = (b0 > 0 ? 16 : 0) | (b1 > 0 ? 32 : 0) | (b2 > 0 ? 64 : 0) | (b3 > 0 ? 128 : 0);
      // A position or weight that is not finite shows even where nothing is read.
      p.weight[0][i] = b0 > 0 ? b0 * m : (read ? A(0) : s.origin() + 0 * m);
      p.weight[1][i] = b1 > 0 ? b1 * m : A(0);
      p.weight[2][i] = b2 > 0 ? b2 * m : A(0);
      p.weight[3][i] = b3 > 0 ? b3 * m : A(0);
      p.pixel[i] = s.y0 * width[i] + s.x0;
      p.corners[i] = read;
      continue;
    }
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

// Addresses of the corners that have their bit, from number `bit` on; `other` for those that have not. level[i] is
// where the point's map begins in its image, and `pixel` how far apart pixels are, in bytes.
template <typename A, typename Sizes, typename Firsts>
DCN_HOST_DEVICE void point_corners(const Points<A>& p, int bit, const Sizes& width, const Firsts& level, int64_t image,
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

// Gradients of position and weight of `count` points, in vectors; the same sums as interpolate_gradient (sampling.h).
template <typename A>
DCN_HOST_DEVICE void find_gradients(Points<A>& p, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    Sample<A, Index> s{};
    s.ly = p.fraction_y[i];
    s.lx = p.fraction_x[i];
    const Index corners = p.corners[i];
    const A d0 = p.dot[4 * i], d1 = p.dot[4 * i + 1], d2 = p.dot[4 * i + 2], d3 = p.dot[4 * i + 3];
    // What is off the map has a gradient's product with zeros: 0, unless that is not finite.
    const A m0 = corners & 1 ? d0 : A(0), m1 = corners & 2 ? d1 : A(0);
    const A m2 = corners & 4 ? d2 : A(0), m3 = corners & 8 ? d3 : A(0);
    const A v0 = corners & 16 ? s.weight(0) * d0 : A(0), v1 = corners & 32 ? s.weight(1) * d1 : A(0);
    const A v2 = corners & 64 ? s.weight(2) * d2 : A(0), v3 = corners & 128 ? s.weight(3) * d3 : A(0);
    const A dy = s.weight_dy(0) * m0 + s.weight_dy(1) * m1 + s.weight_dy(2) * m2 + s.weight_dy(3) * m3;
    const A dx = s.weight_dx(0) * m0 + s.weight_dx(1) * m1 + s.weight_dx(2) * m2 + s.weight_dx(3) * m3;
    p.by_weight[i] = s.origin() + (v0 + v1 + v2 + v3);
    p.by_y[i] = p.attention[i] * (s.origin() + dy);
    p.by_x[i] = p.attention[i] * (s.origin() + dx);
  }
}

// From the gradients of weights to those of the logits of each head.
template <typename A>
DCN_HOST_DEVICE void through_softmax(Points<A>& p, int64_t heads, int64_t points) {
  for (int64_t m = 0; m < heads; ++m) {
    A *grad = p.by_weight + m * points, mean = 0;
    const A* const weight = p.attention + m * points;
#pragma omp simd reduction(+ : mean)
    for (int64_t k = 0; k < points; ++k) mean += weight[k] * grad[k];
#pragma omp simd
    for (int64_t k = 0; k < points; ++k) grad[k] = weight[k] * (grad[k] - mean);
  }
}

}  // namespace dcn::tiles::attention
