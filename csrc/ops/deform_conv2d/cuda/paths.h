// Deformable convolution on a GPU: the fused path where it is chosen and serves the call, else the portable one.
// `Device` is CUDA, or the tests' emulation of it.
#pragma once

#include "../portable.h"
#include "column_gradient.h"
#include "depthwise_path.h"
#include "forward.h"
#include "input_gradient.h"
#include "plan.h"
#include "weight_gradient.h"

namespace dcn {

template <typename Device>
struct GpuDeformConv2d {
  static Tensor forward(const ConvArguments& a, const ConvGeometry& g) {
    const typename Device::Guard guard(a.input);
    if (Device::fuses(a.input) && can_fuse_depthwise(a, g)) return DepthwiseDeformConv2d<Device>::forward(a, g);
    if (Device::fuses(a.input) && can_fuse(a, g))
      if (const std::optional<Tensor> output = fused_forward(a, g)) return *output;
    deform_conv2d_log.note("portable");
    return deform_conv2d_portable<Device>(a, g);
  }

  static ConvGradients backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g,
                                int64_t wanted) {
    const typename Device::Guard guard(a.input);
    if (Device::fuses(a.input) && can_fuse_depthwise(a, g) && can_fuse_depthwise_backward(g))
      return DepthwiseDeformConv2d<Device>::backward(grad_output, a, g, wanted);
    if (Device::fuses(a.input) && can_fuse(a, g) && can_fuse_backward(g))
      if (const std::optional<ConvGradients> gradients = fused_backward(grad_output, a, g, wanted)) return *gradients;
    deform_conv2d_backward_log.note("portable");
    return deform_conv2d_backward_portable<Device>(grad_output, a, g, wanted);
  }

 private:
  // Tiles as wide as the outputs, up to 256, since each tile of outputs samples again. Where there would be too few of
  // these for the multiprocessors, as on small maps, the smallest: idle processors cost more than repeated samples.
  static std::optional<Tensor> fused_forward(const ConvArguments& a, const ConvGeometry& g) {
    const int64_t enough = 2 * Device::multiprocessors(a.input);
    const auto blocks = [&](int64_t pixels, int64_t outputs) {
      return (g.batch * g.out_pixels() + pixels - 1) / pixels * g.groups *
             ((g.group_outputs() + outputs - 1) / outputs);
    };
    if (g.group_outputs() > 128 && blocks(64, 256) >= enough) return launch_forward<ProductShape<2, 4, 8>>(a, g);
    if (g.group_outputs() > 64 && blocks(128, 128) >= enough) return launch_forward<ProductShape<4, 2, 8>>(a, g);
    if (blocks(128, 64) >= enough) return launch_forward<ProductShape<4, 2, 4>>(a, g);
    return launch_forward<ProductShape<2, 4, 2>>(a, g);
  }

  template <typename Shape>
  static std::optional<Tensor> launch_forward(const ConvArguments& a, const ConvGeometry& g) {
    return dispatch_half(a.input.scalar_type(), [&](auto s) -> std::optional<Tensor> {
      using S = decltype(s);
      const Tensor output = new_output(a, g);
      const Tensor weight = taps_first(a.weight);
      const bool aligned_vectors = has_aligned_vectors(output) && g.group_outputs() % 8 == 0;
      const FusedForward<S, Shape> kernel{sampler<S>(a, g), static_cast<const S*>(weight.data_ptr()),
                                          a.bias ? static_cast<const S*>(a.bias->data_ptr()) : nullptr, view<S>(output),
                                          aligned_vectors};
      if (reinterpret_cast<uintptr_t>(kernel.weight) % 16 || !Device::launch(kernel, kernel.blocks(), a.input))
        return std::nullopt;
      static const std::string name = "fused " + std::to_string(Shape::kRows) + "x" + std::to_string(Shape::kColumns);
      deform_conv2d_log.note(name.c_str());
      return output;
    });
  }

