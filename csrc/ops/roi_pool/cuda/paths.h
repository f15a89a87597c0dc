// RoI pooling on a GPU: the portable bodies, one thread per element. `Device` is CUDA, or the tests' emulation of it.
#pragma once

#include "../portable.h"

namespace dcn {

template <typename Device>
struct GpuRoiPool {
  static Tensor forward(const RoiArguments& a, const RoiGeometry& g) {
    const typename Device::Guard guard(a.input);
    logs_of(g.rule).forward.note("portable");
    return roi_pool_portable<Device>(a, g);
  }
  template <typename S>
  static Tensor backward(const Tensor& grad_output, const RoiArguments& a, const Regions<Accumulate<S>>& regions,
                         int64_t wanted, const PartGradients<Accumulate<S>>& parts) {
    const typename Device::Guard guard(a.input);
    logs_of(regions.g.rule).backward.note(wanted & kOrdered ? "portable ordered" : "portable");
    return roi_pool_backward_portable<Device, S>(grad_output, a, regions, wanted, parts);
  }
};

}  // namespace dcn
