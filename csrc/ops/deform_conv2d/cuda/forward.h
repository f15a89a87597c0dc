// Fused forward: a block of threads samples columns of a tile of output pixels into shared memory, tap by tap, and
// multiplies them with the weights on tensor cores. Columns exist in shared memory alone.
#pragma once

#include "forward_reads.h"
#include "product.h"

namespace dcn {

// A block of threads makes a tile of `Shape`, [pixels, outputs]. It takes the terms of the sum, (tap, channel) of the
// group, in steps of eight vectors, in the order of ColumnCursor. While the tensor cores multiply one step, the loads
// of the next are in flight.
template <typename S, typename Shape>
struct FusedForward {
  static constexpr int kThreads = Shape::kThreads, kPixels = Shape::kRows, kOutputs = Shape::kColumns;
  static constexpr bool kLarge = Shape::kTilesDown > 2;  // its sums leave registers for one block alone
  static constexpr int kBlocksPerMultiprocessor = kLarge ? 1 : 2;
  static constexpr int kStages = 2, kVectors = ColumnCursor::kTogether, kWidth = kVectorValues<S>;
  // How many vectors of the next step a thread loads at once; the corners of each take 16 registers.
  static constexpr int kTogether = Shape::kTilesAcross > 4 && !kLarge ? 1 : 2;
  static constexpr int kRounds = kPixels * kVectors / kThreads / kTogether;
  static constexpr int kColumnBytes = kPixels * 16 * kVectors, kWeightBytes = kOutputs * 16 * kVectors;
  static constexpr int kOperandBytes = kStages * (kColumnBytes + kWeightBytes);
  static constexpr int kRecords = kPixels * kSamplesPerPixel;
  static constexpr int kSharedBytes = kOperandBytes + kRecords * 20 + kPixels * static_cast<int>(sizeof(TilePixel));

  Sampler<S> sampler;
  InputPixels<S> input;
  const S* weight;  // [O, taps, C / groups]; of float, to_tf32
  const S* bias;    // may be null
  View<S> output;
  bool aligned_vectors;                   // of output: has_aligned_vectors
  int vectors;                            // of a tap and group
  Divisor<int32_t> offset_group_vectors;  // how many share an offset
  Divisor<int32_t> kernel_width;
  int steps_in_tap, vectors_past_tap;  // ColumnCursor::advance

  FusedForward(const Sampler<S>& of, const InputPixels<S>& from, const S* weights, const S* biases, const View<S>& to,
               bool aligned)
      : sampler(of),
        input(from),
        weight(weights),
        bias(biases),
        output(to),
        aligned_vectors(aligned),
        vectors(of.sizes.group_channels / kWidth),
        offset_group_vectors(of.sizes.offset_group_channels / kWidth),
        kernel_width(of.sizes.kernel_w),
        steps_in_tap(kVectors / vectors),
        vectors_past_tap(kVectors % vectors) {}

  DCN_HOST_DEVICE int output_tiles() const { return (sampler.sizes.group_outputs + kOutputs - 1) / kOutputs; }
  DCN_HOST_DEVICE int64_t blocks() const {
    return (sampler.sizes.pixels + kPixels - 1) / kPixels * sampler.sizes.groups * output_tiles();
  }

  template <typename Block>
  struct Tile {
    const FusedForward& k;
    Block& block;
    int group, output0;                // of this block; output0 counts within the group
    int offset_groups, offset_group0;  // that the group meets

    DCN_DEVICE SharedTile<S, kVectors> columns(int stage) const {
      return {reinterpret_cast<ChannelVector<S>*>(block.shared() + stage * kColumnBytes)};
    }
    DCN_DEVICE SharedTile<S, kVectors> weights(int stage) const {
      return {reinterpret_cast<ChannelVector<S>*>(block.shared() + kStages * kColumnBytes + stage * kWeightBytes)};
    }
    // Weights and places of samples are kept apart, so that threads side by side read words side by side.
    DCN_DEVICE Vector4* sample_weights() const { return reinterpret_cast<Vector4*>(block.shared() + kOperandBytes); }
    DCN_DEVICE int* sample_places() const {
      return reinterpret_cast<int*>(block.shared() + kOperandBytes + kRecords * 16);
    }
    DCN_DEVICE TilePixel* pixels() const {
      return reinterpret_cast<TilePixel*>(block.shared() + kOperandBytes + kRecords * 20);
    }

