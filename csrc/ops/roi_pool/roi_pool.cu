// RoI pooling on CUDA.
#include "../../runtime/cuda_block.cuh"
#include "cuda/paths.h"
#include "operator.h"

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CUDA, m) {
  dcn::RoiPoolOperators<dcn::GpuRoiPool<dcn::CudaBlocks>>::implement(m);
}
