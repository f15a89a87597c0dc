// Weighted sums of samples on the portable path: the bodies of core/attention_bodies.h in order, on any device, and the
// memory that they share. `P` is AttentionPoints or what takes their place.
#pragma once

#include <algorithm>
#include <limits>

#include "../core/attention_index.h"
#include "input_index.h"
#include "tensor.h"

namespace dcn {

// Results and gradients are contiguous: nothing here is an image, even if its strides look like channels_last.
inline Tensor new_contiguous(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::Contiguous);
}

// Of the sizes of a tensor, or with no element where there is none or it is not wanted.
inline Tensor new_gradient(const std::optional<Tensor>& of, bool is_wanted, ScalarType type, const Tensor& like) {
  if (!of || !is_wanted) return new_contiguous(like, {0}, type);
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < of->dim(); ++d) sizes.push_back(of->size(d));
  return new_contiguous(*of, sizes, type);
}

// Positions and weights of a call with the softmax that they need. Owns it.
template <typename Device, typename P>
struct ScaledPoints {
  using A = typename P::Accumulator;

  Tensor scales;
  P points;

  ScaledPoints(const P& unscaled, const Tensor& like)
      : scales(torch::stable::new_empty(like, {unscaled.g.softmax ? 2 * unscaled.g.query_heads() : 0},
                                        scalar_type_of<A>())),
        points(unscaled) {
    if (!points.g.softmax) return;
    SoftmaxScale<A>* const each = static_cast<SoftmaxScale<A>*>(scales.data_ptr());
    Device::for_each(FindSoftmax<P>{points, each}, like);
    points.softmax = each;
  }
};

// Queries whose index of a level fits the device's budget: whole images where they do, else parts of one. Every range
// visits all pixels of its images, so an image has at most 16 parts, unless the index, which counts samples in 32 bits,
// asks for more.
template <typename A, typename Device>
int64_t query_range_size(const char* too_many, const AttentionGeometry& g, const AttentionLevel& level) {
  const int64_t samples = g.heads * level.points;  // below 2^60
  const int64_t countable = std::numeric_limits<int32_t>::max() / samples;
  check(countable > 0, too_many, samples);
  const int64_t fitting = Device::column_bytes / (samples * static_cast<int64_t>(sizeof(IndexEntry<A>)));
  if (fitting < g.queries) return std::min(countable, std::max(fitting, (g.queries + 15) / 16));
  // Maps may be much larger than what is sampled.
  const int64_t cells = g.heads * (level.height + 1) * (level.width + 1);
  const int64_t images = Device::column_bytes / static_cast<int64_t>(2 * sizeof(int32_t)) / cells;
  return std::min(countable, std::max<int64_t>(1, std::min(fitting / g.queries, images)) * g.queries);
}

// Adds to `sums` in an order that does not vary. `too_many` says what is wrong where the samples of a query cannot be
// counted; their number follows it.
template <typename Device, typename S, typename P, typename A = typename P::Accumulator>
void gather_values(const char* too_many, const View<const S>& grad_output, const P& points, const View<A>& sums,
                   const Tensor& like) {
  const AttentionGeometry& g = points.g;
  const int64_t total = g.batch * g.queries;
  if (total == 0) return;
  for (int64_t l = 0; l < g.levels; ++l) {
    const int64_t step = query_range_size<A, Device>(too_many, g, g.level[l]);
    for (QueryRange range{0, 0}; range.first < total; range.first += range.count) {
      const int64_t left = step < g.queries ? g.queries - range.first % g.queries : total - range.first;
      range.count = std::min(step, left);
      const LevelPositions<P> positions{points, l, range};
      const BuiltIndex<A> built = build_input_index<Device>(positions, like);
      const ResultGather<P, S> gather{positions, built.index, grad_output};
      const SummedChunks chunks = sum_chunks<Device>(gather, positions.size(), like);
      Device::for_each(GatherValueGradient<P, S>{gather, chunks.of(gather), sums}, like);
    }
  }
}

// What the gradients of positions and weights are made of, with its memory; none if none is wanted.
template <typename A>
class PointGradients {
 public:
  PointGradients(const AttentionGeometry& g, bool wanted, const Tensor& like)
      : wanted_(wanted),
        memory_(torch::stable::new_empty(
            like,
            {wanted_ ? g.query_heads() * g.points : 0, static_cast<int64_t>(sizeof(PointGradient<A>) / sizeof(A))},
            scalar_type_of<A>())) {}
  PointGradient<A>* data() const { return wanted_ ? static_cast<PointGradient<A>*>(memory_.data_ptr()) : nullptr; }

 private:
  bool wanted_;
  Tensor memory_;
};

// Where gradients go: null where they are not wanted.
template <typename P>
struct AttentionResults {
  View<typename P::Accumulator> value;  // [N, S, M, D], zeros at first
  typename P::Given *locations, *weights;
};

template <typename Device, typename P>
void finish_gradients(const P& points, const PointGradient<typename P::Accumulator>* found,
                      const AttentionResults<P>& to, const Tensor& like) {
  if (to.locations) Device::for_each(LocationGradient<P>{points, found, to.locations}, like);
  if (to.weights) Device::for_each(WeightGradient<P>{points, found, to.weights}, like);
}

// All gradients but those that a kind of points has beside them; `found` is null where those of values alone are
// wanted.
template <typename Device, typename S, typename P>
void find_gradients(const char* too_many, const View<const S>& value, const View<const S>& grad_output, const P& points,
                    bool ordered, PointGradient<typename P::Accumulator>* found, const AttentionResults<P>& to,
                    const Tensor& like) {
  if (to.value.data) {
    if (ordered)
      gather_values<Device, S>(too_many, grad_output, points, to.value, like);
    else
      Device::for_each(ScatterValues<P, S>{points, grad_output, to.value}, like);
  }
  if (found) Device::for_each(FindPointGradients<P, S>{points, value, grad_output, found}, like);
  finish_gradients<Device>(points, found, to, like);
}

}  // namespace dcn
