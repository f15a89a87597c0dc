// Deformable convolution, what a call is given and gives: its arguments, checked and as geometry, their types, and its
// results.
#pragma once

#include <tuple>

#include "../../core/conv_positions.h"
#include "../../core/wanted.h"
#include "../../runtime/kernels.h"
#include "../../runtime/tensor.h"

namespace dcn {

// Which kernels served the operators last.
inline KernelLog deform_conv2d_log("deform_conv2d"), deform_conv2d_backward_log("deform_conv2d_backward");

struct ConvArguments {
  Tensor input, offset, weight;
  std::optional<Tensor> bias, mask;
};

// The memory safety of everything that follows rests on this; friendlier messages come from Python.
inline ConvGeometry check_deform_conv2d(const char* op, const ConvArguments& a, const std::vector<int64_t>& stride,
                                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  const auto check = [&](bool condition, const char* name, const auto&... parts) {
    dcn::check(condition, op, ": ", name, ": expected ", parts...);
  };
  const auto check_dimensions = [&](const Tensor& t, const char* name) {
    check(t.dim() == 4, name, "4 dimensions, got shape ", shape_of(t));
  };
  check_dimensions(a.input, "input");
  check_dimensions(a.offset, "offset");
  check_dimensions(a.weight, "weight");
  // Then no product of two sizes overflows: a tensor that repeats one value (expand) may have any size.
  const int64_t limit = 1 << 30;
  const auto check_integers = [&](const std::vector<int64_t>& v, size_t count, int64_t smallest, const char* name) {
    check(v.size() == count, name, count, " integers, got ", v.size());
    for (int64_t value : v)
      check(value >= smallest && value <= limit, name, "integers from ", smallest, " to ", limit, ", got ", value);
  };
  check_integers(stride, 2, 1, "stride");
  check_integers(padding, 4, 0, "padding");
  check_integers(dilation, 2, 1, "dilation");
  const auto check_sizes = [&](const Tensor& t, const char* name) {
    check(t.size(1) > 0 && t.size(2) > 0 && t.size(3) > 0 && t.size(2) <= limit && t.size(3) <= limit, name,
          "channels, and 1 to ", limit, " rows and columns, got shape ", shape_of(t));
  };
  check_sizes(a.input, "input");
  check_sizes(a.weight, "weight");

  ConvGeometry g{};
  g.batch = a.input.size(0), g.channels = a.input.size(1), g.height = a.input.size(2), g.width = a.input.size(3);
  g.out_channels = a.weight.size(0), g.kernel_h = a.weight.size(2), g.kernel_w = a.weight.size(3);
  g.stride_h = stride[0], g.stride_w = stride[1], g.dilation_h = dilation[0], g.dilation_w = dilation[1];
  g.pad_top = padding[0], g.pad_left = padding[1];
  check(g.channels % a.weight.size(1) == 0, "input", "a multiple of weight.size(1) = ", a.weight.size(1),
        " channels, got ", g.channels);
  g.groups = g.channels / a.weight.size(1);
  check(g.out_channels > 0 && g.out_channels % g.groups == 0, "weight", "a multiple of ", g.groups,
        " output channels, one for each group, got ", g.out_channels);
  const int64_t last_row = g.height + padding[0] + padding[2] - g.dilation_h * (g.kernel_h - 1) - 1;
  const int64_t last_column = g.width + padding[1] + padding[3] - g.dilation_w * (g.kernel_w - 1) - 1;
  check(last_row >= 0 && last_column >= 0, "input", "at least the kernel's size with padding, got input ",
        shape_of(a.input), " and weight ", shape_of(a.weight));
  g.out_height = last_row / g.stride_h + 1;
  g.out_width = last_column / g.stride_w + 1;

  check(a.offset.size(1) > 0 && a.offset.size(1) % (2 * g.taps()) == 0, "offset", "2 * offset_groups * ", g.taps(),
        " channels, got ", a.offset.size(1));
  g.offset_groups = a.offset.size(1) / (2 * g.taps());
  check(g.channels % g.offset_groups == 0, "input", "a multiple of ", g.offset_groups,
        " channels, one for each offset group, got ", g.channels);
  const auto check_output_map = [&](const Tensor& t, int64_t channels, const char* name) {
    check_dimensions(t, name);
    check(t.size(0) == g.batch && t.size(1) == channels && t.size(2) == g.out_height && t.size(3) == g.out_width, name,
          "shape [", g.batch, ", ", channels, ", ", g.out_height, ", ", g.out_width, "], got ", shape_of(t));
  };
  check_output_map(a.offset, 2 * g.offset_groups * g.taps(), "offset");
  if (a.mask) check_output_map(*a.mask, g.offset_groups * g.taps(), "mask");
  if (a.bias)
    check(a.bias->dim() == 1 && a.bias->size(0) == g.out_channels, "bias", "shape [", g.out_channels, "], got ",
          shape_of(*a.bias));

  check_type(op, "input", a.input);
  check_like(op, "weight", a.weight, "input", a.input, false);
  if (a.bias) check_like(op, "bias", *a.bias, "input", a.input, false);
  check_like(op, "offset", a.offset, "input", a.input, true);
  if (a.mask) check_like(op, "mask", *a.mask, "input", a.input, true);
  return g;
}

// Where offset and mask differ in type, both are read as float32.
inline void unify_displacement_types(ConvArguments& a) {
  if (!a.mask || a.mask->scalar_type() == a.offset.scalar_type()) return;
  a.offset = torch::stable::to(a.offset, ScalarType::Float);
  a.mask = torch::stable::to(*a.mask, ScalarType::Float);
}

// Calls f(s, f) with values of the types that input and weight, and that offset and mask are stored in.
template <typename F>
auto dispatch_deform_conv2d(const ConvArguments& a, const F& f) {
  return dispatch_floating(a.input.scalar_type(), [&](auto s) {
    if (a.offset.scalar_type() == a.input.scalar_type()) return f(s, s);
    return f(s, float{});
  });
}

template <typename F>
Displacement<F> displacement(const ConvArguments& a) {
  return {view<const F>(a.offset), a.mask ? view<const F>(*a.mask) : View<const F>{}};
}

// Gradients of input, offset, weight, mask; an empty tensor for what `wanted` does not ask for.
using ConvGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline Tensor new_output(const ConvArguments& a, const ConvGeometry& g) {
  return new_image(a.input, {g.batch, g.out_channels, g.out_height, g.out_width}, a.input.scalar_type(),
                   is_channels_last(a.input));
}

// Not initialised: most paths write what is wanted whole. Those of input and weight are of type `accumulator`.
inline ConvGradients new_gradients(const ConvArguments& a, int64_t wanted, ScalarType accumulator) {
  const auto like = [&](const Tensor& t, bool is_wanted, ScalarType type) {
    if (!is_wanted) return torch::stable::new_empty(a.input, {0}, type);
    return new_image(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, type, is_channels_last(t));
  };
  return {like(a.input, wanted & kInput, accumulator), like(a.offset, wanted & kOffset, a.offset.scalar_type()),
          like(a.weight, wanted & kWeight, accumulator),
          a.mask ? like(*a.mask, wanted & kMask, a.mask->scalar_type()) : like(a.input, false, accumulator)};
}

}  // namespace dcn
