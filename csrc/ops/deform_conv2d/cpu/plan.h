// Deformable convolution on the CPU, how a call is divided: channels into blocks, output pixels into tiles. A tile of
// one block is small enough that its columns stay in the cache of one core.
#pragma once

#include <algorithm>
#include <vector>

#include "../../../runtime/cpu_narrow.h"
#include "../../../runtime/cpu_pairs.h"
#include "../../../runtime/cpu_rows.h"
#include "../arguments.h"

namespace dcn::tiles {

// Consecutive channels of one offset group, which are sampled at the same positions.
struct Run {
  int64_t first, count, offset_group;
};

// Channels whose columns are made together: part of a group, or several whole groups. Depthwise blocks have no matrix
// product.
struct Block {
  int64_t first, count;
  int64_t group, groups;  // the first group, and how many
  bool depthwise;
  std::vector<Run> runs;

  int64_t group_channels() const { return count / groups; }
  int64_t first_offset_group() const { return runs.front().offset_group; }
  int64_t offset_groups() const { return runs.back().offset_group + 1 - runs.front().offset_group; }
};

// Four vectors of AVX-512: enough for long products, little enough for the columns of many pixels.
constexpr int64_t block_channels = 64;

// Whether an image whose channels lie together is read or added to where it lies. Not so if a block is only part of a
// pixel: its channels then lie so far apart that they fall into few sets of the cache, and copying them into a window,
// which holds nothing else, pays off.
template <typename S>
bool reads_in_place(const ConvGeometry& g, const Tensor& image) {
  return is_rows<S>(image) && g.channels <= block_channels;
}

// `max_channels` is a multiple of 16: blocks of narrow groups then are, if the channels are.
inline std::vector<Block> make_blocks(const ConvGeometry& g, int64_t max_channels) {
  const bool depthwise = g.is_depthwise();
  const int64_t whole = depthwise ? g.channels : g.group_channels();  // may be cut anywhere
  const int64_t parts = divide_up(whole, max_channels);
  // Parts of the same size, in whole vectors where possible; or as many groups as fit.
  const int64_t part = std::min(whole, divide_up(divide_up(whole, parts), 16) * 16);
  const int64_t step = parts > 1 ? part : whole * std::max<int64_t>(1, max_channels / whole);
  const int64_t span = parts > 1 ? whole : g.channels;
  std::vector<Block> blocks;
  for (int64_t start = 0; start < g.channels; start += span)
    for (int64_t first = start; first < start + span; first += step) {
      const int64_t count = std::min(step, start + span - first);
      Block block{first, count, first / g.group_channels(), 1, depthwise, {}};
      if (!depthwise) block.groups = std::max<int64_t>(1, count / g.group_channels());
      for (int64_t c = first; c < first + count;) {
        const int64_t og = c / g.offset_group_channels();
        const int64_t end = std::min(first + count, (og + 1) * g.offset_group_channels());
        block.runs.push_back({c, end - c, og});
        c = end;
      }
      blocks.push_back(std::move(block));
    }
  return blocks;
}

// Where columns lie in memory: that of pixel q, tap k and channel c of the block at q * pixel + k * tap + c. A product
// takes `segments` of `width` columns side by side: the channels of a tap, or, where these do not fill vectors, all
// taps and channels at once.
struct ColumnLayout {
  int64_t tap, pixel, segments, width;

