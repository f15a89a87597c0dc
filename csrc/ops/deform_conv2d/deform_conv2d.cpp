// Deformable convolution: the schemas, and the operators of the CPU.
#include "cpu/paths.h"
#include "operator.h"

STABLE_TORCH_LIBRARY_FRAGMENT(dcn_plugin, m) {
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, SymInt[] stride, "
      "SymInt[] padding, SymInt[] dilation) -> Tensor");
  m.def(
      "deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, Tensor? mask, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, int wanted) "
      "-> (Tensor grad_input, Tensor grad_offset, Tensor grad_weight, Tensor grad_mask)");
}

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&dcn::deform_conv2d<dcn::CpuDeformConv2d>));
  m.impl("deform_conv2d_backward", TORCH_BOX(&dcn::deform_conv2d_backward<dcn::CpuDeformConv2d>));
}
