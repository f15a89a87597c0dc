// Multi-scale deformable attention on a GPU: the fused path where it is chosen and serves the call, else the portable
// one. `Device` is CUDA, or the tests' emulation of it.
#pragma once

#include "../../../runtime/gpu_attention.h"
#include "../portable.h"

namespace dcn {

template <typename Device>
struct GpuAttention {
  static Tensor forward(const AttentionArguments& a, const AttentionGeometry& g) {
    const typename Device::Guard guard(a.value);
    const char* reason = Device::why_portable(a.value);
    if (!reason) reason = why_not_attended(a.value.scalar_type(), g);
    if (!reason) {
      if (const std::optional<Tensor> output = fused_forward(a, g)) return *output;
      reason = kNotLaunched;
    }
    ms_deform_attn_log.note("portable", reason);
    return ms_deform_attn_portable<Device>(a, g);
  }

  static AttentionGradients backward(const Tensor& grad_output, const AttentionArguments& a, const AttentionGeometry& g,
                                     int64_t wanted) {
    const typename Device::Guard guard(a.value);
    const char* reason = Device::why_portable(a.value);
    if (!reason) reason = why_not_attended(a.value.scalar_type(), g);
    if (!reason) {
      if (const std::optional<AttentionGradients> gradients = fused_backward(grad_output, a, g, wanted))
        return *gradients;
      reason = kNotLaunched;
    }
    ms_deform_attn_backward_log.note(wanted & kOrdered ? "portable ordered" : "portable", reason);
    return ms_deform_attn_backward_portable<Device>(grad_output, a, g, wanted);
  }

 private:
  static std::optional<Tensor> fused_forward(const AttentionArguments& a, const AttentionGeometry& g) {
    return dispatch_ms_deform_attn(a, [&](auto s, auto f) -> std::optional<Tensor> {
      using S = decltype(s);
      using F = decltype(f);
      if constexpr (std::is_same_v<S, double>) {
        return std::nullopt;  // never: why_not_attended
      } else {
        const Tensor value = with_aligned_rows<S>(a.value, g, g.rows, view<const S>);
        const Tensor output = new_attended(a, g);
        if (!attend_fused<Device>(points_of<AttentionPoints<float, F>>(a, g), view<const S>(value), output))
          return std::nullopt;
        ms_deform_attn_log.note("fused");
        return output;
      }
    });
  }

  static std::optional<AttentionGradients> fused_backward(const Tensor& grad_output, const AttentionArguments& a,
                                                          const AttentionGeometry& g, int64_t wanted) {
    return dispatch_ms_deform_attn(a, [&](auto s, auto f) -> std::optional<AttentionGradients> {
      using S = decltype(s);
      using F = decltype(f);
      if constexpr (std::is_same_v<S, double>) {
        return std::nullopt;  // never: why_not_attended
      } else {
        const auto heads_of = [&](const Tensor& t) { return view_of_heads<const S>(t, g); };
        const Tensor value = with_aligned_rows<S>(a.value, g, g.rows, view<const S>);
        const Tensor grad = with_aligned_rows<S>(grad_output, g, g.queries, heads_of);
        using P = AttentionPoints<float, F>;
        AttentionGradients gradients = new_gradients(a, wanted, ScalarType::Float);
        const ScaledPoints<Device, P> scaled(points_of<P>(a, g), a.value);
        const PointGradients<float> found(g, asks_for_points(wanted), a.value);
        if (!find_gradients_fused<Device>(kTooManyPoints, view<const S>(value), heads_of(grad), scaled.points,
                                          wanted & kOrdered, found.data(), results_of<P>(gradients), a.value))
          return std::nullopt;
        finish_references<Device>(scaled.points, found, gradients, a.value);
        ms_deform_attn_backward_log.note(wanted & kOrdered ? "fused ordered" : "fused");
        std::get<0>(gradients) = torch::stable::to(std::get<0>(gradients), scalar_type_of<S>());
        return gradients;
      }
    });
  }
};

}  // namespace dcn
