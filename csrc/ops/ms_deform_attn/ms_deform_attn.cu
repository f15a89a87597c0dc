// Multi-scale deformable attention on CUDA.
#include "../../runtime/cuda_block.cuh"
#include "cuda/paths.h"
#include "operator.h"

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CUDA, m) { dcn::implement_ms_deform_attn<dcn::GpuAttention<dcn::CudaBlocks>>(m); }
