// Deformable aggregation on the portable path: the bodies of attention in order, on any device.
#pragma once

#include "arguments.h"

namespace dcn {

template <typename Device>
Tensor deform_aggregate2d_portable(const AggregateArguments& a, const AggregateGeometry& geometry) {
  const Tensor output = new_aggregated(a, geometry);
  dispatch_deform_aggregate2d(a, [&](auto s, auto f) {
    using S = decltype(s);
    using P = TapPoints<Accumulate<S>, decltype(f)>;
    const ScaledPoints<Device, P> scaled(taps_of<P>(a, geometry), a.value);
    Device::for_each(Attend<P, S>{scaled.points, view_of_groups<const S>(a.value, geometry.g),
                                  view_of_groups<S>(output, geometry.g)},
                     a.value);
  });
  return output;
}

inline constexpr char kTooManyTaps[] =
    "deform_aggregate2d_backward: offset: expected fewer than 2^31 taps of a pixel's groups, got ";

template <typename P>
AttentionResults<P> results_of(const AggregateGradients& gradients, const AggregateGeometry& geometry) {
  const TapGradients<typename P::Given> of_taps(gradients, geometry);
  AttentionResults<P> to{{}, of_taps.offset, of_taps.weight};
  const Tensor& grad_value = std::get<0>(gradients);
  if (grad_value.numel() > 0) to.value = view_of_groups<typename P::Accumulator>(grad_value, geometry.g);
  return to;
}

template <typename Device>
AggregateGradients deform_aggregate2d_backward_portable(const Tensor& grad_output, const AggregateArguments& a,
                                                        const AggregateGeometry& geometry, int64_t wanted) {
  return dispatch_deform_aggregate2d(a, [&](auto s, auto f) -> AggregateGradients {
    using S = decltype(s);
    using A = Accumulate<S>;
    using P = TapPoints<A, decltype(f)>;
    const AttentionGeometry& g = geometry.g;
    AggregateGradients gradients = new_gradients(a, wanted, scalar_type_of<A>());
    const AttentionResults<P> to = results_of<P>(gradients, geometry);
    const ScaledPoints<Device, P> scaled(taps_of<P>(a, geometry), a.value);
    const PointGradients<A> found(g, to.locations || to.weights, a.value);
    find_gradients<Device, S>(kTooManyTaps, view_of_groups<const S>(a.value, g),
                              view_of_groups<const S>(grad_output, g), scaled.points, wanted & kOrdered, found.data(),
                              to, a.value);
    std::get<0>(gradients) = torch::stable::to(std::get<0>(gradients), scalar_type_of<S>());
    return gradients;
  });
}

}  // namespace dcn
