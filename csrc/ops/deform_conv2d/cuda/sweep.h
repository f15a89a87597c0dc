// Fused backward, the pass over memory between its two products: the gradient of the columns and the four corners of
// each sample are read once, in 16-byte vectors of channels, for the gradients of offset and mask and for the columns.
#pragma once

#include "../../../runtime/lane_sums.h"
#include "samples.h"

namespace dcn {

// How the lanes of a warp are dealt out. `lanes` of them side by side, a power of two, walk over `samples` samples
// together, each with 16 bytes of an offset group's channels at a time; the warp has found these samples before.
struct SweepLanes {
  int vectors;  // of an offset group
  int lanes, samples;

  explicit SweepLanes(int64_t vectors_of_offset_group)
      : vectors(static_cast<int>(vectors_of_offset_group)), lanes(1), samples(1) {
    while (lanes < 32 && lanes < vectors) lanes *= 2;
    // 16 of a warp, where lanes have several, so that there are warps enough for a range of pixels.
    if (lanes > 1) samples = lanes / 2;
  }
  DCN_HOST_DEVICE int samples_of_warp() const { return lanes > 1 ? 16 : 32; }
};

// A sample, ready to be read.
struct alignas(16) SweepRecord {
  float weight[4];  // mask * bilinear
  int64_t where;    // 64 * place in the input + bits: see SweepColumns::record
  int32_t row;      // of the columns of a group: pixel of the range * taps + tap; -1: no sample
  int32_t channel;  // the offset group's first
};

// Columns of some pixels: [groups, pixels, taps, C / groups].
template <typename T>
struct ColumnRows {
  T* data;             // null: not wanted
  int64_t group_step;  // from a group's first value to the next one's
};

// All samples of a range of pixels, by pixel, offset group and tap. No two threads write to one place.
template <typename S>
struct SweepColumns {
  static constexpr int kThreads = 128, kBlocksPerMultiprocessor = 6, kWidth = kVectorValues<S>;
  static constexpr int kSharedBytes = kThreads * static_cast<int>(sizeof(SweepRecord) + 4 * sizeof(float));

  Sampler<S> sampler;  // of an input with aligned vectors of channels
  PixelRange range;
  SweepLanes lanes;
  ColumnRows<const S> grad_columns;
  ColumnRows<S> columns;
  WriteEither<S> grad_offset, grad_mask;

  DCN_HOST_DEVICE int planes() const { return sampler.sizes.offset_groups * sampler.sizes.taps; }
  DCN_HOST_DEVICE int samples_of_block() const { return kThreads / 32 * lanes.samples_of_warp(); }
  int64_t blocks() const { return (range.count * planes() + samples_of_block() - 1) / samples_of_block(); }

  template <typename Block>
  DCN_DEVICE void operator()(Block& block) const {
    const int lane = block.thread() % 32, warp = block.thread() / 32;
    SweepRecord* const records = reinterpret_cast<SweepRecord*>(block.shared()) + 32 * warp;
    float (*const products)[4] =
        reinterpret_cast<float (*)[4]>(block.shared() + kThreads * sizeof(SweepRecord)) + 32 * warp;
    // The samples of a range are numbered in 32 bits.
    const uint32_t number =
        static_cast<uint32_t>(block.index()) * samples_of_block() + warp * lanes.samples_of_warp() + lane;
    const uint32_t row = number / planes();
    const int plane = static_cast<int>(number - row * planes());
    const bool found = lane < lanes.samples_of_warp() && row < range.count;
    TilePixel pixel{-1, 0, 0};
    if (found) pixel = pixel_by_rows(sampler.sizes, range.first + row);
    if (lane < lanes.samples_of_warp()) records[lane] = record(pixel, static_cast<int>(row), plane);
    block.sync_warp();

    const int mine = lane & (lanes.lanes - 1), first = (lane - mine) / lanes.lanes * lanes.samples;
    DCN_KEEP_LOOP
    for (int i = 0; i < lanes.samples; ++i) {
      const SweepRecord r = records[first + i];
      float sums[4] = {0, 0, 0, 0};
      if (r.row >= 0) walk(r, mine, sums);
      if (grad_columns.data) store_lane_sums(block, mine, lanes.lanes, sums, false, products[first + i]);
    }
    block.sync_warp();
    if (grad_columns.data && found)
      write_displacement_gradient(sampler, pixel, plane, products[lane], grad_offset, grad_mask);
  }

