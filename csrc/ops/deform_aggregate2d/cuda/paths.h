// Deformable aggregation on a GPU: the fused path of attention where it is chosen and serves the call, else the
// portable one. `Device` is CUDA, or the tests' emulation of it.
#pragma once

#include "../../../runtime/gpu_attention.h"
#include "../portable.h"

namespace dcn {

// Why attention's kernels do not serve a call: they find taps without offsets in 32 bits. Null: they do.
inline const char* why_not_fused(const AggregateArguments& a, const AggregateGeometry& geometry) {
  const TapGrid& taps = geometry.taps;
  const int64_t sizes[] = {taps.out_width, geometry.out_height}, limit = 1 << 30;
  for (int along = 0; along < 2; ++along)
    if (sizes[along] * taps.stride[along] + taps.kernel[along] * taps.dilation[along] > limit)
      return "stride: expected taps, without offsets, within 2^30 pixels";
  if (geometry.g.points > limit) return "kernel_size: expected at most 2^30 taps";
  return why_not_attended(a.value.scalar_type(), geometry.g);
}

template <typename Device>
struct GpuAggregate {
  static Tensor forward(const AggregateArguments& a, const AggregateGeometry& geometry) {
    const typename Device::Guard guard(a.value);
    const char* reason = Device::why_portable(a.value);
    if (!reason) reason = why_not_fused(a, geometry);
    if (!reason) {
      if (const std::optional<Tensor> output = fused_forward(a, geometry)) return *output;
      reason = kNotLaunched;
    }
    deform_aggregate2d_log.note("portable", reason);
    return deform_aggregate2d_portable<Device>(a, geometry);
  }

  static AggregateGradients backward(const Tensor& grad_output, const AggregateArguments& a,
                                     const AggregateGeometry& geometry, int64_t wanted) {
    const typename Device::Guard guard(a.value);
    const char* reason = Device::why_portable(a.value);
    if (!reason) reason = why_not_fused(a, geometry);
    if (!reason) {
      if (const std::optional<AggregateGradients> gradients = fused_backward(grad_output, a, geometry, wanted))
        return *gradients;
      reason = kNotLaunched;
    }
    deform_aggregate2d_backward_log.note(wanted & kOrdered ? "portable ordered" : "portable", reason);
    return deform_aggregate2d_backward_portable<Device>(grad_output, a, geometry, wanted);
  }

 private:
  static std::optional<Tensor> fused_forward(const AggregateArguments& a, const AggregateGeometry& geometry) {
    return dispatch_deform_aggregate2d(a, [&](auto s, auto f) -> std::optional<Tensor> {
      using S = decltype(s);
      if constexpr (std::is_same_v<S, double>) {
        return std::nullopt;  // never: why_not_fused
      } else {
        const AttentionGeometry& g = geometry.g;
        const auto groups_of = [&](const Tensor& t) { return view_of_groups<const S>(t, g); };
        const Tensor value = with_aligned_rows<S>(a.value, g, g.rows, groups_of);
        const Tensor output = new_aggregated(a, geometry);
        using P = TapPoints<float, decltype(f)>;
        if (!attend_fused<Device>(taps_of<P>(a, geometry), groups_of(value), output)) return std::nullopt;
        deform_aggregate2d_log.note("fused");
        return output;
      }
    });
  }

  static std::optional<AggregateGradients> fused_backward(const Tensor& grad_output, const AggregateArguments& a,
                                                          const AggregateGeometry& geometry, int64_t wanted) {
    return dispatch_deform_aggregate2d(a, [&](auto s, auto f) -> std::optional<AggregateGradients> {
      using S = decltype(s);
      if constexpr (std::is_same_v<S, double>) {
        return std::nullopt;  // never: why_not_fused
      } else {
        const AttentionGeometry& g = geometry.g;
        const auto groups_of = [&](const Tensor& t) { return view_of_groups<const S>(t, g); };
        const Tensor value = with_aligned_rows<S>(a.value, g, g.rows, groups_of);
        const Tensor grad = with_aligned_rows<S>(grad_output, g, g.queries, groups_of);
        using P = TapPoints<float, decltype(f)>;
        AggregateGradients gradients = new_gradients(a, wanted, ScalarType::Float);
        const AttentionResults<P> to = results_of<P>(gradients, geometry);
        const ScaledPoints<Device, P> scaled(taps_of<P>(a, geometry), a.value);
        const PointGradients<float> found(g, to.locations || to.weights, a.value);
        if (!find_gradients_fused<Device>(kTooManyTaps, groups_of(value), groups_of(grad), scaled.points,
                                          wanted & kOrdered, found.data(), to, a.value))
          return std::nullopt;
        deform_aggregate2d_backward_log.note(wanted & kOrdered ? "fused ordered" : "fused");
        std::get<0>(gradients) = torch::stable::to(std::get<0>(gradients), scalar_type_of<S>());
        return gradients;
      }
    });
  }
};

}  // namespace dcn
