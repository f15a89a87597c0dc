// RoI pooling on CUDA: the portable bodies, one thread per element.
#pragma once

#include "../../../runtime/cuda.cuh"
#include "../../../runtime/kernels.h"
#include "../portable.h"

namespace dcn {

struct CudaRoiPool {
  static Tensor forward(const RoiArguments& a, const RoiGeometry& g) {
    const torch::stable::accelerator::DeviceGuard guard(a.input.get_device_index());
    note_kernel(name_of(g.rule), "plain");
    return roi_pool_portable<Cuda>(a, g);
  }
  template <typename S>
  static Tensor backward(const Tensor& grad_output, const RoiArguments& a, const Regions<Accumulate<S>>& regions,
                         int64_t wanted, const PartGradients<Accumulate<S>>& parts) {
    const torch::stable::accelerator::DeviceGuard guard(a.input.get_device_index());
    note_kernel(std::string(name_of(regions.g.rule)) + "_backward", wanted & kOrdered ? "plain ordered" : "plain");
    return roi_pool_backward_portable<Cuda, S>(grad_output, a, regions, wanted, parts);
  }

 private:
  // The operator whose rule this is, as kernels_used names it.
  static const char* name_of(RoiRule rule) {
    if (rule == RoiRule::kAlign) return "deform_roi_pool";
    return rule == RoiRule::kPart ? "deform_ps_roi_pool" : "ps_roi_pool";
  }
};

}  // namespace dcn
