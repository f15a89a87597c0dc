// Deformable convolution on the CPU: the tuned path where it may run and serves the call, else the portable one.
#pragma once

#include "../../../runtime/cpu.h"
#include "../portable.h"
#include "backward.h"
#include "forward.h"

namespace dcn {

struct CpuDeformConv2d {
  static Tensor forward(const ConvArguments& a, const ConvGeometry& g) {
    const CpuKernels kernels = choose_kernels(deform_conv2d_log, tiles::why_portable(g));
    if (kernels == kPortable) return deform_conv2d_portable<Cpu>(a, g);
    const Tensor output = new_output(a, g);
    if (output.numel() > 0)
      dispatch_deform_conv2d(
          a, [&](auto s, auto f) { note(deform_conv2d_log, tiles::forward<decltype(s), decltype(f)>(a, g, output)); });
    return output;
  }

  static ConvGradients backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g,
                                int64_t wanted) {
    const CpuKernels kernels = choose_kernels(deform_conv2d_backward_log, tiles::why_portable(g));
    if (kernels == kPortable) return deform_conv2d_backward_portable<Cpu>(grad_output, a, g, wanted);
    ConvGradients gradients = new_gradients(a, wanted, a.input.scalar_type());
    auto& [grad_input, grad_offset, grad_weight, grad_mask] = gradients;
    if (g.batch == 0)
      torch::stable::zero_(grad_weight);
    else
      dispatch_deform_conv2d(a, [&, &grad_input = grad_input, &grad_offset = grad_offset, &grad_weight = grad_weight,
                                 &grad_mask = grad_mask](auto s, auto f) {
        note(deform_conv2d_backward_log,
             tiles::backward<decltype(s), decltype(f)>(grad_output, a, g, wanted, grad_input, grad_offset, grad_weight,
                                                       grad_mask));
      });
    return gradients;
  }

  // Products of bfloat16 are known by their own name; what else serves is noted already.
  static void note(KernelLog& log, const char* kernels) {
    if (kernels) log.note(kernels);
  }
};

}  // namespace dcn
