// Deformable convolution on a GPU: the fused kernels where they are wanted and serve the call, else the plain ones.
// `Device` is CUDA, or the tests' emulation of it.
#pragma once

#include "../../runtime/kernel_log.h"
#include "forward.h"
#include "plan.h"

namespace dcn {

template <typename Device>
struct GpuDeformConv2d {
  static Tensor forward(const ConvArguments& a, const ConvGeometry& g) {
    const typename Device::Guard guard(a.input);
    if (Device::fuses(a.input) && can_fuse(a, g))
      if (const std::optional<Tensor> output = fused_forward(a, g)) return *output;
    note_kernel("deform_conv2d", "plain");
    return deform_conv2d_portable<Device>(a, g);
  }

  static ConvGradients backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g,
                                int64_t needs) {
    const typename Device::Guard guard(a.input);
    note_kernel("deform_conv2d_backward", "plain");
    return deform_conv2d_backward_portable<Device>(grad_output, a, g, needs);
  }

 private:
  // Tiles as wide as the outputs, up to 256, because every tile of outputs samples anew. Where these would leave
  // multiprocessors idle, as on small maps, the smallest: sampling more often costs less than waiting.
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
      const bool whole_pieces = has_whole_pieces(output) && g.group_outputs() % 8 == 0;
      const FusedForward<S, Shape> kernel{sampler<S>(a, g), static_cast<const S*>(weight.data_ptr()),
                                          a.bias ? static_cast<const S*>(a.bias->data_ptr()) : nullptr, view<S>(output),
                                          whole_pieces};
      if (reinterpret_cast<uintptr_t>(kernel.weight) % 16 || !Device::launch(kernel, kernel.blocks(), a.input))
        return std::nullopt;
      note_kernel("deform_conv2d", "fused ", Shape::kRows, "x", Shape::kColumns);
      return output;
    });
  }
};

}  // namespace dcn
