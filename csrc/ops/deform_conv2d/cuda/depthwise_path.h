// Host side of depthwise.h: which bodies run over what, and the memory in between.
#pragma once

#include "../../../runtime/kernels.h"
#include "../portable.h"
#include "depthwise.h"
#include "plan.h"
#include "weight_gradient.h"

namespace dcn {

template <typename Device>
struct DepthwiseDeformConv2d {
  static Tensor forward(const ConvArguments& a, const ConvGeometry& g) {
    const Tensor output = new_output(a, g);
    dispatch_half(a.input.scalar_type(), [&](auto s) {
      using S = decltype(s);
      const Tensor weight = tap_weights<S>(a, g);
      dispatch_pieces(g, [&](auto count) {
        Device::for_each(DepthwiseForward<S, count>{sampler<S>(a, g),
                                                    {static_cast<const S*>(weight.data_ptr()), g.channels},
                                                    a.bias ? static_cast<const S*>(a.bias->data_ptr()) : nullptr,
                                                    pieces<S>(output)},
                         a.input);
      });
    });
    note_kernel("deform_conv2d", "fused depthwise");
    return output;
  }

  static ConvGradients backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g,
                                int64_t needs) {
    const ConvGradients gradients = new_gradients(a, needs, a.input.scalar_type());
    const Tensor evenly = with_even_pixels(grad_output);
    dispatch_deform_conv2d(a, [&](auto s, auto f) {
      using S = decltype(s);
      if constexpr (sizeof(S) == 2) {
        const auto& [grad_input, grad_offset, grad_weight, grad_mask] = gradients;
        const PieceView<const S> from = pieces<const S>(evenly);
        const Tensor packed = tap_weights<S>(a, g);
        const TapWeights<S> weight{static_cast<const S*>(packed.data_ptr()), g.channels};
        if (needs & (kOffset | kMask))
          Device::for_each(
              DepthwiseDisplacementGradient<S>{sampler<S>(a, g), from, weight,
                                               write_either<S>(grad_offset, needs & kOffset),
                                               write_either<S>(grad_mask, needs & kMask), a.offset.stride(1) == 1},
              a.input);
        if (needs & kInput) input_gradient(from, weight, displacement<S, decltype(f)>(a), g, grad_input);
        if (needs & kWeight) weight_gradient(from, sampler<S>(a, g), grad_weight);
      }
    });
    note_kernel("deform_conv2d_backward", "fused depthwise");
    return gradients;
  }

 private:
  template <typename T>
  static PieceView<T> pieces(const Tensor& t) {
    return {view<T>(t), has_whole_pieces(t)};
  }

  // Calls f with how many pieces a thread has, as a constant.
  template <typename F>
  static void dispatch_pieces(const ConvGeometry& g, const F& f) {
    if (g.offset_group_channels() % 16 == 0)
      f(std::integral_constant<int, 2>{});
    else
      f(std::integral_constant<int, 1>{});
  }

  // A pixel is found by its number then, without a division.
  static Tensor with_even_pixels(const Tensor& t) {
    return t.stride(2) == t.size(3) * t.stride(3) ? t : torch::stable::contiguous(t);
  }

  template <typename S>
  static Tensor tap_weights(const ConvArguments& a, const ConvGeometry& g) {
    const Tensor packed = torch::stable::new_empty(a.weight, {g.taps() * g.channels});
    Device::for_each(PackTapWeights<S>{g, view<const S>(a.weight), static_cast<S*>(packed.data_ptr())}, a.weight);
    return packed;
  }

  // Images whose index fits the device's budget.
  static int64_t images_of_range(const ConvGeometry& g) {
    const int64_t samples = g.taps() * g.out_pixels(), cells = (g.height + 1) * (g.width + 1);
    const int64_t bytes = samples * sizeof(IndexEntry<float>) + cells * 2 * sizeof(int32_t);
    return std::max<int64_t>(1, Device::column_bytes / (g.offset_groups * bytes));
  }

  template <typename S, typename F>
  static void input_gradient(const PieceView<const S>& grad_output, const TapWeights<S>& weight,
                             const Displacement<float, F>& where, const ConvGeometry& g, const Tensor& grad_input) {
    const int64_t step = images_of_range(g) * g.out_pixels(), total = g.batch * g.out_pixels();
    for (PixelRange range{0, 0}; range.first < total; range.first += range.count) {
      range.count = std::min(step, total - range.first);
      const BuiltIndex<float> built = build_input_index<Device>(g, range, where, grad_input);
      Device::for_each(DepthwiseInputGradient<S>{built.index, grad_output, weight, pieces<S>(grad_input)}, grad_input);
    }
  }

  template <typename S>
  static void weight_gradient(const PieceView<const S>& grad_output, const Sampler<S>& sampler,
                              const Tensor& grad_weight) {
    dispatch_pieces(sampler.g, [&](auto count) {
      sum_pixels(DepthwiseWeightGradient<S, count>{sampler, grad_output, 1, 0, nullptr}, view<S>(grad_weight),
                 grad_weight);
    });
  }
  template <typename S, int Pieces>
  static void sum_pixels(DepthwiseWeightGradient<S, Pieces> body, const View<S>& to, const Tensor& on) {
    const ConvGeometry& g = body.sampler.g;
    // As many shares of the pixels as keep the device busy, each of at least eight.
    const int64_t total = g.batch * g.out_pixels();
    const int64_t busy = 1024 * Device::multiprocessors(on) / body.parts();
    body.pixels_of_share = std::max<int64_t>(8, total / std::max<int64_t>(1, busy) + 1);
    body.shares = (total + body.pixels_of_share - 1) / body.pixels_of_share;
    Tensor sums = new_sums(body.shares, g, on);
    body.sums = static_cast<float*>(sums.data_ptr());
    Device::for_each(body, on);
    int64_t shares = body.shares;
    while (shares > kSharesTogether) {
      AddSharesTogether add{shares, kSharesTogether, g.taps() * g.channels, static_cast<float*>(sums.data_ptr()),
                            nullptr};
      const Tensor fewer = new_sums(add.shares_left(), g, on);
      add.to = static_cast<float*>(fewer.data_ptr());
      Device::for_each(add, on);
      sums = fewer;
      shares = add.shares_left();
    }
    Device::for_each(AddWeightShares<S>{g, shares, static_cast<float*>(sums.data_ptr()), to}, on);
  }
  static constexpr int64_t kSharesTogether = 32;
  static Tensor new_sums(int64_t shares, const ConvGeometry& g, const Tensor& like) {
    return torch::stable::new_empty(like, {shares * g.taps() * g.channels}, ScalarType::Float);
  }
};

}  // namespace dcn
