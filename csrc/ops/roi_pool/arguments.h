// RoI pooling, what a call is given and gives: its arguments, checked and as geometry, their types, and its results.
#pragma once

#include <tuple>

#include "../../core/roi_geometry.h"
#include "../../core/wanted.h"
#include "../../runtime/tensor.h"

namespace dcn {

struct RoiArguments {
  Tensor input, rois;
  std::optional<Tensor> offset, mask;
};

inline RoiGeometry pair_geometry(const char* op, RoiRule rule, const std::vector<int64_t>& output_size,
                                 const std::vector<int64_t>& part_size) {
  check(output_size.size() == 2, op, ": output_size must hold 2 integers, got ", output_size.size());
  check(part_size.size() == 2, op, ": part_size must hold 2 integers, got ", part_size.size());
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

// The memory safety of everything that follows rests on this; friendlier messages come from Python. Regions themselves
// are looked at where they are used: one that names no image is not read.
inline void check_roi_pool(const char* op, const RoiArguments& a, RoiGeometry& g) {
  const auto check = [&](bool condition, const auto&... parts) { dcn::check(condition, op, ": ", parts...); };
  check(a.input.dim() == 4, "input must have 4 dimensions, got shape ", shape_of(a.input));
  check(a.rois.dim() == 2 && a.rois.size(1) == 5, "rois must have shape [R, 5], got ", shape_of(a.rois));
  g.batch = a.input.size(0), g.channels = a.input.size(1), g.height = a.input.size(2), g.width = a.input.size(3);
  g.rois = a.rois.size(0);
  check(g.channels > 0 && g.height > 0 && g.width > 0, "input must have channels and pixels, got shape ",
        shape_of(a.input));
  const int64_t most = 1 << 20;
  const auto positive = [&](int64_t value, const char* name) {
    check(value > 0 && value <= most, name, " must be from 1 to ", most, ", got ", value);
  };
  positive(g.out_height, "output_size"), positive(g.out_width, "output_size");
  positive(g.part_height, "part_size"), positive(g.part_width, "part_size");
  positive(g.groups, "group_size");
  const bool part = g.rule == RoiRule::kPart;
  const char* samples = part ? "samples_per_part" : "sampling_ratio";
  const int64_t least = part ? 1 : 0;
  check(g.grid >= least && g.grid <= most, samples, " must be from ", least, " to ", most, ", got ", g.grid);
  check(g.spatial_scale > 0 && g.spatial_scale - g.spatial_scale == 0,
        "spatial_scale must be positive and finite, got ", g.spatial_scale);
  // Compared by division: the product may overflow.
  check(g.outputs > 0 && g.channels % (g.groups * g.groups) == 0 && g.channels / (g.groups * g.groups) == g.outputs,
        "input must have output_dim * group_size ** 2 channels (", g.outputs, " * ", g.groups, " ** 2), got shape ",
        shape_of(a.input));
  g.classes = 1;
  if (a.mask && a.mask->dim() == 4) g.classes = a.mask->size(1);
  if (a.offset && a.offset->dim() == 4) g.classes = a.offset->size(1) / 2;
  check(g.classes > 0 && g.outputs % g.classes == 0, "the classes of offset and mask must divide the ", g.outputs,
        " outputs, got ", g.classes);

  check_input_type(op, a.input);
  check_like_input(op, "rois", a.rois, a.input, true);
  const auto parts = [&](const Tensor& t, int64_t planes, const char* name) {
    check(t.dim() == 4 && t.size(0) == g.rois && t.size(1) == planes && t.size(2) == g.part_height &&
              t.size(3) == g.part_width,
          name, " must have shape [", g.rois, ", ", planes, ", ", g.part_height, ", ", g.part_width, "], got ",
          shape_of(t));
    check_like_input(op, name, t, a.input, true);
  };
  if (a.offset) parts(*a.offset, 2 * g.classes, "offset");
  // What does not exist moves nothing, however it would be scaled.
  if (!a.offset) g.offset_scale = 0;
  if (a.mask) parts(*a.mask, g.classes, "mask");
}

// rois, offset and mask in the type of sums and densely stored; they are small. Keeps them alive.
template <typename A>
struct DensePlaces {
  RoiGeometry g;
  Tensor rois;
  std::optional<Tensor> offset, mask;

  DensePlaces(const RoiArguments& a, const RoiGeometry& geometry) : g(geometry), rois(dense(a.rois)) {
    if (a.offset) offset = dense(*a.offset);
    if (a.mask) mask = dense(*a.mask);
  }
  RoiPlaces<A> places() const {
    return {g, data(rois), offset ? data(*offset) : nullptr, mask ? data(*mask) : nullptr};
  }

 private:
  static Tensor dense(const Tensor& t) { return torch::stable::contiguous(torch::stable::to(t, scalar_type_of<A>())); }
  static const A* data(const Tensor& t) { return static_cast<const A*>(t.data_ptr()); }
};

inline Tensor new_pooled(const RoiArguments& a, const RoiGeometry& g) {
  return new_image(a.input, {g.rois, g.outputs, g.out_height, g.out_width}, a.input.scalar_type(),
                   is_channels_last(a.input));
}

inline Tensor new_roi_gradient(const Tensor& like, bool wanted, ScalarType type) {
  if (!wanted) return torch::stable::new_empty(like, {0}, type);
  return new_image(like, {like.size(0), like.size(1), like.size(2), like.size(3)}, type, is_channels_last(like));
}

// Dense gradients of offset and mask in the type of sums, before they take their own type and layout.
template <typename A>
struct PartGradients {
  Tensor offset, mask;
  A *offset_data = nullptr, *mask_data = nullptr;

  PartGradients(const RoiArguments& a, const RoiGeometry& g, int64_t needs)
      : offset(dense(a, needs & kRoiOffset ? 2 * g.classes : 0, g)),
        mask(dense(a, needs & kRoiMask ? g.classes : 0, g)) {
    if (needs & kRoiOffset) offset_data = static_cast<A*>(offset.data_ptr());
    if (needs & kRoiMask) mask_data = static_cast<A*>(mask.data_ptr());
  }

 private:
  static Tensor dense(const RoiArguments& a, int64_t planes, const RoiGeometry& g) {
    return torch::stable::new_empty(a.input, {g.rois, planes, g.part_height, g.part_width}, scalar_type_of<A>());
  }
};

// Gradients of input, offset, mask; an empty tensor for what `needs` does not ask for.
using RoiGradients = std::tuple<Tensor, Tensor, Tensor>;

}  // namespace dcn
