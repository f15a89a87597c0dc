// Deformable convolution on the CPU, backward, in one pass per (tile, block of channels): the gradient of the columns,
// a sweep over them, the gradient of the weights.
#pragma once

#include "reading.h"
#include "sweep.h"
#include "weights.h"

namespace dcn::tiles {

// A thread's share of the channels: consecutive blocks, and the outputs and offset groups that these meet.
struct Share {
  size_t first_block, blocks;
  int64_t first_output, outputs, first_offset_group, offset_groups;
  int64_t first_weight;  // of its first block in the packed weights
};

// Gradients of offset and mask of some images: the result's own, or what one share adds to it.
template <typename T>
struct DisplacementGradients {
  View<T> offset, mask;  // data is null where there is none
};

// P: what the operands of products are held in: the accumulator type, or bfloat16.
template <typename S, typename F, typename P>
struct Backward {
  using A = Accumulate<S>;
  using W = ProductOf<P>;
  static constexpr int64_t terms = product::terms_of<W>;

  const ConvArguments& a;
  const ConvGeometry& g;
  const Tensor& grad_output;
  const int64_t wanted;
  std::vector<Block> blocks;
  BackwardWeights<W> weights;
  StoredWeights<const A> stored{};  // false: the packed ones are used
  StoredWeights<A> stored_gradient{};
  const A* zeros = nullptr;
  int64_t max_pixels = 0;  // of a tile
  // What is read and what is added to, or none: then tiles have windows, and those of the gradient go to grad_input.
  BlockRows<A> rows{}, grad_rows{};
  int64_t rows_image = 0, grad_image = 0;  // numbers of the images that these begin with
  View<A> grad_input{};

  // What the sweep does, and how it reaches images.
  bool dots() const { return wanted & (kOffset | kMask); }
  bool scatter() const { return wanted & kInput; }
  bool grad_windows() const { return scatter() && !grad_rows; }
  bool uses_windows() const { return !rows || grad_windows(); }

  // The memory of a thread for a tile of `count` pixels.
  struct Workspace {
    TilePixels pixels;
    TileDisplacement<A> moved;
    Taps<A> taps;
    A *columns, *transposed, *grad_rows, *grad_offset, *grad_mask, *window, *grad_window, *sink;
    // The gradient of the output as operands: pairs of outputs, [pixel, output], and of pixels, [pair, output].
    BFloat16* grad_outputs;
    Pair* grad_pixels;
    int64_t bytes;

    Workspace(Scratch scratch, const Backward& job, const Share& share, int64_t count)
        : pixels(scratch, count),
          moved(scratch, job.max_planes(share), count),
          taps(scratch, job.max_planes(share), count, true) {
      const int64_t planes = share.offset_groups * job.g.taps(), window_size = window_bytes / sizeof(A);
      // A product reads whole vectors of columns.
      columns = scratch.take<A>(job.g.taps() * job.max_channels(share) * count + job.weights.width);
      transposed = scratch.take<A>(job.stored ? job.g.taps() * job.max_channels(share) * count : 0);
      grad_rows = scratch.take<A>(share.outputs * count);
      grad_outputs = scratch.take<BFloat16>(terms == 2 ? share.outputs * count : 0);
      grad_pixels = scratch.take<Pair>(terms == 2 ? share.outputs * divide_up(count, 2) : 0);
      grad_offset = scratch.take<A>(2 * planes * count);
      grad_mask = scratch.take<A>(planes * count);
      window = scratch.take<A>(job.rows ? 0 : window_size);
      grad_window = scratch.take<A>(job.grad_windows() ? window_size : 0);
      sink = scratch.take<A>(job.g.channels);
      bytes = scratch.counted();
    }
  };

  int64_t max_channels(const Share& share) const {
    int64_t largest = 0;
    for (size_t i = 0; i < share.blocks; ++i) largest = std::max(largest, blocks[share.first_block + i].count);
    return largest;
  }
  int64_t max_planes(const Share& share) const {
    int64_t largest = 0;
    for (size_t i = 0; i < share.blocks; ++i)
      largest = std::max(largest, blocks[share.first_block + i].offset_groups());
    return largest * g.taps();
  }

