// Multi-scale deformable attention on CUDA: the portable bodies, one thread per element.
#pragma once

#include "../../../runtime/cuda.cuh"
#include "../portable.h"

namespace dcn {

struct CudaAttention {
  static Tensor forward(const AttentionArguments& a, const AttentionGeometry& g) {
    const torch::stable::accelerator::DeviceGuard guard(a.value.get_device_index());
    ms_deform_attn_log.note("portable");
    return ms_deform_attn_portable<Cuda>(a, g);
  }
  static AttentionGradients backward(const Tensor& grad_output, const AttentionArguments& a, const AttentionGeometry& g,
                                     int64_t wanted) {
    const torch::stable::accelerator::DeviceGuard guard(a.value.get_device_index());
    ms_deform_attn_backward_log.note(wanted & kOrdered ? "portable ordered" : "portable");
    return ms_deform_attn_backward_portable<Cuda>(grad_output, a, g, wanted);
  }
};

}  // namespace dcn
