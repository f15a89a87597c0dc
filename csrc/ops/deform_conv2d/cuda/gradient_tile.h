// The gradient of the output as an operand of both gradient products: pixels by 64 outputs in shared memory.
#pragma once

#include "product.h"
#include "samples.h"

namespace dcn {

template <typename S>
struct OutputGradient {
  View<const S> data;
  bool aligned_vectors;  // of data: has_aligned_vectors
  int group_outputs;

  // Starts copying outputs [first, first + 8 Vectors) of a group for the pixels of a tile; zeros beyond the group's
  // last output and the last pixel. They are there after wait_for_copies and a barrier.
  template <int Threads, int Vectors, typename Block>
  DCN_DEVICE void copy(Block& block, const SharedTile<S, Vectors>& to, const TilePixel* pixels, int count, int group,
                       int first) const {
    for (int i = block.thread(); i < count * Vectors; i += Threads) {
      // Threads side by side take outputs side by side where these lie together in memory, else pixels.
      const int pixel = data.c == 1 ? i / Vectors : i % count, vector = data.c == 1 ? i % Vectors : i / count;
      const TilePixel p = pixels[pixel];
      const int o = first + 8 * vector, there = p.n < 0 ? 0 : group_outputs - o;
      const S* const from =
          there > 0 ? &data.at(p.n, static_cast<int64_t>(group) * group_outputs + o, p.y, p.x) : data.data;
      if (aligned_vectors) {
        block.copy_async(to.at(pixel, vector), from, there > 0);
      } else {
        float values[8];
        DCN_UNROLL
        for (int e = 0; e < 8; ++e) values[e] = e < there ? static_cast<float>(from[e * data.c]) : 0.0f;
        *to.at(pixel, vector) = pack<S>(values);
      }
    }
  }
};

}  // namespace dcn
