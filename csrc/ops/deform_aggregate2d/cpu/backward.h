// The backward of deformable aggregation on the CPU: threads share out the groups of all images, so that no two add to
// the same gradient of the value, and each adds in one order: equal bits for any number of threads.
#pragma once

#include "sweep.h"

namespace dcn::tiles::aggregate {

// One group of one image.
template <typename S, typename T, bool Dots, bool Scatter>
struct SweepGroup {
  using A = Accumulate<S>;
  TapFinder<S, T, true> finder;
  View<const S> grad_output;  // [N, H' W', G, D]
  S* grad_value;              // [N, H W, G, D]
  TapGradients<T> to;
  A *value, *grad;  // maps, zeros around the image of the value
  A *rows, *given;  // channels of grad_output, [pixel, channel]; weights, whose place in `finder` gradients take
  int64_t n, m;

  DCN_HOST_DEVICE void operator()() const {
    const Call<S, T>& call = finder.call;
    const MapShape& shape = call.map;
    bool finite = true;
    if constexpr (Dots) finite = pack(&call.value.at(n, 0, m, 0), call.value.c, call.g.channels, shape, value);
    if constexpr (Scatter)
      for (int64_t i = 0; i < shape.numbers(); ++i) grad[i] = A(0);
    const int64_t chunks = call.visits.count();
    for (int64_t i = 0; i < chunks; ++i) {
      const PixelRange pixels = call.visits.at(i);
      if (pixels.count == 0) continue;
      const PixelRange next = call.visits.at(i + 1 < chunks ? i + 1 : i);
      // What was found takes the weights' place, and there may be none to load again.
      if (!call.weights.data) finder.prepare();
      if (finder.load(n, pixels, m) & load_rows(pixels) & finite)
        sweep_chunk<false>(pixels, next);
      else
        sweep_chunk<true>(pixels, next);
    }
    if constexpr (Scatter) {
      const int64_t step = call.g.heads * call.g.channels;
      unpack(grad, shape, call.g.channels, step, grad_value + n * call.g.rows * step + m * call.g.channels);
    }
  }

  // Returns whether all of it is finite.
  DCN_HOST_DEVICE bool load_rows(const PixelRange& pixels) const {
    A sum = 0;
    const int64_t channels = finder.call.g.channels, padded = finder.call.map.channels;
    const S* const from = &grad_output.at(n, pixels.first, m, 0);
    if (grad_output.w == 1) {
      for_each_piece(channels, [&](auto width, int64_t c) DCN_INLINE_LAMBDA {
        pack_row<decltype(width)::value>(from + c, grad_output.c, pixels.count, padded, rows + c, sum);
      });
    } else {
      for (int64_t c = 0; c < channels; ++c)
        pack_row<1>(from + c * grad_output.w, grad_output.c, pixels.count, padded, rows + c, sum);
    }
    return sum == 0;
  }

  // Asks for what is read and written for pixel p of a chunk.
  DCN_HOST_DEVICE void fetch(const PixelRange& pixels, int64_t p) const {
    const AttentionGeometry& g = finder.call.g;
    const TapGrid& grid = finder.call.taps;
    finder.fetch(n, pixels, m, p);
    const int64_t q = pixels.first + p, head = (n * g.queries + q) * g.heads + m;
    prefetch(grad_output.data + n * grad_output.n + q * grad_output.c + m * grad_output.h);
    if (to.offset) {
      prefetch(to.offset + head * grid.offset_row);
      prefetch(to.offset + head * grid.offset_row + 64 / sizeof(T));
    }
    if (to.weight) prefetch(to.weight + head * grid.weight_row);
  }

