// RoI pooling on any device, from the bodies: which of them run, in what order, and the memory that they share.
#pragma once

#include <algorithm>

#include "../../runtime/indices.h"
#include "arguments.h"
#include "bodies.h"
#include "index.h"

namespace dcn {

// Whether 32 bits hold all rows, columns and numbers of elements that a call meets.
template <typename Device>
bool has_int_indices(const RoiGeometry& g, std::initializer_list<const Tensor*> met) {
  int64_t largest = std::max({2 * g.batch, 2 * g.height + 8, 2 * g.width + 8, 5 * g.rois, g.grid,
                              g.rois * g.outputs * g.bins(), g.rois * g.classes * 2 * g.parts() * 16});
  for (const Tensor* t : met) largest = std::max(largest, t->numel() ? extent(*t, t->size(0)) : 0);
  return largest <= Device::largest_index();
}

// Whether the outputs of a class, and the channels that they read, are whole accesses of 16 bytes.
template <typename S>
bool has_vectors(const RoiGeometry& g, const Tensor& input, const Tensor& pooled) {
  return g.groups == 1 && g.class_outputs() % kVectorValues<S> == 0 && is_in_vectors<S>(input) &&
         is_in_vectors<S>(pooled);
}

// Neighbouring threads follow the channels where these lie closer in memory than the pixels of a row.
inline bool is_by_channel(const Tensor& t) { return t.stride(1) < t.stride(3); }

template <typename Device>
Tensor roi_pool_portable(const RoiArguments& a, const RoiGeometry& g) {
  const Tensor output = new_pooled(a, g);
  dispatch_floating(a.input.scalar_type(), [&](auto s) {
    using S = decltype(s);
    using A = Accumulate<S>;
    const DenseRegions<A> dense(a, g);
    const bool in_int = has_int_indices<Device>(g, {&a.input, &output});
    dispatch_indices(in_int, has_vectors<S>(g, a.input, output), [&](auto index, auto vectors) {
      using I = decltype(index);
      constexpr int V = vectors ? kVectorValues<S> : 1;
      Device::for_each(PoolBins<A, S, I, V>{BinElements<A, I, V>(dense.regions(), is_by_channel(a.input)),
                                            view<const S>(a.input), view<S>(output)},
                       a.input);
    });
  });
  return output;
}

// Adds to `sums` in an order that does not vary.
template <typename Device, typename S, typename I>
void gather_bins(const Tensor& grad_output, const Regions<Accumulate<S>>& regions, const Tensor& sums) {
  using A = Accumulate<S>;
  const RoiGeometry& g = regions.g;
  const int64_t bins_of_region = g.classes * g.bins();
  const Tensor memory = torch::stable::new_empty(
      sums, {g.rois * (bins_of_region + 1), static_cast<int64_t>(sizeof(Extent<I>))}, ScalarType::Byte);
  Extent<I>* const of_bins = static_cast<Extent<I>*>(memory.data_ptr());
  Extent<I>* const of_regions = of_bins + g.rois * bins_of_region;
  Device::for_each(FindBinExtents<A, I>{regions, of_bins}, sums);
  Device::for_each(FindRegionExtents<I>{g.rois, bins_of_region, of_bins, of_regions}, sums);
  Device::for_each(GatherBins<A, S, I>(regions, view<const S>(grad_output), view<A>(sums), of_regions, of_bins), sums);
}

template <typename Device, typename S>
Tensor roi_input_gradient(const Tensor& grad_output, const RoiArguments& a, const Regions<Accumulate<S>>& regions,
                          int64_t wanted) {
  using A = Accumulate<S>;
  const RoiGeometry& g = regions.g;
  Tensor grad_input = new_roi_gradient(a.input, wanted & kInput, scalar_type_of<S>());
  if (!(wanted & kInput)) return grad_input;
  // Gathered sums lie by channel, whatever the layout of the input: so do the elements of GatherBins.
  const bool ordered = wanted & kOrdered, by_channel = ordered || is_channels_last(a.input);
  const bool in_place = std::is_same_v<S, A> && by_channel == is_channels_last(a.input);
  Tensor sums = in_place
                    ? grad_input
                    : new_image(grad_input, {g.batch, g.channels, g.height, g.width}, scalar_type_of<A>(), by_channel);
  torch::stable::zero_(sums);
  dispatch_indices(has_int_indices<Device>(g, {&grad_output, &sums}), false, [&](auto index, auto) {
    using I = decltype(index);
    if (ordered)
      gather_bins<Device, S, I>(grad_output, regions, sums);
    else
      Device::for_each(ScatterBins<A, S, I>{BinElements<A, I, 1>(regions, is_by_channel(sums)),
                                            view<const S>(grad_output), view<A>(sums)},
                       a.input);
  });
  if (!in_place) torch::stable::copy_(grad_input, sums);
  return grad_input;
}

template <typename Device, typename S>
void roi_part_gradients(const Tensor& grad_output, const RoiArguments& a, const Regions<Accumulate<S>>& regions,
                        const PartGradients<Accumulate<S>>& parts) {
  using A = Accumulate<S>;
  const RoiGeometry& g = regions.g;
  const bool in_int = has_int_indices<Device>(g, {&a.input, &grad_output});
  const bool in_vectors = has_vectors<S>(g, a.input, grad_output);
  const int64_t places = g.rois * g.classes * g.parts();
  // One thread for each part would leave a GPU idle; each finds the samples anew.
  const int64_t slices = std::clamp<int64_t>(g.class_outputs() / kElementChannels, 1, 16);
  const Tensor memory = torch::stable::new_empty(
      a.input, {slices * places, static_cast<int64_t>(sizeof(PartSums<A>) / sizeof(A))}, scalar_type_of<A>());
  PartSums<A>* const sums = static_cast<PartSums<A>*>(memory.data_ptr());
  dispatch_indices(in_int, in_vectors, [&](auto index, auto vectors) {
    using I = decltype(index);
    constexpr int V = vectors ? kVectorValues<S> : 1;
    Device::for_each(PartGradient<A, S, I, V>(regions, view<const S>(a.input), view<const S>(grad_output), slices,
                                              is_by_channel(a.input), sums),
                     a.input);
  });
  Device::for_each(AddSlices<A>{places, g.parts(), slices, sums, parts.offset_data, parts.mask_data}, a.input);
}

// Returns the gradient of the input; those of offset and mask are written to `parts`.
template <typename Device, typename S>
Tensor roi_pool_backward_portable(const Tensor& grad_output, const RoiArguments& a,
                                  const Regions<Accumulate<S>>& regions, int64_t wanted,
                                  const PartGradients<Accumulate<S>>& parts) {
  if (wanted & (kOffset | kMask)) roi_part_gradients<Device, S>(grad_output, a, regions, parts);
  return roi_input_gradient<Device, S>(grad_output, a, regions, wanted);
}

}  // namespace dcn
