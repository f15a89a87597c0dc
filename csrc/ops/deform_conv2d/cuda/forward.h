// Fused forward: a block of threads samples columns of a tile of output pixels into shared memory, tap by tap, and
// multiplies them with the weights on tensor cores. Columns exist in shared memory alone.
#pragma once

#include "product.h"
#include "samples.h"

namespace dcn {

// A block of threads makes a tile of `Shape`, [pixels, outputs]. It takes the terms of the sum, (tap, channel) of the
// group, in steps of 64, in VectorOrder. While the tensor cores multiply one step, the loads of the next are in flight.
template <typename S, typename Shape>
struct FusedForward {
  static constexpr int kThreads = Shape::kThreads, kBlocksPerMultiprocessor = 2;
  static constexpr int kPixels = Shape::kRows, kOutputs = Shape::kColumns, kStages = 2, kVectors = 8;
  // How many vectors of the next step a thread loads at once; the corners of each take 16 registers.
  static constexpr int kTogether = Shape::kTilesAcross > 4 ? 1 : 2, kRounds = kPixels * kVectors / kThreads / kTogether;
  static constexpr int kColumnBytes = kPixels * 128, kWeightBytes = kOutputs * 128;
  static constexpr int kOperandBytes = kStages * (kColumnBytes + kWeightBytes);
  static constexpr int kRecords = kPixels * kSamplesPerPixel;
  static constexpr int kSharedBytes = kOperandBytes + kRecords * 24 + kPixels * static_cast<int>(sizeof(TilePixel));

  using Order = VectorOrder<kVectors>;

  Sampler<S> sampler;
  const S* weight;  // [O, taps, C / groups]
  const S* bias;    // may be null
  View<S> output;
  bool aligned_vectors;  // of output: has_aligned_vectors

  DCN_HOST_DEVICE int output_tiles() const { return (sampler.sizes.group_outputs + kOutputs - 1) / kOutputs; }
  DCN_HOST_DEVICE int64_t blocks() const {
    return (sampler.sizes.pixels + kPixels - 1) / kPixels * sampler.sizes.groups * output_tiles();
  }

  template <typename Block>
  struct Tile {
    const FusedForward& k;
    Block& block;
    int64_t pixel0;                    // of this block
    int group, output0;                // of this block; output0 counts within the group
    int offset_groups, offset_group0;  // that the group meets

    DCN_DEVICE SharedTile<S, kVectors> columns(int stage) const {
      return {reinterpret_cast<Vector8<S>*>(block.shared() + stage * kColumnBytes)};
    }
    DCN_DEVICE SharedTile<S, kVectors> weights(int stage) const {
      return {reinterpret_cast<Vector8<S>*>(block.shared() + kStages * kColumnBytes + stage * kWeightBytes)};
    }
    // Weights and places of samples are kept apart, so that threads side by side read words side by side.
    DCN_DEVICE float (*sample_weights() const)[4] {
      return reinterpret_cast<float (*)[4]>(block.shared() + kOperandBytes);
    }
    DCN_DEVICE int64_t* sample_places() const {
      return reinterpret_cast<int64_t*>(block.shared() + kOperandBytes + kRecords * 16);
    }
    DCN_DEVICE TilePixel* pixels() const {
      return reinterpret_cast<TilePixel*>(block.shared() + kOperandBytes + kRecords * 24);
    }

    DCN_DEVICE void find_pixels() const {
      for (int i = block.thread(); i < kPixels; i += kThreads) pixels()[i] = k.sampler.pixel(pixel0 + i);
      block.sync();
    }

    // Samples of taps [tap0, tap1), for every offset group that this group of the convolution meets.
    DCN_DEVICE void find_samples(int tap0, int tap1) const {
      for (int i = block.thread(); i < kPixels * (tap1 - tap0) * offset_groups; i += kThreads) {
        const int pixel = i % kPixels, which = i / kPixels;
        const int tap = tap0 + which / offset_groups;
        const int offset_group = offset_group0 + which % offset_groups;
        const SampleRecord r = k.sampler.record(pixels()[pixel], offset_group * k.sampler.sizes.taps + tap);
        DCN_UNROLL
        for (int c = 0; c < 4; ++c) sample_weights()[i][c] = r.weight[c];
        sample_places()[i] = r.where;
      }
      block.sync();
    }

