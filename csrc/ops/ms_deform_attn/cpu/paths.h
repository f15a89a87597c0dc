// Multi-scale deformable attention on the CPU: the tuned path where it may run and serves the call, else the portable
// one.
#pragma once

#include "../../../runtime/cpu.h"
#include "../portable.h"
#include "backward.h"
#include "forward.h"

namespace dcn {

struct CpuAttention {
  static Tensor forward(const AttentionArguments& a, const AttentionGeometry& g) {
    const CpuKernels kernels = choose_kernels(ms_deform_attn_log, tiles::attention::why_portable(g));
    if (kernels == kPortable) return ms_deform_attn_portable<Cpu>(a, g);
    const Tensor output = new_attended(a, g);
    if (output.numel() > 0)
      dispatch_floating(a.value.scalar_type(), [&](auto s) { tiles::attention::forward<decltype(s)>(a, g, output); });
    return output;
  }
  static AttentionGradients backward(const Tensor& grad_output, const AttentionArguments& a, const AttentionGeometry& g,
                                     int64_t wanted) {
    const CpuKernels kernels = choose_kernels(ms_deform_attn_backward_log, tiles::attention::why_portable(g));
    if (kernels == kPortable) {
      // Who chose these kernels wants what CUDA does; what the tuned ones cannot serve is added in order, as they do.
      const int64_t how = chosen_kernels() == kPortable ? wanted : wanted | kOrdered;
      return ms_deform_attn_backward_portable<Cpu>(grad_output, a, g, how);
    }
    return dispatch_floating(a.value.scalar_type(), [&](auto s) {
      return tiles::attention::backward<decltype(s)>(grad_output, a, g, wanted);
    });
  }
};

}  // namespace dcn
