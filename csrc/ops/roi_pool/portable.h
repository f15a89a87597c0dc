// Pooling over regions of interest on any device: check, allocate, run. The three operators differ in the geometry
// that their arguments describe; everything after that is one. The arithmetic is in bodies.h.
#pragma once

#include <algorithm>
#include <tuple>

#include "../../runtime/tensor.h"
#include "bodies.h"

namespace dcn {

struct RoiArguments {
  Tensor input, rois;
  std::optional<Tensor> offset, mask;
};

// Bits of `needs` in the backward. kRoiOrdered: no sums whose order may vary.
enum RoiNeeds : int64_t { kRoiInput = 1, kRoiOffset = 2, kRoiMask = 4, kRoiOrdered = 1 << 8 };

// Gradients of input, offset, mask; an empty tensor for what `needs` does not ask for.
using RoiGradients = std::tuple<Tensor, Tensor, Tensor>;

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

template <typename Device>
Tensor roi_pool_portable(const RoiArguments& a, const RoiGeometry& g) {
  const Tensor output = new_pooled(a, g);
  dispatch_floating(a.input.scalar_type(), [&](auto s) {
    using S = decltype(s);
    using A = Accumulate<S>;
    const DensePlaces<A> dense(a, g);
    Device::for_each(PoolBins<A, S>{dense.places(), view<const S>(a.input), view<S>(output)}, a.input);
  });
  return output;
}

// Adds to grad_input in an order that does not vary.
template <typename Device, typename S>
void gather_bins(const Tensor& grad_output, const RoiPlaces<Accumulate<S>>& where, const Tensor& grad_input) {
  using A = Accumulate<S>;
  const RoiGeometry& g = where.g;
  const int64_t bins_of_region = g.classes * g.bins();
  const Tensor memory = torch::stable::new_empty(
      grad_input, {g.rois * (bins_of_region + 1), static_cast<int64_t>(sizeof(Extent) / sizeof(int64_t))},
      ScalarType::Long);
  Extent* const bins = static_cast<Extent*>(memory.data_ptr());
  Extent* const regions = bins + g.rois * bins_of_region;
  Device::for_each(FindBinExtents<A>{where, bins}, grad_input);
  Device::for_each(FindRegionExtents{g.rois, bins_of_region, bins, regions}, grad_input);
  Device::for_each(GatherBins<A, S>{where, view<const S>(grad_output), view<A>(grad_input), regions, bins}, grad_input);
}

template <typename Device, typename S>
Tensor roi_input_gradient(const Tensor& grad_output, const RoiArguments& a, const RoiPlaces<Accumulate<S>>& where,
                          int64_t needs) {
  using A = Accumulate<S>;
  Tensor grad_input = new_roi_gradient(a.input, needs & kRoiInput, scalar_type_of<S>());
  if (!(needs & kRoiInput)) return grad_input;
  // What is gathered lies by channel whatever the input's layout.
  const bool ordered = needs & kRoiOrdered, by_channel = ordered || is_channels_last(a.input);
  const bool in_place = std::is_same_v<S, A> && by_channel == is_channels_last(a.input);
  Tensor sums = in_place ? grad_input
                         : new_image(grad_input, {where.g.batch, where.g.channels, where.g.height, where.g.width},
                                     scalar_type_of<A>(), by_channel);
  torch::stable::zero_(sums);
  if (ordered)
    gather_bins<Device, S>(grad_output, where, sums);
  else
    Device::for_each(ScatterBins<A, S>{where, view<const S>(grad_output), view<A>(sums)}, a.input);
  if (!in_place) torch::stable::copy_(grad_input, sums);
  return grad_input;
}

template <typename Device, typename S>
void roi_part_gradients(const Tensor& grad_output, const RoiArguments& a, const RoiPlaces<Accumulate<S>>& where,
                        const PartGradients<Accumulate<S>>& parts) {
  using A = Accumulate<S>;
  const RoiGeometry& g = where.g;
  // A thread for each part alone would leave a GPU idle. This many read whole sectors of half types by channel.
  const int64_t slices = std::min<int64_t>(g.class_outputs(), 16), places = g.rois * g.classes * g.parts();
  const Tensor memory = torch::stable::new_empty(
      a.input, {slices * places, static_cast<int64_t>(sizeof(BinGradient<A>) / sizeof(A))}, scalar_type_of<A>());
  BinGradient<A>* const sums = static_cast<BinGradient<A>*>(memory.data_ptr());
  Device::for_each(PartGradient<A, S>{where, view<const S>(a.input), view<const S>(grad_output), slices, sums},
                   a.input);
  Device::for_each(AddSlices<A>{places, g.parts(), slices, sums, parts.offset_data, parts.mask_data}, a.input);
}

// Returns the gradient of the input; those of the parts are written to `parts`.
template <typename Device, typename S>
Tensor roi_pool_backward_portable(const Tensor& grad_output, const RoiArguments& a,
                                  const RoiPlaces<Accumulate<S>>& where, int64_t needs,
                                  const PartGradients<Accumulate<S>>& parts) {
  if (needs & (kRoiOffset | kRoiMask)) roi_part_gradients<Device, S>(grad_output, a, where, parts);
  return roi_input_gradient<Device, S>(grad_output, a, where, needs);
}

// What the operators share once they have described their geometry. `Implementation` has forward(arguments, geometry)
// and backward<S>(grad_output, arguments, places, needs, part gradients).
template <typename Implementation>
Tensor roi_pool(const char* op, const RoiArguments& a, RoiGeometry g) {
  check_roi_pool(op, a, g);
  return Implementation::forward(a, g);
}

template <typename Implementation>
RoiGradients roi_pool_backward(const char* op, const Tensor& grad_output, const RoiArguments& a, RoiGeometry g,
                               int64_t needs) {
  check_roi_pool(op, a, g);
  check(grad_output.dim() == 4 && grad_output.size(0) == g.rois && grad_output.size(1) == g.outputs &&
            grad_output.size(2) == g.out_height && grad_output.size(3) == g.out_width,
        op, ": grad_output must have shape [", g.rois, ", ", g.outputs, ", ", g.out_height, ", ", g.out_width,
        "], got ", shape_of(grad_output));
  check_like_input(op, "grad_output", grad_output, a.input, false);
  if (!a.offset) needs &= ~static_cast<int64_t>(kRoiOffset);
  if (!a.mask) needs &= ~static_cast<int64_t>(kRoiMask);
  return dispatch_floating(a.input.scalar_type(), [&](auto s) -> RoiGradients {
    using S = decltype(s);
    using A = Accumulate<S>;
    const DensePlaces<A> dense(a, g);
    const PartGradients<A> parts(a, g, needs);
    const Tensor grad_input = Implementation::template backward<S>(grad_output, a, dense.places(), needs, parts);
    const auto finish = [&](const std::optional<Tensor>& of, bool wanted, const Tensor& found) {
      const Tensor& like = of ? *of : a.input;
      Tensor result = new_roi_gradient(like, wanted, like.scalar_type());
      if (wanted) torch::stable::copy_(result, found);
      return result;
    };
    return {grad_input, finish(a.offset, needs & kRoiOffset, parts.offset),
            finish(a.mask, needs & kRoiMask, parts.mask)};
  });
}

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

// The operators as torch calls them.
template <typename I>
struct RoiPoolOperators {
  using Optional = std::optional<Tensor>;
  using Pair = std::vector<int64_t>;

