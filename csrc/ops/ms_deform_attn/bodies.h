// Multi-scale deformable attention, element by element: the arithmetic that CPU and CUDA share. Each struct is one
// task; index i runs over its elements in any order. No torch here: host and device compile the same source. `A` is the
// accumulator type, `S` the type that values are stored in, `F` that of locations, weights and reference points.
#pragma once

#include "../../core/accumulate.h"
#include "../../core/attention_positions.h"

namespace dcn {

// Calls f(sample, k, l) for every point k of a query's head, level by level.
template <typename A, typename F, typename Visit>
DCN_HOST_DEVICE void for_each_point(const AttentionPoints<A, F>& points, const QueryHead& h, const Visit& visit) {
  for (int64_t l = 0; l < points.g.levels; ++l) {
    const AttentionLevel& level = points.g.level[l];
    const AttentionFrame<A> frame = points.frame(h.n, h.q, l);
    for (int64_t k = level.first_point; k < level.first_point + level.points; ++k)
      visit(points.sample(frame, h, l, k), k, level);
  }
}

// The softmax of each query's head: its largest logit, and 1 / sum of exponentials.
template <typename A, typename F>
struct FindSoftmax {
  AttentionPoints<A, F> points;
  SoftmaxScale<A>* scales;

  DCN_HOST_DEVICE int64_t size() const { return points.g.query_heads(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const QueryHead h(points.g, i);
    A largest = points.stored_weight(h, 0), sum = 0;
    for (int64_t k = 1; k < points.g.points; ++k) {
      const A logit = points.stored_weight(h, k);
      if (logit > largest) largest = logit;
    }
    // A NaN logit, or an infinite one, makes the sum NaN, and so every weight.
    for (int64_t k = 0; k < points.g.points; ++k) sum += std::exp(points.stored_weight(h, k) - largest);
    scales[i] = {largest, 1 / sum};
  }
};

// output[n, q, m, d] = sum_k weight * bilinear(value of the level, position)
template <typename A, typename S, typename F>
struct Attend {
  AttentionPoints<A, F> points;
  View<const S> value;  // [N, S, M, D]
  View<S> output;       // [N, Q, M, D]

  DCN_HOST_DEVICE int64_t size() const { return points.g.query_heads() * points.g.channels; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const QueryHead h(points.g, i / points.g.channels);
    const int64_t d = i % points.g.channels;
    A sum = 0;
    for_each_point(points, h, [&](const Sample<A>& s, int64_t k, const AttentionLevel& level) {
      sum += points.weight(h, k) * interpolate(s, [&](int64_t row, int64_t column) {
               return static_cast<A>(value.at(h.n, level.first_row + row * level.width + column, h.m, d));
             });
    });
    output.at(h.n, h.q, h.m, d) = static_cast<S>(sum);
  }
};

// The adjoint of Attend: grad_value[n, corner, m, d] += corner weight * weight * grad_output[n, q, m, d]
template <typename A, typename S, typename F>
struct ScatterValues {
  AttentionPoints<A, F> points;
  View<const S> grad_output;
  View<A> grad_value;

  DCN_HOST_DEVICE int64_t size() const { return points.g.query_heads() * points.g.channels; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const QueryHead h(points.g, i / points.g.channels);
    const int64_t d = i % points.g.channels;
    const A grad = static_cast<A>(grad_output.at(h.n, h.q, h.m, d));
    for_each_point(points, h, [&](const Sample<A>& s, int64_t k, const AttentionLevel& level) {
      if (!s.corners) return;
      const A weighted = points.weight(h, k) * grad;
      for (int c = 0; c < 4; ++c) {
        const A w = s.weight(c);
        if (s.has(c) && w != 0)
          atomic_add(&grad_value.at(h.n, level.first_row + s.row(c) * level.width + s.column(c), h.m, d), w * weighted);
      }
    });
  }
};

// What a point's sample does to the result, by its position in pixels and by its weight: sums over the D channels.
template <typename A>
struct PointGradient {
  A by_weight, by_position[2];  // (x, y)
};

// One element: a point, [N, Q, M, K].
template <typename A, typename S, typename F>
struct FindPointGradients {
  AttentionPoints<A, F> points;
  View<const S> value, grad_output;
  PointGradient<A>* found;

