// Deformable aggregation on a GPU. `Device` is CUDA, or the tests' emulation of it.
#pragma once

#include "../portable.h"

namespace dcn {

template <typename Device>
struct GpuAggregate {
  static Tensor forward(const AggregateArguments& a, const AggregateGeometry& geometry) {
    const typename Device::Guard guard(a.value);
    deform_aggregate2d_log.note("portable");
    return deform_aggregate2d_portable<Device>(a, geometry);
  }
  static AggregateGradients backward(const Tensor& grad_output, const AggregateArguments& a,
                                     const AggregateGeometry& geometry, int64_t wanted) {
    const typename Device::Guard guard(a.value);
    deform_aggregate2d_backward_log.note(wanted & kOrdered ? "portable ordered" : "portable");
    return deform_aggregate2d_backward_portable<Device>(grad_output, a, geometry, wanted);
  }
};

}  // namespace dcn
