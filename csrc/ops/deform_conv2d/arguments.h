// Deformable convolution, what a call is given and gives: its arguments, checked and as geometry, their types, and its
// results.
#pragma once

#include <tuple>

#include "../../core/wanted.h"
#include "../../runtime/tensor.h"
#include "bodies.h"

namespace dcn {

struct ConvArguments {
  Tensor input, offset, weight;
  std::optional<Tensor> bias, mask;
};

// The memory safety of everything that follows rests on this; friendlier messages come from Python.
inline ConvGeometry check_deform_conv2d(const char* op, const ConvArguments& a, const std::vector<int64_t>& stride,
                                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  const auto check = [&](bool condition, const auto&... parts) { dcn::check(condition, op, ": ", parts...); };
  const auto four = [&](const Tensor& t, const char* name) {
    check(t.dim() == 4, name, " must have 4 dimensions, got shape ", shape_of(t));
  };
  four(a.input, "input");
  four(a.offset, "offset");
  four(a.weight, "weight");
  const auto of_size = [&](const std::vector<int64_t>& v, size_t size, const char* name) {
    check(v.size() == size, name, " must hold ", size, " integers, got ", v.size());
  };
  of_size(stride, 2, "stride");
  of_size(padding, 4, "padding");
  of_size(dilation, 2, "dilation");
  // Then no product of two of them overflows: a tensor that repeats one value (expand) may have any size.
  const int64_t most = 1 << 30;
  const auto at_least = [&](const std::vector<int64_t>& v, int64_t least, const char* name) {
    for (int64_t value : v)
      check(value >= least && value <= most, name, " must be from ", least, " to ", most, ", got ", value);
  };
  at_least(stride, 1, "stride");
  at_least(padding, 0, "padding");
  at_least(dilation, 1, "dilation");

  ConvGeometry g{};
  g.batch = a.input.size(0), g.channels = a.input.size(1), g.height = a.input.size(2), g.width = a.input.size(3);
  g.out_channels = a.weight.size(0), g.kernel_h = a.weight.size(2), g.kernel_w = a.weight.size(3);
  g.stride_h = stride[0], g.stride_w = stride[1], g.dilation_h = dilation[0], g.dilation_w = dilation[1];
  g.pad_top = padding[0], g.pad_left = padding[1];
  check(g.channels > 0 && g.height > 0 && g.width > 0, "input must have channels and pixels, got shape ",
        shape_of(a.input));
  check(g.out_channels > 0 && a.weight.size(1) > 0 && g.kernel_h > 0 && g.kernel_w > 0,
        "weight must not be empty, got shape ", shape_of(a.weight));
  check(g.height <= most && g.width <= most && g.kernel_h <= most && g.kernel_w <= most, "input and weight may be ",
        most, " high and wide, got shapes ", shape_of(a.input), " and ", shape_of(a.weight));
  check(g.channels % a.weight.size(1) == 0, "input has ", g.channels,
        " channels, not a multiple of weight.size(1) = ", a.weight.size(1));
  g.groups = g.channels / a.weight.size(1);
  check(g.out_channels % g.groups == 0, "weight has ", g.out_channels, " output channels, not a multiple of its ",
        g.groups, " groups");
  g.out_height = (g.height + padding[0] + padding[2] - g.dilation_h * (g.kernel_h - 1) - 1);
  g.out_width = (g.width + padding[1] + padding[3] - g.dilation_w * (g.kernel_w - 1) - 1);
  check(g.out_height >= 0 && g.out_width >= 0, "the output would be empty: input ", shape_of(a.input), ", weight ",
        shape_of(a.weight));
  g.out_height = g.out_height / g.stride_h + 1;
  g.out_width = g.out_width / g.stride_w + 1;
  check(a.offset.size(1) > 0 && a.offset.size(1) % (2 * g.taps()) == 0, "offset must have 2 * offset_groups * ",
        g.taps(), " channels, got ", a.offset.size(1));
  g.offset_groups = a.offset.size(1) / (2 * g.taps());
  check(g.channels % g.offset_groups == 0, "input channels (", g.channels, ") must be divisible by the ",
        g.offset_groups, " offset groups");
  const auto matches = [&](const Tensor& t, int64_t channels, const char* name) {
    four(t, name);
    check(t.size(0) == g.batch && t.size(1) == channels && t.size(2) == g.out_height && t.size(3) == g.out_width, name,
          " must have shape [", g.batch, ", ", channels, ", ", g.out_height, ", ", g.out_width, "], got ", shape_of(t));
  };
  matches(a.offset, 2 * g.offset_groups * g.taps(), "offset");
  if (a.mask) matches(*a.mask, g.offset_groups * g.taps(), "mask");
  if (a.bias)
    check(a.bias->dim() == 1 && a.bias->size(0) == g.out_channels, "bias must have shape [", g.out_channels, "], got ",
          shape_of(*a.bias));

  check_input_type(op, a.input);
  check_like_input(op, "weight", a.weight, a.input, false);
  if (a.bias) check_like_input(op, "bias", *a.bias, a.input, false);
  check_like_input(op, "offset", a.offset, a.input, true);
  if (a.mask) check_like_input(op, "mask", *a.mask, a.input, true);
  return g;
}

// Where offset and mask differ in type, both are read as float32.
inline void unify_displacement_types(ConvArguments& a) {
  if (!a.mask || a.mask->scalar_type() == a.offset.scalar_type()) return;
  a.offset = torch::stable::to(a.offset, ScalarType::Float);
  a.mask = torch::stable::to(*a.mask, ScalarType::Float);
}

// Calls f(input type, offset type).
template <typename F>
auto dispatch_deform_conv2d(const ConvArguments& a, const F& f) {
  return dispatch_floating(a.input.scalar_type(), [&](auto s) {
    if (a.offset.scalar_type() == a.input.scalar_type()) return f(s, s);
    return f(s, float{});
  });
}

template <typename S, typename F>
Displacement<Accumulate<S>, F> displacement(const ConvArguments& a) {
  return {view<const F>(a.offset), a.mask ? view<const F>(*a.mask) : View<const F>{}};
}

// Gradients of input, offset, weight, mask; an empty tensor for what `needs` does not ask for.
using ConvGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline Tensor new_output(const ConvArguments& a, const ConvGeometry& g) {
  return new_image(a.input, {g.batch, g.out_channels, g.out_height, g.out_width}, a.input.scalar_type(),
                   is_channels_last(a.input));
}

// Input and weight gradients are zeros of the type `sums`; the others are not initialised unless the batch is empty.
inline ConvGradients new_gradients(const ConvArguments& a, int64_t needs, ScalarType sums) {
  const auto like = [&](const Tensor& t, bool wanted, ScalarType type) {
    if (!wanted) return torch::stable::new_empty(a.input, {0}, type);
    return new_image(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, type, is_channels_last(t));
  };
  Tensor grad_input = like(a.input, needs & kInput, sums);
  Tensor grad_weight = like(a.weight, needs & kWeight, sums);
  torch::stable::zero_(grad_input);
  torch::stable::zero_(grad_weight);
  return {grad_input, like(a.offset, needs & kOffset, a.offset.scalar_type()), grad_weight,
          a.mask ? like(*a.mask, needs & kMask, a.mask->scalar_type()) : like(a.input, false, sums)};
}

}  // namespace dcn
