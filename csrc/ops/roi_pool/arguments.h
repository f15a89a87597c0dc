// RoI pooling, what a call is given and gives: its arguments, checked and as geometry, their types, and its results.
#pragma once

#include <tuple>

#include "../../core/roi_positions.h"
#include "../../core/wanted.h"
#include "../../runtime/kernels.h"
#include "../../runtime/tensor.h"

namespace dcn {

// Which kernels served the operators last, by their rules.
struct RoiLogs {
  KernelLog forward, backward;
  RoiLogs(const char* op, const char* backward_op) : forward(op), backward(backward_op) {}
};
inline RoiLogs roi_logs[] = {{"deform_roi_pool", "deform_roi_pool_backward"},
                             {"deform_ps_roi_pool", "deform_ps_roi_pool_backward"},
                             {"ps_roi_pool", "ps_roi_pool_backward"}};
inline RoiLogs& logs_of(RoiRule rule) { return roi_logs[static_cast<int>(rule)]; }

struct RoiArguments {
  Tensor input, rois;
  std::optional<Tensor> offset, mask;
};

// What an operator's options say of its geometry; check_roi_pool adds what tensors say.
inline RoiGeometry pair_geometry(const char* op, RoiRule rule, const std::vector<int64_t>& output_size,
                                 const std::vector<int64_t>& part_size) {
  check(output_size.size() == 2, op, ": output_size: expected 2 integers, got ", output_size.size());
  check(part_size.size() == 2, op, ": part_size: expected 2 integers, got ", part_size.size());
  RoiGeometry g{};
  g.rule = rule;
  g.out_height = output_size[0], g.out_width = output_size[1];
  g.part_height = part_size[0], g.part_width = part_size[1];
  g.groups = 1;
  return g;
}

inline RoiGeometry deform_roi_geometry(const char* op, const Tensor& input, const std::vector<int64_t>& output_size,
                                       double spatial_scale, int64_t sampling_ratio, double gamma, bool aligned) {
  RoiGeometry g = pair_geometry(op, RoiRule::kAlign, output_size, output_size);
  g.outputs = input.dim() == 4 ? input.size(1) : 0;
  g.spatial_scale = spatial_scale, g.grid = sampling_ratio, g.offset_scale = gamma, g.aligned = aligned;
  return g;
}

inline RoiGeometry deform_ps_roi_geometry(const char* op, int64_t output_dim, int64_t group_size,
                                          const std::vector<int64_t>& output_size,
                                          const std::vector<int64_t>& part_size, int64_t samples_per_part,
                                          double spatial_scale, double offset_scale) {
  RoiGeometry g = pair_geometry(op, RoiRule::kPart, output_size, part_size);
  g.outputs = output_dim, g.groups = group_size, g.grid = samples_per_part;
  g.spatial_scale = spatial_scale, g.offset_scale = offset_scale;
  return g;
}

inline RoiGeometry ps_roi_geometry(const char* op, int64_t output_dim, int64_t group_size,
                                   const std::vector<int64_t>& output_size, double spatial_scale) {
  RoiGeometry g = pair_geometry(op, RoiRule::kPixels, output_size, output_size);
  g.outputs = output_dim, g.groups = group_size, g.spatial_scale = spatial_scale;
  return g;
}

// The memory safety of everything that follows rests on this; friendlier messages come from Python. The values of the
// regions are not looked at here, since on CUDA that would mean waiting: an invalid one gives NaN.
inline void check_roi_pool(const char* op, const RoiArguments& a, RoiGeometry& g) {
  const auto check = [&](bool condition, const auto&... parts) { dcn::check(condition, op, ": ", parts...); };
  check(a.input.dim() == 4, "input: expected 4 dimensions, got shape ", shape_of(a.input));
  check(a.rois.dim() == 2 && a.rois.size(1) == 5, "rois: expected shape [R, 5], got ", shape_of(a.rois));
  g.batch = a.input.size(0), g.channels = a.input.size(1), g.height = a.input.size(2), g.width = a.input.size(3);
  g.rois = a.rois.size(0);
  check(g.channels > 0 && g.height > 0 && g.width > 0, "input: expected channels and pixels, got shape ",
        shape_of(a.input));
  // Then no product of a few of them overflows.
  const int64_t max = 1 << 20;
  const auto in_range = [&](int64_t value, int64_t min, const char* name) {
    check(value >= min && value <= max, name, ": expected an integer from ", min, " to ", max, ", got ", value);
  };
  in_range(g.out_height, 1, "output_size"), in_range(g.out_width, 1, "output_size");
  in_range(g.part_height, 1, "part_size"), in_range(g.part_width, 1, "part_size");
  in_range(g.groups, 1, "group_size");
  const bool part = g.rule == RoiRule::kPart;
  in_range(g.grid, part ? 1 : 0, part ? "samples_per_part" : "sampling_ratio");
  check(g.spatial_scale > 0 && g.spatial_scale - g.spatial_scale == 0,
        "spatial_scale: expected a positive, finite number, got ", g.spatial_scale);
  // Compared by division: the product may overflow.
  check(g.outputs > 0 && g.channels % (g.groups * g.groups) == 0 && g.channels / (g.groups * g.groups) == g.outputs,
        "input: expected output_dim * group_size ** 2 = ", g.outputs, " * ", g.groups, " ** 2 channels, got shape ",
        shape_of(a.input));
  const bool offset_tells = a.offset && a.offset->dim() == 4, mask_tells = a.mask && a.mask->dim() == 4;
  g.classes = offset_tells ? a.offset->size(1) / 2 : (mask_tells ? a.mask->size(1) : 1);
  const char* teller = offset_tells ? "offset" : "mask";
  check(g.classes > 0 && g.outputs % g.classes == 0, teller, ": expected a number of classes that divides the ",
        g.outputs, " outputs, got ", g.classes);

  check_type(op, "input", a.input);
  check_like(op, "rois", a.rois, "input", a.input, true);
  const auto check_parts = [&](const Tensor& t, int64_t planes, const char* name) {
    check(t.dim() == 4 && t.size(0) == g.rois && t.size(1) == planes && t.size(2) == g.part_height &&
              t.size(3) == g.part_width,
          name, ": expected shape [", g.rois, ", ", planes, ", ", g.part_height, ", ", g.part_width, "], got ",
          shape_of(t));
    check_like(op, name, t, "input", a.input, true);
  };
  if (a.offset) check_parts(*a.offset, 2 * g.classes, "offset");
  // Without offsets nothing moves, even where the scale is infinite or NaN.
  if (!a.offset) g.offset_scale = 0;
  if (a.mask) check_parts(*a.mask, g.classes, "mask");
}

// rois, offset and mask in the accumulator type and densely stored, which costs little: they are small. Owns them.
template <typename A>
struct DenseRegions {
  RoiGeometry g;
  Tensor rois;
  std::optional<Tensor> offset, mask;

