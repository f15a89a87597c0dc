// The points of a query's head as the lanes of a warp share them. Some lanes side by side serve one query and head,
// each 16 bytes of its channels at a time. They find its points together, two a lane, and leave them in shared memory;
// then all of them walk over these points, and read each corner in one coalesced access. `P` is AttentionPoints or what
// takes their place.
#pragma once

#include <limits>

#include "../core/attention_positions.h"
#include "gpu_values.h"

namespace dcn {

// A point, ready to be read: 32 bytes.
struct alignas(16) PointRecord {
  float weight[4];  // of each corner, with the point's own weight in it; NaN for a NaN position
  int32_t row;      // of the top left corner among the rows of the value; may be negative
  int32_t width;    // of the level
  uint32_t corners;
  uint32_t unused;

  DCN_DEVICE bool lies_on_map(int corner) const { return corners >> corner & 1; }
  DCN_DEVICE bool has_weight(int corner) const { return corners >> (4 + corner) & 1; }
};

// What a lane keeps of a point that it has found, to turn sums over channels into gradients.
struct FoundPoint {
  Sample<float, int32_t> sample;
  float weight;
};

// How the lanes of warps are dealt out: `lanes`, a power of two up to a warp, for each query and head. Where 32 lanes
// do not hold all channels, they go over the channels in several turns.
struct AttentionLanes {
  static constexpr int kThreads = 128, kPointsOfLane = 2, kPointsOfWarp = 32 * kPointsOfLane;

  int64_t query_heads;
  int lanes, vectors;  // 16 bytes of channels each

  AttentionLanes(int64_t query_heads, int64_t vectors)
      : query_heads(query_heads), lanes(1), vectors(static_cast<int>(vectors)) {
    while (lanes < 32 && lanes < vectors) lanes *= 2;
  }
  int64_t blocks() const { return (query_heads * lanes + kThreads - 1) / kThreads; }
  DCN_HOST_DEVICE int points_together() const { return lanes * kPointsOfLane; }
  DCN_HOST_DEVICE int turns() const { return (vectors + lanes - 1) / lanes; }
};

// A lane of them.
template <typename P>
struct AttentionLane {
  const AttentionLanes& all;
  bool works;      // the last warp may have lanes without a query
  int64_t number;  // of the query's head
  QueryHead head;
  int lane;                     // among those of its head
  int first_place;              // of its head's points among those of the block
  AttentionFrame<float> frame;  // where there is one level alone

  template <typename Block>
  DCN_DEVICE AttentionLane(const Block& block, const AttentionLanes& all, const P& points) : all(all) {
    const int64_t thread = block.index() * AttentionLanes::kThreads + block.thread();
    number = thread / static_cast<uint32_t>(all.lanes);
    works = number < all.query_heads;
    if (!works) number = 0;
    head = QueryHead(points.g, number);
    lane = block.thread() & (all.lanes - 1);
    first_place = (block.thread() - lane) * AttentionLanes::kPointsOfLane;
    if constexpr (P::has_one_level) frame = points.template frame<int32_t>(head.n, head.q, 0);
  }

  // Finds point k and stores it; `level` is that of an earlier point, and becomes its own.
  DCN_DEVICE FoundPoint find(const P& points, int64_t k, float weight, int& level, PointRecord& record) const {
    FoundPoint p;
    if constexpr (P::has_one_level) {
      p.sample = points.template sample<int32_t>(frame, head, 0, k);
    } else {
      while (k >= points.g.level[level].first_point + points.g.level[level].points) ++level;
      p.sample = points.template sample<int32_t>(points.frame(head.n, head.q, level), head, level, k);
    }
    const AttentionLevel& on = points.g.level[level];
    p.weight = weight;
    PointRecord made;
    made.corners = p.sample.corners;
    DCN_UNROLL
    for (int c = 0; c < 4; ++c) {
      const float w = p.sample.weight(c);
      if (p.sample.has(c) && w != 0) made.corners |= 16u << c;
      made.weight[c] = w != 0 ? w * weight : 0.0f;
    }
    made.width = static_cast<int32_t>(on.width);
    made.row = static_cast<int32_t>(on.first_row) + p.sample.y0 * made.width + p.sample.x0;
    made.unused = 0;
    record = made;
    return p;
  }

  // The softmax of the head's logits, found by its lanes together.
  template <typename Block>
  DCN_DEVICE SoftmaxScale<float> softmax(Block& block, const P& points) const {
    float largest = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t k = lane; k < points.g.points; k += all.lanes) {
      const float logit = points.stored_weight(head, k);
      if (logit > largest) largest = logit;
    }
    for (int distance = all.lanes / 2; distance > 0; distance /= 2) {
      const float other = block.from_lane_across(largest, distance);
      if (other > largest) largest = other;
    }
    // A NaN logit, or an infinite one, makes the sum NaN, and so every weight.
    for (int64_t k = lane; k < points.g.points; k += all.lanes)
      sum += std::exp(points.stored_weight(head, k) - largest);
    for (int distance = all.lanes / 2; distance > 0; distance /= 2) sum += block.from_lane_across(sum, distance);
    return {largest, 1 / sum};
  }
};

// Rows of channels: 16 bytes of each of the four corners of a record.
template <typename S>
struct CornerRows {
  const S* data;  // channels of the lane's head in row 0 of its image
  int32_t row_bytes;

  DCN_DEVICE ChannelVector<S> read(const PointRecord& r, int corner, int channel) const {
    return *reinterpret_cast<const ChannelVector<S>*>(at(data, r, corner, row_bytes) + channel);
  }
  // The product of two 32-bit numbers in 64 bits is one instruction, so that no size needs a kernel of its own.
  template <typename T>
  static DCN_DEVICE T* at(T* rows, const PointRecord& r, int corner, int32_t row_bytes) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    const int32_t row = r.row + (corner & 1) + (corner & 2 ? r.width : 0);
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(rows) + static_cast<int64_t>(row) * row_bytes);
  }
};

}  // namespace dcn
