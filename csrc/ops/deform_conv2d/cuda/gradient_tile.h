// The gradient of the output as an operand of both gradient products: pixels by 64 outputs in shared memory.
#pragma once

#include "product.h"
#include "samples.h"

namespace dcn {

template <typename S>
struct OutputGradient {
  View<const S> data;
  bool whole_pieces;  // outputs lie together, and in whole 16-byte pieces
  int group_outputs;

  // Starts copying outputs [first, first + 8 Pieces) of a group for the pixels of a tile; zeros beyond the group's
  // outputs and the last pixel. Who waits for copies and meets at a barrier then sees them.
  template <int Threads, int Pieces, typename Block>
  DCN_DEVICE void copy(Block& block, const SharedTile<S, Pieces>& to, const TilePixel* pixels, int count, int group,
                       int first) const {
    for (int i = block.thread(); i < count * Pieces; i += Threads) {
      // Neighbouring threads take neighbouring outputs where those lie together, else neighbouring pixels.
      const int pixel = data.c == 1 ? i / Pieces : i % count, piece = data.c == 1 ? i % Pieces : i / count;
      const TilePixel p = pixels[pixel];
      const int o = first + 8 * piece, there = p.n < 0 ? 0 : group_outputs - o;
      const S* const from =
          there > 0 ? &data.at(p.n, static_cast<int64_t>(group) * group_outputs + o, p.y, p.x) : data.data;
      if (whole_pieces) {
        block.copy_async(to.at(pixel, piece), from, there > 0);
      } else {
        float values[8];
        DCN_UNROLL
        for (int e = 0; e < 8; ++e) values[e] = e < there ? static_cast<float>(from[e * data.c]) : 0.0f;
        *to.at(pixel, piece) = pack<S>(values);
      }
    }
  }
};

}  // namespace dcn