  ColumnLayout(const ConvGeometry& g, const Block& b, int64_t pixels) {
    const bool ragged = b.groups == 1 && b.count % 16 != 0;
    tap = ragged ? b.count : pixels * b.count;
    pixel = ragged ? g.taps() * b.count : b.count;
    segments = ragged ? 1 : g.taps();
    width = ragged ? g.taps() * b.count : b.group_channels();
  }
};

// Groups that are multiplied without a product of matrices (runtime/cpu_narrow.h), in vectors that fit into every block
// of so many channels at most, a multiple of 16: the logarithm of their width, or 0.
template <typename A>
int narrow_groups(const ConvGeometry& g) {
  return g.groups > 1 && g.channels % 16 == 0 ? narrow::width_of<A>(g.group_channels(), g.group_outputs()) : 0;
}

// Whether products of pairs of bfloat16 serve a call: channels and outputs of a group come in pairs, and a product
// takes the channels of one tap at a time.
inline bool multiplies_pairs(const ConvGeometry& g, const std::vector<Block>& blocks) {
  if (!dcn::multiplies_pairs() || narrow_groups<float>(g) || g.group_channels() % 2 != 0 || g.group_outputs() % 2 != 0)
    return false;
  return std::all_of(blocks.begin(), blocks.end(), [&](const Block& b) { return b.groups > 1 || b.count % 16 == 0; });
}

// Output pixels [y, y + rows) x [x, x + columns) of images [n, n + images). Who uses a tile says from which image n
// counts.
struct Tile {
  int64_t n, images, y, rows, x, columns;
  int64_t count() const { return images * rows * columns; }
};

// How wide a tile may be. Where the input is read in place, wide ones read what the tile above has left in the cache;
// windows are smallest if their tiles are nearly square.
constexpr int64_t columns_in_place = 64, columns_of_window = 32;

// How output pixels are cut into tiles: several small images to a tile, or several tiles to an image.
struct Tiling {
  int64_t images, height, width;
  int64_t parts_n, parts_y, parts_x;

  Tiling(const ConvGeometry& g, int64_t image_count, int64_t pixels_of_tile, int64_t max_columns)
      : images(image_count), height(g.out_height), width(g.out_width) {
    const int64_t pixels = g.out_pixels();
    parts_n = divide_up(images, std::max<int64_t>(1, pixels_of_tile / pixels));
    parts_x = parts_y = 1;
    if (pixels <= pixels_of_tile) return;
    parts_x = std::min(width, divide_up(width, std::min(max_columns, pixels_of_tile)));
    parts_y = divide_up(height, std::max<int64_t>(1, pixels_of_tile / divide_up(width, parts_x)));
  }
  int64_t size() const { return parts_n * parts_y * parts_x; }
  int64_t max_pixels() const {
    return divide_up(images, parts_n) * divide_up(height, parts_y) * divide_up(width, parts_x);
  }
  Tile operator[](int64_t i) const {
    const auto part = [](int64_t all, int64_t parts, int64_t at, int64_t& first, int64_t& count) {
      first = at * all / parts;
      count = (at + 1) * all / parts - first;
    };
    Tile t;
    part(images, parts_n, i / (parts_y * parts_x), t.n, t.images);
    part(height, parts_y, i / parts_x % parts_y, t.y, t.rows);
    part(width, parts_x, i % parts_x, t.x, t.columns);
    return t;
  }
};

// Calls f(q, n, y) for every row of a tile: its pixels, from number q on, lie at (n, y, tile.x) and to the right.
template <typename F>
void for_each_row(const Tile& tile, const F& f) {
  int64_t q = 0;
  for (int64_t n = tile.n; n < tile.n + tile.images; ++n)
    for (int64_t y = tile.y; y < tile.y + tile.rows; ++y, q += tile.columns) f(q, n, y);
}

// Memory of one thread for a tile and what belongs to it, and for a window on the input or its gradient: 1 MB in all.
constexpr int64_t tile_bytes = 640 << 10, window_bytes = 192 << 10;

// More gain nothing.
constexpr int64_t most_pixels_of_tile = 144;

// How many pixels a tile may have, of which each takes `bytes`, so that there are enough tiles for the threads.
inline int64_t max_pixels_of_tile(int64_t pixels, int64_t bytes, int64_t threads) {
  const int64_t fitting = std::clamp<int64_t>(tile_bytes / bytes, 1, most_pixels_of_tile);
  return std::min(fitting, divide_up(pixels, threads));
}

}  // namespace dcn::tiles
