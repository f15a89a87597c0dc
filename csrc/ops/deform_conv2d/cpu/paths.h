// Deformable convolution on the CPU: the tuned path where it may run and serves the call, else the portable one.
#pragma once

#include "../../../runtime/cpu.h"
#include "../portable.h"
#include "backward.h"
#include "forward.h"

namespace dcn {

struct CpuDeformConv2d {
  static Tensor forward(const ConvArguments& a, const ConvGeometry& g) {
    if (Cpu::portable() || !tiles::fits_index(g)) return deform_conv2d_portable<Cpu>(a, g);
    const Tensor output = new_output(a, g);
    if (output.numel() > 0)
      dispatch_deform_conv2d(a, [&](auto s, auto f) { tiles::forward<decltype(s), decltype(f)>(a, g, output); });
    return output;
  }

  static ConvGradients backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g,
                                int64_t needs) {
    if (Cpu::portable() || !tiles::fits_index(g)) return deform_conv2d_backward_portable<Cpu>(grad_output, a, g, needs);
    const auto [grad_input, grad_offset, grad_weight, grad_mask] = new_gradients(a, needs, a.input.scalar_type());
    if (g.batch > 0)
      dispatch_deform_conv2d(a, [&, &grad_input = grad_input, &grad_offset = grad_offset, &grad_weight = grad_weight,
                                 &grad_mask = grad_mask](auto s, auto f) {
        tiles::backward<decltype(s), decltype(f)>(grad_output, a, g, needs, grad_input, grad_offset, grad_weight,
                                                  grad_mask);
      });
    return {grad_input, grad_offset, grad_weight, grad_mask};
  }
};

}  // namespace dcn
