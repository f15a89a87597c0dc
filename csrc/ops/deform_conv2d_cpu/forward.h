// Deformable convolution on the CPU, forward: per tile of output pixels, where the taps lie; per block of channels,
// columns [tap, pixel, channel] and their product with the packed weights.
#pragma once

#include <atomic>

#include "columns.h"
#include "weights.h"

namespace dcn::tiles {

template <typename S, typename F>
struct Forward {
  using A = Accumulate<S>;

  const ConvArguments& a;
  const ConvGeometry& g;
  const Tensor& output;
  bool direct;  // the input is rows of channels as it lies in memory
  std::vector<Block> blocks;
  ForwardWeights<A> weights;
  const A* zeros;

  // Everything that a thread needs for a tile of `pixels`.
  struct Workspace {
    TilePixels pixels;
    Taps<A> taps;
    A *columns, *products, *window;

    Workspace(Scratch scratch, const Forward& job, int64_t count)
        : pixels(scratch, count),
          taps(scratch, job.most_planes(), count, false),
          columns(scratch.take<A>(job.g.taps() * job.most_channels() * count)),
          products(scratch.take<A>(job.g.out_channels * count)),
          window(scratch.take<A>(job.direct ? 0 : window_bytes / static_cast<int64_t>(sizeof(A)))),
          bytes(scratch.counted()) {}
    int64_t bytes;
  };

  int64_t most_channels() const {
    int64_t most = 0;
    for (const Block& b : blocks) most = std::max(most, b.count);
    return most;
  }
  int64_t most_planes() const {
    int64_t most = 0;
    for (const Block& b : blocks) most = std::max(most, b.offset_groups());
    return most * g.taps();
  }

  void run() const {
    // What one pixel needs; a window is not shared out to pixels.
    const int64_t fixed = Workspace(Scratch(), *this, 0).bytes;
    const int64_t each = (Workspace(Scratch(), *this, 16).bytes - fixed) / 16;
    const int64_t threads = torch::stable::get_num_threads();
    const Tiling tiling(g, g.batch, most_pixels(g.batch * g.out_pixels(), each, threads));
    const int64_t pixels = tiling.most_pixels();
    const int64_t bytes = Workspace(Scratch(), *this, pixels).bytes;
    // Whoever is free takes the next tile: which thread that is does not show in the result.
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min(threads, tiling.size()), 1, [&](int64_t begin, int64_t end) {
      const Workspace work(Scratch(bytes), *this, pixels);
      for (int64_t i = begin; i < end; ++i)
        for (int64_t t; (t = next.fetch_add(1)) < tiling.size();) run_tile(tiling[t], work);
    });
  }

  void run_tile(const Tile& tile, const Workspace& work) const {
    const int64_t count = tile.count();
    const View<S> out = view<S>(output);
    const S* const bias = a.bias ? static_cast<const S*>(a.bias->data_ptr()) : nullptr;
    for (int64_t q = 0; q < count; ++q)
      for (int64_t o = 0; o < g.out_channels; ++o)
        work.products[q * g.out_channels + o] = bias ? static_cast<A>(bias[o]) : A(0);
    work.pixels.find(g, tile);
    int64_t first_group = -1, groups = 0;
    Window window;
    for (const Block& b : blocks) {
      // Blocks that share their offset groups share the taps.
      if (b.first_offset_group() != first_group || b.offset_groups() != groups) {
        first_group = b.first_offset_group(), groups = b.offset_groups();
        load_displacement(tile, 0, first_group * g.taps(), groups * g.taps(), displacement<S, F>(a), work.taps);
        run_vectorised(FindTaps<A>{g, count, groups, work.pixels, work.taps, &window});
        if (direct) point(tile, groups, Addresses::of(Rows<A>{input_rows()}), 0, work);
      }
      run_block(tile, b, window, work);
    }
    for_each_row(tile, [&](int64_t q, int64_t n, int64_t y) {
      run_vectorised(TransposeRow<A, S, Turn::kFromRows>{&out.at(n, 0, y, tile.x), out.c, out.w, g.out_channels,
                                                         tile.columns, work.products + q * g.out_channels,
                                                         g.out_channels});
    });
  }

