// Deformable convolution on the portable path: bodies.h and products over ranges of pixels, on any device.
#pragma once

#include <algorithm>
#include <limits>

#include "../../runtime/input_index.h"
#include "arguments.h"
#include "index.h"

namespace dcn {

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
  check(countable > 0, "deform_conv2d_backward: offset: expected fewer than 2^31 samples of an output pixel, got ",
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
    const Displacement<F> moved = displacement<F>(a);
    for (int64_t first = 0; first < total; first += step) {
      const PixelRange range{first, std::min(step, total - first)};
      const ConvPositions<A, F> positions(g, range, moved);
      Device::for_each(FillColumns<A, S, F, M>{positions, view<const S>(a.input), column}, a.input);
      for (int64_t i = 0; i < g.groups; ++i)
        Device::multiply(matrix(product + i * outputs * range.count, outputs, range.count, range.count, 1, a.input),
                         matrix(kernel + i * outputs * depth, outputs, depth, depth, 1, a.input),
                         matrix(column + i * depth * range.count, depth, range.count, range.count, 1, a.input));
      Device::for_each(StoreOutput<A, S, M>{g, range, product, bias, view<S>(output)}, a.input);
    }
  });
  return output;
}

template <typename Device>
ConvGradients deform_conv2d_backward_portable(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g,
                                              int64_t wanted) {
  return dispatch_deform_conv2d(a, [&](auto s, auto f) -> ConvGradients {
    using S = decltype(s);
    using F = decltype(f);
    using A = Accumulate<S>;
    using M = typename Device::template Product<S>;
    const int64_t total = g.batch * g.out_pixels(), step = gradient_range_size<M, A, Device>(g);
    const int64_t depth = g.group_channels() * g.taps(), outputs = g.group_outputs();
    const bool displaced = wanted & (kOffset | kMask);

    const auto [grad_input, grad_offset, grad_weight, grad_mask] = new_gradients(a, wanted, scalar_type_of<A>());
    const Tensor weight = torch::stable::contiguous(torch::stable::to(a.weight, scalar_type_of<M>()));
    const Tensor columns = torch::stable::new_empty(a.input, {g.channels * g.taps() * step}, scalar_type_of<M>());
    const Tensor gathered = torch::stable::new_empty(a.input, {g.out_channels * step}, scalar_type_of<M>());
    const Tensor part =
        torch::stable::new_empty(a.input, {wanted & kWeight ? g.out_channels * depth : 0}, scalar_type_of<M>());
    M* const column = static_cast<M*>(columns.data_ptr());
    M* const grad = static_cast<M*>(gathered.data_ptr());
    M* const product = static_cast<M*>(part.data_ptr());
    const M* const kernel = static_cast<const M*>(weight.data_ptr());
    const Displacement<F> moved = displacement<F>(a);

    for (PixelRange range{0, 0}; range.first < total; range.first += range.count) {
      const int64_t left = step < g.out_pixels() ? g.out_pixels() - range.first % g.out_pixels() : total - range.first;
      range.count = std::min(step, left);
      const ConvPositions<A, F> positions(g, range, moved);
      Device::for_each(GatherGradOutput<S, M>{g, range, view<const S>(grad_output), grad}, a.input);
      const auto grad_of = [&](int64_t i) {
        return matrix(grad + i * outputs * range.count, outputs, range.count, range.count, 1, a.input);
      };
      if (displaced || (wanted & kInput)) {
        for (int64_t i = 0; i < g.groups; ++i)
          Device::multiply(matrix(column + i * depth * range.count, depth, range.count, range.count, 1, a.input),
                           matrix(kernel + i * outputs * depth, depth, outputs, 1, depth, a.input), grad_of(i));
        if (displaced)
          Device::for_each(DisplacementGradient<A, S, F, M>{positions, view<const S>(a.input), column,
                                                            wanted & kOffset ? view<F>(grad_offset) : View<F>{},
                                                            wanted & kMask ? view<F>(grad_mask) : View<F>{}},
                           a.input);
        if (wanted & kInput) {
          const BuiltIndex<A> built = build_input_index<Device>(positions, a.input);
          Device::for_each(
              GatherInputGradient<A, M>{g, range, positions.images, built.index, column, view<A>(grad_input)}, a.input);
        }
      }
      if (wanted & kWeight) {
        Device::for_each(FillColumns<A, S, F, M>{positions, view<const S>(a.input), column}, a.input);
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

}  // namespace dcn
