// Deformable convolution on the portable path: bodies.h and products over ranges of pixels, on any device.
#pragma once

#include <algorithm>
#include <limits>

#include "../../runtime/indices.h"
#include "../../runtime/input_index.h"
#include "../../runtime/shared_sums.h"
#include "arguments.h"
#include "depthwise_bodies.h"
#include "index.h"

namespace dcn {

// Ranges are whole tiles of the matrix products, where there is a choice.
constexpr int64_t kRangeGrain = 64;

// Pixel ranges whose columns, and whatever else has `more` bytes per pixel and tap, fit the device's budget.
template <typename M, typename Device>
int64_t range_size(const ConvGeometry& g, int64_t more = 0) {
  const int64_t total = g.batch * g.out_pixels();
  const int64_t bytes = (g.channels * static_cast<int64_t>(sizeof(M)) + more) * g.taps();
  const int64_t fitting = Device::column_bytes / bytes / kRangeGrain * kRangeGrain;
  return std::max<int64_t>(1, std::min(total, std::max(fitting, kRangeGrain)));
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
    const int64_t part = (pixels + parts - 1) / parts;
    return std::min((part + kRangeGrain - 1) / kRangeGrain * kRangeGrain, countable);
  }
  // Maps may be much larger than the output.
  const int64_t cells = g.offset_groups * (g.height + 1) * (g.width + 1);
  const int64_t maps = Device::column_bytes / static_cast<int64_t>(2 * sizeof(int32_t)) / cells;
  return std::min(std::max<int64_t>(1, std::min(fitting / pixels, maps)) * pixels, countable);
}

// Whether 32 bits hold all rows, columns and numbers of elements that a range of `step` pixels meets.
template <typename Device>
bool has_int_indices(const ConvGeometry& g, int64_t step, std::initializer_list<const Tensor*> met) {
  const int64_t images = std::min(g.batch, (step + g.out_pixels() - 2) / g.out_pixels() + 1);
  const int64_t positions[] = {g.out_height * g.stride_h + g.kernel_h * g.dilation_h, g.height + g.pad_top,
                               g.out_width * g.stride_w + g.kernel_w * g.dilation_w, g.width + g.pad_left};
  int64_t largest = std::max({step * g.taps() * g.channels, 2 * g.taps() * g.offset_groups, images * g.out_pixels(),
                              images * g.height * g.width * g.channels});
  for (int64_t position : positions) largest = std::max(largest, 2 * position);
  for (const Tensor* t : met) largest = std::max(largest, t->numel() ? extent(*t, images) : 0);
  return largest <= Device::largest_index();
}

