// Deformable convolution on the CPU: the tuned path where it may run and serves the call, else the portable one.
#pragma once

#include "../../../runtime/cpu.h"
#include "../portable.h"
#include "backward.h"
#include "forward.h"

namespace dcn {

struct CpuDeformConv2d {
  static Tensor forward(const ConvArguments& a, const ConvGeometry& g) {
    const CpuKernels kernels = kernels_for(g);
    deform_conv2d_log.note(name_of(kernels));
    if (kernels == kPortable) return deform_conv2d_portable<Cpu>(a, g);
    const Tensor output = new_output(a, g);
    if (output.numel() > 0)
      dispatch_deform_conv2d(a, [&](auto s, auto f) { tiles::forward<decltype(s), decltype(f)>(a, g, output); });
    return output;
  }

  static ConvGradients backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g,
                                int64_t wanted) {
    const CpuKernels kernels = kernels_for(g);
    deform_conv2d_backward_log.note(name_of(kernels));
    if (kernels == kPortable) return deform_conv2d_backward_portable<Cpu>(grad_output, a, g, wanted);
    const auto [grad_input, grad_offset, grad_weight, grad_mask] = new_gradients(a, wanted, a.input.scalar_type());
    if (g.batch > 0)
      dispatch_deform_conv2d(a, [&, &grad_input = grad_input, &grad_offset = grad_offset, &grad_weight = grad_weight,
                                 &grad_mask = grad_mask](auto s, auto f) {
        tiles::backward<decltype(s), decltype(f)>(grad_output, a, g, wanted, grad_input, grad_offset, grad_weight,
                                                  grad_mask);
      });
    return {grad_input, grad_offset, grad_weight, grad_mask};
  }

 private:
  static CpuKernels kernels_for(const ConvGeometry& g) { return tiles::fits_index(g) ? chosen_kernels() : kPortable; }
};

}  // namespace dcn
