// The CPU's choice of kernels, and the log of those that served, for dcn_plugin.ops.kernels_used and for tests.
#include "kernels.h"

namespace dcn {
namespace {

// Sets what may run at most, and returns what was set before.
std::string choose_cpu_kernels(std::string limit) {
  for (const CpuKernels kernels : {kPortable, kTunedBaseline, kTunedV3, kTunedV4, kTuned, kTunedBFloat16})
    if (limit == name_of(kernels)) return name_of(chosen_cpu_kernels().exchange(kernels));
  throw std::runtime_error(
      "_choose_cpu_kernels: limit: expected 'portable', 'tuned' (or 'tuned baseline', 'tuned x86-64-v3', 'tuned "
      "x86-64-v4', 'tuned bfloat16'), got '" +
      limit + "'");
}

std::string kernels_used() { return KernelLog::lines(); }

}  // namespace
}  // namespace dcn

STABLE_TORCH_LIBRARY_FRAGMENT(dcn_plugin, m) {
  m.def("_choose_cpu_kernels(str limit) -> str");
  m.def("_cpu_kernels_used() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CompositeExplicitAutograd, m) {
  m.impl("_choose_cpu_kernels", TORCH_BOX(&dcn::choose_cpu_kernels));
  m.impl("_cpu_kernels_used", TORCH_BOX(&dcn::kernels_used));
}
