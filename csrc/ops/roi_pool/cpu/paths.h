// RoI pooling on the CPU: the tuned path where it may run and serves the call, else the portable one.
#pragma once

#include "../../../runtime/cpu.h"
#include "../portable.h"
#include "backward.h"
#include "forward.h"

namespace dcn {

struct CpuRoiPool {
  static Tensor forward(const RoiArguments& a, const RoiGeometry& g) {
    const CpuKernels kernels = choose_kernels(logs_of(g.rule).forward, tiles::regions::why_portable(g));
    if (kernels == kPortable) return roi_pool_portable<Cpu>(a, g);
    const Tensor output = new_pooled(a, g);
    dispatch_floating(a.input.scalar_type(), [&](auto s) {
      using S = decltype(s);
      const DenseRegions<Accumulate<S>> dense(a, g);
      if (output.numel() > 0) tiles::regions::roi_forward<S>(a, dense.regions(), output);
    });
    return output;
  }

  template <typename S>
  static Tensor backward(const Tensor& grad_output, const RoiArguments& a, const Regions<Accumulate<S>>& regions,
                         int64_t wanted, const PartGradients<Accumulate<S>>& parts) {
    const CpuKernels kernels =
        choose_kernels(logs_of(regions.g.rule).backward, tiles::regions::why_portable(regions.g));
    if (kernels == kPortable) return roi_pool_backward_portable<Cpu, S>(grad_output, a, regions, wanted, parts);
    return tiles::regions::roi_backward<S>(grad_output, a, regions, wanted, parts);
  }
};

}  // namespace dcn