  template <bool Exact>
  DCN_HOST_DEVICE void sweep_chunk(const PixelRange& pixels, const PixelRange& next) const {
    const AttentionGeometry& g = finder.call.g;
    const MapShape& shape = finder.call.map;
    const TapGrid& grid = finder.call.taps;
    finder.template find<Exact>(pixels);
    if constexpr (Dots)
      for (int64_t k = 0; k < g.points; ++k)
        for (int64_t i = 0; i < 4 * lanes; ++i) finder.taps[k].dot[i] = A(0);
    for (int64_t p = 0; p < pixels.count; ++p) {
      const A* const gradient = rows + p * shape.channels;
      fetch(next, p);
      if constexpr (Exact)
        sweep_exactly<Dots, Scatter>(finder.taps, g.points, shape, value, grad, p, gradient);
      else
        sweep<Dots, Scatter>(finder.taps, g.points, shape, value, grad, p, gradient);
    }
    if constexpr (!Dots) return;
    A *const pairs = finder.pairs, *const weights = finder.weights;
    if (g.softmax && to.weight)
      for (int64_t i = 0; i < g.points * lanes; ++i) given[i] = weights[i];
    find_gradients<Exact>(finder.taps, g.points, grid.x_first, static_cast<A>(grid.scale), pairs, weights);
    const int64_t head = (n * g.queries + pixels.first) * g.heads + m;
    if (to.offset)
      from_planes(pairs, pixels.count, 2 * g.points, g.heads * grid.offset_row, to.offset + head * grid.offset_row);
    if (!to.weight) return;
    if (g.softmax) through_softmax(g.points, given, weights);
    from_planes(weights, pixels.count, g.points, g.heads * grid.weight_row, to.weight + head * grid.weight_row);
  }
};

template <typename S, typename T, bool Dots, bool Scatter>
void sweep_images(const Tensor& grad_output, const AggregateArguments& a, const AggregateGeometry& geometry,
                  S* grad_value, const TapGradients<T>& to) {
  using A = Accumulate<S>;
  const Call<S, T> call(a, geometry);
  const AttentionGeometry& g = call.g;
  torch::stable::parallel_for(0, g.batch * g.heads, 1, [&](int64_t begin, int64_t end) {
    A *rows, *given;
    const auto take = [&](Scratch& scratch) {
      rows = scratch.take<A>(lanes * call.map.channels);
      given = scratch.take<A>(lanes * g.points);
      return TapFinder<S, T, true>::take(call, scratch);
    };
    Scratch needed;
    take(needed);
    Scratch scratch(needed.counted());
    const auto finder = take(scratch);
    std::fill_n(rows, lanes * call.map.channels, A(0));
    const MapMemory<A> maps(call.map, 2, a.value);
    for (int64_t i = begin; i < end; ++i)
      run_vectorised(SweepGroup<S, T, Dots, Scatter>{finder, view_of_groups<const S>(grad_output, g), grad_value, to,
                                                     maps.data(), maps.data() + call.map.numbers(), rows, given,
                                                     i / g.heads, i % g.heads});
  });
}

template <typename S, typename T>
AggregateGradients backward(const Tensor& grad_output, const AggregateArguments& a, const AggregateGeometry& geometry,
                            int64_t wanted) {
  const ScalarType type = a.offset.scalar_type();
  const AggregateGradients gradients{new_gradient(a.value, wanted & kValue, scalar_type_of<S>(), a.value),
                                     new_gradient(a.offset, wanted & kOffset, type, a.value),
                                     new_gradient(a.weight, wanted & kWeight, type, a.value)};
  const Tensor& grad_value = std::get<0>(gradients);
  S* const values = grad_value.numel() > 0 ? static_cast<S*>(grad_value.data_ptr()) : nullptr;
  const TapGradients<T> to(gradients, geometry);
  const bool dots = to.offset || to.weight;
  if (dots && values)
    sweep_images<S, T, true, true>(grad_output, a, geometry, values, to);
  else if (dots)
    sweep_images<S, T, true, false>(grad_output, a, geometry, values, to);
  else if (values)
    sweep_images<S, T, false, true>(grad_output, a, geometry, values, to);
  return gradients;
}

}  // namespace dcn::tiles::aggregate