    // Those of this block.
    DCN_DEVICE void find_pixels(int64_t first) const {
      for (int i = block.thread(); i < kPixels; i += kThreads) pixels()[i] = k.sampler.pixel(first + i);
      block.sync();
    }

    // Samples of taps [tap0, tap1), for every offset group that this group of the convolution meets.
    DCN_DEVICE void find_samples(int tap0, int tap1) const {
      for (int i = block.thread(); i < kPixels * (tap1 - tap0) * offset_groups; i += kThreads) {
        const int pixel = i % kPixels, which = i / kPixels;
        const int tap = tap0 + which / offset_groups, offset_group = offset_group0 + which % offset_groups;
        const auto [ky, kx] = k.kernel_width(tap);
        const Plane plane{offset_group * k.sampler.sizes.taps + tap, ky, kx};
        const SampleRecord r = k.input.record(k.sampler, pixels()[pixel], plane, pixels()[0].n);
        sample_weights()[i] = {{r.weight[0], r.weight[1], r.weight[2], r.weight[3]}};
        sample_places()[i] = static_cast<int>(r.where);
      }
      block.sync();
    }

    // Threads side by side take channels side by side.
    DCN_DEVICE int vector_of_thread() const { return block.thread() % kVectors; }
    DCN_DEVICE int row_of_thread() const { return block.thread() / kVectors; }

    // The rows of the weights that a thread copies, kRowsApart apart: where its first begins for a tap, and the number
    // of the last that it has. Beyond the last output that one, whose sums nobody reads there, is repeated.
    static constexpr int kRowsApart = kThreads / kVectors;
    struct WeightRows {
      const S* first;
      int last;
    };
    DCN_DEVICE WeightRows weight_rows(int tap) const {
      const ConvSizes& z = k.sampler.sizes;
      const int left = z.group_outputs - output0, row = row_of_thread() < left ? row_of_thread() : left - 1;
      return {
          k.weight + static_cast<int64_t>(group * z.group_outputs + output0 + row) * z.depth + tap * z.group_channels,
          (left - row - 1) / kRowsApart};
    }
    // Starts copying this thread's vectors of the weights: zeros beyond the last term, since columns are zeros there.
    DCN_DEVICE void copy_weights(int stage, const ColumnCursor& at, bool there, const WeightRows& rows) const {
      const S* const from = rows.first + (there ? kWidth * (at.tap * k.vectors + at.vector) : 0);
      DCN_UNROLL
      for (int i = 0; i < kOutputs / kRowsApart; ++i) {
        const int64_t row = kRowsApart * (i < rows.last ? i : rows.last);
        block.copy_async(weights(stage).at(row_of_thread() + i * kRowsApart, vector_of_thread()),
                         from + row * k.sampler.sizes.depth, there);
      }
      block.commit_copies();
    }

