// Deformable aggregation on the CPU.
#pragma once

#include "../../../runtime/cpu.h"
#include "../portable.h"

namespace dcn {

struct CpuAggregate {
  static Tensor forward(const AggregateArguments& a, const AggregateGeometry& geometry) {
    deform_aggregate2d_log.note(name_of(kPortable));
    return deform_aggregate2d_portable<Cpu>(a, geometry);
  }
  static AggregateGradients backward(const Tensor& grad_output, const AggregateArguments& a,
                                     const AggregateGeometry& geometry, int64_t wanted) {
    deform_aggregate2d_backward_log.note(name_of(kPortable));
    return deform_aggregate2d_backward_portable<Cpu>(grad_output, a, geometry, wanted);
  }
};

}  // namespace dcn
