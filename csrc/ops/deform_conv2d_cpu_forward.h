// Deformable convolution on the CPU, forward: per tile of output pixels, where the taps lie; per block of channels,
// columns [pixel, tap, channel] and their product with the packed weights.
#pragma once

#include "deform_conv2d_cpu.h"

namespace dcn::tiles {

// Where one tap reads and with what weight; what is not read points at a row of zeros.
template <typename A>
struct Tap {
  const A* corner[4];
  A weight[4];  // bilinear weight times mask
};

template <typename A>
struct FindTaps {
  ConvGeometry g;
  Tile tile;
  const Pixel* pixels;
  Rows<const A> input;
  const A *offset, *mask, *zeros;
  Tap<A>* taps;  // [count, G, K]

  DCN_HOST_DEVICE void operator()() const {
    const int64_t planes = g.offset_groups * g.taps();
    for_each_tap(g, tile, pixels, offset, mask, [&](int64_t q, int64_t i, const Sample<A>& s, A m) DCN_INLINE_LAMBDA {
      find(q, taps[q * planes + i], s, m);
    });
  }
  DCN_HOST_DEVICE void find(int64_t q, Tap<A>& tap, const Sample<A>& s, A m) const {
    for (int c = 0; c < 4; ++c) {
      const A w = s.weight(c);
      const bool read = s.has(c) && w != 0;
      tap.corner[c] = read ? input.at(pixels[q].n, s.row(c), s.column(c)) : zeros;
      tap.weight[c] = read ? w * m : s.origin();
    }
    if (!s.corners) tap.weight[0] += 0 * m;  // mask * 0, which is NaN for a mask that is not finite
  }
};

template <typename A>
DCN_HOST_DEVICE void sample_run(const Tap<A>& tap, const Run& run, A* __restrict out) {
  const A *c0 = tap.corner[0] + run.first, *c1 = tap.corner[1] + run.first;
  const A *c2 = tap.corner[2] + run.first, *c3 = tap.corner[3] + run.first;
  const A w0 = tap.weight[0], w1 = tap.weight[1], w2 = tap.weight[2], w3 = tap.weight[3];
#pragma omp simd
  for (int64_t c = 0; c < run.count; ++c) out[c] = w0 * c0[c] + w1 * c1[c] + w2 * c2[c] + w3 * c3[c];
}

// columns[pixel, tap, channel of the block]
template <typename A>
struct FillTile {
  ConvGeometry g;
  const Block& block;
  int64_t count;
  const Tap<A>* taps;
  A* columns;

  DCN_HOST_DEVICE void operator()() const {
    const int64_t kernel = g.taps(), planes = g.offset_groups * kernel;
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < kernel; ++k)
        for (const Run& run : block.runs)
          sample_run(taps[q * planes + run.offset_group * kernel + k], run,
                     columns + (q * kernel + k) * block.count + run.first - block.first);
  }
};

// products[pixel, channel] = sum_k weight[k, channel] * columns[k, channel], pixel by pixel.
template <typename A>
struct DepthwiseTile {
  ConvGeometry g;
  const Block& block;
  int64_t count;
  const Tap<A>* taps;
  const A* weight;
  A *column, *products;  // [block channels] and [count, O]

  DCN_HOST_DEVICE void operator()() const {
    const int64_t planes = g.offset_groups * g.taps();
    const Run run{block.first, block.count, block.runs.front().offset_group};
    for (int64_t q = 0; q < count; ++q) {
      A* __restrict out = products + q * g.out_channels + block.first;
      for (int64_t c = 0; c < block.count; ++c) out[c] = 0;
      for (int64_t k = 0; k < g.taps(); ++k) {
        sample_run(taps[q * planes + run.offset_group * g.taps() + k], run, column);
        const A* w = weight + k * block.count;
#pragma omp simd
        for (int64_t c = 0; c < block.count; ++c) out[c] += w[c] * column[c];
      }
    }
  }
};

// output = products + bias, 16 outputs at a time: products are [pixel, output], the output may have any strides.
template <typename A, typename S>
struct StoreTile {
  int64_t count, outputs, channel_stride;
  const A* products;
  const S* bias;
  const int64_t* at;
  S* output;

  DCN_HOST_DEVICE void operator()() const {
    for (int64_t first = 0; first < outputs; first += 16) {
      const int64_t width = outputs - first < 16 ? outputs - first : 16;
      A start[16] = {};
      if (bias)
        for (int64_t o = 0; o < width; ++o) start[o] = static_cast<A>(bias[first + o]);
      for (int64_t q = 0; q < count; ++q)
        for (int64_t o = 0; o < width; ++o)
          output[at[q] + (first + o) * channel_stride] = static_cast<S>(products[q * outputs + first + o] + start[o]);
    }
  }
};

