// The geometry of multi-scale attention: sizes, and the table of its levels. Symbols as in docs/operators.md.
#pragma once

#include "sampling.h"

namespace dcn {

// One map of the pyramid, and which of the K points of a query and head lie on it.
struct AttentionLevel {
  int64_t height, width;
  int64_t first_row;            // of its pixels among the S rows of the value
  int64_t first_point, points;  // of K
  double box_unit;              // offset_scale / points, divided on the host: a GPU divides doubles slowly
};

// Small enough to go to a kernel by value: no table in a device's memory that would have to be trusted.
struct AttentionGeometry {
  static constexpr int64_t kMaxLevels = 16;

  int64_t batch, rows, heads, channels;  // N, S, M, D: the value
  int64_t queries, points;               // Q, K: the points of all levels together
  int64_t levels;                        // L
  int64_t reference_levels;              // L or 1
  int64_t reference_numbers;             // 0: locations are given; 2: (x, y) and 4: (x, y, w, h) beside raw offsets
  bool softmax;                          // weights are logits
  AttentionLevel level[kMaxLevels];

  // Heads of all queries: each has K points, one sum of weights, and a result of D channels. Ordered (n, q, m).
  DCN_HOST_DEVICE int64_t query_heads() const { return batch * queries * heads; }
  DCN_HOST_DEVICE int64_t reference_level(int64_t l) const { return reference_levels == 1 ? 0 : l; }
};

// Head m of query q of image n, by its number.
struct QueryHead {
  int64_t n, q, m;
  QueryHead() = default;
  DCN_HOST_DEVICE QueryHead(const AttentionGeometry& g, int64_t i)
      : n(i / g.heads / g.queries), q(i / g.heads % g.queries), m(i % g.heads) {}
};

}  // namespace dcn
