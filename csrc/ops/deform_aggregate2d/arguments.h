// Deformable aggregation, what a call is given and gives: its arguments, checked and as attention over the taps of a
// kernel (core/tap_positions.h), their types, and its results.
#pragma once

#include <tuple>

#include "../../core/tap_positions.h"
#include "../../core/wanted.h"
#include "../../runtime/attention.h"
#include "../../runtime/kernels.h"

namespace dcn {

// Which kernels served the operators last.
inline KernelLog deform_aggregate2d_log("deform_aggregate2d"),
    deform_aggregate2d_backward_log("deform_aggregate2d_backward");

struct AggregateArguments {
  Tensor value, offset;
  std::optional<Tensor> weight;
};

struct AggregateOptions {
  std::vector<int64_t> kernel_size, stride, padding, dilation;  // (y, x); padding: (top, left, bottom, right)
  double offset_scale;
  bool remove_center, softmax, official_order;
};

struct AggregateGeometry {
  AttentionGeometry g;  // the map is the only level
  TapGrid taps;
  int64_t out_height;
  bool packed;  // weights follow each group's offsets, in one tensor

  bool has_weights(const AggregateArguments& a) const { return packed || a.weight; }
};

// The memory safety of everything that follows rests on this; friendlier messages come from Python.
inline AggregateGeometry check_deform_aggregate2d(const char* op, const AggregateArguments& a,
                                                  const AggregateOptions& o) {
  const auto check = [&](bool condition, const char* name, const auto&... parts) {
    dcn::check(condition, op, ": ", name, ": expected ", parts...);
  };
  // Then no product of two sizes overflows: a tensor that repeats one value (expand) may have any size.
  const int64_t limit = 1 << 30;
  const auto check_integers = [&](const std::vector<int64_t>& v, size_t count, int64_t smallest, const char* name) {
    check(v.size() == count, name, count, " integers, got ", v.size());
    for (int64_t value : v)
      check(value >= smallest && value <= limit, name, "integers from ", smallest, " to ", limit, ", got ", value);
  };
  check_integers(o.kernel_size, 2, 1, "kernel_size");
  check_integers(o.stride, 2, 1, "stride");
  check_integers(o.padding, 4, 0, "padding");
  check_integers(o.dilation, 2, 1, "dilation");
  check(a.value.dim() == 4, "value", "4 dimensions, got shape ", shape_of(a.value));
  for (int d = 1; d < 4; ++d)
    check(a.value.size(d) > 0 && a.value.size(d) <= limit, "value", "1 to ", limit,
          " rows, columns and channels, got shape ", shape_of(a.value));
  const int64_t all_taps = o.kernel_size[0] * o.kernel_size[1];
  check(!o.remove_center || (o.kernel_size[0] == o.kernel_size[1] && all_taps % 2 == 1 && all_taps > 1),
        "remove_center", "an odd square kernel above 1, got ", o.kernel_size[0], " x ", o.kernel_size[1]);

  AggregateGeometry found{};
  AttentionGeometry& g = found.g;
  TapGrid& taps = found.taps;
  int64_t size[2];  // of the result
  for (int along = 0; along < 2; ++along) {
    const int of = 1 - along;  // options and shapes have y first
    taps.kernel[along] = o.kernel_size[of];
    taps.stride[along] = o.stride[of];
    taps.dilation[along] = o.dilation[of];
    taps.centre[along] = o.dilation[of] * (o.kernel_size[of] - 1) / 2;
    taps.origin[along] = taps.centre[along] - o.padding[of];
    const int64_t last =
        a.value.size(1 + of) + o.padding[of] + o.padding[2 + of] - o.dilation[of] * (o.kernel_size[of] - 1) - 1;
    check(last >= 0, "value", "at least the kernel's size with padding, got value ", shape_of(a.value), " and kernel ",
          o.kernel_size[0], " x ", o.kernel_size[1]);
    size[along] = last / o.stride[of] + 1;
  }
  found.out_height = size[1];
  taps.out_width = size[0];
  taps.scale = o.offset_scale;
  taps.missing = o.remove_center ? all_taps / 2 : all_taps;
  taps.columns = taps.x_first = o.official_order;
  g.batch = a.value.size(0), g.rows = a.value.size(1) * a.value.size(2);
  g.queries = size[0] * size[1], g.points = all_taps - o.remove_center;
  g.levels = 1, g.softmax = o.softmax;
  g.level[0] = {a.value.size(1), a.value.size(2), 0, 0, g.points, 0};

  found.packed = a.offset.dim() == 5 && !a.weight;
  check(a.offset.dim() == 6 || found.packed, "offset", "6 dimensions, or 5 with weights behind the offsets, got shape ",
        shape_of(a.offset));
  g.heads = a.offset.size(3);
  taps.offset_row = found.packed ? 3 * g.points : 2 * g.points;
  taps.weight_row = found.packed ? 3 * g.points : g.points;
  const auto is_of_pixels = [&](const Tensor& t) {
    return t.size(0) == g.batch && t.size(1) == size[1] && t.size(2) == size[0] && t.size(3) == g.heads;
  };
  const bool has_taps =
      found.packed ? a.offset.size(4) == 3 * g.points : a.offset.size(4) == g.points && a.offset.size(5) == 2;
  check(is_of_pixels(a.offset) && has_taps, "offset", "shape [", g.batch, ", ", size[1], ", ", size[0], ", groups, ",
        g.points, ", 2] or, with weights behind the offsets, [..., ", 3 * g.points, "], got ", shape_of(a.offset));
  check(g.heads > 0 && a.value.size(3) % g.heads == 0, "value", "a multiple of the ", g.heads,
        " groups of offset as channels, got ", a.value.size(3));
  g.channels = a.value.size(3) / g.heads;
  check(g.batch <= limit && g.queries <= limit, "value", "at most ", limit, " images and pixels of the result, got ",
        shape_of(a.value));
  check_type(op, "value", a.value);
  check_like(op, "offset", a.offset, "value", a.value, true);
  if (a.weight) {
    const Tensor& t = *a.weight;
    check(t.dim() == 5 && is_of_pixels(t) && t.size(4) == g.points, "weight", "shape [", g.batch, ", ", size[1], ", ",
          size[0], ", ", g.heads, ", ", g.points, "], got ", shape_of(t));
    check_like(op, "weight", t, "value", a.value, true);
  }
  check(found.has_weights(a) || !o.softmax, "weight", "logits for softmax, got none");
  return found;
}

// Where offset and weight differ in type, both are read as float32.
inline void unify_tap_types(AggregateArguments& a) {
  if (!a.weight || a.weight->scalar_type() == a.offset.scalar_type()) return;
  a.offset = torch::stable::to(a.offset, ScalarType::Float);
  a.weight = torch::stable::to(*a.weight, ScalarType::Float);
}

// The pixels of [N, H, W, ...] as one dimension: whether one stride goes from each to the next, and which.
inline bool has_one_stride(const Tensor& t) {
  return t.size(1) == 1 || t.size(2) == 1 || t.stride(1) == t.size(2) * t.stride(2);
}
inline int64_t pixel_stride(const Tensor& t) { return t.size(2) == 1 ? t.stride(1) : t.stride(2); }

// Whatever cuts pixels off is copied.
inline void unify_strides(AggregateArguments& a) {
  for (Tensor* t : {&a.value, &a.offset, a.weight ? &*a.weight : nullptr})
    if (t && !has_one_stride(*t)) *t = torch::stable::contiguous(*t);
}

// Calls f(s, f) with values of the types that the value, and that offset and weight are stored in.
template <typename F>
auto dispatch_deform_aggregate2d(const AggregateArguments& a, const F& f) {
  return dispatch_floating(a.value.scalar_type(), [&](auto s) {
    if (a.offset.scalar_type() == a.value.scalar_type()) return f(s, s);
    return f(s, float{});
  });
}

// [N, H, W, C], value or result or the gradient of one, as [N, H W, G, D].
template <typename S>
View<S> view_of_groups(const Tensor& t, const AttentionGeometry& g) {
  return {static_cast<S*>(t.data_ptr()), t.stride(0), pixel_stride(t), t.stride(3) * g.channels, t.stride(3)};
}

// Without the softmax, which is found first.
template <typename P>
P taps_of(const AggregateArguments& a, const AggregateGeometry& geometry) {
  using F = typename P::Given;
  const AttentionGeometry& g = geometry.g;
  const Tensor& t = a.offset;
  const F* const data = static_cast<const F*>(t.data_ptr());
  const int64_t axis = t.stride(geometry.packed ? 4 : 5), pixel = pixel_stride(t);
  const bool x_first = geometry.taps.x_first;
  typename P::Base points{g, {}, x_first ? axis : -axis, {}, {}, nullptr};
  points.locations = {x_first ? data : data + axis, t.stride(0), pixel, t.stride(3),
                      geometry.packed ? 2 * axis : t.stride(4)};
  if (geometry.packed) points.weights = {data + 2 * g.points * axis, t.stride(0), pixel, t.stride(3), axis};
  if (a.weight) {
    const Tensor& w = *a.weight;
    points.weights = {static_cast<const F*>(w.data_ptr()), w.stride(0), pixel_stride(w), w.stride(3), w.stride(4)};
  }
  return {points, geometry.taps};
}

inline Tensor new_aggregated(const AggregateArguments& a, const AggregateGeometry& geometry) {
  return new_contiguous(a.value, {geometry.g.batch, geometry.out_height, geometry.taps.out_width, a.value.size(3)},
                        a.value.scalar_type());
}

// Gradients of value, offset and weight; an empty tensor for what `wanted` does not ask for.
using AggregateGradients = std::tuple<Tensor, Tensor, Tensor>;

// Those of offset and weight are of the types that these are read in, and not initialised; that of the value is of
// type `accumulator`, and zeros.
inline AggregateGradients new_gradients(const AggregateArguments& a, int64_t wanted, ScalarType accumulator) {
  const ScalarType type = a.offset.scalar_type();
  Tensor grad_value = new_gradient(a.value, wanted & kValue, accumulator, a.value);
  torch::stable::zero_(grad_value);
  return {grad_value, new_gradient(a.offset, wanted & kOffset, type, a.value),
          new_gradient(a.weight, wanted & kWeight, type, a.value)};
}

// Where the gradients of offsets and weights begin, for location_at and weight_at of TapPoints; null: not wanted.
template <typename F>
struct TapGradients {
  F *offset = nullptr, *weight = nullptr;

  TapGradients(const AggregateGradients& gradients, const AggregateGeometry& geometry) {
    const auto data = [](const Tensor& t) { return t.numel() > 0 ? static_cast<F*>(t.data_ptr()) : nullptr; };
    offset = data(std::get<1>(gradients));
    weight = data(std::get<2>(gradients));
    if (geometry.packed && offset) weight = offset + 2 * geometry.g.points;
  }
};

}  // namespace dcn
