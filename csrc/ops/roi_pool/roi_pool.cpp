// RoI pooling: the schemas, and the operators of the CPU.
#include "cpu/paths.h"
#include "operator.h"

STABLE_TORCH_LIBRARY_FRAGMENT(dcn_plugin, m) {
  m.def(
      "deform_roi_pool(Tensor input, Tensor rois, Tensor? offset, Tensor? mask, SymInt[] output_size, "
      "float spatial_scale, int sampling_ratio, float gamma, bool aligned) -> Tensor");
  m.def(
      "deform_roi_pool_backward(Tensor grad_output, Tensor input, Tensor rois, Tensor? offset, Tensor? mask, "
      "SymInt[] output_size, float spatial_scale, int sampling_ratio, float gamma, bool aligned, int wanted) "
      "-> (Tensor grad_input, Tensor grad_offset, Tensor grad_mask)");
  m.def(
      "deform_ps_roi_pool(Tensor input, Tensor rois, Tensor? offset, Tensor? mask, SymInt output_dim, int group_size, "
      "SymInt[] output_size, SymInt[] part_size, int samples_per_part, float spatial_scale, float offset_scale) "
      "-> Tensor");
  m.def(
      "deform_ps_roi_pool_backward(Tensor grad_output, Tensor input, Tensor rois, Tensor? offset, Tensor? mask, "
      "SymInt output_dim, int group_size, SymInt[] output_size, SymInt[] part_size, int samples_per_part, "
      "float spatial_scale, float offset_scale, int wanted) "
      "-> (Tensor grad_input, Tensor grad_offset, Tensor grad_mask)");
  m.def(
      "ps_roi_pool(Tensor input, Tensor rois, SymInt output_dim, int group_size, SymInt[] output_size, "
      "float spatial_scale) -> Tensor");
  m.def(
      "ps_roi_pool_backward(Tensor grad_output, Tensor input, Tensor rois, SymInt output_dim, int group_size, "
      "SymInt[] output_size, float spatial_scale, int wanted) -> Tensor grad_input");
}

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) { dcn::RoiPoolOperators<dcn::CpuRoiPool>::implement(m); }
