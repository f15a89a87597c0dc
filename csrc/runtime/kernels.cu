// Says which kernels ran; dcn_plugin.ops.kernels_used asks.
#include "kernels.h"
#include "tensor.h"

namespace {
std::string cuda_kernels_used() { return dcn::kernels_used(); }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dcn_plugin, m) { m.def("_cuda_kernels_used() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CompositeExplicitAutograd, m) {
  m.impl("_cuda_kernels_used", TORCH_BOX(&cuda_kernels_used));
}
