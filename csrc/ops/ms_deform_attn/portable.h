// Multi-scale deformable attention on the portable path: the bodies in order, on any device.
#pragma once

#include "../../runtime/attention.h"
#include "arguments.h"
#include "bodies.h"

namespace dcn {

template <typename Device>
Tensor ms_deform_attn_portable(const AttentionArguments& a, const AttentionGeometry& g) {
  const Tensor output = new_attended(a, g);
  dispatch_ms_deform_attn(a, [&](auto s, auto f) {
    using S = decltype(s);
    using P = AttentionPoints<Accumulate<S>, decltype(f)>;
    const ScaledPoints<Device, P> scaled(points_of<P>(a, g), a.value);
    Device::for_each(Attend<P, S>{scaled.points, view<const S>(a.value), view_of_heads<S>(output, g)}, a.value);
  });
  return output;
}

// Of which gradients a call has need of what points do to the result.
inline bool asks_for_points(int64_t wanted) {
  return wanted & (kSamplingLocations | kAttentionWeights | kReferencePoints);
}

inline constexpr char kTooManyPoints[] =
    "ms_deform_attn_backward: points: expected fewer than 2^31 samples of a query, got ";

template <typename P>
AttentionResults<P> results_of(const AttentionGradients& gradients) {
  const auto& [grad_value, grad_locations, grad_weights, grad_reference] = gradients;
  const auto data = [](const Tensor& t) { return t.numel() > 0 ? t.data_ptr() : nullptr; };
  using F = typename P::Given;
  AttentionResults<P> to{{}, static_cast<F*>(data(grad_locations)), static_cast<F*>(data(grad_weights))};
  if (grad_value.numel() > 0) to.value = view<typename P::Accumulator>(grad_value);
  return to;
}

template <typename Device, typename P>
void finish_references(const P& points, const PointGradients<typename P::Accumulator>& found,
                       const AttentionGradients& gradients, const Tensor& on) {
  const Tensor& grad_reference = std::get<3>(gradients);
  if (grad_reference.numel() > 0)
    Device::for_each(
        ReferenceGradient<P>{points, found.data(), static_cast<typename P::Given*>(grad_reference.data_ptr())}, on);
}

template <typename Device>
AttentionGradients ms_deform_attn_backward_portable(const Tensor& grad_output, const AttentionArguments& a,
                                                    const AttentionGeometry& g, int64_t wanted) {
  return dispatch_ms_deform_attn(a, [&](auto s, auto f) -> AttentionGradients {
    using S = decltype(s);
    using A = Accumulate<S>;
    using P = AttentionPoints<A, decltype(f)>;
    AttentionGradients gradients = new_gradients(a, wanted, scalar_type_of<A>());
    const ScaledPoints<Device, P> scaled(points_of<P>(a, g), a.value);
    const PointGradients<A> found(g, asks_for_points(wanted), a.value);
    find_gradients<Device, S>(kTooManyPoints, view<const S>(a.value), view_of_heads<const S>(grad_output, g),
                              scaled.points, wanted & kOrdered, found.data(), results_of<P>(gradients), a.value);
    finish_references<Device>(scaled.points, found, gradients, a.value);
    std::get<0>(gradients) = torch::stable::to(std::get<0>(gradients), scalar_type_of<S>());
    return gradients;
  });
}

}  // namespace dcn
