// Deformable convolution on the CPU, backward, in one pass per (tile, block of channels): the gradient of the columns,
// a sweep over them, the gradient of the weights. No thread adds to what another adds to: a lane owns channels, a split
// owns images; what they sum in parts is added up in a fixed order. Equal thread counts give equal bits.
#pragma once

#include "sweep.h"
#include "weights.h"

namespace dcn::tiles {

// Consecutive blocks that one thread works on, and what belongs to them.
struct Lane {
  size_t first_block, blocks;
  int64_t first_output, outputs, first_offset_group, offset_groups;
  int64_t weight_at;  // where the packed weights of its first block begin
};

// Gradients of offset and mask of some images, in one lane's sums or in the result.
template <typename T>
struct DisplacementGradients {
  View<T> offset, mask;  // data is null where there is none
};

template <typename S, typename F>
struct Backward {
  using A = Accumulate<S>;

  const ConvArguments& a;
  const ConvGeometry& g;
  const Tensor& grad_output;
  const int64_t needs;
  std::vector<Block> blocks;
  BackwardWeights<A> weights;
  StoredWeights<const A> stored{};  // or none: packed
  StoredWeights<A> stored_gradient{};
  const A* zeros = nullptr;
  // The gradient of the input: rows in memory, or of any layout; of all images, or from `grad_image` on.
  bool grad_is_rows = false;
  View<A> grad_input{};
  int64_t grad_image = 0;

  bool dots() const { return needs & (kOffset | kMask); }
  bool scatter() const { return needs & kInput; }
  bool uses_windows() const { return !direct() || (scatter() && !grad_is_rows); }
  bool direct() const { return reads_in_place<S>(g, a.input); }

  // Everything that a thread needs for a tile of `pixels`.
  struct Workspace {
    TilePixels pixels;
    Taps<A> taps;
    A *columns, *turned, *grad_rows, *grad_offset, *grad_mask, *window, *grad_window, *sink;
    int64_t bytes;

    Workspace(Scratch scratch, const Backward& job, const Lane& lane, int64_t count)
        : pixels(scratch, count), taps(scratch, job.most_planes(lane), count, true) {
      const int64_t planes = lane.offset_groups * job.g.taps(), window_size = window_bytes / sizeof(A);
      // A product reads whole vectors of columns.
      columns = scratch.take<A>(job.g.taps() * job.most_channels(lane) * count + job.weights.width);
      turned = scratch.take<A>(job.stored ? job.g.taps() * job.most_channels(lane) * count : 0);
      grad_rows = scratch.take<A>(lane.outputs * count);
      grad_offset = scratch.take<A>(2 * planes * count);
      grad_mask = scratch.take<A>(planes * count);
      window = scratch.take<A>(job.direct() ? 0 : window_size);
      grad_window = scratch.take<A>(job.scatter() && !job.grad_is_rows ? window_size : 0);
      sink = scratch.take<A>(job.g.channels);
      bytes = scratch.counted();
    }
  };

  int64_t most_channels(const Lane& lane) const {
    int64_t most = 0;
    for (size_t i = 0; i < lane.blocks; ++i) most = std::max(most, blocks[lane.first_block + i].count);
    return most;
  }
  int64_t most_planes(const Lane& lane) const {
    int64_t most = 0;
    for (size_t i = 0; i < lane.blocks; ++i) most = std::max(most, blocks[lane.first_block + i].offset_groups());
    return most * g.taps();
  }

