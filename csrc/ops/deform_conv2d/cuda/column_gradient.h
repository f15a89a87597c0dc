// Fused backward, first part: the gradient of the columns on tensor cores, and from it the gradients of offset and
// mask. The gradient of the columns goes to memory for the part that sums it into the input's gradient
// (input_gradient.h).
#pragma once

#include "gradient_tile.h"

namespace dcn {

// A block of threads has 64 pixels and some taps, and takes 128 columns (a tap and a channel of the group) at a time.
// First the product, grad_columns = grad_output * weight. Then each thread multiplies eight channels of one sample with
// the four corners that it reads: the four sums of that over an offset group's channels hold the gradients of offset
// and mask.
template <typename S>
struct FusedColumnGradient {
  using Shape = ProductShape<2, 4, 4>;
  static constexpr int kThreads = Shape::kThreads, kBlocksPerMultiprocessor = 2, kStages = 2;
  static constexpr int kPixels = Shape::kRows, kColumns = Shape::kColumns, kVectors = kColumns / 8;
  static constexpr int kOutputs = 64;  // terms of the sum in a stage
  static constexpr int kGradientBytes = kPixels * kOutputs * 2, kWeightBytes = kOutputs * kColumns * 2;
  static constexpr int kOperandBytes = kStages * (kGradientBytes + kWeightBytes);
  // Rows are four floats longer than their columns, so that those which fragments write at once begin in other banks.
  static constexpr int kStagedRow = kColumns + 4;
  static_assert(kPixels * kStagedRow * 4 <= kOperandBytes);
  static constexpr int kRecords = kPixels * kSamplesPerPixel;
  static constexpr int kSharedBytes = kOperandBytes + kRecords * 24 + kPixels * static_cast<int>(sizeof(TilePixel));

  using Order = VectorOrder<kVectors>;

  Sampler<S> sampler;
  PixelRange range;  // whole images
  OutputGradient<S> grad_output;
  const S* weight;  // [O, taps, C / groups]
  S* grad_columns;  // [taps, range.count, C], or null
  WriteEither<S> grad_offset, grad_mask;
  int taps_together;

  DCN_HOST_DEVICE int tap_blocks() const { return (sampler.sizes.taps + taps_together - 1) / taps_together; }
  DCN_HOST_DEVICE int64_t blocks() const { return (range.count + kPixels - 1) / kPixels * tap_blocks(); }
  DCN_DEVICE bool displaced() const { return grad_offset.given() || grad_mask.given(); }

  template <typename Block>
  struct Tile {
    const FusedColumnGradient& k;
    Block& block;
    int64_t pixel0;  // within the range
    int tap0, tap1;

    DCN_DEVICE SharedTile<S, kOutputs / 8> gradient(int stage) const {
      return {reinterpret_cast<Vector8<S>*>(block.shared() + stage * kGradientBytes)};
    }
    DCN_DEVICE SharedTile<S, kVectors> weights(int stage) const {
      return {reinterpret_cast<Vector8<S>*>(block.shared() + kStages * kGradientBytes + stage * kWeightBytes)};
    }
    // The product; overwrites the operands.
    DCN_DEVICE float* staged() const { return reinterpret_cast<float*>(block.shared()); }
    // By sample: sums of the products with its four corners.
    DCN_DEVICE float (*corner_sums() const)[4] {
      return reinterpret_cast<float (*)[4]>(block.shared() + kOperandBytes);
    }
    DCN_DEVICE int64_t* sample_places() const {
      return reinterpret_cast<int64_t*>(block.shared() + kOperandBytes + kRecords * 16);
    }
    DCN_DEVICE TilePixel* pixels() const {
      return reinterpret_cast<TilePixel*>(block.shared() + kOperandBytes + kRecords * 24);
    }
    DCN_DEVICE int taps() const { return k.sampler.sizes.taps; }
    DCN_DEVICE int offset_groups() const { return k.sampler.sizes.offset_groups; }
    DCN_DEVICE Order order() const { return {tap1 - tap0, k.sampler.sizes.vectors()}; }

    // The number of a sample within the block; `tap` counts from tap0.
    DCN_DEVICE int record(int tap, int offset_group, int pixel) const {
      return (tap * offset_groups() + offset_group) * kPixels + pixel;
    }

    DCN_DEVICE void find_samples() const {
      for (int i = block.thread(); i < kPixels; i += kThreads)
        pixels()[i] = pixel0 + i < k.range.count ? k.sampler.pixel(k.range.first + pixel0 + i) : TilePixel{-1, 0, 0};
      block.sync();
      for (int i = block.thread(); i < (tap1 - tap0) * offset_groups() * kPixels; i += kThreads) {
        const int which = i / kPixels, offset_group = which % offset_groups(), tap = tap0 + which / offset_groups();
        sample_places()[i] = k.sampler.place(pixels()[i % kPixels], offset_group * taps() + tap);
        DCN_UNROLL
        for (int c = 0; c < 4; ++c) corner_sums()[i][c] = 0;
      }
      block.sync();
    }