  static std::optional<ConvGradients> fused_backward(const Tensor& grad_output, const ConvArguments& a,
                                                     const ConvGeometry& g, int64_t wanted) {
    return dispatch_deform_conv2d(a, [&](auto s, auto f) -> std::optional<ConvGradients> {
      using S = decltype(s);
      if constexpr (sizeof(S) == 2) {
        const ConvGradients gradients = new_gradients(a, wanted, a.input.scalar_type());
        const auto& [grad_input, grad_offset, grad_weight, grad_mask] = gradients;
        const bool aligned_vectors = has_aligned_vectors(grad_output) && g.group_outputs() % 8 == 0;
        const OutputGradient<S> from{view<const S>(grad_output), aligned_vectors, static_cast<int>(g.group_outputs())};
        if ((wanted & (kInput | kOffset | kMask)) &&
            !fused_columns<S, decltype(f)>(from, a, g, wanted, grad_input, grad_offset, grad_mask))
          return std::nullopt;
        if ((wanted & kWeight) &&
            !(g.group_outputs() > 64 ? fused_weight<S, ProductShape<4, 2, 8>>(from, a, g, grad_weight)
                                     : fused_weight<S, ProductShape<2, 4, 4>>(from, a, g, grad_weight)))
          return std::nullopt;
        deform_conv2d_backward_log.note("fused");
        return gradients;
      } else {
        return std::nullopt;  // never: can_fuse takes half types alone
      }
    });
  }

  // The gradient of the columns, some images at a time, and from it those of offset, mask and input.
  template <typename S, typename F>
  static bool fused_columns(const OutputGradient<S>& from, const ConvArguments& a, const ConvGeometry& g,
                            int64_t wanted, const Tensor& grad_input, const Tensor& grad_offset,
                            const Tensor& grad_mask) {
    const Tensor weight = taps_first(a.weight);
    const int64_t step = images_together<Device>(g) * g.out_pixels(), total = g.batch * g.out_pixels();
    const Tensor columns =
        torch::stable::new_empty(a.input, {wanted & kInput ? g.taps() * std::min(step, total) * g.channels : 0});
    if (reinterpret_cast<uintptr_t>(weight.data_ptr()) % 16) return false;
    for (PixelRange range{0, 0}; range.first < total; range.first += range.count) {
      range.count = std::min(step, total - range.first);
      FusedColumnGradient<S> kernel{sampler<S>(a, g),
                                    range,
                                    from,
                                    static_cast<const S*>(weight.data_ptr()),
                                    wanted & kInput ? static_cast<S*>(columns.data_ptr()) : nullptr,
                                    write_either<S>(grad_offset, wanted & kOffset),
                                    write_either<S>(grad_mask, wanted & kMask),
                                    static_cast<int>(kSamplesPerPixel / g.offset_groups)};
      kernel.taps_together = std::min(kernel.taps_together, static_cast<int>(g.taps()));
      // Small maps have few tiles of pixels: their taps are divided among blocks too.
      while (kernel.taps_together > 1 && kernel.blocks() < 2 * Device::multiprocessors(a.input))
        kernel.taps_together = (kernel.taps_together + 2) / 3;
      if (!Device::launch(kernel, kernel.blocks(), a.input)) return false;
      if (!(wanted & kInput)) continue;
      const ConvPositions<float, F> positions(g, range, displacement<F>(a));
      const BuiltIndex<float> built = build_input_index<Device>(positions, a.input);
      Device::for_each(GatherVectors<S>{g, range, positions.images, built.index, kernel.grad_columns,
                                        view<S>(grad_input), has_aligned_vectors(grad_input)},
                       a.input);
    }
    return true;
  }

  template <typename S, typename Shape>
  static bool fused_weight(const OutputGradient<S>& from, const ConvArguments& a, const ConvGeometry& g,
                           const Tensor& grad_weight) {
    FusedWeightGradient<S, Shape> kernel{sampler<S>(a, g), from, nullptr, 1, 0};
    // As many shares of the pixels as keep the device busy, each of at least four steps.
    const int64_t total = g.batch * g.out_pixels(), steps = (total + kernel.kPixels - 1) / kernel.kPixels;
    const int64_t busy = (4 * Device::multiprocessors(a.input) + kernel.tiles() - 1) / kernel.tiles();
    const int64_t wanted = std::max<int64_t>(1, std::min(busy, steps / 4));
    kernel.pixels_of_share = (steps + wanted - 1) / wanted * kernel.kPixels;
    kernel.shares = (total + kernel.pixels_of_share - 1) / kernel.pixels_of_share;
    const Tensor sums = torch::stable::new_empty(a.input, {kernel.shares * g.out_channels * kernel.sampler.sizes.depth},
                                                 ScalarType::Float);
    kernel.sums = static_cast<float*>(sums.data_ptr());
    if (!Device::launch(kernel, kernel.blocks(), a.input)) return false;
    Device::for_each(AddWeightShares<S>{g, kernel.shares, kernel.sums, view<S>(grad_weight)}, a.input);
    return true;
  }
};

}  // namespace dcn
