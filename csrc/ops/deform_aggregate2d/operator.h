// Deformable aggregation as torch calls it: arguments checked and brought to their types and strides, then a device's
// implementation.
#pragma once

#include "arguments.h"

namespace dcn {

// The operators as the schemas have them. `Implementation` has forward(arguments, geometry) and backward(grad_output,
// arguments, geometry, wanted), which returns gradients in the types that the arguments are read in.
template <typename Implementation>
Tensor deform_aggregate2d(Tensor value, Tensor offset, std::optional<Tensor> weight, std::vector<int64_t> kernel_size,
                          std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                          double offset_scale, bool remove_center, bool softmax, bool official_order) {
  AggregateArguments a{value, offset, weight};
  const AggregateGeometry geometry = check_deform_aggregate2d(
      "deform_aggregate2d", a,
      {kernel_size, stride, padding, dilation, offset_scale, remove_center, softmax, official_order});
  unify_tap_types(a);
  unify_strides(a);
  return Implementation::forward(a, geometry);
}

template <typename Implementation>
AggregateGradients deform_aggregate2d_backward(Tensor grad_output, Tensor value, Tensor offset,
                                               std::optional<Tensor> weight, std::vector<int64_t> kernel_size,
                                               std::vector<int64_t> stride, std::vector<int64_t> padding,
                                               std::vector<int64_t> dilation, double offset_scale, bool remove_center,
                                               bool softmax, bool official_order, int64_t wanted) {
  AggregateArguments a{value, offset, weight};
  const char* op = "deform_aggregate2d_backward";
  const AggregateGeometry geometry = check_deform_aggregate2d(
      op, a, {kernel_size, stride, padding, dilation, offset_scale, remove_center, softmax, official_order});
  const int64_t out_width = geometry.taps.out_width;
  check(grad_output.dim() == 4 && grad_output.size(0) == geometry.g.batch &&
            grad_output.size(1) == geometry.out_height && grad_output.size(2) == out_width &&
            grad_output.size(3) == value.size(3),
        op, ": grad_output: expected shape [", geometry.g.batch, ", ", geometry.out_height, ", ", out_width, ", ",
        value.size(3), "], got ", shape_of(grad_output));
  check_like(op, "grad_output", grad_output, "value", value, false);
  if (!weight) wanted &= ~static_cast<int64_t>(kWeight);
  unify_tap_types(a);
  unify_strides(a);
  if (!has_one_stride(grad_output)) grad_output = torch::stable::contiguous(grad_output);
  const auto [grad_value, grad_offset, grad_weight] = Implementation::backward(grad_output, a, geometry, wanted);
  return {grad_value, torch::stable::to(grad_offset, offset.scalar_type()),
          weight ? torch::stable::to(grad_weight, weight->scalar_type()) : grad_weight};
}

template <typename Implementation, typename Library>
void implement_deform_aggregate2d(Library& m) {
  m.impl("deform_aggregate2d", TORCH_BOX(&deform_aggregate2d<Implementation>));
  m.impl("deform_aggregate2d_backward", TORCH_BOX(&deform_aggregate2d_backward<Implementation>));
}

}  // namespace dcn