  // Images [first, first + images), counted from `image`.
  void run(const Lane& lane, int64_t image, int64_t first, int64_t images, const DisplacementGradients<F>& result,
           const DisplacementGradients<A>& part, A* grad_weight) const {
    const int64_t fixed = Workspace(Scratch(), *this, lane, 0).bytes;
    const int64_t each = (Workspace(Scratch(), *this, lane, 16).bytes - fixed) / 16;
    const Tiling tiling(g, images, most_pixels(images * g.out_pixels(), each, 1),
                        uses_windows() ? columns_of_window : columns_in_place);
    const int64_t pixels = tiling.most_pixels();
    const Workspace work(Scratch(Workspace(Scratch(), *this, lane, pixels).bytes), *this, lane, pixels);
    std::fill_n(work.sink, g.channels, A(0));
    for (int64_t t = 0; t < tiling.size(); ++t) {
      Tile tile = tiling[t];
      tile.n += first;
      run_tile(lane, tile, image, work, grad_weight, t > 0);
      if (result.offset.data) store(lane, tile, image, 2, work.grad_offset, pixels, result.offset);
      if (result.mask.data) store(lane, tile, image, 1, work.grad_mask, pixels, result.mask);
      if (part.offset.data) store(lane, tile, 0, 2, work.grad_offset, pixels, part.offset);
      if (part.mask.data) store(lane, tile, 0, 1, work.grad_mask, pixels, part.mask);
    }
  }

  template <typename T>
  void store(const Lane& lane, const Tile& tile, int64_t image, int64_t per_plane, A* from, int64_t capacity,
             const View<T>& to) const {
    for_each_row(tile, [&](int64_t q, int64_t n, int64_t y) {
      // A plane is to the pixels here what a pixel is to the channels there.
      run_vectorised(TransposeRow<A, T, Turn::kFromRows>{
          &to.at(image + n, per_plane * lane.first_offset_group * g.taps(), y, tile.x), to.w, to.c, tile.columns,
          per_plane * lane.offset_groups * g.taps(), from + q, capacity});
    });
  }

  void run_tile(const Lane& lane, const Tile& tile, int64_t image, const Workspace& work, A* grad_weight,
                bool accumulate) const {
    const int64_t count = tile.count(), capacity = work.taps.pixels;
    const View<const S> grad_out = view<const S>(grad_output);
    work.pixels.find(g, tile);
    for_each_row(tile, [&](int64_t q, int64_t n, int64_t y) {
      run_vectorised(TransposeRow<A, const S, Turn::kToRows>{&grad_out.at(image + n, lane.first_output, y, tile.x),
                                                             grad_out.c, grad_out.w, lane.outputs, tile.columns,
                                                             work.grad_rows + q * lane.outputs, lane.outputs});
    });
    std::fill_n(work.grad_offset, 2 * lane.offset_groups * g.taps() * capacity, A(0));
    std::fill_n(work.grad_mask, lane.offset_groups * g.taps() * capacity, A(0));

    int64_t first_group = -1, groups = 0, at = lane.weight_at;
    Window window;
    const auto finish = [&] {
      if (!dots() || groups == 0) return;
      const int64_t plane = (first_group - lane.first_offset_group) * g.taps();
      run_vectorised(FinishDots<A>{count, groups * g.taps(), work.taps, work.grad_offset + 2 * plane * capacity,
                                   work.grad_mask + plane * capacity});
    };
    for (size_t i = lane.first_block; i < lane.first_block + lane.blocks; ++i) {
      const Block& b = blocks[i];
      // Blocks that share their offset groups share the taps.
      if (b.first_offset_group() != first_group || b.offset_groups() != groups) {
        finish();
        first_group = b.first_offset_group(), groups = b.offset_groups();
        load_displacement(tile, image, first_group * g.taps(), groups * g.taps(), displacement<S, F>(a), work.taps);
        window = find_taps<true>(g, count, groups, work.pixels, work.taps, uses_windows());
        std::fill_n(work.taps.dot, 4 * groups * g.taps() * capacity, A(0));
      }
      if (stored)
        run_stored(lane, tile, b, image, window, work, accumulate);
      else
        run_block(lane, tile, b, image, window, work, at, grad_weight + at);
      at += weights.size(b);
    }
    finish();
  }

