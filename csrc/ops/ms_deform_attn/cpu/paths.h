// Multi-scale deformable attention on the CPU: the portable path.
#pragma once

#include "../../../runtime/cpu.h"
#include "../portable.h"

namespace dcn {

struct CpuAttention {
  static Tensor forward(const AttentionArguments& a, const AttentionGeometry& g) {
    ms_deform_attn_log.note("portable");
    return ms_deform_attn_portable<Cpu>(a, g);
  }
  static AttentionGradients backward(const Tensor& grad_output, const AttentionArguments& a, const AttentionGeometry& g,
                                     int64_t wanted) {
    ms_deform_attn_backward_log.note("portable");
    return ms_deform_attn_backward_portable<Cpu>(grad_output, a, g, wanted);
  }
};

}  // namespace dcn
