// Deformable convolution on the CPU, forward: per tile of output pixels, where the taps lie; per block of channels,
// columns [tap, pixel, channel] and their product with the packed weights.
#pragma once

#include <atomic>

#include "columns.h"
#include "reading.h"
#include "weights.h"

namespace dcn::tiles {

// P: what columns are held in: the accumulator type, or bfloat16 for products of pairs.
template <typename S, typename F, typename P>
struct Forward {
  using A = Accumulate<S>;
  using W = ProductOf<P>;
  static constexpr int64_t terms = product::terms_of<W>;

  const ConvArguments& a;
  const ConvGeometry& g;
  const Tensor& output;
  int64_t max_pixels;  // of a tile
  std::vector<Block> blocks;
  ForwardWeights<W> weights;
  const A* zeros;
  StoredWeights<const A> stored{};  // false: the packed ones are used
  BlockRows<A> rows{};              // what is read, or none: then tiles have windows
  int64_t rows_image = 0;           // number of the image that these begin with

  // The memory of a thread for a tile of `count` pixels.
  struct Workspace {
    TilePixels pixels;
    TileDisplacement<A> moved;
    Taps<A> taps;
    P* columns;
    A *transposed, *products, *window;
    mutable PrefetchList next;

    Workspace(Scratch scratch, const Forward& job, int64_t count)
        : pixels(scratch, count),
          moved(scratch, job.max_planes(), count),
          taps(scratch, job.max_planes(), count, false),
          columns(scratch.take<P>(job.g.taps() * job.max_channels() * count)),
          transposed(scratch.take<A>(job.stored ? job.transposed_size(count) : 0)),
          products(scratch.take<A>(job.g.out_channels * count)),
          window(scratch.take<A>(job.rows ? 0 : window_bytes / static_cast<int64_t>(sizeof(A)))),
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

