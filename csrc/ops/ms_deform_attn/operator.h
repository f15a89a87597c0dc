// Multi-scale deformable attention as torch calls it: arguments checked and brought to their types, then a device's
// implementation.
#pragma once

#include "arguments.h"

namespace dcn {

// The operators as the schemas have them. `Implementation` has forward(arguments, geometry) and backward(grad_output,
// arguments, geometry, wanted), which returns gradients in the types that the arguments are read in.
template <typename Implementation>
Tensor ms_deform_attn(Tensor value, Tensor sampling_locations, std::optional<Tensor> attention_weights,
                      std::optional<Tensor> reference_points, std::vector<int64_t> spatial_shapes,
                      std::vector<int64_t> points, bool softmax, double offset_scale) {
  AttentionArguments a{value, sampling_locations, attention_weights, reference_points};
  const AttentionGeometry g =
      check_ms_deform_attn("ms_deform_attn", a, {spatial_shapes, points, softmax, offset_scale});
  unify_point_types(a);
  return Implementation::forward(a, g);
}

template <typename Implementation>
AttentionGradients ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor sampling_locations,
                                           std::optional<Tensor> attention_weights,
                                           std::optional<Tensor> reference_points, std::vector<int64_t> spatial_shapes,
                                           std::vector<int64_t> points, bool softmax, double offset_scale,
                                           int64_t wanted) {
  AttentionArguments a{value, sampling_locations, attention_weights, reference_points};
  const char* op = "ms_deform_attn_backward";
  const AttentionGeometry g = check_ms_deform_attn(op, a, {spatial_shapes, points, softmax, offset_scale});
  check(grad_output.dim() == 3 && grad_output.size(0) == g.batch && grad_output.size(1) == g.queries &&
            grad_output.size(2) == g.heads * g.channels,
        op, ": grad_output: expected shape [", g.batch, ", ", g.queries, ", ", g.heads * g.channels, "], got ",
        shape_of(grad_output));
  check_like(op, "grad_output", grad_output, "value", value, false);
  if (!attention_weights) wanted &= ~static_cast<int64_t>(kAttentionWeights);
  if (!reference_points) wanted &= ~static_cast<int64_t>(kReferencePoints);
  unify_point_types(a);
  const auto [grad_value, grad_locations, grad_weights, grad_reference] =
      Implementation::backward(grad_output, a, g, wanted);
  const auto in_own_type = [](const Tensor& gradient, const std::optional<Tensor>& argument) {
    return argument ? torch::stable::to(gradient, argument->scalar_type()) : gradient;
  };
  return {grad_value, in_own_type(grad_locations, sampling_locations), in_own_type(grad_weights, attention_weights),
          in_own_type(grad_reference, reference_points)};
}

template <typename Implementation, typename Library>
void implement_ms_deform_attn(Library& m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn<Implementation>));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward<Implementation>));
}

}  // namespace dcn
