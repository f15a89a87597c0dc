// The log of the kernels that served on CUDA, for dcn_plugin.ops.kernels_used.
#include "kernels.h"

namespace {
std::string kernels_used() { return dcn::KernelLog::lines(); }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dcn_plugin, m) { m.def("_cuda_kernels_used() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CompositeExplicitAutograd, m) {
  m.impl("_cuda_kernels_used", TORCH_BOX(&kernels_used));
}