  // All tiles of images [first, first + images).
  void run(int64_t first, int64_t images) const {
    // Bytes that a pixel adds to what a tile takes anyway, such as its window.
    const int64_t fixed = Workspace(Scratch(), *this, 0).bytes;
    const int64_t each = (Workspace(Scratch(), *this, 16).bytes - fixed) / 16;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t most = max_pixels_of_tile(images * g.out_pixels(), each, threads);
    const Tiling tiling(g, images, std::min(most, max_pixels), rows ? columns_in_place : columns_of_window);
    const int64_t pixels = tiling.max_pixels();
    const int64_t bytes = Workspace(Scratch(), *this, pixels).bytes;
    // With fewer tiles than threads, several threads take the same tile and some of its outputs each. All of them
    // sample its columns, which costs little beside the product.
    const bool shared = stored || (weights.in_place && g.groups == 1);
    const int64_t parts = shared ? divide_up(threads, tiling.size()) : 1, tasks = tiling.size() * parts;
    // Whole panels, which no part cuts.
    const int64_t grain = weights.in_place ? weights.width : 1, grains = divide_up(g.out_channels, grain);
    // Threads draw tasks from a counter, so that a fast one does more of them. No result depends on which thread does a
    // task, and the counter guards no other memory: hence the relaxed order.
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t begin, int64_t end) {
      const Workspace work(Scratch(bytes), *this, pixels);
      if (stored) std::fill_n(work.transposed, transposed_size(pixels), A(0));
      for (int64_t i = begin; i < end; ++i)
        for (int64_t t = next.fetch_add(1, std::memory_order_relaxed); t < tasks;) {
          const int64_t later = next.fetch_add(1, std::memory_order_relaxed), part = t % parts;
          const Outputs outputs{part * grains / parts * grain,
                                std::min((part + 1) * grains / parts * grain, g.out_channels)};
          Tile tile = tiling[t / parts], following = tiling[std::min(later, tasks - 1) / parts];
          tile.n += first, following.n += first;
          run_tile(tile, following, outputs, work);
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
        window = find_taps<false>(TilePlanes<A>{g, count, groups, work.pixels, work.moved}, work.taps, !rows);
      }
      const bool last = i + 1 == blocks.size();
      const Block& later = blocks[last ? 0 : i + 1];
      const Tile& reader = last ? next : tile;
      const int64_t row = last ? row_after(g, tile, next) : 0;
      if (rows)
        list_lines(g, reader, row, view_of(rows.of(later)), -rows_image, 0, later.count, work.next);
      else
        list_lines(g, reader, row, view<const S>(a.input), 0, later.first, later.count, work.next);
      fill_block(tile, b, window, work);
      if constexpr (terms == 1)
        if (stored) {
          multiply_stored(count, b, outputs, work);
          continue;
        }
      multiply_block(tile, b, outputs, work);
    }
    for_each_row(tile, [&](int64_t q, int64_t n, int64_t y) {
      S* const to = &out.at(n, outputs.first, y, tile.x);
      // Products are [pixel, output]. With stored weights they are [output, pixel]: TransposeRow then takes the pixels
      // for its channels, and the outputs for its pixels.
      if (stored)
        run_vectorised(TransposeRow<A, S, Transpose::kFromRows>{to, out.w, out.c, tile.columns, outputs.count(),
                                                                work.products + q, work.taps.stride});
      else
        run_vectorised(TransposeRow<A, S, Transpose::kFromRows>{to, out.c, out.w, outputs.count(), tile.columns,
                                                                work.products + q * g.out_channels + outputs.first,
                                                                g.out_channels});
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
    A* const first = work.products + outputs.first;
    for (int64_t o = 0; o < outputs.count(); ++o) first[o] = start(outputs.first + o);
    for (int64_t q = 1; q < count; ++q) std::copy_n(first, outputs.count(), first + q * g.out_channels);
  }

  void point(const Tile& tile, int64_t groups, const Addresses& in, int64_t first_image, const Workspace& work) const {
    point_taps(tile, groups * g.taps(), work.pixels, work.taps, in, first_image, zeros, 4, work.taps.value);
  }

  void fill_block(const Tile& tile, const Block& b, const Window& window, const Workspace& work) const {
    const ColumnLayout layout(g, b, work.taps.stride);
    const int64_t count = tile.count();
    const View<const S> input = view<const S>(a.input);
    const int64_t at_once = rows ? b.count : window_channels<A>(tile, window, b.count);
    // Channels [first, last) of the block; the taps have the addresses of the first.
    const auto fill = [&](int64_t first, int64_t last) {
      for (const Run& r : b.runs) {
        const int64_t from = std::max(first, r.first), to = std::min(last, r.first + r.count);
        if (from >= to) continue;
        const int64_t plane = (r.offset_group - b.first_offset_group()) * g.taps();
        P* const columns = work.columns + from - b.first;
        const RunTaps<A> taps{work.taps, plane, from - first};
        const int64_t lines = from == b.first ? work.next.count : 0;
        if constexpr (terms == 2)
          fill_rounded({taps, count, to - from, g.taps(), columns, layout.tap, layout.pixel, work.next.lines, lines});
        else if (b.depthwise)
          run_vectorised(DepthwiseRun<A>{taps, count, to - from, g.taps(), weights.data + from, g.channels,
                                         work.products + from, g.out_channels});
        else
          run_vectorised(
              FillRun<A>{taps, count, to - from, g.taps(), columns, layout.tap, layout.pixel, work.next.lines, lines});
      }
    };
    for (int64_t done = 0; done < b.count; done += at_once) {
      const int64_t first = b.first + done, channels = std::min(at_once, b.count - done);
      if (rows) {
        point(tile, b.offset_groups(), Addresses::of(rows.of(b)), rows_image, work);
      } else {
        load_window(tile, window, input, 0, first, channels, work.window);
        point(tile, b.offset_groups(), Addresses::of(window, channels, work.window), tile.n, work);
      }
      fill(first, first + channels);
    }
  }

  // `outputs` are all, or whole panels of the only group.
  void multiply_block(const Tile& tile, const Block& b, const Outputs& outputs, const Workspace& work) const {
    if (b.depthwise) return;
    const ColumnLayout layout(g, b, work.taps.stride);
    const int64_t count = tile.count();
    if constexpr (terms == 1)
      if (weights.narrow)
        return narrow::kernels<A>().forward[weights.narrow]({count, g.taps(), b.count, weights.data + weights.start(b),
                                                             nullptr, work.columns, work.products + b.first, layout.tap,
                                                             layout.pixel, g.out_channels});
    for (int64_t i = 0; i < b.groups; ++i) {
      const int64_t channels = b.group_channels(), some = std::min(g.group_outputs(), outputs.count());
      product::Right<W> right = weights.of(b, i);
      right.data += outputs.first / weights.width * right.panel;
      const product::Size size{count, some, channels / terms, g.taps()};
      const product::Left<W> left{reinterpret_cast<const W*>(work.columns + i * channels), layout.pixel / terms, 1,
                                  layout.tap / terms};
      const product::Result<A> result{work.products + outputs.first + (b.group + i) * g.group_outputs(), g.out_channels,
                                      weights.width};
      if (weights.in_place)
        product::multiply_by_rows<W>(size, left, right, result);
      else
        product::multiply<W>(size, left, right, result, true);
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
};

template <typename S, typename F, typename P>
void forward(const ConvArguments& a, const ConvGeometry& g, const Tensor& output, const std::vector<Block>& blocks) {
  using A = Accumulate<S>;
  using W = ProductOf<P>;
  int64_t size = 0;
  for (const Block& b : blocks) size += ForwardWeights<W>{g, nullptr}.size(b);
  StoredWeights<const A> stored;
  if constexpr (std::is_same_v<S, A>)
    if (blocks.front().groups == 1 && !g.is_depthwise()) stored = StoredWeights<const A>(g, a.weight);
  // Weights with their taps outermost would be read in short stretches.
  if (stored.order == StoredWeights<const A>::kTapsOutside) stored = {};
  ForwardWeights<W> weights{g, nullptr};
  if constexpr (std::is_same_v<S, W>) use_in_place(weights, a.weight);
  if (!stored && !weights.in_place) {
    weights.data = thread_scratch<W, -2>(size);
    pack_forward(weights, blocks, view<const S>(a.weight));
  }
  const Tensor zeros = torch::stable::new_zeros(a.input, {g.channels}, scalar_type_of<A>());
  const View<const S> input = view<const S>(a.input);
  const bool in_place = reads_in_place<S>(g, a.input);
  const Reading reading = choose_reading<S, F>(a, g, !in_place);
  Forward<S, F, P> job{a,     g, output, reading.max_pixels, blocks, weights, static_cast<const A*>(zeros.data_ptr()),
                       stored};
  if (!reading.copies) {
    if (in_place) job.rows = rows_in_place<A>(input);
    return job.run(0, g.batch);
  }
  const int64_t held = images_at_a_time<A>({g.channels, g.height, g.width}, g.batch);
  const Tensor copies = new_copies<A>(a.input, g, held);
  job.rows = rows_of_copies(g, static_cast<A*>(copies.data_ptr()));
  for (int64_t image = 0; image < g.batch; image += held) {
    const int64_t images = std::min(held, g.batch - image);
    transpose_blocks<Transpose::kToRows>(g, blocks, input, image, images, job.rows);
    job.rows_image = image;
    job.run(image, images);
  }
}

// Returns the kernels that served, if they are no matter of the vectors alone.
template <typename S, typename F>
const char* forward(const ConvArguments& a, const ConvGeometry& g, const Tensor& output) {
  const std::vector<Block> blocks = make_blocks(g, block_channels);
  if constexpr (std::is_same_v<S, BFloat16>)
    if (multiplies_pairs(g, blocks)) return forward<S, F, BFloat16>(a, g, output, blocks), name_of(kTunedBFloat16);
  return forward<S, F, Accumulate<S>>(a, g, output, blocks), nullptr;
}

}  // namespace dcn::tiles