 private:
  // Every corner has a place on the map, so that all can be read without a question: one that is not on the map is read
  // at its neighbour's, and then not used. Bit c of `where`: corner c has a weight. Bits 4 and 5: there is a column to
  // the right of the place, a row below.
  DCN_DEVICE SweepRecord record(const TilePixel& p, int pixel_of_range, int plane) const {
    SweepRecord r{{0, 0, 0, 0}, 0, -1, 0};
    if (p.n < 0) return r;
    const Sample<float, int> s = sampler.sample(p, plane);
    const float m = sampler.modulation(p, plane);
    int bits = 0;
    DCN_UNROLL
    for (int c = 0; c < 4; ++c) {
      const float w = s.weight(c);
      if (!s.has(c) || w == 0) continue;
      r.weight[c] = m * w;
      bits |= 1 << c;
    }
    // Nothing is read, but a NaN position or infinite mask is to show.
    if (bits == 0) r.weight[0] = m * s.origin();
    const int y = s.y0 < 0 ? 0 : s.y0, x = s.x0 < 0 ? 0 : s.x0;
    if (s.x0 >= 0 && x + 1 < sampler.g.width) bits |= 16;
    if (s.y0 >= 0 && y + 1 < sampler.g.height) bits |= 32;
    r.where = (p.n * sampler.input.n + y * sampler.input.h + x * sampler.input.w) * 64 + bits;
    r.row = pixel_of_range * sampler.sizes.taps + plane % sampler.sizes.taps;
    r.channel = plane / sampler.sizes.taps * sampler.sizes.offset_group_channels;
    return r;
  }

  // One sample, by lane `mine` of those that share it. sums[c] += sum over its channels of the column's gradient times
  // corner c. What is not wanted is computed all the same, and neither read nor written.
  DCN_DEVICE void walk(const SweepRecord& r, int mine, float (&sums)[4]) const {
    const S* const place = sampler.input.data + (r.where >> 6);
    const int64_t right = r.where & 16 ? sampler.input.w : 0, below = r.where & 32 ? sampler.input.h : 0;
    const int bits = static_cast<int>(r.where) & 15, group_channels = sampler.sizes.group_channels;
    const float start = bits ? 0.0f : r.weight[0];
    DCN_KEEP_LOOP
    for (int vector = mine; vector < lanes.vectors; vector += lanes.lanes) {
      const int channel = r.channel + vector * kWidth;
      int64_t from = static_cast<int64_t>(r.row) * group_channels + channel, to = from;
      if (sampler.sizes.groups > 1) {
        const int group = channel / group_channels;
        from += group * (grad_columns.group_step - group_channels);
        to += group * (columns.group_step - group_channels);
      }
      ChannelVector<S> corners[4], given{};
      DCN_UNROLL
      for (int c = 0; c < 4; ++c)
        corners[c] =
            *reinterpret_cast<const ChannelVector<S>*>(place + channel + (c & 2 ? below : 0) + (c & 1 ? right : 0));
      if (grad_columns.data) given = *reinterpret_cast<const ChannelVector<S>*>(grad_columns.data + from);
      float grad[kWidth], found[kWidth];
      unpack(grad, given);
      DCN_UNROLL
      for (int e = 0; e < kWidth; ++e) found[e] = start;
      DCN_UNROLL
      for (int c = 0; c < 4; ++c) {
        float values[kWidth];
        unpack(values, corners[c]);
        DCN_UNROLL
        for (int e = 0; e < kWidth; ++e) sums[c] += grad[e] * values[e];
        if (bits >> c & 1) {
          DCN_UNROLL
          for (int e = 0; e < kWidth; ++e) found[e] += r.weight[c] * values[e];
        }
      }
      if (columns.data) store_vector<S>(columns.data + to, pack<S>(found));
    }
  }
};

}  // namespace dcn
