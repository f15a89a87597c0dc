// The fused path of depthwise convolutions on the host: runs the bodies of depthwise.h, with the memory in between.
#pragma once

#include "../../../runtime/input_index.h"
#include "depthwise.h"
#include "plan.h"
#include "weight_sums.h"

namespace dcn {

template <typename Device>
struct DepthwiseDeformConv2d {
  static Tensor forward(const ConvArguments& a, const ConvGeometry& g) {
    const Tensor output = new_output(a, g);
    dispatch_half(a.input.scalar_type(), [&](auto s) {
      using S = decltype(s);
      const Tensor weight = tap_weights<S>(a, g);
      dispatch_vectors(g, [&](auto count) {
        Device::for_each(DepthwiseForward<S, count>{sampler<S>(a, g),
                                                    {static_cast<const S*>(weight.data_ptr()), g.channels},
                                                    a.bias ? static_cast<const S*>(a.bias->data_ptr()) : nullptr,
                                                    vectors<S>(output)},
                         a.input);
      });
    });
    deform_conv2d_log.note("fused depthwise");
    return output;
  }

  static ConvGradients backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g,
                                int64_t wanted) {
    const ConvGradients gradients = new_gradients(a, wanted, a.input.scalar_type());
    const Tensor evenly = with_even_pixels(grad_output);
    dispatch_deform_conv2d(a, [&](auto s, auto f) {
      using S = decltype(s);
      if constexpr (sizeof(S) == 2) {
        const auto& [grad_input, grad_offset, grad_weight, grad_mask] = gradients;
        const VectorView<const S> from = vectors<const S>(evenly);
        const Tensor packed = tap_weights<S>(a, g);
        const TapWeights<S> weight{static_cast<const S*>(packed.data_ptr()), g.channels};
        if (wanted & (kOffset | kMask))
          Device::for_each(
              DepthwiseDisplacementGradient<S>{sampler<S>(a, g), from, weight,
                                               write_either<S>(grad_offset, wanted & kOffset),
                                               write_either<S>(grad_mask, wanted & kMask), a.offset.stride(1) == 1},
              a.input);
        if (wanted & kInput) input_gradient(from, weight, displacement<decltype(f)>(a), g, grad_input);
        if (wanted & kWeight) weight_gradient(from, sampler<S>(a, g), grad_weight);
      }
    });
    deform_conv2d_backward_log.note("fused depthwise");
    return gradients;
  }

 private:
  template <typename T>
  static VectorView<T> vectors(const Tensor& t) {
    return {view<T>(t), has_aligned_vectors(t)};
  }

  // Calls f with how many vectors of channels a thread has, as a constant.
  template <typename F>
  static void dispatch_vectors(const ConvGeometry& g, const F& f) {
    if (g.offset_group_channels() % 16 == 0)
      f(std::integral_constant<int, 2>{});
    else
      f(std::integral_constant<int, 1>{});
  }

  // A copy whose pixels lie evenly spaced, so that a pixel is found by its number without a division.
  static Tensor with_even_pixels(const Tensor& t) {
    return t.stride(2) == t.size(3) * t.stride(3) ? t : torch::stable::contiguous(t);
  }

  template <typename S>
  static Tensor tap_weights(const ConvArguments& a, const ConvGeometry& g) {
    const Tensor packed = torch::stable::new_empty(a.weight, {g.taps() * g.channels});
    Device::for_each(PackTapWeights<S, S>{g, view<const S>(a.weight), static_cast<S*>(packed.data_ptr())}, a.weight);
    return packed;
  }

  // How many images at a time, so that their index fits the device's budget.
  static int64_t images_of_range(const ConvGeometry& g) {
    const int64_t samples = g.taps() * g.out_pixels(), cells = (g.height + 1) * (g.width + 1);
    const int64_t bytes = samples * sizeof(IndexEntry<float>) + cells * 2 * sizeof(int32_t);
    return std::max<int64_t>(1, Device::column_bytes / (g.offset_groups * bytes));
  }

  template <typename S, typename F>
  static void input_gradient(const VectorView<const S>& grad_output, const TapWeights<S>& weight,
                             const Displacement<F>& moved, const ConvGeometry& g, const Tensor& grad_input) {
    const int64_t step = images_of_range(g) * g.out_pixels(), total = g.batch * g.out_pixels();
    for (PixelRange range{0, 0}; range.first < total; range.first += range.count) {
      range.count = std::min(step, total - range.first);
      const ConvPositions<float, F> positions(g, range, moved);
      const BuiltIndex<float> built = build_input_index<Device>(positions, grad_input);
      const DepthwiseGather<S> gather{g, range, positions.images, built.index, grad_output, weight};
      const SummedChunks chunks = sum_chunks<Device>(gather, positions.size(), grad_input);
      Device::for_each(DepthwiseInputGradient<S>{gather, chunks.of(gather), vectors<S>(grad_input)}, grad_input);
    }
  }

  template <typename S>
  static void weight_gradient(const VectorView<const S>& grad_output, const Sampler<S>& sampler,
                              const Tensor& grad_weight) {
    dispatch_vectors(sampler.g, [&](auto count) {
      sum_pixels(DepthwiseWeightGradient<S, count>{sampler, grad_output, 1, 0, nullptr}, view<S>(grad_weight),
                 grad_weight);
    });
  }
  template <typename S, int Vectors>
  static void sum_pixels(DepthwiseWeightGradient<S, Vectors> body, const View<S>& to, const Tensor& on) {
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