  void run_block(const Lane& lane, const Tile& tile, const Block& b, int64_t image, const Window& window,
                 const Workspace& work, int64_t weight_at, A* grad_weight) const {
    const ColumnLayout layout(g, b, work.taps.pixels);
    const int64_t count = tile.count(), outputs = b.depthwise ? b.count : g.group_outputs();
    const int64_t panels = weights.panels(b), segment_size = panels * weights.panel_size();
    const A* const grad = work.grad_rows + b.group * g.group_outputs() - lane.first_output;
    const auto for_each_product = [&](const auto& f) {
      for (int64_t i = 0; i < b.groups; ++i)
        for (int64_t s = 0; s < layout.segments; ++s)
          f(grad + i * outputs, work.columns + i * b.group_channels() + s * layout.tap,
            (i * layout.segments + s) * segment_size);
    };
    if (dots() || scatter()) {
      if (b.depthwise)
        run_vectorised(DepthwiseColumnGradient<A>{count, g.taps(), b.count, weights.data + weight_at, grad,
                                                  lane.outputs, work.columns, layout.tap, layout.pixel});
      else
        for_each_product([&](const A* rows, A* columns, int64_t at) {
          product::multiply<A>({count, layout.width, outputs}, {rows, lane.outputs, 1},
                               {weights.data + weight_at + at, weights.panel_size(), weights.width},
                               {columns, layout.pixel, weights.width}, false);
        });
    }
    sweep(tile, b, image, window, layout, work);
    if (!(needs & kWeight)) return;
    if (b.depthwise)
      run_vectorised(DepthwiseWeightGradient<A>{count, g.taps(), b.count, work.columns, grad, layout.tap, layout.pixel,
                                                lane.outputs, grad_weight});
    else
      for_each_product([&](const A* rows, A* columns, int64_t at) {
        product::multiply<A>({outputs, layout.width, count}, {rows, 1, lane.outputs},
                             {columns, weights.width, layout.pixel},
                             {grad_weight + at, weights.width, weights.panel_size()}, true);
      });
  }

  // The same with weights and their gradient as they are stored. Where taps are inside, the columns take that order for
  // the products.
  void run_stored(const Lane& lane, const Tile& tile, const Block& b, int64_t image, const Window& window,
                  const Workspace& work, bool accumulate) const {
    const ColumnLayout layout(g, b, work.taps.pixels);
    const int64_t count = tile.count(), outputs = g.group_outputs(), width = weights.width;
    const bool inside = stored.order == StoredWeights<const A>::kTapsInside;
    const int64_t depth = stored.depth(g.taps(), b.count), first_output = b.group * outputs;
    const int64_t channel = b.first - b.group * g.group_channels();
    A* const columns = inside ? work.turned : work.columns;
    const int64_t pixel = inside ? depth : layout.pixel, segment = inside ? 0 : layout.tap;
    const A* const grad = work.grad_rows + first_output - lane.first_output;

    if (dots() || scatter()) {
      for (int64_t s = 0; s < stored.segments(g.taps()); ++s)
        product::multiply<A>({count, depth, outputs}, {grad, lane.outputs, 1},
                             {stored.at(first_output, channel) + s * stored.tap, width, stored.output},
                             {columns + s * segment, pixel, width}, false);
      if (inside) turn_taps<Turn::kToRows>(count, b, layout, work);
    }
    sweep(tile, b, image, window, layout, work);
    if (!(needs & kWeight)) return;
    if (inside) turn_taps<Turn::kFromRows>(count, b, layout, work);
    for (int64_t s = 0; s < stored.segments(g.taps()); ++s)
      product::multiply<A>({outputs, depth, count}, {grad, 1, lane.outputs}, {columns + s * segment, width, pixel},
                           {stored_gradient.at(first_output, channel) + s * stored.tap, stored.output, width},
                           accumulate);
  }

