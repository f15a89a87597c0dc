// RoI pooling as torch calls it: arguments checked and brought to the accumulator type, then a device's implementation.
// The three operators differ in the geometry that their options describe; everything after that is one.
#pragma once

#include "arguments.h"

namespace dcn {

// `Implementation` has forward(arguments, geometry) and backward<S>(grad_output, arguments, regions, wanted, parts),
// which returns the gradient of the input and writes those of offset and mask to `parts`.
template <typename Implementation>
Tensor roi_pool(const char* op, const RoiArguments& a, RoiGeometry g) {
  check_roi_pool(op, a, g);
  return Implementation::forward(a, g);
}

template <typename Implementation>
RoiGradients roi_pool_backward(const char* op, const Tensor& grad_output, const RoiArguments& a, RoiGeometry g,
                               int64_t wanted) {
  check_roi_pool(op, a, g);
  check(grad_output.dim() == 4 && grad_output.size(0) == g.rois && grad_output.size(1) == g.outputs &&
            grad_output.size(2) == g.out_height && grad_output.size(3) == g.out_width,
        op, ": grad_output: expected shape [", g.rois, ", ", g.outputs, ", ", g.out_height, ", ", g.out_width,
        "], got ", shape_of(grad_output));
  check_like(op, "grad_output", grad_output, "input", a.input, false);
  if (!a.offset) wanted &= ~static_cast<int64_t>(kOffset);
  if (!a.mask) wanted &= ~static_cast<int64_t>(kMask);
  return dispatch_floating(a.input.scalar_type(), [&](auto s) -> RoiGradients {
    using S = decltype(s);
    using A = Accumulate<S>;
    const DenseRegions<A> dense(a, g);
    const PartGradients<A> parts(a, g, wanted);
    const Tensor grad_input = Implementation::template backward<S>(grad_output, a, dense.regions(), wanted, parts);
    const auto in_own_type = [&](const std::optional<Tensor>& argument, bool wanted, const Tensor& found) {
      const Tensor& like = argument ? *argument : a.input;
      Tensor result = new_roi_gradient(like, wanted, like.scalar_type());
      if (wanted) torch::stable::copy_(result, found);
      return result;
    };
    return {grad_input, in_own_type(a.offset, wanted & kOffset, parts.offset),
            in_own_type(a.mask, wanted & kMask, parts.mask)};
  });
}

// The operators as the schemas have them.
template <typename Implementation>
struct RoiPoolOperators {
  using Optional = std::optional<Tensor>;
  using Pair = std::vector<int64_t>;

  static Tensor deform(Tensor input, Tensor rois, Optional offset, Optional mask, Pair output_size,
                       double spatial_scale, int64_t sampling_ratio, double gamma, bool aligned) {
    const char* op = "deform_roi_pool";
    return roi_pool<Implementation>(
        op, {input, rois, offset, mask},
        deform_roi_geometry(op, input, output_size, spatial_scale, sampling_ratio, gamma, aligned));
  }
  static RoiGradients deform_backward(Tensor grad_output, Tensor input, Tensor rois, Optional offset, Optional mask,
                                      Pair output_size, double spatial_scale, int64_t sampling_ratio, double gamma,
                                      bool aligned, int64_t wanted) {
    const char* op = "deform_roi_pool_backward";
    return roi_pool_backward<Implementation>(
        op, grad_output, {input, rois, offset, mask},
        deform_roi_geometry(op, input, output_size, spatial_scale, sampling_ratio, gamma, aligned), wanted);
  }
  static Tensor deform_ps(Tensor input, Tensor rois, Optional offset, Optional mask, int64_t output_dim,
                          int64_t group_size, Pair output_size, Pair part_size, int64_t samples_per_part,
                          double spatial_scale, double offset_scale) {
    const char* op = "deform_ps_roi_pool";
    return roi_pool<Implementation>(op, {input, rois, offset, mask},
                                    deform_ps_roi_geometry(op, output_dim, group_size, output_size, part_size,
                                                           samples_per_part, spatial_scale, offset_scale));
  }
  static RoiGradients deform_ps_backward(Tensor grad_output, Tensor input, Tensor rois, Optional offset, Optional mask,
                                         int64_t output_dim, int64_t group_size, Pair output_size, Pair part_size,
                                         int64_t samples_per_part, double spatial_scale, double offset_scale,
                                         int64_t wanted) {
    const char* op = "deform_ps_roi_pool_backward";
    return roi_pool_backward<Implementation>(op, grad_output, {input, rois, offset, mask},
                                             deform_ps_roi_geometry(op, output_dim, group_size, output_size, part_size,
                                                                    samples_per_part, spatial_scale, offset_scale),
                                             wanted);
  }
  static Tensor ps(Tensor input, Tensor rois, int64_t output_dim, int64_t group_size, Pair output_size,
                   double spatial_scale) {
    const char* op = "ps_roi_pool";
    return roi_pool<Implementation>(op, {input, rois, std::nullopt, std::nullopt},
                                    ps_roi_geometry(op, output_dim, group_size, output_size, spatial_scale));
  }
  static Tensor ps_backward(Tensor grad_output, Tensor input, Tensor rois, int64_t output_dim, int64_t group_size,
                            Pair output_size, double spatial_scale, int64_t wanted) {
    const char* op = "ps_roi_pool_backward";
    return std::get<0>(roi_pool_backward<Implementation>(
        op, grad_output, {input, rois, std::nullopt, std::nullopt},
        ps_roi_geometry(op, output_dim, group_size, output_size, spatial_scale), wanted));
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("deform_roi_pool", TORCH_BOX(&RoiPoolOperators::deform));
    m.impl("deform_roi_pool_backward", TORCH_BOX(&RoiPoolOperators::deform_backward));
    m.impl("deform_ps_roi_pool", TORCH_BOX(&RoiPoolOperators::deform_ps));
    m.impl("deform_ps_roi_pool_backward", TORCH_BOX(&RoiPoolOperators::deform_ps_backward));
    m.impl("ps_roi_pool", TORCH_BOX(&RoiPoolOperators::ps));
    m.impl("ps_roi_pool_backward", TORCH_BOX(&RoiPoolOperators::ps_backward));
  }
};

}  // namespace dcn