  Rows<A> input_rows() const {
    const View<const S> in = view<const S>(a.input);
    return {const_cast<A*>(reinterpret_cast<const A*>(in.data)), in.n, in.h, in.w};
  }
  void point(const Tile& tile, int64_t groups, const Addresses& in, int64_t first_image, const Workspace& work) const {
    point_taps(tile, groups * g.taps(), work.pixels, work.taps, in, first_image, zeros, 4, work.taps.value);
  }

  void run_block(const Tile& tile, const Block& b, const Window& window, const Workspace& work) const {
    const ColumnLayout layout(g, b, work.taps.pixels);
    const int64_t count = tile.count();
    const View<const S> input = view<const S>(a.input);
    const int64_t at_once = direct ? b.count : window_channels<A>(tile, window, b.count);
    // Channels [first, last) of the block, behind addresses of channel `origin`; -1: there are no addresses.
    const auto fill = [&](int64_t first, int64_t last, int64_t origin) {
      for (const Run& r : b.runs) {
        const int64_t from = std::max(first, r.first), to = std::min(last, r.first + r.count);
        if (from >= to) continue;
        const int64_t plane = (r.offset_group - b.first_offset_group()) * g.taps();
        A* const columns = work.columns + from - b.first;
        if (origin < 0)
          GatherRun<A, S>{g,     tile,   work.taps, plane,   count,      to - from,
                          input, tile.n, from,      columns, layout.tap, layout.pixel}();
        else if (b.depthwise)
          run_vectorised(DepthwiseRun<A>{{work.taps, plane, from - origin},
                                         count,
                                         to - from,
                                         g.taps(),
                                         weights.data + from,
                                         g.channels,
                                         work.products + from,
                                         g.out_channels,
                                         work.columns});
        else
          run_vectorised(FillRun<A>{
              {work.taps, plane, from - origin}, count, to - from, g.taps(), columns, layout.tap, layout.pixel});
      }
    };
    if (at_once == 0) fill(b.first, b.first + b.count, -1);
    for (int64_t done = 0; at_once > 0 && done < b.count; done += at_once) {
      const int64_t first = b.first + done, channels = std::min(at_once, b.count - done);
      if (!direct) {
        load_window(tile, window, input, 0, first, channels, work.window);
        point(tile, b.offset_groups(), Addresses::of(window, channels, work.window), tile.n, work);
      }
      fill(first, first + channels, direct ? 0 : first);
    }
    if (b.depthwise) {
      if (at_once == 0) add_depthwise(count, b, layout, work);
      return;
    }
    for (int64_t i = 0; i < b.groups; ++i) {
      const int64_t channels = b.group_channels(), outputs = g.group_outputs();
      product::multiply<A>({count, outputs, channels, g.taps()},
                           {work.columns + i * channels, layout.pixel, 1, layout.tap}, weights.of(b, i),
                           {work.products + (b.group + i) * outputs, g.out_channels, weights.width}, true);
    }
  }

  void add_depthwise(int64_t count, const Block& b, const ColumnLayout& layout, const Workspace& work) const {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < g.taps(); ++k)
        for (int64_t c = 0; c < b.count; ++c)
          work.products[q * g.out_channels + b.first + c] +=
              weights.data[k * g.channels + b.first + c] * work.columns[k * layout.tap + q * layout.pixel + c];
  }
};

template <typename S, typename F>
void forward(const ConvArguments& a, const ConvGeometry& g, const Tensor& output) {
  using A = Accumulate<S>;
  const int64_t size = ForwardWeights<A>{g, nullptr}.size();
  const Tensor packed = torch::stable::new_empty(a.input, {size}, scalar_type_of<A>());
  const ForwardWeights<A> weights{g, static_cast<A*>(packed.data_ptr())};
  pack_forward(weights, view<const S>(a.weight));
  const Tensor zeros = torch::stable::new_zeros(a.input, {g.channels}, scalar_type_of<A>());
  Forward<S, F>{a, g, output, is_rows<S>(a.input), make_blocks(g, 64), weights, static_cast<const A*>(zeros.data_ptr())}
      .run();
}

}  // namespace dcn::tiles