  // Between turned columns [pixel, channel, tap] and columns [tap, pixel, channel].
  template <Turn Direction>
  void turn_taps(int64_t count, const Block& b, const ColumnLayout& layout, const Workspace& work) const {
    for (int64_t q = 0; q < count; ++q)
      run_vectorised(TransposeRow<A, A, Direction>{work.turned + q * b.count * g.taps(), g.taps(), 1, b.count, g.taps(),
                                                   work.columns + q * layout.pixel, layout.tap});
  }

  void sweep(const Tile& tile, const Block& b, int64_t image, const Window& window, const ColumnLayout& layout,
             const Workspace& work) const {
    const View<const S> input = view<const S>(a.input);
    const int64_t count = tile.count(), planes = b.offset_groups() * g.taps();
    const bool grad_windows = scatter() && !grad_is_rows;
    const int64_t at_once = direct() && !grad_windows ? b.count : window_channels<A>(tile, window, b.count);
    if (at_once == 0) return gather(tile, b, image, layout, work);

    for (int64_t done = 0; done < b.count; done += at_once) {
      const int64_t first = b.first + done, channels = std::min(at_once, b.count - done), last = first + channels;
      const Addresses in_window = Addresses::of(window, channels, work.window);
      if (direct())
        point(tile, planes, work,
              Addresses::of(Rows<const A>{reinterpret_cast<const A*>(input.data) + first, input.n, input.h, input.w}),
              -image, zeros, 0, work.taps.value);
      else {
        load_window(tile, window, input, image, first, channels, work.window);
        point(tile, planes, work, in_window, tile.n, zeros, 0, work.taps.value);
      }
      if (grad_windows) {
        std::fill_n(work.grad_window, tile.images * window.pixels() * channels, A(0));
        point(tile, planes, work, Addresses::of(window, channels, work.grad_window), tile.n, work.sink, 4,
              work.taps.grad);
      } else if (scatter()) {
        point(tile, planes, work,
              Addresses::of(Rows<A>{grad_input.data + first, grad_input.n, grad_input.h, grad_input.w}),
              grad_image - image, work.sink, 4, work.taps.grad);
      }
      for (const Run& r : b.runs) {
        const int64_t from = std::max(first, r.first), to = std::min(last, r.first + r.count);
        if (from >= to) continue;
        const RunTaps<A> taps{work.taps, (r.offset_group - b.first_offset_group()) * g.taps(), from - first};
        with_needs(dots(), scatter(), needs & kWeight, [&](auto d, auto s, auto c) {
          run_vectorised(SweepRun<A, d.value, s.value, c.value>{
              taps, count, to - from, g.taps(), zeros, work.columns + from - b.first, layout.tap, layout.pixel});
        });
      }
      if (grad_windows) add_window(tile, window, image, first, channels, work.grad_window);
    }
  }

  void point(const Tile& tile, int64_t planes, const Workspace& work, const Addresses& in, int64_t first_image,
             const A* other, int bit, int64_t* const* to) const {
    point_taps(tile, planes, work.pixels, work.taps, in, first_image, other, bit, to);
  }

  void add_window(const Tile& tile, const Window& window, int64_t image, int64_t channel, int64_t channels,
                  A* rows) const {
    for (int64_t n = 0; n < tile.images; ++n)
      for (int64_t y = 0; y < window.height; ++y)
        run_vectorised(TransposeRow<A, A, Turn::kAddFromRows>{
            &grad_input.at(image - grad_image + tile.n + n, channel, window.y + y, window.x), grad_input.c,
            grad_input.w, channels, window.width, rows + (n * window.height + y) * window.width * channels, channels});
  }

