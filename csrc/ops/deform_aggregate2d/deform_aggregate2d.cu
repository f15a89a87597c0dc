// Deformable aggregation on CUDA.
#include "../../runtime/cuda_block.cuh"
#include "cuda/paths.h"
#include "operator.h"

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CUDA, m) {
  dcn::implement_deform_aggregate2d<dcn::GpuAggregate<dcn::CudaBlocks>>(m);
}
