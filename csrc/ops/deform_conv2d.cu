// Deformable convolution on CUDA: the portable bodies, one thread per element, and torch's matrix products.
#include "../runtime/cuda.cuh"
#include "deform_conv2d.h"

namespace dcn {
namespace {

struct CudaDeformConv2d {
  static Tensor forward(const ConvArguments& a, const ConvGeometry& g) {
    const torch::stable::accelerator::DeviceGuard guard(a.input.get_device_index());
    return deform_conv2d_portable<Cuda>(a, g);
  }
  static ConvGradients backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g,
                                int64_t needs) {
    const torch::stable::accelerator::DeviceGuard guard(a.input.get_device_index());
    return deform_conv2d_backward_portable<Cuda>(grad_output, a, g, needs);
  }
};

}  // namespace
}  // namespace dcn

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CUDA, m) {
  m.impl("deform_conv2d", TORCH_BOX(&dcn::deform_conv2d<dcn::CudaDeformConv2d>));
  m.impl("deform_conv2d_backward", TORCH_BOX(&dcn::deform_conv2d_backward<dcn::CudaDeformConv2d>));
}