  void gather(const Tile& tile, const Block& b, int64_t image, const ColumnLayout& layout,
              const Workspace& work) const {
    for (const Run& r : b.runs)
      GatherSweep<A, S>{g,
                        tile,
                        work.taps,
                        (r.offset_group - b.first_offset_group()) * g.taps(),
                        tile.count(),
                        r.count,
                        view<const S>(a.input),
                        scatter() ? grad_input : View<A>{},
                        image + tile.n,
                        image - grad_image + tile.n,
                        r.first,
                        dots(),
                        (needs & kWeight) != 0,
                        work.columns + r.first - b.first,
                        layout.tap,
                        layout.pixel}();
  }
};

// Blocks shared out evenly.
template <typename A>
std::vector<Lane> make_lanes(const ConvGeometry& g, const std::vector<Block>& blocks, const BackwardWeights<A>& weights,
                             int64_t threads) {
  const int64_t count = static_cast<int64_t>(blocks.size()), lanes = std::min(threads, count);
  std::vector<Lane> found;
  int64_t weight_at = 0;
  for (int64_t i = 0; i < lanes; ++i) {
    const size_t first = i * count / lanes, end = (i + 1) * count / lanes;
    const Block &from = blocks[first], &to = blocks[end - 1];
    const int64_t last_group = to.depthwise ? to.first + to.count : to.group + to.groups;
    const int64_t first_group = from.depthwise ? from.first : from.group;
    found.push_back({first, end - first, first_group * g.group_outputs(),
                     (last_group - first_group) * g.group_outputs(), from.first_offset_group(),
                     to.first_offset_group() + to.offset_groups() - from.first_offset_group(), weight_at});
    for (size_t b = first; b < end; ++b) weight_at += weights.size(blocks[b]);
  }
  return found;
}

// result = sum of the lanes' parts, in their order.
template <typename A, typename T>
void add_parts(const Tensor& parts, int64_t lanes, int64_t images, int64_t image, const View<T>& result,
               int64_t channels, int64_t height, int64_t width) {
  const A* const data = static_cast<const A*>(parts.data_ptr());
  const int64_t lane_size = parts.numel() / lanes;
  torch::stable::parallel_for(0, images * channels * height, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / (channels * height), c = i / height % channels, y = i % height;
      for (int64_t x = 0; x < width; ++x) {
        A sum = 0;
        for (int64_t lane = 0; lane < lanes; ++lane) sum += data[lane * lane_size + i * width + x];
        result.at(image + n, c, y, x) = static_cast<T>(sum);
      }
    }
  });
}