    DCN_DEVICE void copy_operands(int stage, int group, int output0, int vector0) const {
      const int outputs = k.grad_output.group_outputs;
      const int64_t depth = k.sampler.sizes.depth;
      k.grad_output.template copy<kThreads>(block, gradient(stage), pixels(), kPixels, group, output0);
      const int p = block.thread() % kVectors;
      const auto [tap, vector] = order().at(vector0 + p);
      for (int row = block.thread() / kVectors; row < kOutputs; row += kThreads / kVectors) {
        const bool wanted = output0 + row < outputs && vector0 + p < order().count();
        const S* const from = k.weight + (static_cast<int64_t>(group) * outputs + output0 + row) * depth +
                              8 * ((tap0 + tap) * order().vectors + vector);
        block.copy_async(weights(stage).at(row, p), wanted ? from : k.weight, wanted);
      }
      block.commit_copies();
    }

    // The product for 16 vectors of columns of a group, from number `vector0` on.
    DCN_DEVICE void multiply(int group, int vector0) const {
      ProductSums<Shape> sums;
      sums.start(block.thread(), [](int) { return 0.0f; });
      copy_operands(0, group, 0, vector0);
      block.template wait_for_copies<0>();
      block.sync();
      for (int output0 = 0, stage = 0; output0 < k.grad_output.group_outputs; output0 += kOutputs, stage ^= 1) {
        if (output0 + kOutputs < k.grad_output.group_outputs)
          copy_operands(stage ^ 1, group, output0 + kOutputs, vector0);
        DCN_UNROLL
        for (int step = 0; step < kOutputs / 16; ++step)
          sums.template add<Summed::kAlongRows, Summed::kAcrossRows>(block, gradient(stage), weights(stage), step);
        block.template wait_for_copies<0>();
        block.sync();
      }
      sums.for_each_pair(block.thread(), [&](int pixel, int column, float first, float second) {
        float* const to = staged() + pixel * kStagedRow + column;
        to[0] = first, to[1] = second;
      });
      block.sync();
    }

    DCN_DEVICE void take_apart(int group, int vector0) const {
      DCN_KEEP_LOOP
      for (int i = block.thread(); i < kPixels * kVectors; i += kThreads) {
        // Eight threads side by side have one pixel and vectors side by side.
        const int half = i / (kPixels * 8), pixel = i / 8 % kPixels, p = 8 * half + i % 8;
        const bool there = vector0 + p < order().count() && pixels()[pixel].n >= 0;
        const auto [tap, vector] = order().at(there ? vector0 + p : 0);
        const int channel = 8 * (group * order().vectors + vector);
        float grad[8];
        DCN_UNROLL
        for (int e = 0; e < 8; ++e) grad[e] = staged()[pixel * kStagedRow + 8 * p + e];
        if (there && k.grad_columns) {
          const int64_t number = k.sampler.number_by_rows(pixels()[pixel]) - k.range.first;
          *reinterpret_cast<Vector8<S>*>(k.grad_columns +
                                         ((tap0 + tap) * k.range.count + number) * k.sampler.g.channels + channel) =
              pack<S>(grad);
        }
        if (k.displaced()) {
          const int sample = record(tap, channel / k.sampler.sizes.offset_group_channels, pixel);
          add_to_sample(there ? sample : -1, there ? sample_places()[sample] : 0, channel, grad);
        }
      }
      block.sync();
    }

    // Threads side by side that have the same sample first add up what they found; then the first of them adds it to
    // corner_sums(). No two threads add to the same sample at once: within a warp there is a barrier between them, and
    // other warps have other pixels.
    DCN_DEVICE void add_to_sample(int sample, int64_t place, int channel, const float (&grad)[8]) const {
      float sums[4];
      k.sampler.multiply_corners(sums, place, channel, grad);
      DCN_UNROLL
      for (int distance = 1; distance < 8; distance *= 2) {
        const bool same = block.from_lane_above(sample, distance) == sample && block.thread() % 8 + distance < 8;
        DCN_UNROLL
        for (int c = 0; c < 4; ++c) {
          const float above = block.from_lane_above(sums[c], distance);
          if (same) sums[c] += above;
        }
      }
      const int below = block.from_lane_below(sample);
      if (sample >= 0 && (block.thread() % 8 == 0 || below != sample)) {
        DCN_UNROLL
        for (int c = 0; c < 4; ++c) corner_sums()[sample][c] += sums[c];
      }
      block.sync_warp();
    }

    DCN_DEVICE void write() const {
      for (int i = block.thread(); i < (tap1 - tap0) * offset_groups() * kPixels; i += kThreads) {
        const TilePixel p = pixels()[i % kPixels];
        if (p.n < 0) continue;
        const int which = i / kPixels;
        const int plane = which % offset_groups() * taps() + tap0 + which / offset_groups();
        write_displacement_gradient(k.sampler, p, plane, corner_sums()[i], k.grad_offset, k.grad_mask);
      }
    }
  };

  template <typename Block>
  DCN_DEVICE void operator()(Block& block) const {
    const int taps = sampler.sizes.taps, tap0 = static_cast<int>(block.index() % tap_blocks()) * taps_together;
    const int tap1 = tap0 + taps_together < taps ? tap0 + taps_together : taps;
    const Tile<Block> tile{*this, block, block.index() / tap_blocks() * kPixels, tap0, tap1};
    tile.find_samples();
    for (int group = 0; group < sampler.sizes.groups; ++group)
      for (int vector = 0; vector < tile.order().count(); vector += kVectors) {
        tile.multiply(group, vector);
        tile.take_apart(group, vector);
      }
    if (displaced()) tile.write();
  }
};

}  // namespace dcn
