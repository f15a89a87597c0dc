// Multi-scale deformable attention on the portable path: the bodies in order, on any device, and the memory that they
// share.
#pragma once

#include <algorithm>
#include <limits>

#include "../../runtime/input_index.h"
#include "arguments.h"
#include "index.h"

namespace dcn {

// Positions and weights of a call with the softmax that they need. Owns it.
template <typename Device, typename A, typename F>
struct ScaledPoints {
  Tensor scales;
  AttentionPoints<A, F> points;

  ScaledPoints(const AttentionArguments& a, const AttentionGeometry& g)
      : scales(torch::stable::new_empty(a.value, {g.softmax ? 2 * g.query_heads() : 0}, scalar_type_of<A>())),
        points(points_of<A, F>(a, g, nullptr)) {
    if (!g.softmax) return;
    SoftmaxScale<A>* const each = static_cast<SoftmaxScale<A>*>(scales.data_ptr());
    Device::for_each(FindSoftmax<A, F>{points, each}, a.value);
    points.softmax = each;
  }
};

template <typename Device>
Tensor ms_deform_attn_portable(const AttentionArguments& a, const AttentionGeometry& g) {
  const Tensor output = new_attended(a, g);
  dispatch_ms_deform_attn(a, [&](auto s, auto f) {
    using S = decltype(s);
    using F = decltype(f);
    using A = Accumulate<S>;
    const ScaledPoints<Device, A, F> scaled(a, g);
    Device::for_each(Attend<A, S, F>{scaled.points, view<const S>(a.value), view_of_heads<S>(output, g)}, a.value);
  });
  return output;
}

// Queries whose index of a level fits the device's budget: whole images where they do, else parts of one. Every range
// visits all pixels of its images, so an image has at most 16 parts, unless the index, which counts samples in 32 bits,
// asks for more.
template <typename A, typename Device>
int64_t query_range_size(const AttentionGeometry& g, const AttentionLevel& level) {
  const int64_t samples = g.heads * level.points;  // below 2^60
  const int64_t countable = std::numeric_limits<int32_t>::max() / samples;
  check(countable > 0, "ms_deform_attn_backward: points: expected fewer than 2^31 samples of a query, got ", samples);
  const int64_t fitting = Device::column_bytes / (samples * static_cast<int64_t>(sizeof(IndexEntry<A>)));
  if (fitting < g.queries) return std::min(countable, std::max(fitting, (g.queries + 15) / 16));
  // Maps may be much larger than what is sampled.
  const int64_t cells = g.heads * (level.height + 1) * (level.width + 1);
  const int64_t images = Device::column_bytes / static_cast<int64_t>(2 * sizeof(int32_t)) / cells;
  return std::min(countable, std::max<int64_t>(1, std::min(fitting / g.queries, images)) * g.queries);
}

// Adds to `sums` in an order that does not vary.
template <typename Device, typename S, typename F, typename A>
void gather_values(const Tensor& grad_output, const AttentionPoints<A, F>& points, const Tensor& sums) {
  const AttentionGeometry& g = points.g;
  const int64_t total = g.batch * g.queries;
  if (total == 0) return;
  for (int64_t l = 0; l < g.levels; ++l) {
    const int64_t step = query_range_size<A, Device>(g, g.level[l]);
    for (QueryRange range{0, 0}; range.first < total; range.first += range.count) {
      const int64_t left = step < g.queries ? g.queries - range.first % g.queries : total - range.first;
      range.count = std::min(step, left);
      const LevelPositions<A, F> positions{points, l, range};
      const BuiltIndex<A> built = build_input_index<Device>(positions, sums);
      Device::for_each(
          GatherValueGradient<A, S, F>{positions, built.index, view_of_heads<const S>(grad_output, g), view<A>(sums)},
          sums);
    }
  }
}

// What the gradients of locations, weights and reference points are made of, with its memory; none if none is wanted.
template <typename A>
class PointGradients {
 public:
  PointGradients(const AttentionArguments& a, const AttentionGeometry& g, int64_t wanted)
      : wanted_(wanted & (kSamplingLocations | kAttentionWeights | kReferencePoints)),
        memory_(torch::stable::new_empty(
            a.value,
            {wanted_ ? g.query_heads() * g.points : 0, static_cast<int64_t>(sizeof(PointGradient<A>) / sizeof(A))},
            scalar_type_of<A>())) {}
  PointGradient<A>* data() const { return wanted_ ? static_cast<PointGradient<A>*>(memory_.data_ptr()) : nullptr; }

 private:
  bool wanted_;
  Tensor memory_;
};

template <typename Device, typename A, typename F>
void finish_gradients(const AttentionPoints<A, F>& points, const PointGradients<A>& found, int64_t wanted,
                      const AttentionGradients& gradients, const Tensor& on) {
  const auto& [grad_value, grad_locations, grad_weights, grad_reference] = gradients;
  const auto data = [](const Tensor& t) { return static_cast<F*>(t.data_ptr()); };
  if (wanted & kSamplingLocations)
    Device::for_each(LocationGradient<A, F>{points, found.data(), data(grad_locations)}, on);
  if (wanted & kAttentionWeights) Device::for_each(WeightGradient<A, F>{points, found.data(), data(grad_weights)}, on);
  if (wanted & kReferencePoints)
    Device::for_each(ReferenceGradient<A, F>{points, found.data(), data(grad_reference)}, on);
}

template <typename Device>
AttentionGradients ms_deform_attn_backward_portable(const Tensor& grad_output, const AttentionArguments& a,
                                                    const AttentionGeometry& g, int64_t wanted) {
  return dispatch_ms_deform_attn(a, [&](auto s, auto f) -> AttentionGradients {
    using S = decltype(s);
    using F = decltype(f);
    using A = Accumulate<S>;
    const AttentionGradients gradients = new_gradients(a, wanted, scalar_type_of<A>());
    const auto& [grad_value, grad_locations, grad_weights, grad_reference] = gradients;
    const ScaledPoints<Device, A, F> scaled(a, g);
    const View<const S> grad = view_of_heads<const S>(grad_output, g);
    if (wanted & kValue) {
      if (wanted & kOrdered)
        gather_values<Device, S>(grad_output, scaled.points, grad_value);
      else
        Device::for_each(ScatterValues<A, S, F>{scaled.points, grad, view<A>(grad_value)}, a.value);
    }
    const PointGradients<A> found(a, g, wanted);
    if (found.data())
      Device::for_each(FindPointGradients<A, S, F>{scaled.points, view<const S>(a.value), grad, found.data()}, a.value);
    finish_gradients<Device>(scaled.points, found, wanted, gradients, a.value);
    return {torch::stable::to(grad_value, scalar_type_of<S>()), grad_locations, grad_weights, grad_reference};
  });
}

}  // namespace dcn