template <typename S, typename F>
void backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g, int64_t needs,
              const Tensor& grad_input, const Tensor& grad_offset, const Tensor& grad_weight, const Tensor& grad_mask) {
  using A = Accumulate<S>;
  const int64_t threads = torch::stable::get_num_threads();
  const auto zeroed = [&](const std::vector<int64_t>& sizes) {
    return torch::stable::new_zeros(a.input, sizes, scalar_type_of<A>());
  };
  const auto data = [](const Tensor& t) { return static_cast<A*>(t.data_ptr()); };

  // Enough blocks for the threads as long as each keeps two vectors' worth of channels.
  std::vector<Block> blocks = make_blocks(g, block_channels);
  if (static_cast<int64_t>(blocks.size()) < threads)
    blocks = make_blocks(g, std::clamp<int64_t>(divide_up(g.channels, threads), 32, block_channels));
  BackwardWeights<A> weights{g, nullptr};
  const int64_t weight_size = weights.size(blocks);
  StoredWeights<const A> stored;
  StoredWeights<A> stored_gradient;
  if constexpr (std::is_same_v<S, A>) {
    // Gradients are added in place where nobody else does.
    const bool alone = g.batch == 1 || threads <= static_cast<int64_t>(blocks.size());
    if (alone && blocks.front().groups == 1 && !is_depthwise(g)) {
      stored = StoredWeights<const A>(g, a.weight);
      if (needs & kWeight) stored_gradient = StoredWeights<A>(g, grad_weight);
      if ((needs & kWeight) && static_cast<int>(stored_gradient.order) != static_cast<int>(stored.order)) stored = {};
    }
  }
  weights.data = stored ? nullptr : thread_scratch<A, -2>(weight_size);
  if (!stored) turn_backward<true>(weights, blocks, view<const S>(a.weight));
  const std::vector<Lane> lanes = make_lanes(g, blocks, weights, threads);
  const Tensor zeros = zeroed({g.channels});

  Backward<S, F> job{a, g, grad_output, needs, blocks, weights, stored, stored_gradient};
  job.zeros = data(zeros);
  // Half types are summed in float, in rows of some images at a time.
  const bool staged = job.scatter() && !std::is_same_v<S, A>;
  const ImageSize size{g.channels, g.height, g.width};
  const int64_t held = staged ? images_at_a_time<A>(size, g.batch) : g.batch;
  const Tensor staging = zeroed({staged ? held * size.elements() : 0});
  const Rows<A> staging_rows = dense_rows(size, data(staging));
  job.grad_is_rows = staged || (job.scatter() && reads_in_place<S>(g, grad_input));
  if (staged)
    job.grad_input = {staging_rows.data, staging_rows.n, 1, staging_rows.h, staging_rows.w};
  else if (job.scatter()) {
    Tensor whole = grad_input;
    torch::stable::zero_(whole);
    job.grad_input = view<A>(grad_input);
  }

  // Lanes that share offset groups sum in parts, one for each.
  const int64_t planes = g.offset_groups * g.taps();
  bool shared = false;
  for (size_t i = 1; i < lanes.size(); ++i)
    shared |= lanes[i].first_offset_group < lanes[i - 1].first_offset_group + lanes[i - 1].offset_groups;
  const int64_t lane_count = static_cast<int64_t>(lanes.size());
  const auto parts = [&](bool wanted, int64_t channels) {
    return zeroed({shared && wanted ? lane_count * held : 0, channels, g.out_height, g.out_width});
  };
  const Tensor offset_parts = parts(needs & kOffset, 2 * planes), mask_parts = parts(needs & kMask, planes);
  DisplacementGradients<F> result{};
  if (!shared && (needs & kOffset)) result.offset = view<F>(grad_offset);
  if (!shared && (needs & kMask)) result.mask = view<F>(grad_mask);

  const int64_t splits = std::min(held, divide_up(threads, lane_count));
  const Tensor weight_parts = zeroed({(needs & kWeight) && !stored ? splits * weight_size : 0});

  for (int64_t image = 0; image < g.batch; image += held) {
    const int64_t images = std::min(held, g.batch - image);
    if (staged) {
      Tensor rows = staging;
      if (image > 0) torch::stable::zero_(rows);
      job.grad_image = image;
    }
    torch::stable::parallel_for(0, lane_count * splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t lane = i % lane_count, split = i / lane_count;
        const int64_t first = split * images / splits, last = (split + 1) * images / splits;
        DisplacementGradients<A> part{};
        if (shared && (needs & kOffset))
          part.offset = view<A>(offset_parts), part.offset.data += lane * held * part.offset.n;
        if (shared && (needs & kMask)) part.mask = view<A>(mask_parts), part.mask.data += lane * held * part.mask.n;
        if (first < last)
          job.run(lanes[lane], image, first, last - first, result, part,
                  data(weight_parts) + ((needs & kWeight) && !stored ? split * weight_size : 0));
      }
    });
    if (staged) transpose_images<Turn::kFromRows>(size, view<S>(grad_input), image, images, staging_rows);
    if (shared && (needs & kOffset))
      add_parts<A>(offset_parts, lane_count, images, image, view<F>(grad_offset), 2 * planes, g.out_height,
                   g.out_width);
    if (shared && (needs & kMask))
      add_parts<A>(mask_parts, lane_count, images, image, view<F>(grad_mask), planes, g.out_height, g.out_width);
  }
  if (!(needs & kWeight) || stored) return;
  A* const sum = data(weight_parts);
  for (int64_t split = 1; split < splits; ++split)
    for (int64_t i = 0; i < weight_size; ++i) sum[i] += sum[split * weight_size + i];
  weights.data = sum;
  turn_backward<false>(weights, blocks, view<S>(grad_weight));
}

}  // namespace dcn::tiles