  // One share of the channels in images [first, first + images); these and tile.n count from `image`. The gradients of
  // offset and mask go to `result`, or to `part` (counted from its own first image), those of the weights to
  // `grad_weight`.
  void run(const Share& share, int64_t image, int64_t first, int64_t images, const DisplacementGradients<F>& result,
           const DisplacementGradients<A>& part, A* grad_weight) const {
    const int64_t fixed = Workspace(Scratch(), *this, share, 0).bytes;
    const int64_t each = (Workspace(Scratch(), *this, share, 16).bytes - fixed) / 16;
    const int64_t most = max_pixels_of_tile(images * g.out_pixels(), each, 1);
    const Tiling tiling(g, images, std::min(most, max_pixels), uses_windows() ? columns_of_window : columns_in_place);
    const int64_t pixels = tiling.max_pixels();
    const Workspace work(Scratch(Workspace(Scratch(), *this, share, pixels).bytes), *this, share, pixels);
    std::fill_n(work.sink, g.channels, A(0));
    for (int64_t t = 0; t < tiling.size(); ++t) {
      Tile tile = tiling[t];
      tile.n += first;
      run_tile(share, tile, image, work, grad_weight, image > 0 || t > 0);
      if (result.offset.data) store(share, tile, image, 2, work.grad_offset, pixels, result.offset);
      if (result.mask.data) store(share, tile, image, 1, work.grad_mask, pixels, result.mask);
      if (part.offset.data) store(share, tile, 0, 2, work.grad_offset, pixels, part.offset);
      if (part.mask.data) store(share, tile, 0, 1, work.grad_mask, pixels, part.mask);
    }
  }

  // Writes planes of a tile to an image; `per_plane` is 2 for offsets (y, x), 1 for masks.
  template <typename T>
  void store(const Share& share, const Tile& tile, int64_t image, int64_t per_plane, A* from, int64_t capacity,
             const View<T>& to) const {
    for_each_row(tile, [&](int64_t q, int64_t n, int64_t y) {
      // From [plane, x] to images: TransposeRow takes the pixels for its channels, and the planes for its pixels.
      run_vectorised(TransposeRow<A, T, Transpose::kFromRows>{
          &to.at(image + n, per_plane * share.first_offset_group * g.taps(), y, tile.x), to.w, to.c, tile.columns,
          per_plane * share.offset_groups * g.taps(), from + q, capacity});
    });
  }

  void run_tile(const Share& share, const Tile& tile, int64_t image, const Workspace& work, A* grad_weight,
                bool accumulate) const {
    const int64_t count = tile.count(), capacity = work.taps.stride;
    const View<const S> grad_out = view<const S>(grad_output);
    work.pixels.find(g, tile);
    for_each_row(tile, [&](int64_t q, int64_t n, int64_t y) {
      run_vectorised(TransposeRow<A, const S, Transpose::kToRows>{
          &grad_out.at(image + n, share.first_output, y, tile.x), grad_out.c, grad_out.w, share.outputs, tile.columns,
          work.grad_rows + q * share.outputs, share.outputs});
    });
    if constexpr (terms == 2) {
      round_row(work.grad_rows, count * share.outputs, work.grad_outputs);
      pair_pixels(count, share.outputs, work.grad_rows, share.outputs, work.grad_pixels, share.outputs);
    }
    std::fill_n(work.grad_offset, 2 * share.offset_groups * g.taps() * capacity, A(0));
    std::fill_n(work.grad_mask, share.offset_groups * g.taps() * capacity, A(0));

    int64_t first_group = -1, groups = 0, at = share.first_weight;
    Window window;
    const auto finish = [&] {
      if (!dots() || groups == 0) return;
      const int64_t plane = (first_group - share.first_offset_group) * g.taps();
      run_vectorised(FinishDots<A>{count, groups * g.taps(), work.taps, work.moved.mask,
                                   work.grad_offset + 2 * plane * capacity, work.grad_mask + plane * capacity});
    };
    for (size_t i = share.first_block; i < share.first_block + share.blocks; ++i) {
      const Block& b = blocks[i];
      // Blocks of the same offset groups have the same taps.
      if (b.first_offset_group() != first_group || b.offset_groups() != groups) {
        finish();
        first_group = b.first_offset_group(), groups = b.offset_groups();
        work.moved.load(tile, image, first_group * g.taps(), groups * g.taps(), displacement<F>(a));
        window = find_taps<true>(TilePlanes<A>{g, count, groups, work.pixels, work.moved}, work.taps, uses_windows());
        std::fill_n(work.taps.dot, 4 * groups * g.taps() * capacity, A(0));
      }
      if constexpr (terms == 2) {
        run_pairs(share, tile, b, image, window, work, at / terms, grad_weight + at);
      } else if (stored)
        run_stored(share, tile, b, image, window, work, accumulate);
      else
        run_block(share, tile, b, image, window, work, at, grad_weight + at);
      at += weights.size(b) * terms;
    }
    finish();
  }

