// RoI pooling on the CPU: the tuned path, and the portable one where that is asked for or maps are huge.
#pragma once

#include "../../../runtime/cpu.h"
#include "../portable.h"
#include "backward.h"
#include "forward.h"

namespace dcn {

struct CpuRoiPool {
  static Tensor forward(const RoiArguments& a, const RoiGeometry& g) {
    if (is_portable(g)) return roi_pool_portable<Cpu>(a, g);
    const Tensor output = new_pooled(a, g);
    dispatch_floating(a.input.scalar_type(), [&](auto s) {
      using S = decltype(s);
      const DensePlaces<Accumulate<S>> dense(a, g);
      if (output.numel() > 0) tiles::regions::roi_forward<S>(a, dense.places(), output);
    });
    return output;
  }
  template <typename S>
  static Tensor backward(const Tensor& grad_output, const RoiArguments& a, const RoiPlaces<Accumulate<S>>& where,
                         int64_t needs, const PartGradients<Accumulate<S>>& parts) {
    if (is_portable(where.g)) return roi_pool_backward_portable<Cpu, S>(grad_output, a, where, needs, parts);
    return tiles::regions::roi_backward<S>(grad_output, a, where, needs, parts);
  }

 private:
  static bool is_portable(const RoiGeometry& g) { return Cpu::portable() || !tiles::regions::fits_index(g); }
};

}  // namespace dcn
