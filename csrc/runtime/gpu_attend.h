// output[n, q, m, d] = sum_k weight * bilinear(value of the level, position), 16 bytes of channels a lane.
#pragma once

#include "gpu_points.h"

namespace dcn {

template <typename P, typename S>
struct FusedAttend {
  P points;
  AttentionLanes lanes;
  View<const S> value;  // [N, S, M, D], whose rows are aligned vectors
  S* output;            // [N, Q, M, D], densely stored

  static constexpr int kThreads = AttentionLanes::kThreads, kBlocksPerMultiprocessor = 8;
  static constexpr int kSharedBytes = kThreads * AttentionLanes::kPointsOfLane * static_cast<int>(sizeof(PointRecord));
  static constexpr int kWidth = kVectorValues<S>;

  template <typename Block>
  DCN_DEVICE void operator()(Block& block) const {
    const AttentionLane<P> me(block, lanes, points);
    PointRecord* const records = reinterpret_cast<PointRecord*>(block.shared()) + me.first_place;
    const CornerRows<S> rows{&value.at(me.head.n, 0, me.head.m, 0), static_cast<int32_t>(value.c * sizeof(S))};
    const int count = static_cast<int>(points.g.points);
    SoftmaxScale<float> scale{0, 1};
    if (points.g.softmax) scale = me.softmax(block, points);
    for (int turn = 0; turn < lanes.turns(); ++turn) {
      const int vector = turn * lanes.lanes + me.lane;
      const bool reads = me.works && vector < lanes.vectors;
      float sums[kWidth];
      DCN_UNROLL
      for (int i = 0; i < kWidth; ++i) sums[i] = 0;
      int level = 0;
      for (int first = 0; first < count; first += lanes.points_together()) {
        block.sync_warp();  // nobody reads the points before these any more
        DCN_UNROLL
        for (int e = 0; e < AttentionLanes::kPointsOfLane; ++e) {
          const int place = me.lane + e * lanes.lanes, k = first + place;
          if (k >= count) continue;
          const float stored = points.stored_weight(me.head, k);
          me.find(points, k, points.g.softmax ? scale.weight(stored) : stored, level, records[place]);
        }
        block.sync_warp();
        if (reads) add_points(sums, records, count - first, rows, vector * kWidth);
      }
      if (reads)
        *reinterpret_cast<ChannelVector<S>*>(output + (me.number * lanes.vectors + vector) * kWidth) = pack<S>(sums);
    }
  }

 private:
  DCN_DEVICE void add_points(float (&sums)[kWidth], const PointRecord* records, int left, const CornerRows<S>& rows,
                             int channel) const {
    const int points_here = left < lanes.points_together() ? left : lanes.points_together();
    for (int p = 0; p < points_here; ++p) {
      const PointRecord r = records[p];
      ChannelVector<S> corners[4];
      DCN_UNROLL
      for (int c = 0; c < 4; ++c) corners[c] = r.has_weight(c) ? rows.read(r, c, channel) : ChannelVector<S>{};
      DCN_UNROLL
      for (int c = 0; c < 4; ++c) add_scaled(sums, r.weight[c], corners[c]);
    }
  }
};

}  // namespace dcn
