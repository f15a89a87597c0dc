// Which gradients a backward is asked for: the bits of its argument `wanted`, the same in every operator. Python's
// side is WANTED in dcn_plugin/ops/_operator.py.
#pragma once

#include <cstdint>

namespace dcn {

enum Wanted : int64_t {
  kInput = 1,
  kOffset = 2,
  kWeight = 4,
  kMask = 8,
  kValue = 16,
  kSamplingLocations = 32,
  kAttentionWeights = 64,
  kReferencePoints = 128,
  kOrdered = 1 << 8,  // torch's deterministic mode: no sums whose order may vary
};

}  // namespace dcn