// The channels of an image side by side, unless they are. Not worth a copy where most pixels are never read.
inline Tensor channels_together(const Tensor& input, const ConvGeometry& g) {
  if (g.channels == 1 || input.stride(1) == 1 || g.height * g.width > g.out_pixels() * g.taps()) return input;
  return torch::stable::contiguous(input, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Whether the channels of a group, and of an offset group, are whole accesses of 16 bytes.
template <typename S>
bool has_vectors(const Tensor& input, const ConvGeometry& g) {
  constexpr int64_t vector = kVectorValues<S>;
  return is_in_vectors<S>(input) && g.group_channels() % vector == 0 && g.offset_group_channels() % vector == 0;
}

// Pixel by pixel, channels of a pixel side by side: a matrix [pixels, channels] for the products.
inline bool is_by_pixel(const Tensor& t) {
  return is_stored(t, {t.size(1) * t.size(2) * t.size(3), 1, t.size(1) * t.size(3), t.size(1)});
}
inline Tensor by_pixel(const Tensor& t, ScalarType type) {
  return torch::stable::contiguous(torch::stable::to(t, type), torch::headeronly::MemoryFormat::ChannelsLast);
}

template <typename M>
Tensor row_of(const M* data, int64_t count, const Tensor& like) {
  return torch::stable::from_blob(const_cast<M*>(data), {count}, {1}, like.device(), scalar_type_of<M>());
}

// Depthwise weights as [taps, C], in the type that is computed in.
template <typename Device, typename S>
Tensor tap_weights(const ConvArguments& a, const ConvGeometry& g) {
  using A = Accumulate<S>;
  const Tensor packed = torch::stable::new_empty(a.weight, {g.taps() * g.channels}, scalar_type_of<A>());
  Device::for_each(PackTapWeights<S, A>{g, view<const S>(a.weight), static_cast<A*>(packed.data_ptr())}, a.input);
  return packed;
}

template <typename Device, typename S, typename F>
Tensor depthwise_portable(const ConvArguments& a, const ConvGeometry& g, Tensor output) {
  using A = Accumulate<S>;
  const Tensor input = channels_together(a.input, g), weight = tap_weights<Device, S>(a, g);
  const bool in_vectors = is_in_vectors<S>(input) && g.offset_group_channels() % kVectorValues<S> == 0;
  // Pixels of a launch: all of them, but for sizes whose samples need numbers of 64 bits.
  const int64_t total = g.batch * g.out_pixels();
  const int64_t step = std::min(total, std::max<int64_t>(1, (1 << 30) / (g.taps() * g.channels)));
  const bool in_int = has_int_indices<Device>(g, step, {&input, &output, &a.offset, a.mask ? &*a.mask : &a.offset});
  dispatch_indices(in_int, in_vectors, [&](auto index, auto vectors) {
    using I = decltype(index);
    constexpr int V = vectors ? kVectorValues<S> : 1;
    for (int64_t first = 0; first < total; first += step) {
      const RowPositions<A, F, I> positions(g, {first, std::min(step, total - first)}, displacement<F>(a));
      const int64_t image = positions.images.first;
      Device::for_each(
          SumTaps<A, S, F, I, V>{positions, ChannelLanes<I, V>(g.offset_group_channels(), g.offset_groups),
                                 from_image(view<const S>(input), image), static_cast<const A*>(weight.data_ptr()),
                                 a.bias ? static_cast<const S*>(a.bias->data_ptr()) : nullptr,
                                 from_image(view<S>(output), image), in_vectors && is_in_vectors<S>(output)},
          input);
    }
  });
  return output;
}

template <typename Device>
Tensor deform_conv2d_portable(const ConvArguments& a, const ConvGeometry& g) {
  Tensor output = new_output(a, g);
  if (g.batch == 0) return output;
  if (g.is_depthwise())
    return dispatch_deform_conv2d(
        a, [&](auto s, auto f) { return depthwise_portable<Device, decltype(s), decltype(f)>(a, g, output); });
  return dispatch_deform_conv2d(a, [&](auto s, auto f) {
    using S = decltype(s);
    using F = decltype(f);
    using A = Accumulate<S>;
    using M = typename Device::template Product<S>;
    const int64_t total = g.batch * g.out_pixels(), step = range_size<M, Device>(g);
    const int64_t depth = g.group_channels() * g.taps(), outputs = g.group_outputs();
    const Tensor input = channels_together(a.input, g), weight = by_pixel(a.weight, scalar_type_of<M>());
    const Tensor columns = torch::stable::new_empty(input, {g.channels * g.taps() * step}, scalar_type_of<M>());
    const bool in_place = std::is_same_v<S, M> && is_by_pixel(output);
    const Tensor result =
        in_place ? output
                 : new_image(input, {g.batch, g.out_channels, g.out_height, g.out_width}, scalar_type_of<M>(), true);
    const Tensor bias = a.bias ? torch::stable::to(*a.bias, scalar_type_of<M>()) : columns;
    M* const column = static_cast<M*>(columns.data_ptr());
    M* const product = static_cast<M*>(result.data_ptr());
    const M* const kernel = static_cast<const M*>(weight.data_ptr());
    const bool in_int = has_int_indices<Device>(g, step, {&input, &a.offset, a.mask ? &*a.mask : &a.offset});
    dispatch_indices(in_int, has_vectors<S>(input, g), [&](auto index, auto vectors) {
      using I = decltype(index);
      constexpr int V = vectors ? kVectorValues<S> : 1;
      for (int64_t first = 0; first < total; first += step) {
        const PixelRange range{first, std::min(step, total - first)};
        const RowPositions<A, F, I> positions(g, range, displacement<F>(a));
        Device::for_each(
            FillColumns<A, S, F, M, I, V>{positions, ChannelLanes<I, V>(g.offset_group_channels(), g.offset_groups),
                                          from_image(view<const S>(input), positions.images.first),
                                          Columns<M, I>(column, g, range)},
            input);
        for (int64_t i = 0; i < g.groups; ++i) {
          const Tensor out = matrix(product + range.first * g.out_channels + i * outputs, range.count, outputs,
                                    g.out_channels, 1, input);
          const Tensor of_group = matrix(column + i * depth * range.count, range.count, depth, depth, 1, input);
          const Tensor by = matrix(kernel + i * outputs * depth, depth, outputs, 1, depth, input);
          if (a.bias)
            Device::multiply_and_add(out, row_of(static_cast<const M*>(bias.data_ptr()) + i * outputs, outputs, input),
                                     of_group, by);
          else
            Device::multiply(out, of_group, by);
        }
      }
    });
    if (!in_place) torch::stable::copy_(output, result);
    return output;
  });
}

// Adds to `sums`, which begin with the range's first image, in an order that does not vary.
template <typename Device, typename A, typename M, typename I, int V, typename P>
void gather_input(const P& positions, const ConvGeometry& g, const Columns<const M, I>& grad_columns,
                  const View<A>& sums, const Tensor& like) {
  const BuiltIndex<A> built = build_input_index<Device>(positions, like);
  const ColumnGather<A, M, I, V> gather{static_cast<I>(positions.rows()),
                                        ChannelLanes<I, V>(g.offset_group_channels(), g.offset_groups), built.index,
                                        grad_columns};
  const SummedChunks chunks = sum_chunks<Device>(gather, positions.size(), like);
  Device::for_each(
      GatherInputGradient<A, M, I, V>{gather, chunks.of(gather), positions.images.count * g.height * g.width,
                                      Divisor<I>(g.width), Divisor<I>(g.height), sums},
      like);
}

// The gradient of depthwise weights: adds what a range of pixels gives, in an order that does not vary.
template <typename Device, typename A, typename M>
void add_depthwise_weights(const M* columns, const M* grad_output, int64_t pixels, const ConvGeometry& g, A* to,
                           const Tensor& like) {
  const int64_t shares = SumShares<A, M>::shares_of(pixels);
  const Tensor sums = torch::stable::new_empty(like, {shares * g.taps() * g.channels}, scalar_type_of<A>());
  A* const sum = static_cast<A*>(sums.data_ptr());
  Device::for_each(SumShares<A, M>{pixels, g.taps(), g.channels, columns, grad_output, sum}, like);
  Device::for_each(AddShares<A>{shares, g.taps(), g.channels, sum, to}, like);
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
    if (total == 0) {
      ConvGradients gradients = new_gradients(a, wanted, scalar_type_of<S>());
      torch::stable::zero_(std::get<2>(gradients));
      return gradients;
    }
    // Those of input and weight are sums first.
    const ConvGradients displacements = new_gradients(a, wanted & (kOffset | kMask), scalar_type_of<S>());
    const Tensor &grad_offset = std::get<1>(displacements), &grad_mask = std::get<3>(displacements);

    const Tensor input = channels_together(a.input, g), weight = by_pixel(a.weight, scalar_type_of<M>());
    const Tensor grad = by_pixel(grad_output, scalar_type_of<M>());
    const auto grad_data = [&](const PixelRange& range) {
      return static_cast<const M*>(grad.data_ptr()) + range.first * g.out_channels;
    };
    const Tensor columns = torch::stable::new_empty(input, {g.channels * g.taps() * step}, scalar_type_of<M>());
    const auto zeros = [&](const Tensor& like, bool is_wanted, bool channels_last) {
      Tensor sums = is_wanted ? new_image(like, {like.size(0), like.size(1), like.size(2), like.size(3)},
                                          scalar_type_of<A>(), channels_last)
                              : torch::stable::new_empty(like, {0}, scalar_type_of<A>());
      return torch::stable::zero_(sums);
    };
    const Tensor input_sums = zeros(input, wanted & kInput, input.stride(1) == 1);
    const Tensor weight_sums = zeros(weight, wanted & kWeight, true);
    const bool adds_products = !std::is_same_v<M, A>;
    const Tensor part = torch::stable::new_empty(input, {adds_products && (wanted & kWeight) ? outputs * depth : 0},
                                                 scalar_type_of<M>());
    // Threads that share the channels of a sample, of which each takes eight or more.
    int shift = 0;
    while (2 << shift <= Device::kLanes && (2 << shift) * kElementChannels <= g.offset_group_channels()) ++shift;
    M* const column = static_cast<M*>(columns.data_ptr());
    const M* const kernel = static_cast<const M*>(weight.data_ptr());
    A* const weight_sum = static_cast<A*>(weight_sums.data_ptr());

    const bool in_int =
        has_int_indices<Device>(g, step,
                                {&input, &a.offset, a.mask ? &*a.mask : &a.offset,
                                 wanted & kOffset ? &grad_offset : &a.offset, wanted & kMask ? &grad_mask : &a.offset});
    // Depthwise, columns are those of one group, and bodies take the place of a product for each channel.
    const bool depthwise = g.is_depthwise();
    ConvGeometry of_columns = g;
    if (depthwise) of_columns.groups = 1;
    const Tensor taps = depthwise && (displaced || (wanted & kInput)) ? tap_weights<Device, S>(a, g) : weight;
    dispatch_indices(in_int, has_vectors<S>(input, of_columns), [&](auto index, auto vectors) {
      using I = decltype(index);
      constexpr int V = vectors ? kVectorValues<S> : 1, gathered = vectors ? kVectorValues<M> : 1;
      for (PixelRange range{0, 0}; range.first < total; range.first += range.count) {
        const int64_t left =
            step < g.out_pixels() ? g.out_pixels() - range.first % g.out_pixels() : total - range.first;
        range.count = std::min(step, left);
        const RowPositions<A, F, I> positions(g, range, displacement<F>(a));
        const int64_t image = positions.images.first;
        const View<const S> read = from_image(view<const S>(input), image);
        const auto of_group = [&](int64_t i) {
          return matrix(column + i * depth * range.count, range.count, depth, depth, 1, input);
        };
        const auto grad_of = [&](int64_t i, bool transposed) {
          const M* const first = grad_data(range) + i * outputs;
          return transposed ? matrix(first, outputs, range.count, 1, g.out_channels, input)
                            : matrix(first, range.count, outputs, g.out_channels, 1, input);
        };
        if (displaced || (wanted & kInput)) {
          if (depthwise)
            Device::for_each(
                SpreadGradient<A, M, I, gathered>{range.count * g.taps(), ChannelLanes<I, gathered>(g.channels, 1),
                                                  Divisor<I>(g.taps()), grad_data(range),
                                                  static_cast<const A*>(taps.data_ptr()), column},
                input);
          for (int64_t i = 0; !depthwise && i < g.groups; ++i)
            Device::multiply(of_group(i), grad_of(i, false),
                             matrix(kernel + i * outputs * depth, outputs, depth, depth, 1, input));
          const Columns<const M, I> grad_columns(column, of_columns, range);
          if (displaced)
            Device::for_each(
                SharedSums<DisplacementGradient<A, S, F, M, I, V>>{
                    {positions, read, grad_columns,
                     wanted & kOffset ? from_image(view<F>(grad_offset), image) : View<F>{},
                     wanted & kMask ? from_image(view<F>(grad_mask), image) : View<F>{}},
                    shift},
                input);
          if (wanted & kInput)
            gather_input<Device, A, M, I, gathered>(positions, g, grad_columns, from_image(view<A>(input_sums), image),
                                                    input);
        }
        if (wanted & kWeight) {
          Device::for_each(
              FillColumns<A, S, F, M, I, V>{positions, ChannelLanes<I, V>(g.offset_group_channels(), g.offset_groups),
                                            read, Columns<M, I>(column, of_columns, range)},
              input);
          if (depthwise) add_depthwise_weights<Device>(column, grad_data(range), range.count, g, weight_sum, input);
          for (int64_t i = 0; !depthwise && i < g.groups; ++i) {
            A* const sum = weight_sum + i * outputs * depth;
            if constexpr (std::is_same_v<M, A>) {
              const Tensor sums = matrix(sum, outputs, depth, depth, 1, input);
              Device::multiply_and_add(sums, sums, grad_of(i, true), of_group(i));
            } else {
              M* const product = static_cast<M*>(part.data_ptr());
              Device::multiply(matrix(product, outputs, depth, depth, 1, input), grad_of(i, true), of_group(i));
              Device::for_each(AddWeightGradient<A, M>{outputs * depth, product, sum}, input);
            }
          }
        }
      }
    });
    // In the type and layout of the argument.
    const auto finished = [&](const Tensor& of, const Tensor& sums, bool is_wanted) {
      if (std::is_same_v<S, A> && (!is_wanted || is_channels_last(sums) == is_channels_last(of))) return sums;
      if (!is_wanted) return torch::stable::new_empty(of, {0});
      Tensor gradient =
          new_image(of, {of.size(0), of.size(1), of.size(2), of.size(3)}, scalar_type_of<S>(), is_channels_last(of));
      return torch::stable::copy_(gradient, sums);
    };
    return {finished(a.input, input_sums, wanted & kInput), grad_offset,
            finished(a.weight, weight_sums, wanted & kWeight), grad_mask};
  });
}

}  // namespace dcn
