// Pooling over regions of interest: the schemas, and the CPU's implementation.
#include "portable.h"

#include "../../runtime/cpu.h"
#include "cpu/backward.h"

namespace dcn {
namespace {

struct CpuRoiPool {
  static Tensor forward(const RoiArguments& a, const RoiGeometry& g) {
    if (is_portable(g)) return roi_pool_portable<Cpu>(a, g);
    const Tensor output = new_pooled(a, g);
    dispatch_floating(a.input.scalar_type(), [&](auto s) {
      using S = decltype(s);
      const DensePlaces<Accumulate<S>> dense(a, g);
      if (output.numel() > 0) tiles::regions::roi_forward<S>(a, dense.places(), output);
    });
    return output;
  }
  template <typename S>
  static Tensor backward(const Tensor& grad_output, const RoiArguments& a, const RoiPlaces<Accumulate<S>>& where,
                         int64_t needs, const PartGradients<Accumulate<S>>& parts) {
    if (is_portable(where.g)) return roi_pool_backward_portable<Cpu, S>(grad_output, a, where, needs, parts);
    return tiles::regions::roi_backward<S>(grad_output, a, where, needs, parts);
  }

 private:
  static bool is_portable(const RoiGeometry& g) { return Cpu::portable() || !tiles::regions::fits_index(g); }
};

}  // namespace
}  // namespace dcn

STABLE_TORCH_LIBRARY_FRAGMENT(dcn_plugin, m) {
  m.def(
      "deform_roi_pool(Tensor input, Tensor rois, Tensor? offset, Tensor? mask, SymInt[] output_size, "
      "float spatial_scale, int sampling_ratio, float gamma, bool aligned) -> Tensor");
  m.def(
      "deform_roi_pool_backward(Tensor grad_output, Tensor input, Tensor rois, Tensor? offset, Tensor? mask, "
      "SymInt[] output_size, float spatial_scale, int sampling_ratio, float gamma, bool aligned, int needs) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "deform_ps_roi_pool(Tensor input, Tensor rois, Tensor? offset, Tensor? mask, SymInt output_dim, int group_size, "
      "SymInt[] output_size, SymInt[] part_size, int samples_per_part, float spatial_scale, float offset_scale) "
      "-> Tensor");
  m.def(
      "deform_ps_roi_pool_backward(Tensor grad_output, Tensor input, Tensor rois, Tensor? offset, Tensor? mask, "
      "SymInt output_dim, int group_size, SymInt[] output_size, SymInt[] part_size, int samples_per_part, "
      "float spatial_scale, float offset_scale, int needs) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ps_roi_pool(Tensor input, Tensor rois, SymInt output_dim, int group_size, SymInt[] output_size, "
      "float spatial_scale) -> Tensor");
  m.def(
      "ps_roi_pool_backward(Tensor grad_output, Tensor input, Tensor rois, SymInt output_dim, int group_size, "
      "SymInt[] output_size, float spatial_scale, int needs) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) { dcn::RoiPoolOperators<dcn::CpuRoiPool>::implement(m); }
