// Deformable convolution on the CPU, whole images as rows of each block's channels: where they lie in memory already,
// or in a copy. Where offsets are far, tiles read and add to these, since the window of each would hold much of the
// map.
#pragma once

#include "plan.h"

namespace dcn::tiles {

// Rows of some images, block by block.
template <typename A>
struct BlockRows {
  Rows<A> images{};    // from channel 0 on
  int64_t width = 0;   // of copies, [image][block][y][x][channel of the block]: of the map, and its pixels
  int64_t pixels = 0;  // 0: the blocks of a pixel lie together

  explicit operator bool() const { return images.data; }
  Rows<A> of(const Block& b) const {
    if (pixels == 0) return {images.data + b.first, images.n, images.h, images.w};
    return {images.data + b.first * pixels, images.n, width * b.count, b.count};
  }
};

template <typename A, typename S>
BlockRows<A> rows_in_place(const View<S>& images) {
  return {{const_cast<A*>(reinterpret_cast<const A*>(images.data)), images.n, images.h, images.w}};
}

template <typename A>
BlockRows<A> rows_of_copies(const ConvGeometry& g, A* data) {
  const int64_t pixels = g.height * g.width;
  return {{data, g.channels * pixels, 0, 0}, g.width, pixels};
}

// The rows without the first channels of each pixel.
template <typename A>
Rows<A> from_channel(const Rows<A>& rows, int64_t channel) {
  return {rows.data + channel, rows.n, rows.h, rows.w};
}

template <typename A>
View<const A> view_of(const Rows<A>& rows) {
  return {rows.data, rows.n, 1, rows.h, rows.w};
}

// From images of any type and layout to copies, or back.
template <Transpose Direction, typename A, typename S>
void transpose_blocks(const ConvGeometry& g, const std::vector<Block>& blocks, const View<S>& images,
                      int64_t first_image, int64_t count, const BlockRows<A>& rows) {
  const int64_t lines = static_cast<int64_t>(blocks.size()) * g.height;
  torch::stable::parallel_for(0, count * lines, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / lines, y = i % g.height;
      const Block& b = blocks[i % lines / g.height];
      const Rows<A> to = rows.of(b);
      run_vectorised(TransposeRow<A, S, Direction>{&images.at(first_image + n, b.first, y, 0), images.c, images.w,
                                                   b.count, g.width, to.at(n, y, 0), to.w});
    }
  });
}

// The memory of copies of some images.
template <typename A>
Tensor new_copies(const Tensor& like, const ConvGeometry& g, int64_t images) {
  const Tensor copies = torch::stable::new_empty(like, {images * g.channels * g.height * g.width}, scalar_type_of<A>());
  prefer_large_pages(copies);
  return copies;
}

// How many images the backward holds at a time: so many for each of `splits` threads that share images out.
template <typename A>
int64_t images_held(const ConvGeometry& g, int64_t splits) {
  const int64_t fitting = images_at_a_time<A>({g.channels, g.height, g.width}, g.batch);
  return std::min(g.batch, std::max(splits, fitting / splits * splits));
}

}  // namespace dcn::tiles