    // This thread's first row of the weights, from a tap on.
    DCN_DEVICE const S* weight_row(int tap) const {
      const ConvSizes& z = k.sampler.sizes;
      const int row = group * z.group_outputs + output0 + block.thread() / kVectors;
      return k.weight + static_cast<int64_t>(row) * z.depth + tap * z.group_channels;
    }
    // Starts copying eight vectors of each row of the weights, from number `first` on; zeros beyond the last.
    DCN_DEVICE void copy_weights(int stage, int first, const Order& order, const S* from) const {
      const ConvSizes& z = k.sampler.sizes;
      const int p = block.thread() % kVectors, row0 = block.thread() / kVectors;
      const auto [tap, vector] = order.at(first + p);
      const int rows = first + p < order.count() ? z.group_outputs - output0 : 0;
      from += 8 * (tap * order.vectors + vector);
      DCN_UNROLL
      for (int row = row0; row < row0 + kOutputs; row += 32, from += int64_t{32} * z.depth)
        block.copy_async(weights(stage).at(row, p), row < rows ? from : k.weight, row < rows);
      block.commit_copies();
    }

    // The corners of the vectors that a thread is loading for a stage.
    struct Corners {
      Vector8<S> v[kTogether][4];
    };

    // Threads side by side take channels side by side where these lie together in memory, else pixels.
    DCN_DEVICE int vector_of_thread() const {
      return k.sampler.channels_together() ? block.thread() % kVectors : block.thread() / 32;
    }
    DCN_DEVICE int pixel_of_thread(int i) const {
      return 32 * i + (k.sampler.channels_together() ? block.thread() / kVectors : block.thread() % 32);
    }
    // A vector of the columns: its sample among those of a pixel (-1 beyond the last), and its first channel.
    struct ColumnVector {
      int sample, channel;
    };
    DCN_DEVICE ColumnVector vector(int number, const Order& order) const {
      if (number >= order.count()) return {-1, 0};
      const ConvSizes& z = k.sampler.sizes;
      const auto [tap, vector] = order.at(number);
      const int channel = group * z.group_channels + 8 * vector;
      return {tap * offset_groups + channel / z.offset_group_channels - offset_group0, channel};
    }
    DCN_DEVICE void fetch(Corners& corners, int round, const ColumnVector& p) const {
      if (!k.sampler.channels_together()) return;
      DCN_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        const int pixel = pixel_of_thread(round * kTogether + i);
        k.sampler.fetch(corners.v[i], p.sample < 0 ? 0 : sample_places()[p.sample * kPixels + pixel], p.channel);
      }
    }
    DCN_DEVICE void store(const Corners& corners, int stage, int round, const ColumnVector& p) const {
      DCN_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        const int pixel = pixel_of_thread(round * kTogether + i), sample = p.sample * kPixels + pixel;
        Vector8<S> found = zeros<S>();
        if (p.sample >= 0)
          found = k.sampler.channels_together()
                      ? combine(corners.v[i], sample_weights()[sample])
                      : k.sampler.interpolate_apart(sample_places()[sample], sample_weights()[sample], p.channel);
        *columns(stage).at(pixel, vector_of_thread()) = found;
      }
    }

    DCN_DEVICE void add_taps(ProductSums<Shape>& sums, int tap0, int tap1) const {
      const Order order{tap1 - tap0, k.sampler.sizes.vectors()};
      ColumnVector mine = vector(vector_of_thread(), order);
      Corners corners;
      const S* const row = weight_row(tap0);
      copy_weights(0, 0, order, row);
      DCN_KEEP_LOOP
      for (int round = 0; round < kRounds; ++round) {
        fetch(corners, round, mine);
        store(corners, 0, round, mine);
      }
      block.template wait_for_copies<0>();
      block.sync();
      for (int first = 0, stage = 0; first < order.count(); first += kVectors, stage ^= 1) {
        const bool more = first + kVectors < order.count();
        if (more) {
          copy_weights(stage ^ 1, first + kVectors, order, row);
          mine = vector(first + kVectors + vector_of_thread(), order);
        }
        // Not unrolled: the addresses of all rounds would not fit into registers.
        DCN_KEEP_LOOP
        for (int round = 0; round < kRounds; ++round) {
          if (more) fetch(corners, round, mine);
          DCN_UNROLL
          for (int step = 0; step < 4 / kRounds; ++step)
            sums.template add<Summed::kAlongRows, Summed::kAlongRows>(block, columns(stage), weights(stage),
                                                                      round * (4 / kRounds) + step);
          if (more) store(corners, stage ^ 1, round, mine);
        }
        block.template wait_for_copies<0>();
        block.sync();
      }
    }