  DenseRegions(const RoiArguments& a, const RoiGeometry& geometry) : g(geometry), rois(dense(a.rois)) {
    if (a.offset) offset = dense(*a.offset);
    if (a.mask) mask = dense(*a.mask);
  }
  Regions<A> regions() const { return {g, data(rois), offset ? data(*offset) : nullptr, mask ? data(*mask) : nullptr}; }

 private:
  static Tensor dense(const Tensor& t) { return torch::stable::contiguous(torch::stable::to(t, scalar_type_of<A>())); }
  static const A* data(const Tensor& t) { return static_cast<const A*>(t.data_ptr()); }
};

inline Tensor new_pooled(const RoiArguments& a, const RoiGeometry& g) {
  return new_image(a.input, {g.rois, g.outputs, g.out_height, g.out_width}, a.input.scalar_type(),
                   is_channels_last(a.input));
}

// Gradients of input, offset, mask; an empty tensor for what is not wanted (core/wanted.h).
using RoiGradients = std::tuple<Tensor, Tensor, Tensor>;

inline Tensor new_roi_gradient(const Tensor& like, bool wanted, ScalarType type) {
  if (!wanted) return torch::stable::new_empty(like, {0}, type);
  return new_image(like, {like.size(0), like.size(1), like.size(2), like.size(3)}, type, is_channels_last(like));
}

// The gradients of offset and mask as they are computed: dense, in the accumulator type.
template <typename A>
struct PartGradients {
  Tensor offset, mask;
  A *offset_data = nullptr, *mask_data = nullptr;  // null: not wanted

  PartGradients(const RoiArguments& a, const RoiGeometry& g, int64_t wanted)
      : offset(dense(a, wanted & kOffset ? 2 * g.classes : 0, g)), mask(dense(a, wanted & kMask ? g.classes : 0, g)) {
    if (wanted & kOffset) offset_data = static_cast<A*>(offset.data_ptr());
    if (wanted & kMask) mask_data = static_cast<A*>(mask.data_ptr());
  }

 private:
  static Tensor dense(const RoiArguments& a, int64_t planes, const RoiGeometry& g) {
    return torch::stable::new_empty(a.input, {g.rois, planes, g.part_height, g.part_width}, scalar_type_of<A>());
  }
};

}  // namespace dcn
