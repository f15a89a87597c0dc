// The gradients of weighted sums of samples in one walk over the points: products of the result's gradient with the
// four corners, which hold the gradients of positions and weights, and additions to the rows of the value's gradient.
#pragma once

#include "../core/attention_bodies.h"
#include "gpu_points.h"
#include "lane_sums.h"

namespace dcn {

template <typename P, typename S>
struct FusedAttendGradient {
  P points;
  AttentionLanes lanes;
  View<const S> value, grad_output;  // whose rows are aligned vectors
  PointGradient<float>* found;       // [N, Q, M, K]; null: not wanted
  float* grad_value;                 // [N, S, M, D], zeros, densely stored; null: not wanted here

  static constexpr int kThreads = AttentionLanes::kThreads, kBlocksPerMultiprocessor = 5;
  static constexpr int kPointsOfLane = AttentionLanes::kPointsOfLane;
  // Records and, beside them, the four products of each.
  static constexpr int kSharedBytes =
      kThreads * kPointsOfLane * static_cast<int>(sizeof(PointRecord) + 4 * sizeof(float));
  static constexpr int kWidth = kVectorValues<S>;

  template <typename Block>
  DCN_DEVICE void operator()(Block& block) const {
    const AttentionLane<P> me(block, lanes, points);
    PointRecord* const all_records = reinterpret_cast<PointRecord*>(block.shared());
    PointRecord* const records = all_records + me.first_place;
    float (*const products)[4] =
        reinterpret_cast<float (*)[4]>(all_records + kThreads * kPointsOfLane) + me.first_place;
    const int count = static_cast<int>(points.g.points);
    int level = 0;
    for (int first = 0; first < count; first += lanes.points_together()) {
      FoundPoint mine[kPointsOfLane];
      DCN_UNROLL
      for (int e = 0; e < kPointsOfLane; ++e) {
        const int place = me.lane + e * lanes.lanes, k = first + place;
        if (k < count) mine[e] = me.find(points, k, points.weight(me.head, k), level, records[place]);
      }
      block.sync_warp();
      const int left = count - first, here = left < lanes.points_together() ? left : lanes.points_together();
      for (int turn = 0; turn < lanes.turns(); ++turn) {
        if (found) multiply_corners(block, me, records, here, turn, products);
        if (grad_value && me.works) add_corners(block, me, records, here, turn);
      }
      block.sync_warp();
      DCN_UNROLL
      for (int e = 0; e < kPointsOfLane; ++e) {
        const int place = me.lane + e * lanes.lanes, k = first + place;
        if (found && me.works && k < count) found[me.number * count + k] = gradient(mine[e], products[place]);
      }
    }
  }

 private:
  // products[p][corner] = sum over channels of grad_output * corner, over all lanes in a fixed order.
  template <typename Block>
  DCN_DEVICE void multiply_corners(Block& block, const AttentionLane<P>& me, const PointRecord* records, int here,
                                   int turn, float (*products)[4]) const {
    const CornerRows<S> rows{&value.at(me.head.n, 0, me.head.m, 0), static_cast<int32_t>(value.c * sizeof(S))};
    const int vector = turn * lanes.lanes + me.lane, channel = vector * kWidth;
    const bool reads = me.works && vector < lanes.vectors;
    float grad[kWidth];
    DCN_UNROLL
    for (int i = 0; i < kWidth; ++i) grad[i] = 0;
    if (reads)
      add_scaled(grad, 1.0f,
                 *reinterpret_cast<const ChannelVector<S>*>(&grad_output.at(me.head.n, me.head.q, me.head.m, channel)));
    for (int p = 0; p < here; ++p) {
      const PointRecord& r = records[p];
      ChannelVector<S> corners[4];
      DCN_UNROLL
      for (int c = 0; c < 4; ++c)
        corners[c] = reads && r.lies_on_map(c) ? rows.read(r, c, channel) : ChannelVector<S>{};
      float sums[4];
      DCN_UNROLL
      for (int c = 0; c < 4; ++c) sums[c] = dot(grad, corners[c]);
      store_lane_sums(block, me.lane, lanes.lanes, sums, turn > 0, products[p]);
    }
  }

  // grad_value[n, corner, m, d] += corner weight * weight * grad_output[n, q, m, d]. Lanes side by side add to
  // neighbours: in fours where the processor adds these at once, else one by one.
  template <typename Block>
  DCN_DEVICE void add_corners(Block& block, const AttentionLane<P>& me, const PointRecord* records, int here,
                              int turn) const {
    const int64_t heads = points.g.heads;
    const int channels = lanes.vectors * kWidth, piece = block.adds_vectors() ? 4 : 1;
    const int first = turn * lanes.lanes * kWidth + me.lane * piece, step = lanes.lanes * piece;
    const S* const from = &grad_output.at(me.head.n, me.head.q, me.head.m, 0);
    float* const rows = grad_value + (me.head.n * points.g.rows * heads + me.head.m) * channels;
    const int32_t row_bytes = static_cast<int32_t>(heads * channels * sizeof(float));
    float grad[kWidth];
    DCN_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      const int channel = first + i / piece * step + i % piece;
      grad[i] = channel < channels ? static_cast<float>(from[channel]) : 0.0f;
    }
    for (int p = 0; p < here; ++p) {
      const PointRecord& r = records[p];
      DCN_UNROLL
      for (int c = 0; c < 4; ++c) {
        if (!r.has_weight(c)) continue;
        float* const to = CornerRows<S>::at(rows, r, c, row_bytes) + first;
        DCN_UNROLL
        for (int i = 0; i < kWidth; i += 4) {
          float add[4];
          DCN_UNROLL
          for (int j = 0; j < 4; ++j) add[j] = r.weight[c] * grad[i + j];
          if (block.adds_vectors()) {
            if (first + i / 4 * step < channels) block.add_vector(to + i / 4 * step, add);
          } else {
            DCN_UNROLL
            for (int j = 0; j < 4; ++j)
              if (first + (i + j) * step < channels) block.add(to + (i + j) * step, add[j]);
          }
        }
      }
    }
  }

  // What FindPointGradients finds: the sampler's own derivatives, of the products in place of the values.
  static DCN_DEVICE PointGradient<float> gradient(const FoundPoint& p, const float (&products)[4]) {
    const Gradient<float> g = combine_corners(p.sample, [&](int corner) { return products[corner]; });
    return {g.value, {p.weight * g.dx, p.weight * g.dy}};
  }
};

}  // namespace dcn
