// Deformable aggregation on the CPU: the tuned path where it may run and serves the call, else the portable one.
#pragma once

#include "../../../runtime/cpu.h"
#include "../portable.h"
#include "backward.h"
#include "forward.h"

namespace dcn {

struct CpuAggregate {
  static Tensor forward(const AggregateArguments& a, const AggregateGeometry& geometry) {
    const CpuKernels kernels = choose_kernels(deform_aggregate2d_log, tiles::aggregate::why_portable(geometry.g));
    if (kernels == kPortable) return deform_aggregate2d_portable<Cpu>(a, geometry);
    const Tensor output = new_aggregated(a, geometry);
    if (output.numel() > 0)
      dispatch_deform_aggregate2d(
          a, [&](auto s, auto t) { tiles::aggregate::forward<decltype(s), decltype(t)>(a, geometry, output); });
    return output;
  }
  static AggregateGradients backward(const Tensor& grad_output, const AggregateArguments& a,
                                     const AggregateGeometry& geometry, int64_t wanted) {
    const CpuKernels kernels =
        choose_kernels(deform_aggregate2d_backward_log, tiles::aggregate::why_portable(geometry.g));
    if (kernels == kPortable) {
      // Who chose these kernels wants what CUDA does; what the tuned ones cannot serve is added in order, as they do.
      const int64_t how = chosen_kernels() == kPortable ? wanted : wanted | kOrdered;
      return deform_aggregate2d_backward_portable<Cpu>(grad_output, a, geometry, how);
    }
    return dispatch_deform_aggregate2d(a, [&](auto s, auto t) {
      return tiles::aggregate::backward<decltype(s), decltype(t)>(grad_output, a, geometry, wanted);
    });
  }
};

}  // namespace dcn