  static Tensor deform(Tensor input, Tensor rois, Optional offset, Optional mask, Pair output_size,
                       double spatial_scale, int64_t sampling_ratio, double gamma, bool aligned) {
    const char* op = "deform_roi_pool";
    return roi_pool<I>(op, {input, rois, offset, mask},
                       deform_roi_geometry(op, input, output_size, spatial_scale, sampling_ratio, gamma, aligned));
  }
  static RoiGradients deform_backward(Tensor grad_output, Tensor input, Tensor rois, Optional offset, Optional mask,
                                      Pair output_size, double spatial_scale, int64_t sampling_ratio, double gamma,
                                      bool aligned, int64_t needs) {
    const char* op = "deform_roi_pool_backward";
    return roi_pool_backward<I>(
        op, grad_output, {input, rois, offset, mask},
        deform_roi_geometry(op, input, output_size, spatial_scale, sampling_ratio, gamma, aligned), needs);
  }
  static Tensor deform_ps(Tensor input, Tensor rois, Optional offset, Optional mask, int64_t output_dim,
                          int64_t group_size, Pair output_size, Pair part_size, int64_t samples_per_part,
                          double spatial_scale, double offset_scale) {
    const char* op = "deform_ps_roi_pool";
    return roi_pool<I>(op, {input, rois, offset, mask},
                       deform_ps_roi_geometry(op, output_dim, group_size, output_size, part_size, samples_per_part,
                                              spatial_scale, offset_scale));
  }
  static RoiGradients deform_ps_backward(Tensor grad_output, Tensor input, Tensor rois, Optional offset, Optional mask,
                                         int64_t output_dim, int64_t group_size, Pair output_size, Pair part_size,
                                         int64_t samples_per_part, double spatial_scale, double offset_scale,
                                         int64_t needs) {
    const char* op = "deform_ps_roi_pool_backward";
    return roi_pool_backward<I>(op, grad_output, {input, rois, offset, mask},
                                deform_ps_roi_geometry(op, output_dim, group_size, output_size, part_size,
                                                       samples_per_part, spatial_scale, offset_scale),
                                needs);
  }
  static Tensor ps(Tensor input, Tensor rois, int64_t output_dim, int64_t group_size, Pair output_size,
                   double spatial_scale) {
    const char* op = "ps_roi_pool";
    return roi_pool<I>(op, {input, rois, std::nullopt, std::nullopt},
                       ps_roi_geometry(op, output_dim, group_size, output_size, spatial_scale));
  }
  static Tensor ps_backward(Tensor grad_output, Tensor input, Tensor rois, int64_t output_dim, int64_t group_size,
                            Pair output_size, double spatial_scale, int64_t needs) {
    const char* op = "ps_roi_pool_backward";
    return std::get<0>(roi_pool_backward<I>(op, grad_output, {input, rois, std::nullopt, std::nullopt},
                                            ps_roi_geometry(op, output_dim, group_size, output_size, spatial_scale),
                                            needs));
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
