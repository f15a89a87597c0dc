// Multi-scale deformable attention on a GPU: the fused path where it is chosen and serves the call, else the portable
// one. `Device` is CUDA, or the tests' emulation of it.
#pragma once

#include "../portable.h"
#include "backward.h"
#include "forward.h"
#include "plan.h"

namespace dcn {

template <typename Device>
struct GpuAttention {
  static Tensor forward(const AttentionArguments& a, const AttentionGeometry& g) {
    const typename Device::Guard guard(a.value);
    if (Device::fuses(a.value))
      if (const std::optional<Tensor> output = fused_forward(a, g)) return *output;
    ms_deform_attn_log.note("portable");
    return ms_deform_attn_portable<Device>(a, g);
  }

  static AttentionGradients backward(const Tensor& grad_output, const AttentionArguments& a, const AttentionGeometry& g,
                                     int64_t wanted) {
    const typename Device::Guard guard(a.value);
    if (Device::fuses(a.value))
      if (const std::optional<AttentionGradients> gradients = fused_backward(grad_output, a, g, wanted))
        return *gradients;
    ms_deform_attn_backward_log.note(wanted & kOrdered ? "portable ordered" : "portable");
    return ms_deform_attn_backward_portable<Device>(grad_output, a, g, wanted);
  }

 private:
  static std::optional<Tensor> fused_forward(const AttentionArguments& a, const AttentionGeometry& g) {
    return dispatch_ms_deform_attn(a, [&](auto s, auto f) -> std::optional<Tensor> {
      using S = decltype(s);
      using F = decltype(f);
      if constexpr (std::is_same_v<S, double>) {
        return std::nullopt;
      } else {
        const View<const S> value = view<const S>(a.value);
        if (!can_fuse_attention(value, g)) return std::nullopt;
        const Tensor output = new_attended(a, g);
        const FusedAttend<S, F> kernel{points_of<AttentionPoints<float, F>>(a, g), lanes_of<S>(g), value,
                                       static_cast<S*>(output.data_ptr())};
        if (!Device::launch(kernel, kernel.lanes.blocks(), a.value)) return std::nullopt;
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
        return std::nullopt;
      } else {
        const View<const S> value = view<const S>(a.value);
        if (!can_fuse_attention(value, g)) return std::nullopt;
        Tensor from = grad_output;
        if (!has_aligned_rows(view_of_heads<const S>(from, g), {g.batch, g.queries, g.heads})) from = new_copy(from);
        const View<const S> grad = view_of_heads<const S>(from, g);
        AttentionGradients gradients = new_gradients(a, wanted, ScalarType::Float);
        using P = AttentionPoints<float, F>;
        const ScaledPoints<Device, P> scaled(points_of<P>(a, g), a.value);
        const bool adds = (wanted & kValue) && !(wanted & kOrdered);
        const PointGradients<float> found(g, asks_for_points(wanted), a.value);
        const FusedAttendGradient<S, F> kernel{
            scaled.points, lanes_of<S>(g), value,
            grad,          found.data(),   adds ? static_cast<float*>(std::get<0>(gradients).data_ptr()) : nullptr};
        if ((adds || found.data()) && !Device::launch(kernel, kernel.lanes.blocks(), a.value)) return std::nullopt;
        if ((wanted & kValue) && !adds)
          gather_values<Device, S>(kTooManyPoints, grad, scaled.points, view<float>(std::get<0>(gradients)), a.value);
        finish_gradients<Device>(scaled.points, found.data(), results_of<P>(gradients), a.value);
        finish_references<Device>(scaled.points, found, gradients, a.value);
        ms_deform_attn_backward_log.note(wanted & kOrdered ? "fused ordered" : "fused");
        std::get<0>(gradients) = torch::stable::to(std::get<0>(gradients), scalar_type_of<S>());
        return gradients;
      }
    });
  }

  static Tensor new_copy(const Tensor& t) {
    Tensor copy = new_contiguous(t, {t.size(0), t.size(1), t.size(2)}, t.scalar_type());
    torch::stable::copy_(copy, t);
    return copy;
  }
};

}  // namespace dcn
