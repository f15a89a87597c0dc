// Fused backward, second part: the gradient of the weights on tensor cores. Columns are sampled again into shared
// memory.
#pragma once

#include "gradient_tile.h"

namespace dcn {

// grad_weight = grad_output^T * columns, a sum over pixels. A block of threads has a tile of `Shape`, [outputs,
// columns], where a column is a (tap, channel) of the group, and a share of the pixels, which it takes 64 at a time.
// AddWeightShares adds the shares' sums in order, so the result is the same every time.
template <typename S, typename Shape>
struct FusedWeightGradient {
  static constexpr int kThreads = Shape::kThreads, kBlocksPerMultiprocessor = 2, kStages = 2;
  static constexpr int kOutputs = Shape::kRows, kColumns = Shape::kColumns, kVectors = kColumns / 8, kPixels = 64;
  static constexpr int kRounds = kPixels * kVectors / kThreads;
  static constexpr int kGradientBytes = kPixels * kOutputs * 2, kColumnBytes = kPixels * kColumns * 2;
  static constexpr int kOperandBytes = kStages * (kGradientBytes + kColumnBytes);
  // Each vector of columns may be of another sample.
  static constexpr int kRecords = kPixels * kVectors;
  static constexpr int kSharedBytes =
      kOperandBytes + kRecords * 24 + kStages * kPixels * static_cast<int>(sizeof(TilePixel));

  Sampler<S> sampler;
  OutputGradient<S> grad_output;
  float* sums;  // [shares, O, taps, C / groups]
  int64_t shares, pixels_of_share;

  DCN_HOST_DEVICE int output_tiles() const { return (sampler.sizes.group_outputs + kOutputs - 1) / kOutputs; }
  DCN_HOST_DEVICE int column_tiles() const { return (sampler.sizes.depth + kColumns - 1) / kColumns; }
  DCN_HOST_DEVICE int tiles() const { return sampler.sizes.groups * output_tiles() * column_tiles(); }
  DCN_HOST_DEVICE int64_t blocks() const { return shares * tiles(); }

  template <typename Block>
  struct Tile {
    const FusedWeightGradient& k;
    Block& block;
    int64_t first, end;                    // pixels of this block's share
    int group, output0, vector0, vectors;  // `vectors`: how many the columns of the group have

    DCN_DEVICE SharedTile<S, kOutputs / 8> gradient(int stage) const {
      return {reinterpret_cast<Vector8<S>*>(block.shared() + stage * kGradientBytes)};
    }
    DCN_DEVICE SharedTile<S, kVectors> columns(int stage) const {
      return {reinterpret_cast<Vector8<S>*>(block.shared() + kStages * kGradientBytes + stage * kColumnBytes)};
    }
    DCN_DEVICE float (*sample_weights() const)[4] {
      return reinterpret_cast<float (*)[4]>(block.shared() + kOperandBytes);
    }
    DCN_DEVICE int64_t* sample_places() const {
      return reinterpret_cast<int64_t*>(block.shared() + kOperandBytes + kRecords * 16);
    }
    DCN_DEVICE TilePixel* pixels(int stage) const {
      return reinterpret_cast<TilePixel*>(block.shared() + kOperandBytes + kRecords * 24) + stage * kPixels;
    }

    // A vector of columns: what it reads, and the tile's first vector of the same sample, whose record it uses.
    struct ColumnVector {
      int head, tap, channel, offset_group;
    };
    DCN_DEVICE ColumnVector vector(int p) const {
      const int number = vector0 + p;
      if (number >= vectors) return {-1, 0, 0, 0};
      const int channel_vectors = k.sampler.sizes.vectors(),
                offset_group_channels = k.sampler.sizes.offset_group_channels;
      const int tap = number / channel_vectors, channel = 8 * (number % channel_vectors + group * channel_vectors);
      const int offset_group = channel / offset_group_channels;
      // The offset group's first vector, counted from the group's.
      const int begin = offset_group * (offset_group_channels / 8) - group * channel_vectors;
      const int head = tap * channel_vectors + (begin > 0 ? begin : 0) - vector0;
      return {head > 0 ? head : 0, tap, channel, offset_group};
    }

    // Finds the pixels of a step and the samples of its columns, and starts copying its gradients.
    DCN_DEVICE void prepare(int stage, int64_t pixel0) const {
      for (int i = block.thread(); i < kPixels; i += kThreads)
        pixels(stage)[i] = pixel0 + i < end ? k.sampler.pixel(pixel0 + i) : TilePixel{-1, 0, 0};
      block.sync();
      k.grad_output.template copy<kThreads>(block, gradient(stage), pixels(stage), kPixels, group, output0);
      block.commit_copies();
      for (int i = block.thread(); i < kRecords; i += kThreads) {
        const ColumnVector p = vector(i / kPixels);
        if (p.head != i / kPixels) continue;
        const SampleRecord r =
            k.sampler.record(pixels(stage)[i % kPixels], p.offset_group * k.sampler.sizes.taps + p.tap);
        DCN_UNROLL
        for (int c = 0; c < 4; ++c) sample_weights()[i][c] = r.weight[c];
        sample_places()[i] = r.where;
      }
      block.sync();
    }

