// The switch between the paths on the CPU, for tests: returns what was set before.
#include "cpu.h"

namespace dcn {
namespace {

int64_t set_cpu_path(int64_t most) { return Cpu::most_path().exchange(static_cast<int>(most)); }

}  // namespace
}  // namespace dcn

STABLE_TORCH_LIBRARY_FRAGMENT(dcn_plugin, m) { m.def("_set_cpu_path(int most) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CompositeExplicitAutograd, m) {
  m.impl("_set_cpu_path", TORCH_BOX(&dcn::set_cpu_path));
}
