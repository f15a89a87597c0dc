// Deformable convolution on a GPU: the fused path where it is chosen and serves the call, else the portable one.
// `Device` is CUDA, or the tests' emulation of it.
#pragma once

#include "../portable.h"
#include "backward.h"
#include "depthwise_path.h"
#include "forward.h"
#include "plan.h"

namespace dcn {

template <typename Device>
struct GpuDeformConv2d {
  static Tensor forward(const ConvArguments& a, const ConvGeometry& g) {
    const typename Device::Guard guard(a.input);
    const char* reason = Device::why_portable(a.input);
    if (!reason) reason = why_not_fused(a, g, Device::uses_tf32);
    if (!reason && g.is_depthwise()) return DepthwiseDeformConv2d<Device>::forward(with_aligned_input(a), g);
    if (!reason) {
      if (const std::optional<Tensor> output = fused_forward(a, g)) return *output;
      reason = kNotLaunched;
    }
    deform_conv2d_log.note("portable", reason);
    return deform_conv2d_portable<Device>(a, g);
  }

  static ConvGradients backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g,
                                int64_t wanted) {
    const typename Device::Guard guard(a.input);
    const char* reason = Device::why_portable(a.input);
    if (!reason) reason = why_not_fused_backward(a, g);
    if (!reason && g.is_depthwise())
      return DepthwiseDeformConv2d<Device>::backward(grad_output, with_aligned_input(a), g, wanted);
    if (!reason) return fused_backward(grad_output, a, g, wanted);
    deform_conv2d_backward_log.note("portable", reason);
    return deform_conv2d_backward_portable<Device>(grad_output, a, g, wanted);
  }

 private:
  static std::optional<Tensor> fused_forward(const ConvArguments& a, const ConvGeometry& g) {
    if (a.input.scalar_type() == ScalarType::Half) return forward_from<Half>(a, g);
    if (a.input.scalar_type() == ScalarType::BFloat16) return forward_from<BFloat16>(a, g);
    return forward_from<float>(a, g);
  }

  // Other layouts than pixels of aligned vectors are copied: once, instead of reading each channel of a corner alone.
  template <typename S>
  static std::optional<Tensor> forward_from(const ConvArguments& a, const ConvGeometry& g) {
    Tensor input = a.input;
    std::optional<InputPixels<S>> pixels = input_pixels<S>(input, g);
    if (!pixels && can_number_pixels(g, g.height * g.width, g.width)) {
      input = new_image(a.input, {g.batch, g.channels, g.height, g.width}, a.input.scalar_type(), true);
      torch::stable::copy_(input, a.input);
      pixels = input_pixels<S>(input, g);
    }
    if (!pixels) return std::nullopt;
    const Tensor weight = operand_weights<S>(a, g);
    return choose_tile<S>(a, g, *pixels, static_cast<const S*>(weight.data_ptr()));
  }

  // Weights as [O, taps, C / groups], as the products take them.
  template <typename S>
  static Tensor operand_weights(const ConvArguments& a, const ConvGeometry& g) {
    if constexpr (sizeof(S) == 2) {
      return taps_first(a.weight);
    } else {
      const RoundWeights body{g, view<const float>(a.weight), nullptr};
      const Tensor rounded = torch::stable::new_empty(a.weight, {body.size()}, ScalarType::Float);
      Device::for_each(RoundWeights{g, body.weight, static_cast<float*>(rounded.data_ptr())}, a.input);
      return rounded;
    }
  }

  // Tiles as wide as the outputs, up to 256, since each tile of outputs samples again, and as large as shared memory
  // allows. Where there would be too few of these for the multiprocessors, as on small maps, smaller ones: idle
  // processors cost more than repeated samples. A multiprocessor has one of the largest tiles at a time, or two others.
  template <typename S>
  static std::optional<Tensor> choose_tile(const ConvArguments& a, const ConvGeometry& g, const InputPixels<S>& pixels,
                                           const S* weight) {
    using Largest = ProductShape<2, 4, 8, 4>;
    const int64_t multiprocessors = Device::multiprocessors(a.input);
    const auto busy = [&](int64_t rows, int64_t outputs, int64_t at_once) {
      return (g.batch * g.out_pixels() + rows - 1) / rows * g.groups * ((g.group_outputs() + outputs - 1) / outputs) >=
             at_once * multiprocessors;
    };
    const auto launch = [&](auto shape) { return launch_forward<decltype(shape)>(a, g, pixels, weight); };
    if (g.group_outputs() > 128 && busy(128, 256, 1) &&
        FusedForward<S, Largest>::kSharedBytes <= Device::shared_bytes(a.input))
      return launch(Largest{});
    if (g.group_outputs() > 128 && busy(64, 256, 2)) return launch(ProductShape<2, 4, 8>{});
    if (g.group_outputs() > 64 && busy(128, 128, 2)) return launch(ProductShape<4, 2, 8>{});
    if (busy(128, 64, 2)) return launch(ProductShape<4, 2, 4>{});
    return launch(ProductShape<2, 4, 2>{});
  }

  template <typename Shape, typename S>
  static std::optional<Tensor> launch_forward(const ConvArguments& a, const ConvGeometry& g,
                                              const InputPixels<S>& pixels, const S* weight) {
    const Tensor output = new_output(a, g);
    const bool aligned_vectors = has_aligned_vectors(output) && g.group_outputs() % 8 == 0;
    const FusedForward<S, Shape> kernel(sampler<S>(a, g), pixels, weight,
                                        a.bias ? static_cast<const S*>(a.bias->data_ptr()) : nullptr, view<S>(output),
                                        aligned_vectors);
    if (!Device::launch(kernel, kernel.blocks(), a.input)) return std::nullopt;
    static const std::string name = std::string(sizeof(S) == 4 ? "fused tf32 " : "fused ") +
                                    std::to_string(Shape::kRows) + "x" + std::to_string(Shape::kColumns);
    deform_conv2d_log.note(name.c_str());
    return output;
  }

  static ConvGradients fused_backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g,
                                      int64_t wanted) {
    deform_conv2d_backward_log.note("fused");
    return dispatch_deform_conv2d(a, [&](auto s, auto f) -> ConvGradients {
      using S = decltype(s);
      if constexpr (!std::is_same_v<S, double>)
        return FusedBackward<Device, S, decltype(f)>::run(grad_output, a, g, wanted);
      else
        throw std::logic_error("dcn_plugin: double, which why_not_fused_backward refuses");
    });
  }
};

}  // namespace dcn
