// RoI pooling on the CPU: the tuned path where it may run and serves the call, else the portable one.
#pragma once

#include "../../../runtime/cpu.h"
#include "../portable.h"
#include "backward.h"
#include "forward.h"

namespace dcn {

struct CpuRoiPool {
  static Tensor forward(const RoiArguments& a, const RoiGeometry& g) {
    const CpuKernels kernels = kernels_for(g);
    logs_of(g.rule).forward.note(name_of(kernels));
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
    const CpuKernels kernels = kernels_for(regions.g);
    logs_of(regions.g.rule).backward.note(name_of(kernels));
    if (kernels == kPortable) return roi_pool_backward_portable<Cpu, S>(grad_output, a, regions, wanted, parts);
    return tiles::regions::roi_backward<S>(grad_output, a, regions, wanted, parts);
  }

 private:
  static CpuKernels kernels_for(const RoiGeometry& g) {
    return tiles::regions::fits_index(g) ? chosen_kernels() : kPortable;
  }
};

}  // namespace dcn
