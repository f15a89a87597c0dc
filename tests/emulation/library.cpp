// The GPU's operators on CPU tensors: everything of csrc/ops/deform_conv2d/cuda but CUDA itself, in emulated blocks of
// threads. Compiled and loaded by the tests.
#include "block.h"
#include "ops/deform_conv2d/cuda/paths.h"
#include "ops/deform_conv2d/operator.h"
#include "ops/ms_deform_attn/cuda/paths.h"
#include "ops/ms_deform_attn/operator.h"
#include "runtime/cpu.h"

namespace emulation {

struct Settings {
  int64_t multiprocessors = 4;
  Schedule schedule;
};

inline Settings& settings() {
  static Settings s;
  return s;
}

struct Device : dcn::Cpu {
  // So little that small tests have several ranges of images.
  static constexpr int64_t column_gradient_bytes = 40 << 10;

  struct Guard {
    explicit Guard(const dcn::Tensor&) {}
  };
  static int64_t multiprocessors(const dcn::Tensor&) { return settings().multiprocessors; }
  static bool fuses(const dcn::Tensor&) { return dcn::chooses_fused_kernels(); }
  template <typename Kernel>
  static bool launch(const Kernel& kernel, int64_t blocks, const dcn::Tensor&) {
    // What every processor from sm_80 on grants a block.
    static_assert(Kernel::kSharedBytes <= 99 << 10);
    run_grid(kernel, blocks, settings().schedule);
    return true;
  }
};

int64_t set_schedule(int64_t order, bool late_copies, bool blocks_backwards, int64_t multiprocessors,
                     bool adds_vectors) {
  settings() = {multiprocessors, {static_cast<Order>(order), late_copies, blocks_backwards, 1, adds_vectors}};
  return order;
}

std::string kernels_used() { return dcn::KernelLog::lines(); }

}  // namespace emulation

STABLE_TORCH_LIBRARY(dcn_plugin_emulated, m) {
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, SymInt[] stride, "
      "SymInt[] padding, SymInt[] dilation) -> Tensor");
  m.def(
      "deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, Tensor? mask, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, int wanted) "
      "-> (Tensor grad_input, Tensor grad_offset, Tensor grad_weight, Tensor grad_mask)");
  m.def(
      "ms_deform_attn(Tensor value, Tensor sampling_locations, Tensor? attention_weights, Tensor? reference_points, "
      "SymInt[] spatial_shapes, SymInt[] points, bool softmax, float offset_scale) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor sampling_locations, Tensor? attention_weights, "
      "Tensor? reference_points, SymInt[] spatial_shapes, SymInt[] points, bool softmax, float offset_scale, "
      "int wanted) -> (Tensor grad_value, Tensor grad_sampling_locations, Tensor grad_attention_weights, "
      "Tensor grad_reference_points)");
  m.def(
      "set_schedule(int order, bool late_copies, bool blocks_backwards, int multiprocessors, bool adds_vectors=True) "
      "-> int");
  m.def("kernels_used() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin_emulated, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&dcn::deform_conv2d<dcn::GpuDeformConv2d<emulation::Device>>));
  m.impl("deform_conv2d_backward", TORCH_BOX(&dcn::deform_conv2d_backward<dcn::GpuDeformConv2d<emulation::Device>>));
  dcn::implement_ms_deform_attn<dcn::GpuAttention<emulation::Device>>(m);
}

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_schedule", TORCH_BOX(&emulation::set_schedule));
  m.impl("kernels_used", TORCH_BOX(&emulation::kernels_used));
}
