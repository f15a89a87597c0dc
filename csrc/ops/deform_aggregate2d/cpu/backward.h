// The backward of deformable aggregation on the CPU: threads share out the images or, where there are fewer of these,
// their groups, so that no two add to the same gradient of the value, and each adds in one order: equal bits for any
// number of threads.
#pragma once

#include "../../../runtime/cpu_sweep.h"
#include "taps.h"

namespace dcn::tiles::aggregate {

// Some groups of all pixels of an image.
template <typename S, typename T, bool Dots, bool Scatter>
struct SweepGroups {
  using A = Accumulate<S>;
  TapFinder<S, T, true> finder;
  View<const S> grad_output;  // [N, H' W', G, D]
  A* grad_value;              // [N, H W, G, D], zeros at first
  TapGradients<T> to;
  Chunk chunk;
  int64_t out_height, n;
  HeadRange groups;
  A* row;  // a group's channels of a gradient

  DCN_HOST_DEVICE void operator()() const {
    const AttentionGeometry& g = finder.call.g;
    finder.prepare(chunk.pixels * chunk.groups * g.points);
    const TapGrid& taps = finder.call.taps;
    const int64_t rows = divide_up(taps.out_width, chunk.pixels) * out_height, end = groups.first + groups.count;
    for_each_row_of_strips(taps, out_height, chunk.pixels, 0, rows, [&](int64_t q, int64_t pixels) DCN_INLINE_LAMBDA {
      for (int64_t m = groups.first; m < end; m += chunk.groups)
        sweep_some(q, pixels, {m, end - m < chunk.groups ? end - m : chunk.groups});
    });
  }

  DCN_HOST_DEVICE void sweep_some(int64_t q, int64_t pixels, HeadRange some) const {
    const AttentionGeometry& g = finder.call.g;
    attention::Points<A>& p = finder.points;
    const int64_t heads = pixels * some.count, count = padded(heads * g.points);
    const int64_t pixel = g.heads * g.channels * static_cast<int64_t>(sizeof(A));  // of the gradient
    finder.find(n, q, pixels, some);
    if constexpr (Scatter)
      attention::find_offsets(p, finder.table.grad.data(), static_cast<Index>(pixel), heads * g.points, p.grad_offset);
    const A* const grad_image = grad_value + (n * g.rows * g.heads + some.first) * g.channels;
    const attention::CornersOnMap values = finder.corners(n, some.first, 0);
    const attention::CornersOnMap grads{
        reinterpret_cast<int64_t>(grad_image), p.grad_offset, p.corners, 4, pixel, pixel * g.level[0].width};
    if constexpr (Dots)
      for (int64_t i = 0; i < 4 * count; ++i) p.dot[i] = A(0);
    for (int64_t i = 0; i < heads; ++i)
      attention::sweep<Dots, Scatter, S>(p, values, grads, i * g.points, g.points, g.channels,
                                         gradient(q + i / some.count, some.first + i % some.count));
    if constexpr (Dots) finish(q, pixels, some);
  }

  DCN_HOST_DEVICE const A* gradient(int64_t q, int64_t m) const {
    const S* const from = &grad_output.at(n, q, m, 0);
    const int64_t channels = finder.call.g.channels, stride = grad_output.w;
    if constexpr (std::is_same_v<S, A>) {
      if (stride == 1) return from;
    }
    if (stride == 1) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) row[c] = widen(from[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) row[c] = widen(from[c * stride]);
    }
    return row;
  }