  DCN_HOST_DEVICE int64_t size() const { return points.g.query_heads() * points.g.points; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const QueryHead h(points.g, i / points.g.points);
    const int64_t k = i % points.g.points;
    int64_t l = 0;
    while (k >= points.g.level[l].first_point + points.g.level[l].points) ++l;
    const AttentionLevel& level = points.g.level[l];
    const Sample<A> s = points.sample(points.frame(h.n, h.q, l), h, l, k);
    Gradient<A> sum{0, 0, 0};
    for (int64_t d = 0; d < points.g.channels; ++d) {
      const A grad = static_cast<A>(grad_output.at(h.n, h.q, h.m, d));
      const Gradient<A> at = interpolate_gradient(s, [&](int64_t row, int64_t column) {
        return static_cast<A>(value.at(h.n, level.first_row + row * level.width + column, h.m, d));
      });
      sum.value += grad * at.value;
      sum.dy += grad * at.dy;
      sum.dx += grad * at.dx;
    }
    const A weight = points.weight(h, k);
    found[i] = {sum.value, {weight * sum.dx, weight * sum.dy}};
  }
};

// The gradients of locations (or raw offsets): those of positions in the unit that these are given in. One element: a
// level of a query's head.
template <typename A, typename F>
struct LocationGradient {
  AttentionPoints<A, F> points;
  const PointGradient<A>* found;
  F* grad_locations;  // [N, Q, M, K, 2], densely stored

  DCN_HOST_DEVICE int64_t size() const { return points.g.query_heads() * points.g.levels; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t head = i / points.g.levels, l = i % points.g.levels;
    const QueryHead h(points.g, head);
    const AttentionLevel& level = points.g.level[l];
    const AttentionFrame<A> frame = points.frame(h.n, h.q, l);
    for (int64_t p = 0; p < level.points; ++p) {
      const int64_t at = head * points.g.points + level.first_point + p;
      for (int along = 0; along < 2; ++along)
        grad_locations[2 * at + along] = static_cast<F>(found[at].by_position[along] * frame.unit[along]);
    }
  }
};

// The gradients of weights, or of logits through the softmax: weight_k * (grad_k - sum_j weight_j grad_j). One element:
// a query's head.
template <typename A, typename F>
struct WeightGradient {
  AttentionPoints<A, F> points;
  const PointGradient<A>* found;
  F* grad_weights;  // [N, Q, M, K], densely stored

  DCN_HOST_DEVICE int64_t size() const { return points.g.query_heads(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const QueryHead h(points.g, i);
    const int64_t first = i * points.g.points;
    A mean = 0;
    if (points.softmax)
      for (int64_t k = 0; k < points.g.points; ++k) mean += points.weight(h, k) * found[first + k].by_weight;
    for (int64_t k = 0; k < points.g.points; ++k) {
      const A grad = found[first + k].by_weight;
      grad_weights[first + k] = static_cast<F>(points.softmax ? points.weight(h, k) * (grad - mean) : grad);
    }
  }
};

// The gradients of reference points: sums over heads and points, over levels too where all of them share one, always
// in the same order. One element: a reference point.
template <typename A, typename F>
struct ReferenceGradient {
  AttentionPoints<A, F> points;
  const PointGradient<A>* found;
  F* grad_reference;  // [N, Q, L or 1, 2 or 4], densely stored

  DCN_HOST_DEVICE int64_t size() const { return points.g.batch * points.g.queries * points.g.reference_levels; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const AttentionGeometry& g = points.g;
    const int64_t query = i / g.reference_levels, r = i % g.reference_levels;
    A sums[4] = {0, 0, 0, 0};
    for (int64_t l = 0; l < g.levels; ++l) {
      if (g.reference_level(l) != r) continue;
      const AttentionLevel& level = g.level[l];
      for (int64_t m = 0; m < g.heads; ++m) {
        const int64_t head = query * g.heads + m;
        const QueryHead h(g, head);
        for (int64_t k = level.first_point; k < level.first_point + level.points; ++k)
          for (int along = 0; along < 2; ++along) {
            const A by_pixel = found[head * g.points + k].by_position[along] * points.size(l, along);
            sums[along] += by_pixel;
            if (g.reference_numbers == 4) sums[2 + along] += by_pixel * points.box_unit(l) * points.given(h, k, along);
          }
      }
    }
    // As many steps as there are sums, so that a GPU keeps these in registers.
    for (int j = 0; j < 4; ++j)
      if (j < g.reference_numbers) grad_reference[i * g.reference_numbers + j] = static_cast<F>(sums[j]);
  }
};

}  // namespace dcn
