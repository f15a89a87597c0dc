// Deformable convolution on the CPU, how a call reads its images: where they lie, through the window of each tile, or,
// where offsets are far, from copies of whole images. It follows from sizes and the longest offset alone.
#pragma once

#include <cmath>

#include "images.h"
#include "taps.h"

namespace dcn::tiles {

struct Reading {
  bool copies;         // from copies; else in place or through windows
  int64_t max_pixels;  // of a tile: any window then has room for 16 channels
};

// The longest of some rows of offsets, of which NaN are none.
template <typename A, typename F>
struct LongestOffset {
  const F* offsets;
  int64_t rows, row_stride, count, stride;
  A* longest;

  DCN_HOST_DEVICE void operator()() const {
    A most = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const F* const row = offsets + r * row_stride;
#pragma omp simd reduction(max : most)
      for (int64_t i = 0; i < count; ++i) {
        const A offset = static_cast<A>(row[i * stride]), length = offset < 0 ? -offset : offset;
        most = length > most ? length : most;
      }
    }
    *longest = most;
  }
};

// No offset of a call moves a sample by more pixels; or the size of the map, if that is less.
template <typename A, typename F>
int64_t longest_offset(const ConvGeometry& g, const View<const F>& offset) {
  const int64_t planes = 2 * g.offset_groups * g.taps(), lines = g.batch * g.out_height;
  const int64_t parts = std::min<int64_t>(lines, 4 * torch::stable::get_num_threads());
  std::vector<A> longest(parts);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t i = part * lines / parts; i < (part + 1) * lines / parts; ++i) {
        const F* const line = &offset.at(i / g.out_height, 0, i % g.out_height, 0);
        A found = 0;
        if (offset.c == 1 && offset.w == planes)
          run_vectorised(LongestOffset<A, F>{line, 1, 0, g.out_width * planes, 1, &found});
        else if (offset.c == 1)
          run_vectorised(LongestOffset<A, F>{line, g.out_width, offset.w, planes, 1, &found});
        else
          run_vectorised(LongestOffset<A, F>{line, planes, offset.c, g.out_width, offset.w, &found});
        longest[part] = std::max(longest[part], found);
      }
  });
  const A most = *std::max_element(longest.begin(), longest.end());
  // On huge maps positions are rounded to whole pixels, or more.
  const int64_t size = std::max(g.height, g.width), rounding = size >> 22;
  return most < static_cast<A>(size) ? static_cast<int64_t>(std::ceil(most)) + rounding : size;
}

// How much of the input the windows of tiles of at most `pixels` have, if no offset is longer than `reach`.
struct Windows {
  int64_t pixels, all;  // of a window, and of all of them

  Windows(const ConvGeometry& g, int64_t pixels_of_tile, int64_t reach) {
    const Tiling tiling(g, g.batch, pixels_of_tile, columns_of_window);
    const auto extent = [&](int64_t count, int64_t stride, int64_t kernel, int64_t dilation, int64_t size) {
      return std::min(size, (count - 1) * stride + (kernel - 1) * dilation + 2 + 2 * reach);
    };
    const int64_t of_image =
        extent(divide_up(g.out_height, tiling.parts_y), g.stride_h, g.kernel_h, g.dilation_h, g.height) *
        extent(divide_up(g.out_width, tiling.parts_x), g.stride_w, g.kernel_w, g.dilation_w, g.width);
    pixels = of_image * std::min(g.batch, std::max<int64_t>(1, pixels_of_tile / g.out_pixels()));
    all = of_image * g.batch * tiling.parts_y * tiling.parts_x;
  }
};

// `needed`: whether anything is to be read or added to that is not rows as it lies.
template <typename S, typename F>
Reading choose_reading(const ConvArguments& a, const ConvGeometry& g, bool needed) {
  using A = Accumulate<S>;
  // Copying, and reading what is no longer in a near cache, takes as long as windows that have each pixel so often.
  constexpr int64_t repeats = 10;
  if (!needed) return {false, most_pixels_of_tile};
  const auto pay = [&](const Windows& windows) {
    const int64_t bytes = windows.pixels * std::min<int64_t>(g.channels, 16) * static_cast<int64_t>(sizeof(A));
    return bytes <= window_bytes && windows.all <= repeats * g.batch * g.height * g.width;
  };
  const int64_t size = std::max(g.height, g.width);
  if (pay(Windows(g, most_pixels_of_tile, size))) return {false, most_pixels_of_tile};
  const int64_t reach = longest_offset<A>(g, displacement<F>(a).offset);
  // Small tiles pay where samples lie far apart, by a stride.
  for (int64_t pixels = most_pixels_of_tile; pixels > 0; pixels /= 2)
    if (pay(Windows(g, pixels, reach))) return {false, pixels};
  return {true, most_pixels_of_tile};
}

}  // namespace dcn::tiles