    // Threads side by side take channels side by side where these lie together in memory, else pixels.
    DCN_DEVICE int vector_of_thread(int round) const {
      const int i = round * kThreads + block.thread();
      return k.sampler.channels_together() ? i % kVectors : i / kPixels;
    }
    DCN_DEVICE int pixel_of_thread(int round) const {
      const int i = round * kThreads + block.thread();
      return k.sampler.channels_together() ? i / kVectors : i % kPixels;
    }
    DCN_DEVICE void fetch(Vector8<S> (&corners)[4], int round) const {
      const ColumnVector p = vector(vector_of_thread(round));
      if (k.sampler.channels_together())
        k.sampler.fetch(corners, p.head < 0 ? 0 : sample_places()[p.head * kPixels + pixel_of_thread(round)],
                        p.channel);
    }
    DCN_DEVICE void store(const Vector8<S> (&corners)[4], int stage, int round) const {
      const ColumnVector p = vector(vector_of_thread(round));
      const int sample = p.head * kPixels + pixel_of_thread(round);
      Vector8<S> found = zeros<S>();
      if (p.head >= 0)
        found = k.sampler.channels_together()
                    ? combine(corners, sample_weights()[sample])
                    : k.sampler.interpolate_apart(sample_places()[sample], sample_weights()[sample], p.channel);
      *columns(stage).at(pixel_of_thread(round), vector_of_thread(round)) = found;
    }

    DCN_DEVICE void add_pixels(ProductSums<Shape>& sums) const {
      Vector8<S> corners[4];
      prepare(0, first);
      DCN_KEEP_LOOP
      for (int round = 0; round < kRounds; ++round) {
        fetch(corners, round);
        store(corners, 0, round);
      }
      block.template wait_for_copies<0>();
      block.sync();
      int stage = 0;
      for (int64_t pixel = first; pixel < end; pixel += kPixels, stage ^= 1) {
        const bool more = pixel + kPixels < end;
        if (more) prepare(stage ^ 1, pixel + kPixels);
        DCN_KEEP_LOOP
        for (int round = 0; round < kRounds; ++round) {
          if (more) fetch(corners, round);
          DCN_UNROLL
          for (int step = 0; step < 4 / kRounds; ++step)
            sums.template add<Summed::kAcrossRows, Summed::kAcrossRows>(block, gradient(stage), columns(stage),
                                                                        round * (4 / kRounds) + step);
          if (more) store(corners, stage ^ 1, round);
        }
        block.template wait_for_copies<0>();
        block.sync();
      }
    }

    DCN_DEVICE void write(const ProductSums<Shape>& found, int64_t share) const {
      const int outputs = k.sampler.sizes.group_outputs;
      const int64_t depth = k.sampler.sizes.depth;
      const int rows = outputs - output0, columns_left = 8 * (vectors - vector0);
      float* const to = k.sums + (share * k.sampler.g.out_channels + group * outputs + output0) * depth + 8 * vector0;
      found.for_each_pair(block.thread(), [&](int o, int column, float first, float second) {
        if (o >= rows || column >= columns_left) return;
        to[o * depth + column] = first;
        to[o * depth + column + 1] = second;
      });
    }
  };

  template <typename Block>
  DCN_DEVICE void operator()(Block& block) const {
    // Blocks side by side have the same pixels.
    const int64_t share = block.index() / tiles(), first = share * pixels_of_share, end = first + pixels_of_share;
    const int tile = static_cast<int>(block.index() % tiles()), row_tile = tile / column_tiles();
    const Tile<Block> here{*this,
                           block,
                           first,
                           end < sampler.sizes.pixels ? end : sampler.sizes.pixels,
                           row_tile / output_tiles(),
                           row_tile % output_tiles() * kOutputs,
                           tile % column_tiles() * kVectors,
                           sampler.sizes.depth / 8};
    ProductSums<Shape> found;
    found.start(block.thread(), [](int) { return 0.0f; });
    here.add_pixels(found);
    here.write(found, share);
  }
};

// grad_weight[o, c, tap] = the sum of the shares, in order.
template <typename S>
struct AddWeightShares {
  ConvGeometry g;
  int64_t shares;
  const float* sums;  // [shares, O, taps, C / groups]
  View<S> grad_weight;

  DCN_HOST_DEVICE int64_t size() const { return g.out_channels * g.taps() * g.group_channels(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    float sum = 0;
    for (int64_t s = 0; s < shares; ++s) sum += sums[s * size() + i];
    const int64_t c = i % g.group_channels(), tap = i / g.group_channels() % g.taps();
    grad_weight.at(i / g.group_channels() / g.taps(), c, tap / g.kernel_w, tap % g.kernel_w) = static_cast<S>(sum);
  }
};

}  // namespace dcn
