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
  bool direct;  // the input is read where it lies
  std::vector<Block> blocks;
  ForwardWeights<A> weights;
  const A* zeros;
  StoredWeights<const A> stored{};  // false: the packed ones are used

  // The memory of a thread for a tile of `count` pixels.
  struct Workspace {
    TilePixels pixels;
    TileDisplacement<A> moved;
    Taps<A> taps;
    A *columns, *transposed, *products, *window;
    mutable PrefetchList next;

    Workspace(Scratch scratch, const Forward& job, int64_t count)
        : pixels(scratch, count),
          moved(scratch, job.max_planes(), count),
          taps(scratch, job.max_planes(), count, false),
          columns(scratch.take<A>(job.g.taps() * job.max_channels() * count)),
          transposed(scratch.take<A>(job.stored ? job.transposed_size(count) : 0)),
          products(scratch.take<A>(job.g.out_channels * count)),
          window(scratch.take<A>(job.direct ? 0 : window_bytes / static_cast<int64_t>(sizeof(A)))),
          next(scratch),
          bytes(scratch.counted()) {}
    int64_t bytes;
  };

  // Of the columns in panels of pixels, which stored weights are multiplied with.
  int64_t transposed_size(int64_t count) const {
    return divide_up(count, weights.width) * weights.width * g.taps() * max_channels();
  }
  int64_t max_channels() const {
    int64_t largest = 0;
    for (const Block& b : blocks) largest = std::max(largest, b.count);
    return largest;
  }
  int64_t max_planes() const {
    int64_t largest = 0;
    for (const Block& b : blocks) largest = std::max(largest, b.offset_groups());
    return largest * g.taps();
  }

  void run() const {
    // Bytes that a pixel adds to what a tile takes anyway, such as its window.
    const int64_t fixed = Workspace(Scratch(), *this, 0).bytes;
    const int64_t each = (Workspace(Scratch(), *this, 16).bytes - fixed) / 16;
    const int64_t threads = torch::stable::get_num_threads();
    const Tiling tiling(g, g.batch, max_pixels_of_tile(g.batch * g.out_pixels(), each, threads),
                        direct ? columns_in_place : columns_of_window);
    const int64_t pixels = tiling.max_pixels();
    const int64_t bytes = Workspace(Scratch(), *this, pixels).bytes;
    // With fewer tiles than threads, several threads take the same tile and some of its outputs each. All of them
    // sample its columns, which costs little beside the product.
    const int64_t parts = stored ? divide_up(threads, tiling.size()) : 1, tasks = tiling.size() * parts;
    // Threads draw tasks from a counter, so that a fast one does more of them. No result depends on which thread does a
    // task, and the counter guards no other memory: hence the relaxed order.
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t begin, int64_t end) {
      const Workspace work(Scratch(bytes), *this, pixels);
      if (stored) std::fill_n(work.transposed, transposed_size(pixels), A(0));
      for (int64_t i = begin; i < end; ++i)
        for (int64_t t = next.fetch_add(1, std::memory_order_relaxed); t < tasks;) {
          const int64_t later = next.fetch_add(1, std::memory_order_relaxed), part = t % parts;
          const Outputs outputs{part * g.out_channels / parts, (part + 1) * g.out_channels / parts};
          run_tile(tiling[t / parts], tiling[std::min(later, tasks - 1) / parts], outputs, work);
          t = later;
        }
    });
  }

  struct Outputs {
    int64_t first, last;
    int64_t count() const { return last - first; }
  };

  // `next` is the tile that this thread will work on afterwards: its input is prefetched.
  void run_tile(const Tile& tile, const Tile& next, const Outputs& outputs, const Workspace& work) const {
    const int64_t count = tile.count();
    const View<S> out = view<S>(output);
    const S* const bias = a.bias ? static_cast<const S*>(a.bias->data_ptr()) : nullptr;
    start_products(count, bias, outputs, work);
    work.pixels.find(g, tile);
    int64_t first_group = -1, groups = 0;
    Window window;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const Block& b = blocks[i];
      // Blocks of the same offset groups have the same taps.
      if (b.first_offset_group() != first_group || b.offset_groups() != groups) {
        first_group = b.first_offset_group(), groups = b.offset_groups();
        work.moved.load(tile, 0, first_group * g.taps(), groups * g.taps(), displacement<F>(a));
        window = find_taps<false>(TilePlanes<A>{g, count, groups, work.pixels, work.moved}, work.taps, !direct);
        if (direct) point(tile, groups, Addresses::of(Rows<A>{input_rows()}), 0, work);
      }
      const bool last = i + 1 == blocks.size();
      const Block& later = blocks[last ? 0 : i + 1];
      list_lines(g, last ? next : tile, last ? row_after(g, tile, next) : 0, view<const S>(a.input), 0, later.first,
                 later.count, work.next);
      fill_block(tile, b, window, work);
      if (stored)
        multiply_stored(count, b, outputs, work);
      else
        multiply_block(tile, b, work);
    }
    for_each_row(tile, [&](int64_t q, int64_t n, int64_t y) {
      S* const to = &out.at(n, outputs.first, y, tile.x);
      // Products are [pixel, output]. With stored weights they are [output, pixel]: TransposeRow then takes the pixels
      // for its channels, and the outputs for its pixels.
      if (stored)
        run_vectorised(TransposeRow<A, S, Transpose::kFromRows>{to, out.w, out.c, tile.columns, outputs.count(),
                                                                work.products + q, work.taps.stride});
      else
        run_vectorised(TransposeRow<A, S, Transpose::kFromRows>{to, out.c, out.w, g.out_channels, tile.columns,
                                                                work.products + q * g.out_channels, g.out_channels});
    });
  }

  // Fills the products, [pixel, output] or with stored weights [output, pixel], with the bias.
  void start_products(int64_t count, const S* bias, const Outputs& outputs, const Workspace& work) const {
    const auto start = [&](int64_t o) { return bias ? static_cast<A>(bias[o]) : A(0); };
    if (stored) {
      for (int64_t o = outputs.first; o < outputs.last; ++o)
        std::fill_n(work.products + (o - outputs.first) * work.taps.stride, count, start(o));
      return;
    }
    for (int64_t o = 0; o < g.out_channels; ++o) work.products[o] = start(o);
    for (int64_t q = 1; q < count; ++q) std::copy_n(work.products, g.out_channels, work.products + q * g.out_channels);
  }

  Rows<A> input_rows() const {
    const View<const S> in = view<const S>(a.input);
    return {const_cast<A*>(reinterpret_cast<const A*>(in.data)), in.n, in.h, in.w};
  }
  void point(const Tile& tile, int64_t groups, const Addresses& in, int64_t first_image, const Workspace& work) const {
    point_taps(tile, groups * g.taps(), work.pixels, work.taps, in, first_image, zeros, 4, work.taps.value);
  }

  void fill_block(const Tile& tile, const Block& b, const Window& window, const Workspace& work) const {
    const ColumnLayout layout(g, b, work.taps.stride);
    const int64_t count = tile.count();
    const View<const S> input = view<const S>(a.input);
    const int64_t at_once = direct ? b.count : window_channels<A>(tile, window, b.count);
    // Channels [first, last) of the block; the taps have the addresses of channel `origin`, or, if that is -1, none.
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
                                         g.out_channels});
        else
          run_vectorised(FillRun<A>{{work.taps, plane, from - origin},
                                    count,
                                    to - from,
                                    g.taps(),
                                    columns,
                                    layout.tap,
                                    layout.pixel,
                                    work.next.lines,
                                    from == b.first ? work.next.count : 0});
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
    if (b.depthwise && at_once == 0) add_depthwise(count, b, layout, work);
  }

  void multiply_block(const Tile& tile, const Block& b, const Workspace& work) const {
    if (b.depthwise) return;
    const ColumnLayout layout(g, b, work.taps.stride);
    const int64_t count = tile.count();
    for (int64_t i = 0; i < b.groups; ++i) {
      const int64_t channels = b.group_channels(), outputs = g.group_outputs();
      product::multiply<A>({count, outputs, channels, g.taps()},
                           {work.columns + i * channels, layout.pixel, 1, layout.tap}, weights.of(b, i),
                           {work.products + (b.group + i) * outputs, g.out_channels, weights.width}, true);
    }
  }

  // products[output, pixel] += weights, as they are stored, times columns, in panels of pixels.
  void multiply_stored(int64_t count, const Block& b, const Outputs& outputs, const Workspace& work) const {
    const ColumnLayout layout(g, b, work.taps.stride);
    const int64_t width = weights.width, panel = g.taps() * b.count * width;
    const bool inside = stored.order == StoredWeights<const A>::kTapsInside;
    const int64_t tap = (inside ? 1 : b.count) * width, channel = (inside ? g.taps() : 1) * width;
    for (int64_t first = 0; first < count; first += width)
      for (int64_t k = 0; k < g.taps(); ++k)
        run_vectorised(TransposeRow<A, A, Transpose::kFromRows>{
            work.transposed + first / width * panel + k * tap, channel, 1, b.count, std::min(width, count - first),
            work.columns + k * layout.tap + first * layout.pixel, layout.pixel});
    // `outputs` may reach into other groups; only those of this block's group are its own.
    const int64_t group_outputs = g.group_outputs(), from = std::max(outputs.first, b.group * group_outputs);
    const int64_t to = std::min(outputs.last, (b.group + 1) * group_outputs);
    if (from >= to) return;
    product::multiply<A>({to - from, count, stored.depth(g.taps(), b.count), stored.segments(g.taps())},
                         {stored.at(from, b.first - b.group * g.group_channels()), stored.output, 1, stored.tap},
                         {work.transposed, panel, width, tap},
                         {work.products + (from - outputs.first) * work.taps.stride, work.taps.stride, width}, true);
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
  const std::vector<Block> blocks = make_blocks(g, block_channels);
  int64_t size = 0;
  for (const Block& b : blocks) size += ForwardWeights<A>{g, nullptr}.size(b);
  StoredWeights<const A> stored;
  if constexpr (std::is_same_v<S, A>)
    if (blocks.front().groups == 1 && !is_depthwise(g)) stored = StoredWeights<const A>(g, a.weight);
  // Weights with their taps outermost would be read in short stretches.
  if (stored.order == StoredWeights<const A>::kTapsOutside) stored = {};
  const ForwardWeights<A> weights{g, stored ? nullptr : thread_scratch<A, -2>(size)};
  if (!stored) pack_forward(weights, blocks, view<const S>(a.weight));
  const Tensor zeros = torch::stable::new_zeros(a.input, {g.channels}, scalar_type_of<A>());
  Forward<S, F>{
      a, g, output, reads_in_place<S>(g, a.input), blocks, weights, static_cast<const A*>(zeros.data_ptr()), stored}
      .run();
}

}  // namespace dcn::tiles