  void run_block(const Share& share, const Tile& tile, const Block& b, int64_t image, const Window& window,
                 const Workspace& work, int64_t weight_at, A* grad_weight) const {
    const ColumnLayout layout(g, b, work.taps.stride);
    const int64_t count = tile.count(), outputs = b.depthwise ? b.count : g.group_outputs();
    const int64_t panels = weights.panels(b), segment_size = panels * weights.panel_size();
    const A* const grad = work.grad_rows + b.group * g.group_outputs() - share.first_output;
    const auto for_each_product = [&](const auto& f) {
      for (int64_t i = 0; i < b.groups; ++i)
        for (int64_t s = 0; s < layout.segments; ++s)
          f(grad + i * outputs, work.columns + i * b.group_channels() + s * layout.tap,
            (i * layout.segments + s) * segment_size);
    };
    const narrow::Sums<A> sums{count,
                               g.taps(),
                               b.count,
                               weights.data + weight_at,
                               grad_weight,
                               work.columns,
                               const_cast<A*>(grad),
                               layout.tap,
                               layout.pixel,
                               share.outputs};
    if (dots() || scatter()) {
      if (weights.narrow)
        narrow::kernels<A>().columns[weights.narrow](sums);
      else if (b.depthwise)
        run_vectorised(DepthwiseColumnGradient<A>{count, g.taps(), b.count, weights.data + weight_at, grad,
                                                  share.outputs, work.columns, layout.tap, layout.pixel});
      else
        for_each_product([&](const A* rows, A* columns, int64_t at) {
          product::multiply<A>({count, layout.width, outputs}, {rows, share.outputs, 1},
                               {weights.data + weight_at + at, weights.panel_size(), weights.width},
                               {columns, layout.pixel, weights.width}, false);
        });
    }
    sweep(tile, b, image, window, layout, work);
    if (!(wanted & kWeight)) return;
    if (weights.narrow)
      narrow::kernels<A>().gradient[weights.narrow](sums);
    else if (b.depthwise)
      run_vectorised(DepthwiseWeightGradient<A>{count, g.taps(), b.count, work.columns, grad, layout.tap, layout.pixel,
                                                share.outputs, grad_weight});
    else
      for_each_product([&](const A* rows, A* columns, int64_t at) {
        product::multiply<A>({outputs, layout.width, count}, {rows, 1, share.outputs},
                             {columns, weights.width, layout.pixel},
                             {grad_weight + at, weights.width, weights.panel_size()}, true);
      });
  }

  // to[pair of pixels] = the rows of both; the last of an odd number has zeros for its second.
  static void pair_pixels(int64_t count, int64_t values, const A* rows, int64_t row, Pair* to, int64_t pair) {
    for (int64_t q = 0; q < count; q += 2)
      pair_rows(rows + q * row, q + 1 < count ? rows + (q + 1) * row : nullptr, values, to + q / 2 * pair);
  }

  // The same with products of pairs.
  void run_pairs(const Share& share, const Tile& tile, const Block& b, int64_t image, const Window& window,
                 const Workspace& work, int64_t weight_at, A* grad_weight) const {
    const ColumnLayout layout(g, b, work.taps.stride);
    const int64_t count = tile.count(), outputs = g.group_outputs(), panels = weights.panels(b);
    const int64_t first = b.group * outputs - share.first_output;
    const auto for_each_product = [&](const auto& f) {
      for (int64_t i = 0; i < b.groups; ++i)
        for (int64_t s = 0; s < layout.segments; ++s)
          f(first + i * outputs, work.columns + i * b.group_channels() + s * layout.tap,
            (i * layout.segments + s) * panels);
    };
    if (dots() || scatter())
      for_each_product([&](int64_t output, A* columns, int64_t panel) {
        product::multiply<Pair>(
            {count, layout.width, outputs / 2},
            {reinterpret_cast<const Pair*>(work.grad_outputs + output), share.outputs / 2, 1},
            {weights.data + weight_at + panel * weights.panel_size(), weights.panel_size(), weights.width},
            {columns, layout.pixel, weights.width}, false);
      });
    sweep(tile, b, image, window, layout, work);
    if (!(wanted & kWeight)) return;
    // The columns become pairs in their own memory.
    for (int64_t k = 0; k < g.taps(); ++k) {
      A* const columns = work.columns + k * layout.tap;
      pair_pixels(count, b.count, columns, layout.pixel, reinterpret_cast<Pair*>(columns), layout.pixel);
    }
    for_each_product([&](int64_t output, A* columns, int64_t panel) {
      product::multiply<Pair>(
          {outputs, layout.width, divide_up(count, 2)}, {work.grad_pixels + output, 1, share.outputs},
          {reinterpret_cast<const Pair*>(columns), weights.width, layout.pixel},
          {grad_weight + panel * outputs * weights.width, weights.width, outputs * weights.width}, true);
    });
  }

