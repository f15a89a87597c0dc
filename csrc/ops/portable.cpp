// The switch between tuned and portable paths on the CPU, for tests: returns what was set before.
#include "../runtime/cpu.h"

namespace dcn {
namespace {

bool set_portable(bool enable) { return Cpu::portable().exchange(enable); }

}  // namespace
}  // namespace dcn

STABLE_TORCH_LIBRARY_FRAGMENT(dcn_plugin, m) { m.def("_set_portable(bool enable) -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CompositeExplicitAutograd, m) {
  m.impl("_set_portable", TORCH_BOX(&dcn::set_portable));
}
