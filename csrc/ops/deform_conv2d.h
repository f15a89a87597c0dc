// Deformable convolution on any device: check, allocate, then portable columns and products over pixel ranges.
// Which device is a template argument; the arithmetic is in deform_conv2d_body.h.
#pragma once

#include <algorithm>
#include <limits>
#include <tuple>

#include "../runtime/tensor.h"
#include "deform_conv2d_index.h"

namespace dcn {

struct ConvArguments {
  Tensor input, offset, weight;
  std::optional<Tensor> bias, mask;
};

// Bits of `needs` in the backward. kOrdered: no sums whose order may vary.
enum Needs : int64_t { kInput = 1, kOffset = 2, kWeight = 4, kMask = 8, kOrdered = 1 << 8 };

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

// Pixel ranges whose columns, and whatever else has `more` bytes per pixel and tap, fit the device's budget.
template <typename M, typename Device>
int64_t range_size(const ConvGeometry& g, int64_t more = 0) {
  const int64_t total = g.batch * g.out_pixels();
  const int64_t bytes = (g.channels * static_cast<int64_t>(sizeof(M)) + more) * g.taps();
  return std::max<int64_t>(1, std::min(total, std::max<int64_t>(Device::column_bytes / bytes, 64)));
}

// Ranges of the backward: whole images where they fit, else parts of one image. Every range visits all pixels of its
// images for the input's gradient, so an image has at most 16 parts, whatever its size.
template <typename M, typename A, typename Device>
int64_t gradient_range_size(const ConvGeometry& g) {
  const int64_t pixels = g.out_pixels();
  const int64_t fitting = range_size<M, Device>(g, g.offset_groups * sizeof(IndexEntry<A>));
  // The index counts samples in 32 bits.
  const int64_t countable = std::numeric_limits<int32_t>::max() / (g.offset_groups * g.taps());
  check(countable > 0, "deform_conv2d_backward: offset must hold fewer than 2^31 samples of an output pixel, got ",
        g.offset_groups * g.taps());
  if (fitting < pixels) {
    const int64_t parts = std::min<int64_t>((pixels + fitting - 1) / fitting, 16);
    return std::min((pixels + parts - 1) / parts, countable);
  }
  // Maps may be much larger than the output.
  const int64_t cells = g.offset_groups * (g.height + 1) * (g.width + 1);
  const int64_t maps = Device::column_bytes / static_cast<int64_t>(2 * sizeof(int32_t)) / cells;
  return std::min(std::max<int64_t>(1, std::min(fitting / pixels, maps)) * pixels, countable);
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

template <typename Device>
Tensor deform_conv2d_portable(const ConvArguments& a, const ConvGeometry& g) {
  const Tensor output = new_output(a, g);
  dispatch_deform_conv2d(a, [&](auto s, auto f) {
    using S = decltype(s);
    using F = decltype(f);
    using A = Accumulate<S>;
    using M = typename Device::template Product<S>;
    const int64_t total = g.batch * g.out_pixels(), step = range_size<M, Device>(g);
    const int64_t depth = g.group_channels() * g.taps(), outputs = g.group_outputs();
    if (total == 0) return;
    const Tensor weight = torch::stable::contiguous(torch::stable::to(a.weight, scalar_type_of<M>()));
    const Tensor columns = torch::stable::new_empty(a.input, {g.channels * g.taps() * step}, scalar_type_of<M>());
    const Tensor products = torch::stable::new_empty(a.input, {g.out_channels * step}, scalar_type_of<M>());
    M* const column = static_cast<M*>(columns.data_ptr());
    M* const product = static_cast<M*>(products.data_ptr());
    const M* const kernel = static_cast<const M*>(weight.data_ptr());
    const S* const bias = a.bias ? static_cast<const S*>(a.bias->data_ptr()) : nullptr;
    for (int64_t first = 0; first < total; first += step) {
      const PixelRange range{first, std::min(step, total - first)};
      Device::for_each(FillColumns<A, S, F, M>{g, range, view<const S>(a.input), displacement<S, F>(a), column},
                       a.input);
      for (int64_t i = 0; i < g.groups; ++i)
        Device::multiply(matrix(product + i * outputs * range.count, outputs, range.count, range.count, 1, a.input),
                         matrix(kernel + i * outputs * depth, outputs, depth, depth, 1, a.input),
                         matrix(column + i * depth * range.count, depth, range.count, range.count, 1, a.input));
      Device::for_each(StoreOutput<A, S, M>{g, range, product, bias, view<S>(output)}, a.input);
    }
  });
  return output;
}

// An index with its memory.
template <typename A>
struct BuiltIndex {
  Tensor begin, entries;
  InputIndex<A> index;
};

// Of the samples of `range`, which may be any; their number must fit 32 bits. Nothing is read back on the host.
template <typename Device, typename A, typename F>
BuiltIndex<A> build_input_index(const ConvGeometry& g, const PixelRange& range, const Displacement<A, F>& where,
                                const Tensor& like) {
  InputIndex<A> index(g, range);
  Tensor begin = torch::stable::new_zeros(like, {index.cells() + 1}, ScalarType::Int);
  Device::for_each(CountSamples<A, F>{index, where, static_cast<int32_t*>(begin.data_ptr())}, like);
  begin = Device::running_sum(begin);
  const Tensor entries = torch::stable::new_empty(like, {4 * index.samples()}, scalar_type_of<A>());
  index.begin = static_cast<int32_t*>(begin.data_ptr());
  index.entries = static_cast<IndexEntry<A>*>(entries.data_ptr());
  Device::for_each(FillIndex<A, F>{index, where}, like);
  Device::for_each(SortCells<A>{index}, like);
  return {begin, entries, index};
}

template <typename Device>
ConvGradients deform_conv2d_backward_portable(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g,
                                              int64_t needs) {
  return dispatch_deform_conv2d(a, [&](auto s, auto f) -> ConvGradients {
    using S = decltype(s);
    using F = decltype(f);
    using A = Accumulate<S>;
    using M = typename Device::template Product<S>;
    const int64_t total = g.batch * g.out_pixels(), step = gradient_range_size<M, A, Device>(g);
    const int64_t depth = g.group_channels() * g.taps(), outputs = g.group_outputs();
    const bool displaced = needs & (kOffset | kMask);

    const auto [grad_input, grad_offset, grad_weight, grad_mask] = new_gradients(a, needs, scalar_type_of<A>());
    const Tensor weight = torch::stable::contiguous(torch::stable::to(a.weight, scalar_type_of<M>()));
    const Tensor columns = torch::stable::new_empty(a.input, {g.channels * g.taps() * step}, scalar_type_of<M>());
    const Tensor gathered = torch::stable::new_empty(a.input, {g.out_channels * step}, scalar_type_of<M>());
    const Tensor part =
        torch::stable::new_empty(a.input, {needs & kWeight ? g.out_channels * depth : 0}, scalar_type_of<M>());
    M* const column = static_cast<M*>(columns.data_ptr());
    M* const grad = static_cast<M*>(gathered.data_ptr());
    M* const product = static_cast<M*>(part.data_ptr());
    const M* const kernel = static_cast<const M*>(weight.data_ptr());
    const Displacement<A, F> where = displacement<S, F>(a);

    for (PixelRange range{0, 0}; range.first < total; range.first += range.count) {
      const int64_t left = step < g.out_pixels() ? g.out_pixels() - range.first % g.out_pixels() : total - range.first;
      range.count = std::min(step, left);
      Device::for_each(GatherGradOutput<S, M>{g, range, view<const S>(grad_output), grad}, a.input);
      const auto grad_of = [&](int64_t i) {
        return matrix(grad + i * outputs * range.count, outputs, range.count, range.count, 1, a.input);
      };
      if (displaced || (needs & kInput)) {
        for (int64_t i = 0; i < g.groups; ++i)
          Device::multiply(matrix(column + i * depth * range.count, depth, range.count, range.count, 1, a.input),
                           matrix(kernel + i * outputs * depth, depth, outputs, 1, depth, a.input), grad_of(i));
        if (displaced)
          Device::for_each(DisplacementGradient<A, S, F, M>{g, range, view<const S>(a.input), where, column,
                                                            needs & kOffset ? view<F>(grad_offset) : View<F>{},
                                                            needs & kMask ? view<F>(grad_mask) : View<F>{}},
                           a.input);
        if (needs & kInput) {
          const BuiltIndex<A> built = build_input_index<Device>(g, range, where, a.input);
          Device::for_each(GatherInputGradient<A, M>{built.index, column, view<A>(grad_input)}, a.input);
        }
      }
      if (needs & kWeight) {
        Device::for_each(FillColumns<A, S, F, M>{g, range, view<const S>(a.input), where, column}, a.input);
        for (int64_t i = 0; i < g.groups; ++i)
          Device::multiply(matrix(product + i * outputs * depth, outputs, depth, depth, 1, a.input), grad_of(i),
                           matrix(column + i * depth * range.count, range.count, depth, 1, range.count, a.input));
        Device::for_each(AddWeightGradient<A, M>{g, product, view<A>(grad_weight)}, a.input);
      }
    }
    return {torch::stable::to(grad_input, scalar_type_of<S>()), grad_offset,
            torch::stable::to(grad_weight, scalar_type_of<S>()), grad_mask};
  });
}

// The operators as torch calls them. `Implementation` has forward(arguments, geometry) and
// backward(grad_output, arguments, geometry, needs).
template <typename Implementation>
Tensor deform_conv2d(Tensor input, Tensor offset, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> mask,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  ConvArguments a{input, offset, weight, bias, mask};
  const ConvGeometry g = check_deform_conv2d("deform_conv2d", a, stride, padding, dilation);
  unify_displacement_types(a);
  if (a.bias) a.bias = torch::stable::contiguous(*a.bias);
  return Implementation::forward(a, g);
}

template <typename Implementation>
ConvGradients deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor weight,
                                     std::optional<Tensor> mask, std::vector<int64_t> stride,
                                     std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t needs) {
  ConvArguments a{input, offset, weight, std::nullopt, mask};
  const char* op = "deform_conv2d_backward";
  const ConvGeometry g = check_deform_conv2d(op, a, stride, padding, dilation);
  check(grad_output.dim() == 4 && grad_output.size(0) == g.batch && grad_output.size(1) == g.out_channels &&
            grad_output.size(2) == g.out_height && grad_output.size(3) == g.out_width,
        op, ": grad_output must have shape [", g.batch, ", ", g.out_channels, ", ", g.out_height, ", ", g.out_width,
        "], got ", shape_of(grad_output));
  check_like_input(op, "grad_output", grad_output, input, false);
  if (!mask) needs &= ~static_cast<int64_t>(kMask);
  unify_displacement_types(a);
  auto [grad_input, grad_offset, grad_weight, grad_mask] = Implementation::backward(grad_output, a, g, needs);
  grad_offset = torch::stable::to(grad_offset, offset.scalar_type());
  if (mask) grad_mask = torch::stable::to(grad_mask, mask->scalar_type());
  return {grad_input, grad_offset, grad_weight, grad_mask};
}

}  // namespace dcn