    // By way of shared memory, so that threads side by side write values side by side in either layout.
    DCN_DEVICE void write(const ProductSums<Shape>& sums) const {
      const ConvSizes& z = k.sampler.sizes;
      const bool along_outputs = k.output.c == 1;
      // Rows are eight values longer than they need be, so that the next row begins in another bank.
      const int stride = 8 + (along_outputs ? kOutputs : kPixels);
      S* const staged = reinterpret_cast<S*>(block.shared());
      if (along_outputs)
        sums.for_each_pair(block.thread(), [&](int pixel, int o, float first, float second) {
          const uint32_t both = pack<S>(first, second);
          std::memcpy(staged + pixel * stride + o, &both, sizeof(both));
        });
      else
        sums.for_each_pair(block.thread(), [&](int pixel, int o, float first, float second) {
          staged[o * stride + pixel] = static_cast<S>(first);
          staged[(o + 1) * stride + pixel] = static_cast<S>(second);
        });
      block.sync();
      const int outputs = z.group_outputs - output0, out0 = group * z.group_outputs + output0;
      if (along_outputs && k.aligned_vectors) {
        for (int i = block.thread(); i < kPixels * kOutputs / 8; i += kThreads) {
          const int pixel = i / (kOutputs / 8), o = i % (kOutputs / 8) * 8;
          const TilePixel p = pixels()[pixel];
          if (p.n >= 0 && o < outputs)
            *reinterpret_cast<Vector8<S>*>(&k.output.at(p.n, out0 + o, p.y, p.x)) =
                *reinterpret_cast<const Vector8<S>*>(staged + pixel * stride + o);
        }
        return;
      }
      for (int i = block.thread(); i < kPixels * kOutputs; i += kThreads) {
        const int pixel = along_outputs ? i / kOutputs : i % kPixels, o = along_outputs ? i % kOutputs : i / kPixels;
        const TilePixel p = pixels()[pixel];
        if (p.n >= 0 && o < outputs)
          k.output.at(p.n, out0 + o, p.y, p.x) = staged[along_outputs ? pixel * stride + o : o * stride + pixel];
      }
    }
    DCN_DEVICE float bias_of(int o) const {
      const int outputs = k.sampler.sizes.group_outputs;
      return k.bias && output0 + o < outputs ? static_cast<float>(k.bias[group * outputs + output0 + o]) : 0.0f;
    }
  };

  template <typename Block>
  DCN_DEVICE void operator()(Block& block) const {
    const ConvSizes& z = sampler.sizes;
    // Blocks side by side have the same pixels, and so read the same input.
    const int across = z.groups * output_tiles(), i = static_cast<int>(block.index() % across);
    const int group = i / output_tiles();
    const int first = group * z.group_channels / z.offset_group_channels;
    const int last = ((group + 1) * z.group_channels - 1) / z.offset_group_channels;
    const Tile<Block> tile{
        *this, block, block.index() / across * kPixels, group, i % output_tiles() * kOutputs, last - first + 1, first};
    ProductSums<Shape> sums;
    sums.start(tile.block.thread(), [&](int o) { return tile.bias_of(o); });
    tile.find_pixels();
    const int taps = z.taps, together = kSamplesPerPixel / tile.offset_groups;
    for (int tap = 0; tap < taps; tap += together) {
      const int end = tap + together < taps ? tap + together : taps;
      tile.find_samples(tap, end);
      tile.add_taps(sums, tap, end);
    }
    tile.write(sums);
  }
};

}  // namespace dcn