template <typename S, typename F>
void forward(const ConvArguments& a, const ConvGeometry& g, const Tensor& output) {
  using A = Accumulate<S>;
  const int64_t planes = g.offset_groups * g.taps();
  const bool few = std::is_same_v<S, A> && is_few_pixels(g);
  const bool oihw = few && is_oihw(g, a.weight), ohwi = few && !oihw && is_ohwi(g, a.weight);
  const std::vector<Block> blocks = make_blocks(g, ohwi ? g.group_channels() : 128);
  int64_t widest = 0;
  for (const Block& b : blocks) widest = std::max(widest, b.count);

  const Tensor packed = torch::stable::new_empty(a.input, {oihw || ohwi ? 0 : a.weight.numel()}, scalar_type_of<A>());
  const A* weight = static_cast<const A*>(oihw || ohwi ? a.weight.data_ptr() : packed.data_ptr());
  if (!oihw && !ohwi) transpose_weights<true>(g, blocks, view<const S>(a.weight), static_cast<A*>(packed.data_ptr()));
  const Tensor zero_row = torch::stable::new_zeros(a.input, {g.channels}, scalar_type_of<A>());
  const A* const zeros = static_cast<const A*>(zero_row.data_ptr());

  const View<const S> input = view<const S>(a.input);
  const View<S> out = view<S>(output);
  const Displacement<A, F> where = displacement<S, F>(a);
  const S* const bias = a.bias ? static_cast<const S*>(a.bias->data_ptr()) : nullptr;
  const ImageSize size{g.channels, g.height, g.width};
  const bool direct = is_rows<S>(a.input);
  const int64_t held = direct ? g.batch : images_at_a_time<A>(size, g.batch);
  const Tensor buffer =
      torch::stable::new_empty(a.input, {direct ? 0 : held * g.channels * g.height * g.width}, scalar_type_of<A>());
  for (int64_t image = 0; image < g.batch; image += held) {
    const int64_t images = std::min(held, g.batch - image);
    const Rows<const A> rows = input_rows(direct, input, size, image, images, buffer);
    const int64_t pixels = images * g.out_pixels();
    const int64_t per_tile =
        tile_size(pixels, g.taps() * widest * static_cast<int64_t>(sizeof(A)), torch::stable::get_num_threads());
    torch::stable::parallel_for(0, divide_up(pixels, per_tile), 1, [&](int64_t begin, int64_t end) {
      A* const columns = thread_scratch<A, 0>(per_tile * g.taps() * widest);
      A* const turned = thread_scratch<A, 5>(oihw ? per_tile * g.taps() * widest : 0);
      A* const products = thread_scratch<A, 1>(per_tile * g.out_channels);
      A* const offset = thread_scratch<A, 2>(per_tile * planes * 3);
      Tap<A>* const taps = thread_scratch<Tap<A>, 3>(per_tile * planes);
      int64_t* const at = thread_scratch<int64_t, 4>(per_tile);
      Pixel* const pixel = thread_scratch<Pixel, 8>(per_tile);
      for (int64_t t = begin; t < end; ++t) {
        const Tile tile{t * per_tile, std::min(per_tile, pixels - t * per_tile)};
        A* const mask = offset + 2 * planes * tile.count;
        list_pixels(g, tile, pixel);
        load_displacement(g, tile, pixel, where, image, at, offset, mask);
        run_vectorised(FindTaps<A>{g, tile, pixel, rows, offset, mask, zeros, taps});
        for (const Block& b : blocks) {
          if (b.depthwise) {
            run_vectorised(DepthwiseTile<A>{g, b, tile.count, taps, weight + b.weight_at, columns, products});
            continue;
          }
          run_vectorised(FillTile<A>{g, b, tile.count, taps, columns});
          const int64_t depth = g.taps() * b.count, outputs = g.group_outputs();
          const int64_t row = oihw ? g.group_channels() * g.taps() : depth;  // of one output's weights
          const A* from = weight + (oihw ? stored_at(g, b) : b.weight_at);
          if (oihw) run_vectorised(TurnTaps<A, true>{tile.count, g.taps(), b.count, columns, turned});
          Cpu::multiply(matrix(products + b.group * outputs, tile.count, outputs, g.out_channels, 1, a.input),
                        matrix(oihw ? turned : columns, tile.count, depth, depth, 1, a.input),
                        matrix(from, depth, outputs, 1, row, a.input),
                        b.first > b.group * g.group_channels());  // later blocks of a group add to the first
        }
        locate_pixels(tile, pixel, out, image, at);
        run_vectorised(StoreTile<A, S>{tile.count, g.out_channels, out.c, products, bias, at, out.data});
      }
    });
  }
}

}  // namespace dcn::tiles
