// Multi-scale deformable attention, what a call is given and gives: its arguments, checked and as geometry, their
// types, and its results.
#pragma once

#include <tuple>

#include "../../core/attention_positions.h"
#include "../../core/wanted.h"
#include "../../runtime/attention.h"
#include "../../runtime/kernels.h"
#include "../../runtime/tensor.h"

namespace dcn {

// Which kernels served the operators last.
inline KernelLog ms_deform_attn_log("ms_deform_attn"), ms_deform_attn_backward_log("ms_deform_attn_backward");

struct AttentionArguments {
  Tensor value, locations;  // or raw offsets, where there are reference points
  std::optional<Tensor> weights, reference;
};

struct AttentionOptions {
  std::vector<int64_t> spatial_shapes, points;  // [H_0, W_0, H_1, W_1, ...]; of each level
  bool softmax;
  double offset_scale;
};

// The memory safety of everything that follows rests on this; friendlier messages come from Python. The table of levels
// is looked at here, on the host, on every device.
inline AttentionGeometry check_ms_deform_attn(const char* op, const AttentionArguments& a, const AttentionOptions& o) {
  const auto check = [&](bool condition, const char* name, const auto&... parts) {
    dcn::check(condition, op, ": ", name, ": expected ", parts...);
  };
  const auto check_dimensions = [&](const Tensor& t, int64_t count, const char* name) {
    check(t.dim() == count, name, count, " dimensions, got shape ", shape_of(t));
  };
  // Then no product of two sizes overflows: a tensor that repeats one value (expand) may have any size.
  const int64_t limit = 1 << 30;
  check_dimensions(a.value, 4, "value");
  check_dimensions(a.locations, 5, "sampling_locations");
  AttentionGeometry g{};
  g.batch = a.value.size(0), g.rows = a.value.size(1), g.heads = a.value.size(2), g.channels = a.value.size(3);
  g.queries = a.locations.size(1), g.points = a.locations.size(3);
  g.softmax = o.softmax;
  check(g.heads > 0 && g.channels > 0 && g.batch <= limit && g.heads <= limit && g.channels <= limit, "value", "1 to ",
        limit, " heads and channels, got shape ", shape_of(a.value));
  check(a.locations.size(0) == g.batch && a.locations.size(2) == g.heads && a.locations.size(4) == 2 &&
            g.queries <= limit && g.points <= limit,
        "sampling_locations", "shape [", g.batch, ", Q, ", g.heads, ", K, 2], got ", shape_of(a.locations));

  g.levels = static_cast<int64_t>(o.points.size());
  check(g.levels >= 1 && g.levels <= AttentionGeometry::kMaxLevels, "points", "1 to ", AttentionGeometry::kMaxLevels,
        " levels, got ", g.levels);
  check(o.spatial_shapes.size() == 2 * o.points.size(), "spatial_shapes", 2 * g.levels, " integers, got ",
        o.spatial_shapes.size());
  const auto check_integers = [&](const std::vector<int64_t>& v, const char* name) {
    for (int64_t value : v) check(value >= 1 && value <= limit, name, "integers from 1 to ", limit, ", got ", value);
  };
  check_integers(o.spatial_shapes, "spatial_shapes");
  check_integers(o.points, "points");
  int64_t rows = 0, points = 0;
  for (int64_t l = 0; l < g.levels; ++l) {
    const int64_t height = o.spatial_shapes[2 * l], width = o.spatial_shapes[2 * l + 1];
    g.level[l] = {height, width, rows, points, o.points[l], o.offset_scale / static_cast<double>(o.points[l])};
    points += o.points[l];
    // Compared with what is left: the sum may overflow.
    check(height * width <= g.rows - rows, "spatial_shapes", "levels with the ", g.rows,
          " pixels of value together, got more");
    rows += height * width;
  }
  check(rows == g.rows, "spatial_shapes", "levels with the ", g.rows, " pixels of value together, got ", rows);
  check(points == g.points, "points", g.points, " together, as sampling_locations have, got ", points);

  check_type(op, "value", a.value);
  check_like(op, "sampling_locations", a.locations, "value", a.value, true);
  if (a.weights) {
    const Tensor& t = *a.weights;
    check(
        t.dim() == 4 && t.size(0) == g.batch && t.size(1) == g.queries && t.size(2) == g.heads && t.size(3) == g.points,
        "attention_weights", "shape [", g.batch, ", ", g.queries, ", ", g.heads, ", ", g.points, "], got ",
        shape_of(t));
    check_like(op, "attention_weights", t, "value", a.value, true);
  }
  check(a.weights || !o.softmax, "attention_weights", "logits for softmax, got none");
  if (a.reference) {
    const Tensor& t = *a.reference;
    check(t.dim() == 4 && t.size(0) == g.batch && t.size(1) == g.queries && (t.size(2) == g.levels || t.size(2) == 1) &&
              (t.size(3) == 2 || t.size(3) == 4),
          "reference_points", "shape [", g.batch, ", ", g.queries, ", ", g.levels, " or 1, 2 or 4], got ", shape_of(t));
    check_like(op, "reference_points", t, "value", a.value, true);
    g.reference_levels = t.size(2), g.reference_numbers = t.size(3);
  }
  return g;
}

// Where locations, weights and reference points differ in type, all are read as float32.
inline void unify_point_types(AttentionArguments& a) {
  const ScalarType type = a.locations.scalar_type();
  if ((!a.weights || a.weights->scalar_type() == type) && (!a.reference || a.reference->scalar_type() == type)) return;
  a.locations = torch::stable::to(a.locations, ScalarType::Float);
  if (a.weights) a.weights = torch::stable::to(*a.weights, ScalarType::Float);
  if (a.reference) a.reference = torch::stable::to(*a.reference, ScalarType::Float);
}

// Calls f(s, f) with values of the types that the value, and that locations, weights and reference points are stored
// in.
template <typename F>
auto dispatch_ms_deform_attn(const AttentionArguments& a, const F& f) {
  return dispatch_floating(a.value.scalar_type(), [&](auto s) {
    if (a.locations.scalar_type() == a.value.scalar_type()) return f(s, s);
    return f(s, float{});
  });
}

// Without the softmax, which is found first.
template <typename P>
P points_of(const AttentionArguments& a, const AttentionGeometry& g) {
  using F = typename P::Given;
  return {g,
          view<const F>(a.locations),
          a.locations.stride(4),
          a.weights ? view<const F>(*a.weights) : View<const F>{},
          a.reference ? view<const F>(*a.reference) : View<const F>{},
          nullptr};
}

// [N, Q, M * D], result or its gradient, as [N, Q, M, D].
template <typename S>
View<S> view_of_heads(const Tensor& t, const AttentionGeometry& g) {
  return {static_cast<S*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2) * g.channels, t.stride(2)};
}

inline Tensor new_attended(const AttentionArguments& a, const AttentionGeometry& g) {
  return new_contiguous(a.value, {g.batch, g.queries, g.heads * g.channels}, a.value.scalar_type());
}

// Gradients of value, locations, weights and reference points; an empty tensor for what `wanted` does not ask for.
using AttentionGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Those of locations, weights and reference points are of the types that these are read in, and not initialised; that
// of the value are zeros of type `accumulator`.
inline AttentionGradients new_gradients(const AttentionArguments& a, int64_t wanted, ScalarType accumulator) {
  const ScalarType type = a.locations.scalar_type();
  Tensor grad_value = new_gradient(a.value, wanted & kValue, accumulator, a.value);
  torch::stable::zero_(grad_value);
  return {grad_value, new_gradient(a.locations, wanted & kSamplingLocations, type, a.value),
          new_gradient(a.weights, wanted & kAttentionWeights, type, a.value),
          new_gradient(a.reference, wanted & kReferencePoints, type, a.value)};
}

}  // namespace dcn
