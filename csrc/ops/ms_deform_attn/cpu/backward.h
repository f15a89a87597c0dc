// The backward of multi-scale deformable attention on the CPU: threads share out the images or, where there are fewer
// of these, their heads, so that no two add to the same gradient of the value, and each adds in the order of visits:
// equal bits for any number of threads.
#pragma once

#include "../../../runtime/cpu_sweep.h"
#include "forward.h"
#include "gradients.h"

namespace dcn::tiles::attention {

// What a backward is asked for, and where it goes.
template <typename A>
struct Results {
  A* value = nullptr;  // [N, S, M, D], zeros at first
  PointGradients points;
  bool points_wide = true;  // whether these are of type A
  A* references = nullptr;  // [N, Q, M, reference levels, numbers]: sums of each head
  bool dots() const { return points.locations || points.weights || references; }
};

// Some heads of all queries of an image.
template <typename S, bool Dots, bool Scatter>
struct SweepHeads {
  using A = Accumulate<S>;
  PointFinder<S, true> finder;
  const Visits& visits;
  View<const S> grad_output;  // [N, Q, M, D]
  Results<A> to;
  int64_t step, n;
  HeadRange heads;
  A *row, *unread;  // of a head's channels: its gradient; what takes the place of corners off the map

  DCN_HOST_DEVICE void operator()() const {
    finder.prepare(step);
    visits.for_each(0, finder.call.g.queries, [&](int64_t q) DCN_INLINE_LAMBDA {
      for (int64_t m = heads.first; m < heads.first + heads.count; m += step) {
        const int64_t left = heads.first + heads.count - m;
        sweep_some(q, {m, left < step ? left : step});
      }
    });
  }

  DCN_HOST_DEVICE void sweep_some(int64_t q, HeadRange some) const {
    const AttentionGeometry& g = finder.call.g;
    Points<A>& p = finder.points;
    const int64_t count = padded(some.count * g.points);
    finder.find(n, q, some);
    if constexpr (Scatter)
      point_corners(p, 4, finder.table.width.data(), finder.table.grad.data() + some.first * g.points,
                    reinterpret_cast<int64_t>(to.value + n * g.rows * g.heads * g.channels),
                    g.heads * g.channels * static_cast<int64_t>(sizeof(A)), reinterpret_cast<int64_t>(unread), count,
                    p.grad);
    if constexpr (Dots)
      for (int64_t i = 0; i < 4 * count; ++i) p.dot[i] = A(0);
    for (int64_t i = 0; i < some.count; ++i) {
      load_row(q, some.first + i);
      sweep<Dots, Scatter, S>(p, ListedCorners{p.value}, ListedCorners{p.grad}, i * g.points, g.points, g.channels,
                              row);
    }
    if constexpr (Dots) finish(q, some);
  }

  DCN_HOST_DEVICE void load_row(int64_t q, int64_t m) const {
    const S* const from = &grad_output.at(n, q, m, 0);
    const int64_t channels = finder.call.g.channels, stride = grad_output.w;
    A* const out = row;
    if (stride == 1) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) out[c] = widen(from[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) out[c] = widen(from[c * stride]);
    }
  }

  DCN_HOST_DEVICE void finish(int64_t q, HeadRange some) const {
    const AttentionGeometry& g = finder.call.g;
    const int64_t query = n * g.queries + q;
    find_gradients(finder.points, padded(some.count * g.points));
    if (to.references)
      sum_references(g, some, finder.points,
                     to.references + (query * g.heads + some.first) * g.reference_levels * g.reference_numbers);
    if constexpr (std::is_same_v<S, A>)
      store_gradients<A>(g, to.points, query, some, finder.points);
    else if (to.points_wide)
      store_gradients<A>(g, to.points, query, some, finder.points);
    else
      store_gradients<S>(g, to.points, query, some, finder.points);
  }
};

