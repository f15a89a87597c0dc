// Sums over lanes of a warp that lie side by side, in a fixed order.
#pragma once

#include "gpu_values.h"

namespace dcn {

// Adds each of four values up over `lanes` lanes, a power of two, of which this is number `lane`, and stores the sums;
// with `add`, adds them to what is there. Each exchange halves what a lane holds of the four, as long as there are
// several. All lanes of a warp call it together.
template <typename Block>
DCN_DEVICE void store_lane_sums(Block& block, int lane, int lanes, const float (&values)[4], bool add, float* to) {
  if (lanes == 1) {
    DCN_UNROLL
    for (int c = 0; c < 4; ++c) to[c] = (add ? to[c] : 0.0f) + values[c];
    return;
  }
  const bool right = lane & 1, lower = lane & 2;
  float two[2];
  DCN_UNROLL
  for (int i = 0; i < 2; ++i)
    two[i] = (right ? values[2 + i] : values[i]) + block.from_lane_across(right ? values[i] : values[2 + i], 1);
  if (lanes == 2) {
    DCN_UNROLL
    for (int i = 0; i < 2; ++i) to[2 * right + i] = (add ? to[2 * right + i] : 0.0f) + two[i];
    return;
  }
  float one = (lower ? two[1] : two[0]) + block.from_lane_across(lower ? two[0] : two[1], 2);
  for (int distance = 4; distance < lanes; distance *= 2) one += block.from_lane_across(one, distance);
  const int number = 2 * right + lower;
  if (lane < 4) to[number] = (add ? to[number] : 0.0f) + one;
}

}  // namespace dcn
