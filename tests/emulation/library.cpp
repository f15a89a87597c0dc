// The GPU's operators on CPU tensors: everything of csrc/ops/*/cuda but CUDA itself, in emulated blocks of threads.
// Compiled and loaded by the tests, which give the operators their schemas.
#include <typeinfo>

#include "block.h"
#include "ops/deform_aggregate2d/cuda/paths.h"
#include "ops/deform_aggregate2d/operator.h"
#include "ops/deform_conv2d/cuda/paths.h"
#include "ops/deform_conv2d/operator.h"
#include "ops/ms_deform_attn/cuda/paths.h"
#include "ops/ms_deform_attn/operator.h"
#include "ops/roi_pool/cuda/paths.h"
#include "ops/roi_pool/operator.h"
#include "runtime/cpu.h"
#include "runtime/precision.h"

namespace emulation {

struct Settings {
  int64_t multiprocessors = 4;
  Schedule schedule;
  int64_t shared_bytes = 99 << 10;  // what every processor from sm_80 on grants a block
  int64_t largest_index = std::numeric_limits<int32_t>::max();
  bool is_old = false;  // the processor, for fused kernels
};

inline Settings& settings() {
  static Settings s;
  return s;
}

// Runs kernels in place of the emulation: tests/ptx, which interprets what nvcc made of them. It is told of memory that
// no dispatcher sees.
struct Interpreter {
  void (*launch)(const char* type, const void* kernel, int64_t bytes, int64_t blocks, int64_t threads,
                 int64_t shared_bytes, bool whole_blocks) = nullptr;
  void (*allocated)(const void* memory, int64_t bytes) = nullptr;
};

inline Interpreter& interpreter() {
  static Interpreter i;
  return i;
}

struct Device : dcn::Cpu {
  // As on CUDA: operands of matrix products stay half.
  template <typename S>
  using Product = S;

  template <typename Body>
  static void for_each(const Body& body, const dcn::Tensor& on) {
    if (!interpreter().launch) return dcn::Cpu::for_each(body, on);
    if (body.size() == 0) return;
    constexpr int64_t threads = 256;  // as many as on CUDA
    const int64_t blocks = std::min<int64_t>((body.size() + threads - 1) / threads, 1 << 20);
    interpreter().launch(typeid(Body).name(), &body, sizeof(Body), blocks, threads, 0, false);
  }
  static dcn::Tensor running_sum(const dcn::Tensor& counts) {
    const dcn::Tensor sums = dcn::Cpu::running_sum(counts);
    if (interpreter().allocated) interpreter().allocated(sums.data_ptr(), sums.numel() * sums.element_size());
    return sums;
  }

  // So little that small tests have several ranges of images.
  static constexpr int64_t column_gradient_bytes = 40 << 10;

  static constexpr int kLanes = 8;                   // as on CUDA
  static constexpr int64_t kColumnBytes = 32 << 10;  // so little that small tests have several ranges of pixels
  static inline int64_t column_bytes = kColumnBytes;
  static int64_t largest_index() { return settings().largest_index; }

