// Positions that are no convolution's: points on some maps, one map after the other. What csrc gives to any positions
// is run on them. Compiled and loaded by tests/ops/test_positions.py.
#include "core/division.h"
#include "runtime/cpu.h"
#include "runtime/cpu_taps.h"
#include "runtime/input_index.h"

namespace points {

using dcn::Cpu, dcn::Sample, dcn::Tensor;

// `where` is [maps, points, (y, x)], `weight` [maps, points].
template <typename I>
struct Points {
  const float *where, *weight;
  int64_t map_count, points, map_height, map_width;

  DCN_HOST_DEVICE int64_t size() const { return map_count * points; }
  DCN_HOST_DEVICE Sample<float, I> sample(int64_t i) const {
    return dcn::make_sample<float, I>(where[2 * i], where[2 * i + 1], map_height, map_width);
  }
  DCN_HOST_DEVICE float modulation(int64_t i) const { return weight[i]; }
  DCN_HOST_DEVICE int64_t height() const { return map_height; }
  DCN_HOST_DEVICE int64_t width() const { return map_width; }
  DCN_HOST_DEVICE int64_t maps() const { return map_count; }
  DCN_HOST_DEVICE int64_t map(int64_t i) const { return i / points; }

  // In planes: a map is one.
  DCN_HOST_DEVICE int64_t planes() const { return map_count; }
  DCN_HOST_DEVICE Points plane(int64_t i) const {
    return {where + 2 * i * points, weight + i * points, 1, points, map_height, map_width};
  }
};

const float* data(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
float* mutable_data(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// What a point gives the pixels that it reads: its number of `grad`.
struct PointGather {
  using Accumulator = float;
  static constexpr int kSums = 1;

  dcn::InputIndex<float> index;
  const float* grad;

  struct Place {};
  int64_t parts() const { return 1; }
  Place place(int64_t, int64_t) const { return {}; }
  float load(const Place&, int32_t sample) const { return grad[sample]; }
  static void add(float (&sums)[1], float weight, float value) { sums[0] += weight * value; }
};

// grad_maps[m, y, x] = sum over the points that read the pixel of corner weight * weight * grad[m, point].
struct GatherMaps {
  PointGather gather;
  const dcn::SumsOf<PointGather>* chunk_sums;
  float* grad_maps;

  int64_t size() const { return gather.index.maps * gather.index.height * gather.index.width; }
  void operator()(int64_t i) const {
    const int64_t width = gather.index.width, height = gather.index.height;
    dcn::SumsOf<PointGather> sums;
    dcn::gather_pixel(gather, chunk_sums, i / width / height, 0, i / width % height, i % width, sums);
    grad_maps[i] = sums.of[0];
  }
};

Tensor gradient_of_maps(Tensor grad, Tensor where, Tensor weight, int64_t height, int64_t width) {
  const Points<int64_t> points{data(where), data(weight), where.size(0), where.size(1), height, width};
  const dcn::BuiltIndex<float> built = dcn::build_input_index<Cpu>(points, grad);
  const Tensor found = torch::stable::new_empty(grad, {where.size(0), height, width});
  const PointGather gather{built.index, data(grad)};
  const dcn::SummedChunks chunks = dcn::sum_chunks<Cpu>(gather, points.size(), grad);
  Cpu::for_each(GatherMaps{gather, chunks.of(gather), mutable_data(found)}, grad);
  return found;
}

// Quotients and remainders, as kernels find them.
template <typename I>
Tensor divide_by(const dcn::Divisor<I>& divisor, const Tensor& numbers) {
  const Tensor found = torch::stable::new_empty(numbers, {numbers.numel(), 2});
  for (int64_t i = 0; i < numbers.numel(); ++i) {
    const dcn::Quotient<I> of = divisor(static_cast<I>(static_cast<const int64_t*>(numbers.data_ptr())[i]));
    static_cast<int64_t*>(found.data_ptr())[2 * i] = of.quotient;
    static_cast<int64_t*>(found.data_ptr())[2 * i + 1] = of.remainder;
  }
  return found;
}
Tensor divide(Tensor numbers, int64_t by, bool in_int) {
  if (in_int) return divide_by(dcn::Divisor<int32_t>(by), numbers);
  return divide_by(dcn::Divisor<int64_t>(by), numbers);
}

// result[m, point] = weight * the map's value there, from what find_taps has found.
Tensor values(Tensor maps, Tensor where, Tensor weight) {
  using dcn::tiles::Index;
  const int64_t planes = where.size(0), points = where.size(1), height = maps.size(1), width = maps.size(2);
  dcn::Scratch count;
  dcn::tiles::Taps<float>(count, planes, points, true);
  dcn::Scratch scratch(count.counted());
  const dcn::tiles::Taps<float> taps(scratch, planes, points, true);
  const Points<Index> positions{data(where), data(weight), planes, points, height, width};
  const dcn::tiles::Window window = dcn::tiles::find_taps<true>(positions, taps, true);
  const Tensor found = torch::stable::new_empty(maps, {planes, points});
  for (int64_t i = 0; i < planes * points; ++i) {
    const int64_t map = i / points;
    float sum = 0;
    for (int c = 0; c < 4; ++c) {
      const bool read = taps.corners[i] >> (4 + c) & 1;
      const int64_t y = taps.y0[i] + (c >> 1), x = taps.x0[i] + (c & 1);
      // Outside of the window nothing is there to be read.
      const bool inside = y >= window.y && y < window.y + window.height && x >= window.x && x < window.x + window.width;
      dcn::check(!read || inside, "a corner lies outside of the window");
      sum += read ? taps.weight[c][i] * data(maps)[(map * height + y) * width + x] : taps.weight[c][i];
    }
    mutable_data(found)[i] = sum;
  }
  return found;
}

}  // namespace points

STABLE_TORCH_LIBRARY(dcn_plugin_points, m) {
  m.def("gradient_of_maps(Tensor grad, Tensor where, Tensor weight, int height, int width) -> Tensor");
  m.def("divide(Tensor numbers, int by, bool in_int) -> Tensor");
  m.def("values(Tensor maps, Tensor where, Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin_points, CPU, m) {
  m.impl("gradient_of_maps", TORCH_BOX(&points::gradient_of_maps));
  m.impl("divide", TORCH_BOX(&points::divide));
  m.impl("values", TORCH_BOX(&points::values));
}
