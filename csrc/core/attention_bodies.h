// Weighted sums of samples, element by element: the arithmetic of multi-scale attention, and of what is one in other
// words (tap_positions.h), that CPU and CUDA share. Each struct is one task; index i runs over its elements in any
// order. No torch here: host and device compile the same source. `P` is AttentionPoints or what takes their place, `S`
// the type that values are stored in.
#pragma once

#include "accumulate.h"
#include "attention_positions.h"

namespace dcn {

// Calls f(sample, k, l) for every point k of a query's head, level by level.
template <typename P, typename Visit>
DCN_HOST_DEVICE void for_each_point(const P& points, const QueryHead& h, const Visit& visit) {
  for (int64_t l = 0; l < points.g.levels; ++l) {
    const AttentionLevel& level = points.g.level[l];
    const auto frame = points.frame(h.n, h.q, l);
    for (int64_t k = level.first_point; k < level.first_point + level.points; ++k)
      visit(points.sample(frame, h, l, k), k, level);
  }
}

// The softmax of each query's head: its largest logit, and 1 / sum of exponentials.
template <typename P>
struct FindSoftmax {
  using A = typename P::Accumulator;

  P points;
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
template <typename P, typename S>
struct Attend {
  using A = typename P::Accumulator;

  P points;
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
template <typename P, typename S>
struct ScatterValues {
  using A = typename P::Accumulator;

  P points;
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
template <typename P, typename S>
struct FindPointGradients {
  using A = typename P::Accumulator;

  P points;
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
template <typename P>
struct LocationGradient {
  using A = typename P::Accumulator;
  using F = typename P::Given;

  P points;
  const PointGradient<A>* found;
  F* grad_locations;  // as points.location_at has it

  DCN_HOST_DEVICE int64_t size() const { return points.g.query_heads() * points.g.levels; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t head = i / points.g.levels, l = i % points.g.levels;
    const QueryHead h(points.g, head);
    const AttentionLevel& level = points.g.level[l];
    const auto frame = points.frame(h.n, h.q, l);
    for (int64_t k = level.first_point; k < level.first_point + level.points; ++k)
      for (int along = 0; along < 2; ++along)
        grad_locations[points.location_at(head, k, along)] =
            static_cast<F>(found[head * points.g.points + k].by_position[along] * frame.unit[along]);
  }
};

// The gradients of weights, or of logits through the softmax: weight_k * (grad_k - sum_j weight_j grad_j). One element:
// a query's head.
template <typename P>
struct WeightGradient {
  using A = typename P::Accumulator;
  using F = typename P::Given;

  P points;
  const PointGradient<A>* found;
  F* grad_weights;  // as points.weight_at has it

  DCN_HOST_DEVICE int64_t size() const { return points.g.query_heads(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const QueryHead h(points.g, i);
    const int64_t first = i * points.g.points;
    A mean = 0;
    if (points.softmax)
      for (int64_t k = 0; k < points.g.points; ++k) mean += points.weight(h, k) * found[first + k].by_weight;
    for (int64_t k = 0; k < points.g.points; ++k) {
      const A grad = found[first + k].by_weight;
      grad_weights[points.weight_at(i, k)] =
          static_cast<F>(points.softmax ? points.weight(h, k) * (grad - mean) : grad);
    }
  }
};

}  // namespace dcn
