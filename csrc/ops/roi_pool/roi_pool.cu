// RoI pooling on CUDA.
#include "cuda/paths.h"
#include "operator.h"

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CUDA, m) { dcn::RoiPoolOperators<dcn::CudaRoiPool>::implement(m); }