  // The same with weights and their gradient as they are stored. Where these have their taps innermost, columns are
  // transposed to the same order for the products, and back for the sweep.
  void run_stored(const Share& share, const Tile& tile, const Block& b, int64_t image, const Window& window,
                  const Workspace& work, bool accumulate) const {
    const ColumnLayout layout(g, b, work.taps.stride);
    const int64_t count = tile.count(), outputs = g.group_outputs(), width = weights.width;
    const bool inside = stored.order == StoredWeights<const A>::kTapsInside;
    const int64_t depth = stored.depth(g.taps(), b.count), first_output = b.group * outputs;
    const int64_t channel = b.first - b.group * g.group_channels();
    A* const columns = inside ? work.transposed : work.columns;
    const int64_t pixel = inside ? depth : layout.pixel, segment = inside ? 0 : layout.tap;
    const A* const grad = work.grad_rows + first_output - share.first_output;

    if (dots() || scatter()) {
      for (int64_t s = 0; s < stored.segments(g.taps()); ++s)
        product::multiply<A>({count, depth, outputs}, {grad, share.outputs, 1},
                             {stored.at(first_output, channel) + s * stored.tap, width, stored.output},
                             {columns + s * segment, pixel, width}, false);
      if (inside) transpose_taps<Transpose::kToRows>(count, b, layout, work);
    }
    sweep(tile, b, image, window, layout, work);
    if (!(wanted & kWeight)) return;
    if (inside) transpose_taps<Transpose::kFromRows>(count, b, layout, work);
    for (int64_t s = 0; s < stored.segments(g.taps()); ++s)
      product::multiply<A>({outputs, depth, count}, {grad, 1, share.outputs}, {columns + s * segment, width, pixel},
                           {stored_gradient.at(first_output, channel) + s * stored.tap, stored.output, width},
                           accumulate);
  }

  // Between columns [tap, pixel, channel] and transposed ones [pixel, channel, tap].
  template <Transpose Direction>
  void transpose_taps(int64_t count, const Block& b, const ColumnLayout& layout, const Workspace& work) const {
    for (int64_t q = 0; q < count; ++q)
      run_vectorised(TransposeRow<A, A, Direction>{work.transposed + q * b.count * g.taps(), g.taps(), 1, b.count,
                                                   g.taps(), work.columns + q * layout.pixel, layout.tap});
  }

  void sweep(const Tile& tile, const Block& b, int64_t image, const Window& window, const ColumnLayout& layout,
             const Workspace& work) const {
    const View<const S> input = view<const S>(a.input);
    const int64_t count = tile.count(), planes = b.offset_groups() * g.taps();
    const int64_t at_once = uses_windows() ? window_channels<A>(tile, window, b.count) : b.count;
    for (int64_t done = 0; done < b.count; done += at_once) {
      const int64_t first = b.first + done, channels = std::min(at_once, b.count - done), last = first + channels;
      if (rows) {
        point(tile, planes, work, Addresses::of(from_channel(rows.of(b), done)), rows_image - image, zeros, 0,
              work.taps.value);
      } else {
        load_window(tile, window, input, image, first, channels, work.window);
        point(tile, planes, work, Addresses::of(window, channels, work.window), tile.n, zeros, 0, work.taps.value);
      }
      if (grad_windows()) {
        std::fill_n(work.grad_window, tile.images * window.pixels() * channels, A(0));
        point(tile, planes, work, Addresses::of(window, channels, work.grad_window), tile.n, work.sink, 4,
              work.taps.grad);
      } else if (scatter()) {
        point(tile, planes, work, Addresses::of(from_channel(grad_rows.of(b), done)), grad_image - image, work.sink, 4,
              work.taps.grad);
      }
      for (const Run& r : b.runs) {
        const int64_t from = std::max(first, r.first), to = std::min(last, r.first + r.count);
        if (from >= to) continue;
        const RunTaps<A> taps{work.taps, (r.offset_group - b.first_offset_group()) * g.taps(), from - first};
        with_wanted(dots(), scatter(), wanted & kWeight, [&](auto d, auto s, auto c) {
          run_vectorised(SweepRun<A, d.value, s.value, c.value>{
              taps, count, to - from, g.taps(), zeros, work.columns + from - b.first, layout.tap, layout.pixel});
        });
      }
      if (grad_windows()) add_window(tile, window, image, first, channels, work.grad_window);
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
        run_vectorised(TransposeRow<A, A, Transpose::kAddFromRows>{
            &grad_input.at(image + tile.n + n, channel, window.y + y, window.x), grad_input.c, grad_input.w, channels,
            window.width, rows + (n * window.height + y) * window.width * channels, channels});
  }
};

}  // namespace dcn::tiles
