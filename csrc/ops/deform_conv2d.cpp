// Deformable convolution: the schemas, and the CPU's implementation.
#include "deform_conv2d.h"

#include "../runtime/cpu.h"
#include "deform_conv2d_cpu/backward.h"
#include "deform_conv2d_cpu/forward.h"

namespace dcn {
namespace {

struct CpuDeformConv2d {
  static Tensor forward(const ConvArguments& a, const ConvGeometry& g) {
    if (Cpu::portable() || !tiles::fits_index(g)) return deform_conv2d_portable<Cpu>(a, g);
    const Tensor output = new_output(a, g);
    if (output.numel() > 0)
      dispatch_deform_conv2d(a, [&](auto s, auto f) { tiles::forward<decltype(s), decltype(f)>(a, g, output); });
    return output;
  }

  static ConvGradients backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g,
                                int64_t needs) {
    if (Cpu::portable() || !tiles::fits_index(g)) return deform_conv2d_backward_portable<Cpu>(grad_output, a, g, needs);
    const auto [grad_input, grad_offset, grad_weight, grad_mask] = new_gradients(a, needs, a.input.scalar_type());
    if (g.batch > 0)
      dispatch_deform_conv2d(a, [&, &grad_input = grad_input, &grad_offset = grad_offset, &grad_weight = grad_weight,
                                 &grad_mask = grad_mask](auto s, auto f) {
        tiles::backward<decltype(s), decltype(f)>(grad_output, a, g, needs, grad_input, grad_offset, grad_weight,
                                                  grad_mask);
      });
    return {grad_input, grad_offset, grad_weight, grad_mask};
  }
};

}  // namespace
}  // namespace dcn

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