    // What a thread samples for a stage: a vector of each of its pixels, which are kRowsApart apart.
    struct Column {
      const char* from;  // this vector's channels in the image of the first pixel
      int sample;        // of the first pixel; -1: beyond the last term
    };
    DCN_DEVICE Column column(const ColumnCursor& at, bool there) const {
      // Found anew in each step, since registers are scarce.
      const char* const from =
          reinterpret_cast<const char*>(k.input.data) + pixels()[0].n * k.input.image * k.input.bytes;
      if (!there) return {from, -1};
      const int channel_vector = group * k.vectors + at.vector;
      const int offset_group = k.offset_group_vectors.divide(channel_vector) - offset_group0;
      return {from + 16 * channel_vector, (at.tap * offset_groups + offset_group) * kPixels};
    }
    // The corners of the vectors that a thread is loading.
    struct Corners {
      ChannelVector<S> v[kTogether][4];
    };
    DCN_DEVICE int pixel_of_thread(int i) const { return row_of_thread() + i * kRowsApart; }
    DCN_DEVICE void fetch(Corners& corners, int round, const Column& p) const {
      DCN_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        const int pixel = pixel_of_thread(round * kTogether + i);
        k.input.fetch(corners.v[i], p.from, p.sample < 0 ? 0 : sample_places()[p.sample + pixel]);
      }
    }
    DCN_DEVICE void store(const Corners& corners, int stage, int round, const Column& p) const {
      DCN_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        const int pixel = pixel_of_thread(round * kTogether + i);
        const Vector4 weight = p.sample < 0 ? Vector4{} : sample_weights()[p.sample + pixel];
        float sums[kWidth] = {};
        DCN_UNROLL
        for (int c = 0; c < 4; ++c) add_scaled(sums, weight.values[c], corners.v[i][c]);
        *columns(stage).at(pixel, vector_of_thread()) = pack_operand<S>(sums);
      }
    }

    DCN_DEVICE void add_taps(ProductSums<Shape>& sums, int tap0, int tap1) const {
      const int taps = tap1 - tap0, steps = (taps * k.vectors + kVectors - 1) / kVectors;
      const WeightRows rows = weight_rows(tap0);
      ColumnCursor at(vector_of_thread(), k.vectors);
      Corners corners;
      bool there = at.there(taps, k.vectors);
      Column mine = column(at, there);
      copy_weights(0, at, there, rows);
      DCN_KEEP_LOOP
      for (int round = 0; round < kRounds; ++round) {
        fetch(corners, round, mine);
        store(corners, 0, round, mine);
      }
      block.template wait_for_copies<0>();
      block.sync();
      DCN_KEEP_LOOP
      for (int step = 0, stage = 0; step < steps; ++step, stage ^= 1) {
        const bool more = step + 1 < steps;
        if (more) {
          at.advance(taps, k.vectors, k.steps_in_tap, k.vectors_past_tap);
          there = at.there(taps, k.vectors);
          copy_weights(stage ^ 1, at, there, rows);
          mine = column(at, there);
        }
        // Not unrolled: the addresses of all rounds would not fit into registers.
        DCN_KEEP_LOOP
        for (int round = 0; round < kRounds; ++round) {
          if (more) fetch(corners, round, mine);
          DCN_UNROLL
          for (int part = 0; part < kVectors / 2 / kRounds; ++part)
            sums.add(block, columns(stage), weights(stage), round * (kVectors / 2 / kRounds) + part);
          if (more) store(corners, stage ^ 1, round, mine);
        }
        block.template wait_for_copies<0>();
        block.sync();
      }
    }

    DCN_DEVICE void write(const ProductSums<Shape>& sums) const {
      if constexpr (sizeof(S) == 4)
        write_words(sums);
      else
        write_staged(sums);
    }

    // Lanes side by side have whole 32 bytes of neighbours in either layout.
    DCN_DEVICE void write_words(const ProductSums<Shape>& sums) const {
      const int outputs = k.sampler.sizes.group_outputs - output0,
                out0 = group * k.sampler.sizes.group_outputs + output0;
      sums.for_each_row(block.thread(), [&](int pixel) {
        const TilePixel p = pixels()[pixel];
        const int count = p.n < 0 ? 0 : outputs;
        S* const to = &k.output.at(p.n < 0 ? 0 : p.n, out0, p.y, p.x);
        return [to, count, apart = k.output.c](int o, float first, float second) {
          if (o < count) to[o * apart] = first;
          if (o + 1 < count) to[(o + 1) * apart] = second;
        };
      });
    }

    // By way of shared memory, so that threads side by side write values side by side in either layout.
    DCN_DEVICE void write_staged(const ProductSums<Shape>& sums) const {
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
    const Tile<Block> tile{*this, block, group, i % output_tiles() * kOutputs, last - first + 1, first};
    ProductSums<Shape> sums;
    sums.start(tile.block.thread(), [&](int o) { return tile.bias_of(o); });
    tile.find_pixels(block.index() / across * kPixels);
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
