// RoI pooling on CUDA: the portable bodies, one thread per element.
#pragma once

#include "../../../runtime/cuda.cuh"
#include "../portable.h"

namespace dcn {

struct CudaRoiPool {
  static Tensor forward(const RoiArguments& a, const RoiGeometry& g) {
    const torch::stable::accelerator::DeviceGuard guard(a.input.get_device_index());
    logs_of(g.rule).forward.note("portable");
    return roi_pool_portable<Cuda>(a, g);
  }
  template <typename S>
  static Tensor backward(const Tensor& grad_output, const RoiArguments& a, const Regions<Accumulate<S>>& regions,
                         int64_t wanted, const PartGradients<Accumulate<S>>& parts) {
    const torch::stable::accelerator::DeviceGuard guard(a.input.get_device_index());
    logs_of(regions.g.rule).backward.note(wanted & kOrdered ? "portable ordered" : "portable");
    return roi_pool_backward_portable<Cuda, S>(grad_output, a, regions, wanted, parts);
  }
};

}  // namespace dcn
