// Deformable convolution on the CPU, what forward and backward share: the input as rows of channels (N H W C, in the
// type of sums), output pixels in tiles, channels in blocks, weights packed block by block. Vectors run over channels.
#pragma once

#include <algorithm>
#include <vector>

#include "deform_conv2d.h"
#include "image_rows.h"

namespace dcn::tiles {

// Consecutive channels that share their sampling positions.
struct Run {
  int64_t first, count, offset_group;
};

// Channels whose columns are made together. Depthwise: each channel is its own group, with one output.
struct Block {
  int64_t first, count, group;
  int64_t weight_at;  // where its packed weights start: [outputs, K, count], depthwise [K, count]
  bool depthwise;
  std::vector<Run> runs;
};

inline std::vector<Block> make_blocks(const ConvGeometry& g, int64_t most_channels) {
  const bool depthwise = g.group_channels() == 1 && g.group_outputs() == 1;
  const int64_t span = depthwise ? g.offset_group_channels() : g.group_channels();
  // Even blocks, in whole vectors where possible.
  const int64_t parts = divide_up(span, most_channels);
  const int64_t size = std::min(span, divide_up(divide_up(span, parts), 16) * 16);
  std::vector<Block> blocks;
  int64_t weight_at = 0;
  for (int64_t start = 0; start < g.channels; start += span)
    for (int64_t first = start; first < start + span; first += size) {
      Block block{first, std::min(size, start + span - first), first / g.group_channels(), weight_at, depthwise, {}};
      for (int64_t c = first; c < first + block.count;) {
        const int64_t og = c / g.offset_group_channels();
        const int64_t end = std::min(first + block.count, (og + 1) * g.offset_group_channels());
        block.runs.push_back({c, end - c, og});
        c = end;
      }
      weight_at += (depthwise ? 1 : g.group_outputs()) * g.taps() * block.count;
      blocks.push_back(std::move(block));
    }
  return blocks;
}

// One output's weights [channels, K] of any layout against [K, channels] in the type of sums; `Pack`: which way.
template <typename A, typename S, bool Pack>
struct WeightRow {
  S* weight;
  int64_t channel_stride, y_stride, x_stride, kernel_h, kernel_w, channels;
  A* packed;
  int64_t packed_tap_stride, parts, part_stride;  // unpacking adds up `parts` packed weights

  DCN_HOST_DEVICE void operator()() const {
    constexpr int64_t vector = 16;
    for (int64_t first = 0; first < channels; first += vector)
      for (int64_t y = 0; y < kernel_h; ++y)
        for (int64_t x = 0; x < kernel_w; ++x) {
          S* const from = weight + first * channel_stride + y * y_stride + x * x_stride;
          A* const to = packed + (y * kernel_w + x) * packed_tap_stride + first;
          const int64_t count = channels - first < vector ? channels - first : vector;
          for (int64_t c = 0; c < count; ++c) {
            if constexpr (Pack) {
              to[c] = static_cast<A>(from[c * channel_stride]);
            } else {
              A sum = 0;
              for (int64_t part = 0; part < parts; ++part) sum += to[part * part_stride + c];
              from[c * channel_stride] = static_cast<S>(sum);
            }
          }
        }
  }
};

template <bool Pack, typename A, typename S>
void transpose_weights(const ConvGeometry& g, const std::vector<Block>& blocks, const View<S>& weight, A* packed,
                       int64_t parts = 1, int64_t part_stride = 0) {
  const bool depthwise = blocks.front().depthwise;
  const int64_t outputs = depthwise ? 1 : g.group_outputs();
  torch::stable::parallel_for(0, static_cast<int64_t>(blocks.size()) * outputs, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Block& b = blocks[i / outputs];
      const int64_t o = depthwise ? b.first : b.group * outputs + i % outputs;
      const int64_t c = depthwise ? 0 : b.first - b.group * g.group_channels();
      run_vectorised(WeightRow<A, S, Pack>{
          &weight.at(o, c, 0, 0), depthwise ? weight.n : weight.c, weight.h, weight.w, g.kernel_h, g.kernel_w, b.count,
          packed + b.weight_at + i % outputs * g.taps() * b.count, b.count, parts, part_stride});
    }
  });
}

