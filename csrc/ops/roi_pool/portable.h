// RoI pooling on any device, from the bodies: which of them run, in what order, and the memory that they share.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "bodies.h"
#include "index.h"

namespace dcn {

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

}  // namespace dcn