  // From dots to the gradients of offsets and weights, as they are stored.
  DCN_HOST_DEVICE void finish(int64_t q, int64_t pixels, HeadRange some) const {
    const AttentionGeometry& g = finder.call.g;
    const TapGrid& taps = finder.call.taps;
    attention::Points<A>& p = finder.points;
    const int64_t heads = pixels * some.count, count = heads * g.points,
                  head = (n * g.queries + q) * g.heads + some.first;
    attention::find_gradients(p, padded(count));
    // Side by side, unless they are packed, or there are several pixels and not all groups.
    const bool dense = taps.offset_row == 2 * g.points && (some.count == g.heads || pixels == 1);
    if (to.offset) {
      T* const own = to.offset + head * taps.offset_row;
      T* const out = dense ? own : finder.room;
      const A scale = static_cast<A>(taps.scale);
      const A *const first = taps.x_first ? p.by_x : p.by_y, *const second = taps.x_first ? p.by_y : p.by_x;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        out[2 * i] = narrow<T>(first[i] * scale);
        out[2 * i + 1] = narrow<T>(second[i] * scale);
      }
      if (!dense) spread_pixels(out, pixels, some.count, 2 * g.points, taps.offset_row, own);
    }
    if (!to.weight) return;
    if (g.softmax) attention::through_softmax(p, heads, g.points);
    T* const own = to.weight + head * taps.weight_row;
    T* const out = dense ? own : finder.room;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = narrow<T>(p.by_weight[i]);
    if (!dense) spread_pixels(out, pixels, some.count, g.points, taps.weight_row, own);
  }

  // `size` numbers of each group, which are `row` apart where they are stored.
  DCN_HOST_DEVICE void spread_pixels(const T* from, int64_t pixels, int64_t groups_here, int64_t size, int64_t row,
                                     T* to) const {
    for (int64_t p = 0; p < pixels; ++p)
      spread(from + p * groups_here * size, groups_here, size, row, to + p * finder.call.g.heads * row);
  }
};

template <typename S, typename T, bool Dots, bool Scatter>
void sweep_images(const Tensor& grad_output, const AggregateArguments& a, const AggregateGeometry& geometry,
                  Accumulate<S>* grad_value, const TapGradients<T>& to) {
  using A = Accumulate<S>;
  const AttentionGeometry& g = geometry.g;
  const Call<S, T> call(a, geometry);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = g.batch % threads == 0 ? 1 : std::min(threads, g.heads);
  torch::stable::parallel_for(0, g.batch * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch needed;
    Points<A>* points;
    A* row;
    T* room;
    const auto take = [&](Scratch& scratch) {
      points = scratch.take<Points<A>>(1), row = scratch.take<A>(g.channels);
      room = scratch.take<T>(3 * attention::points_room);
    };
    take(needed);
    Scratch scratch(needed.counted());
    take(scratch);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts, first = part * g.heads / parts, last = (part + 1) * g.heads / parts;
      // A part may have one group less than the largest: a table of its own.
      const Chunk own(g, call.taps, last - first);
      const TapTable<S> table(g, call.taps, own, call.value);
      run_vectorised(SweepGroups<S, T, Dots, Scatter>{{call, table, *points, room},
                                                      view_of_groups<const S>(grad_output, g),
                                                      grad_value,
                                                      to,
                                                      own,
                                                      geometry.out_height,
                                                      i / parts,
                                                      {first, last - first},
                                                      row});
    }
  });
}

template <typename S, typename T>
AggregateGradients backward(const Tensor& grad_output, const AggregateArguments& a, const AggregateGeometry& geometry,
                            int64_t wanted) {
  using A = Accumulate<S>;
  // Half types are summed in float.
  AggregateGradients gradients = new_gradients(a, wanted, scalar_type_of<A>());
  const Tensor& grad_value = std::get<0>(gradients);
  A* const values = grad_value.numel() > 0 ? static_cast<A*>(grad_value.data_ptr()) : nullptr;
  const TapGradients<T> to(gradients, geometry);
  const bool dots = to.offset || to.weight;
  if (dots && values)
    sweep_images<S, T, true, true>(grad_output, a, geometry, values, to);
  else if (dots)
    sweep_images<S, T, true, false>(grad_output, a, geometry, values, to);
  else if (values)
    sweep_images<S, T, false, true>(grad_output, a, geometry, values, to);
  std::get<0>(gradients) = torch::stable::to(grad_value, scalar_type_of<S>());
  return gradients;
}

}  // namespace dcn::tiles::aggregate