// With fewer pixels than outputs, packing the weights would cost more than anything that is done with them: they are
// used as they are stored. OIHW weights then get columns [pixel, channel, tap], in their own order.
inline bool is_few_pixels(const ConvGeometry& g) { return g.batch * g.out_pixels() < g.group_outputs(); }
inline bool is_oihw(const ConvGeometry& g, const Tensor& weight) {
  return is_stored(weight, {g.group_channels() * g.taps(), g.taps(), g.kernel_w, 1});
}
inline bool is_ohwi(const ConvGeometry& g, const Tensor& weight) {
  const int64_t c = g.group_channels();
  return is_stored(weight, {c * g.taps(), 1, g.kernel_w * c, c});
}
// Where a block's first output begins in OIHW weights.
inline int64_t stored_at(const ConvGeometry& g, const Block& b) {
  return (b.group * (g.group_outputs() - 1) * g.group_channels() + b.first) * g.taps();
}

// Between columns [pixel, tap, channel] and [pixel, channel, tap]; `Innermost`: to taps innermost, or back.
template <typename A, bool Innermost>
struct TurnTaps {
  int64_t count, taps, channels;
  const A* from;
  A* to;

  DCN_HOST_DEVICE void operator()() const {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < taps; ++k)
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t inner = (q * channels + c) * taps + k, outer = (q * taps + k) * channels + c;
          to[Innermost ? inner : outer] = from[Innermost ? outer : inner];
        }
  }
};

// Output pixels [first, first + count) of the flattened (n, y, x) order; n counts from the first image held.
struct Tile {
  int64_t first, count;
};

// Pixels per tile so that its columns stay in L2; tiles in a multiple of the number of threads.
inline int64_t tile_size(int64_t pixels, int64_t bytes_per_pixel, int64_t threads) {
  constexpr int64_t budget = 1024 << 10;
  const int64_t most = std::max<int64_t>(32, std::min<int64_t>(budget / bytes_per_pixel, 512));
  int64_t count = divide_up(pixels, most);
  if (pixels >= 32 * threads) count = divide_up(count, threads) * threads;
  return divide_up(pixels, count);
}

// The pixels of a tile, without a division each.
inline void list_pixels(const ConvGeometry& g, const Tile& tile, Pixel* pixels) {
  Pixel p(g, tile.first);
  for (int64_t q = 0; q < tile.count; ++q) {
    pixels[q] = p;
    if (++p.x == g.out_width) p.x = 0, ++p.y;
    if (p.y == g.out_height) p.y = 0, ++p.n;
  }
}

// Element offsets of a tile's pixels in a tensor with these strides.
template <typename S>
void locate_pixels(const Tile& tile, const Pixel* pixels, const View<S>& t, int64_t first_image, int64_t* at) {
  for (int64_t q = 0; q < tile.count; ++q)
    at[q] = (first_image + pixels[q].n) * t.n + pixels[q].y * t.h + pixels[q].x * t.w;
}

// The displacements of a tile in the type of sums, plane by plane: offset [2 G K, count], mask [G K, count].
template <typename A, typename F>
void load_displacement(const ConvGeometry& g, const Tile& tile, const Pixel* pixels, const Displacement<A, F>& where,
                       int64_t first_image, int64_t* at, A* offset, A* mask) {
  const int64_t planes = g.offset_groups * g.taps();
  const auto load = [&](const View<const F>& from, int64_t count, A* to) {
    locate_pixels(tile, pixels, from, first_image, at);
    for (int64_t c = 0; c < count; ++c)
      for (int64_t q = 0; q < tile.count; ++q) to[c * tile.count + q] = static_cast<A>(from.data[at[q] + c * from.c]);
  };
  load(where.offset, 2 * planes, offset);
  if (where.mask.data)
    load(where.mask, planes, mask);
  else
    std::fill(mask, mask + planes * tile.count, A(1));
}

// Calls f(pixel q, plane i, sample, mask) for every tap of a tile, plane by plane.
template <typename A, typename F>
DCN_HOST_DEVICE void for_each_tap(const ConvGeometry& g, const Tile& tile, const Pixel* pixels, const A* offset,
                                  const A* mask, const F& f) {
  int64_t i = 0;
  for (int64_t og = 0; og < g.offset_groups; ++og)
    for (int64_t ky = 0; ky < g.kernel_h; ++ky)
      for (int64_t kx = 0; kx < g.kernel_w; ++kx, ++i) {
        const A *dy = offset + 2 * i * tile.count, *dx = dy + tile.count, *m = mask + i * tile.count;
        for (int64_t q = 0; q < tile.count; ++q)
          f(q, i, g.sample<A>(pixels[q].y, pixels[q].x, ky, kx, dy[q], dx[q]), m[q]);
      }
}

}  // namespace dcn::tiles