template <typename S, bool Dots, bool Scatter>
void sweep_images(const Tensor& grad_output, const AttentionArguments& a, const AttentionGeometry& g,
                  const Results<Accumulate<S>>& results) {
  using A = Accumulate<S>;
  const Call<S> call(a, g);
  const PointTable table(call);
  const Visits visits(g);
  const Tensor zeros = torch::stable::new_zeros(a.value, {g.channels});
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = g.batch % threads == 0 ? 1 : std::min(threads, g.heads);
  torch::stable::parallel_for(0, g.batch * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch needed;
    const auto take = [&](Scratch& scratch, Points<A>*& points, A*& row, A*& unread) {
      points = scratch.take<Points<A>>(1), row = scratch.take<A>(g.channels), unread = scratch.take<A>(g.channels);
    };
    Points<A>* points;
    A *row, *unread;
    take(needed, points, row, unread);
    Scratch scratch(needed.counted());
    take(scratch, points, row, unread);
    std::fill_n(unread, g.channels, A(0));
    const PointFinder<S, true> finder{call, table, *points, reinterpret_cast<int64_t>(zeros.data_ptr())};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts, first = part * g.heads / parts, last = (part + 1) * g.heads / parts;
      run_vectorised(SweepHeads<S, Dots, Scatter>{finder,
                                                  visits,
                                                  view_of_heads<const S>(grad_output, g),
                                                  results,
                                                  std::min(heads_at_once(g), last - first),
                                                  i / parts,
                                                  {first, last - first},
                                                  row,
                                                  unread});
    }
  });
}

// grad_reference = sums over the heads, in their order.
template <typename A, typename T>
void add_heads(const AttentionGeometry& g, const A* sums, T* grad_reference) {
  const int64_t each = g.reference_levels * g.reference_numbers;
  torch::stable::parallel_for(0, g.batch * g.queries, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * each; i < end * each; ++i) {
      A sum = 0;
      for (int64_t m = 0; m < g.heads; ++m) sum += sums[(i / each * g.heads + m) * each + i % each];
      grad_reference[i] = narrow<T>(sum);
    }
  });
}

template <typename S>
AttentionGradients backward(const Tensor& grad_output, const AttentionArguments& a, const AttentionGeometry& g,
                            int64_t wanted) {
  using A = Accumulate<S>;
  // Half types are summed in float.
  const auto [nothing, grad_locations, grad_weights, grad_reference] =
      new_gradients(a, wanted & ~static_cast<int64_t>(kValue), scalar_type_of<A>());
  Tensor grad_value = nothing;
  if (wanted & kValue) {
    grad_value = new_contiguous(a.value, {g.batch, g.rows, g.heads, g.channels}, scalar_type_of<A>());
    prefer_large_pages(grad_value);
    torch::stable::zero_(grad_value);
  }
  const auto data = [](const Tensor& t) { return t.numel() > 0 ? t.data_ptr() : nullptr; };
  const Tensor sums =
      new_contiguous(a.value, {data(grad_reference) ? g.heads : 0, grad_reference.numel()}, scalar_type_of<A>());
  Results<A> results;
  results.value = static_cast<A*>(data(grad_value));
  results.points = {data(grad_locations), data(grad_weights)};
  results.points_wide = a.locations.scalar_type() == scalar_type_of<A>();
  results.references = static_cast<A*>(data(sums));
  if (results.dots() && results.value)
    sweep_images<S, true, true>(grad_output, a, g, results);
  else if (results.dots())
    sweep_images<S, true, false>(grad_output, a, g, results);
  else if (results.value)
    sweep_images<S, false, true>(grad_output, a, g, results);
  if (results.references && results.points_wide)
    add_heads(g, results.references, static_cast<A*>(grad_reference.data_ptr()));
  if (results.references && !results.points_wide)
    add_heads(g, results.references, static_cast<S*>(grad_reference.data_ptr()));
  return {torch::stable::to(grad_value, scalar_type_of<S>()), grad_locations, grad_weights, grad_reference};
}

}  // namespace dcn::tiles::attention
