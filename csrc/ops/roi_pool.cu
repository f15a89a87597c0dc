// Pooling over regions of interest on CUDA: the portable bodies, one thread per element.
#include "../runtime/cuda.cuh"
#include "roi_pool.h"

namespace dcn {
namespace {

struct CudaRoiPool {
  static Tensor forward(const RoiArguments& a, const RoiGeometry& g) {
    const torch::stable::accelerator::DeviceGuard guard(a.input.get_device_index());
    return roi_pool_portable<Cuda>(a, g);
  }
  template <typename S>
  static Tensor backward(const Tensor& grad_output, const RoiArguments& a, const RoiPlaces<Accumulate<S>>& where,
                         int64_t needs, const PartGradients<Accumulate<S>>& parts) {
    const torch::stable::accelerator::DeviceGuard guard(a.input.get_device_index());
    return roi_pool_backward_portable<Cuda, S>(grad_output, a, where, needs, parts);
  }
};

}  // namespace
}  // namespace dcn

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CUDA, m) { dcn::RoiPoolOperators<dcn::CudaRoiPool>::implement(m); }
