// Multi-scale deformable attention: the schemas, and the operators of the CPU.
#include "cpu/paths.h"
#include "operator.h"

STABLE_TORCH_LIBRARY_FRAGMENT(dcn_plugin, m) {
  m.def(
      "ms_deform_attn(Tensor value, Tensor sampling_locations, Tensor? attention_weights, Tensor? reference_points, "
      "SymInt[] spatial_shapes, SymInt[] points, bool softmax, float offset_scale) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor sampling_locations, Tensor? attention_weights, "
      "Tensor? reference_points, SymInt[] spatial_shapes, SymInt[] points, bool softmax, float offset_scale, "
      "int wanted) -> (Tensor grad_value, Tensor grad_sampling_locations, Tensor grad_attention_weights, "
      "Tensor grad_reference_points)");
}

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) { dcn::implement_ms_deform_attn<dcn::CpuAttention>(m); }
