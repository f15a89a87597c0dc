// Deformable aggregation: the schemas, and the operators of the CPU.
#include "cpu/paths.h"
#include "operator.h"

STABLE_TORCH_LIBRARY_FRAGMENT(dcn_plugin, m) {
  m.def(
      "deform_aggregate2d(Tensor value, Tensor offset, Tensor? weight, SymInt[] kernel_size, SymInt[] stride, "
      "SymInt[] padding, SymInt[] dilation, float offset_scale, bool remove_center, bool softmax, bool official_order) "
      "-> Tensor");
  m.def(
      "deform_aggregate2d_backward(Tensor grad_output, Tensor value, Tensor offset, Tensor? weight, "
      "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, float offset_scale, "
      "bool remove_center, bool softmax, bool official_order, int wanted) -> (Tensor grad_value, Tensor grad_offset, "
      "Tensor grad_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) { dcn::implement_deform_aggregate2d<dcn::CpuAggregate>(m); }
