// Deformable convolution on CUDA.
#include "../../runtime/cuda_block.cuh"
#include "cuda/paths.h"
#include "operator.h"

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CUDA, m) {
  using Implementation = dcn::GpuDeformConv2d<dcn::CudaBlocks>;
  m.impl("deform_conv2d", TORCH_BOX(&dcn::deform_conv2d<Implementation>));
  m.impl("deform_conv2d_backward", TORCH_BOX(&dcn::deform_conv2d_backward<Implementation>));
}