  struct Guard {
    explicit Guard(const dcn::Tensor&) {}
  };
  static int64_t multiprocessors(const dcn::Tensor&) { return settings().multiprocessors; }
  static int64_t shared_bytes(const dcn::Tensor&) { return settings().shared_bytes; }
  static bool uses_tf32() { return dcn::convolutions_use_tf32(); }
  static const char* why_portable(const dcn::Tensor&) {
    if (!dcn::chooses_fused_kernels()) return dcn::kNotChosen;
    return settings().is_old ? dcn::kOldProcessor : nullptr;
  }
  static void multiply_groups(const dcn::Tensor& out, const dcn::Tensor& a, const dcn::Tensor& b) {
    const auto wide = [&](const dcn::Tensor& t) { return torch::stable::to(t, out.scalar_type()); };
    if (out.dim() == 2) return multiply(out, wide(a), wide(b));
    for (int64_t i = 0; i < out.size(0); ++i)
      multiply_groups(torch::stable::select(out, 0, i), torch::stable::select(a, 0, i), torch::stable::select(b, 0, i));
  }
  template <typename Kernel>
  static bool launch(const Kernel& kernel, int64_t blocks, const dcn::Tensor&) {
    if (Kernel::kSharedBytes > settings().shared_bytes) return false;
    if (interpreter().launch)
      interpreter().launch(typeid(Kernel).name(), &kernel, sizeof(Kernel), blocks, Kernel::kThreads,
                           Kernel::kSharedBytes, true);
    else
      run_grid(kernel, blocks, settings().schedule);
    return true;
  }
};

int64_t set_schedule(int64_t order, bool late_copies, bool blocks_backwards, int64_t multiprocessors, bool adds_vectors,
                     int64_t shared_bytes) {
  settings().multiprocessors = multiprocessors;
  settings().schedule = {static_cast<Order>(order), late_copies, blocks_backwards, 1, adds_vectors};
  settings().shared_bytes = shared_bytes;
  return order;
}

// The row and the column of output pixel `number` in the order that tiles of an image of this size take them.
std::vector<int64_t> pixel_of_tile(int64_t out_height, int64_t out_width, int64_t rows_of_strip, int64_t number) {
  dcn::ConvGeometry g{};
  g.batch = g.channels = g.out_channels = g.kernel_h = g.kernel_w = g.groups = g.offset_groups = 1;
  g.out_height = out_height, g.out_width = out_width;
  const dcn::Sampler<dcn::Half> sampler{g, dcn::ConvSizes(g, static_cast<int>(rows_of_strip)), {}, {}, {}};
  const dcn::TilePixel p = sampler.pixel(number);
  return {p.y, p.x};
}

bool set_old_processor(bool is_old) { return settings().is_old = is_old; }

// Why no fused kernel would serve a call, which is not run; nothing if one would.
std::string why_portable_conv(dcn::Tensor input, dcn::Tensor offset, dcn::Tensor weight, std::vector<int64_t> stride,
                              bool backward) {
  const dcn::ConvArguments a{input, offset, weight, std::nullopt, std::nullopt};
  const dcn::ConvGeometry g = dcn::check_deform_conv2d("why_portable_conv", a, stride, {0, 0, 0, 0}, {1, 1});
  const char* const reason = backward ? dcn::why_not_fused_backward(a, g) : dcn::why_not_fused(a, g, Device::uses_tf32);
  return reason ? reason : "";
}
std::string why_portable_attention(dcn::Tensor value, dcn::Tensor locations, std::vector<int64_t> spatial_shapes) {
  const dcn::AttentionArguments a{value, locations, std::nullopt, std::nullopt};
  const dcn::AttentionGeometry g =
      dcn::check_ms_deform_attn("why_portable_attention", a, {spatial_shapes, {locations.size(3)}, false, 1.0});
  const char* const reason = dcn::why_not_attended(value.scalar_type(), g);
  return reason ? reason : "";
}

// What the portable path's columns may take at a time, and may be numbered with in 32 bits; nothing: as usual.
int64_t set_portable(std::optional<int64_t> column_bytes, std::optional<int64_t> largest_index) {
  Device::column_bytes = column_bytes.value_or(Device::kColumnBytes);
  return settings().largest_index = largest_index.value_or(Settings{}.largest_index);
}

std::string kernels_used() { return dcn::KernelLog::lines(); }

}  // namespace emulation

extern "C" __attribute__((visibility("default"))) void set_interpreter(emulation::Interpreter chosen) {
  emulation::interpreter() = chosen;
}

STABLE_TORCH_LIBRARY_FRAGMENT(dcn_plugin_emulated, m) {
  m.def(
      "set_schedule(int order, bool late_copies, bool blocks_backwards, int multiprocessors, bool adds_vectors=True, "
      "int shared_bytes=101376) -> int");
  m.def("set_old_processor(bool is_old) -> bool");
  m.def("why_portable_conv(Tensor input, Tensor offset, Tensor weight, SymInt[] stride, bool backward) -> str");
  m.def("why_portable_attention(Tensor value, Tensor sampling_locations, SymInt[] spatial_shapes) -> str");
  m.def("pixel_of_tile(int out_height, int out_width, int rows_of_strip, int number) -> int[]");
  m.def("set_portable(int? column_bytes=None, int? largest_index=None) -> int");
  m.def("kernels_used() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin_emulated, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&dcn::deform_conv2d<dcn::GpuDeformConv2d<emulation::Device>>));
  m.impl("deform_conv2d_backward", TORCH_BOX(&dcn::deform_conv2d_backward<dcn::GpuDeformConv2d<emulation::Device>>));
  dcn::implement_ms_deform_attn<dcn::GpuAttention<emulation::Device>>(m);
  dcn::implement_deform_aggregate2d<dcn::GpuAggregate<emulation::Device>>(m);
  dcn::RoiPoolOperators<dcn::GpuRoiPool<emulation::Device>>::implement(m);
}

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_schedule", TORCH_BOX(&emulation::set_schedule));
  m.impl("set_old_processor", TORCH_BOX(&emulation::set_old_processor));
  m.impl("why_portable_conv", TORCH_BOX(&emulation::why_portable_conv));
  m.impl("why_portable_attention", TORCH_BOX(&emulation::why_portable_attention));
  m.impl("pixel_of_tile", TORCH_BOX(&emulation::pixel_of_tile));
  m.impl("set_portable", TORCH_BOX(&emulation::set_portable));
  m.impl("kernels_used", TORCH_BOX(&emulation::kernels_used));
}
