// Sums of the gradient of the weight that were found apart, in float: added in order, and rounded once.
#pragma once

#include "../bodies.h"

namespace dcn {

// Sums of `together` shares each, in order: with many shares, few threads would add them all.
struct AddSharesTogether {
  int64_t shares, together, size_of_share;
  const float* from;  // [shares, size_of_share]
  float* to;          // may be `from`, where one share is left

  DCN_HOST_DEVICE int64_t shares_left() const { return (shares + together - 1) / together; }
  DCN_HOST_DEVICE int64_t size() const { return shares_left() * size_of_share; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t first = i / size_of_share * together, end = first + together;
    float sum = 0;
    for (int64_t s = first; s < (end < shares ? end : shares); ++s) sum += from[s * size_of_share + i % size_of_share];
    to[i] = sum;
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
