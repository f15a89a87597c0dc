// Whether convolutions of float32 may be multiplied in TF32, as torch's own switches say.
#pragma once

#include <atomic>

#include "tensor.h"

namespace dcn {

// Asked in every call: the answer is torch's, by way of an operator that Python registers
// (dcn_plugin/ops/_precision.py), since the stable ABI has no function for it. A program without Python has nobody to
// ask, and gets full float32.
inline bool convolutions_use_tf32() {
  static std::atomic<bool> nobody{false};
  if (nobody.load(std::memory_order_relaxed)) return false;
  StableIValue answer{};
  const char* const name = "dcn_plugin::_convolutions_use_tf32";
  if (torch_call_dispatcher(name, "", &answer, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    nobody.store(true, std::memory_order_relaxed);
    return false;
  }
  return torch::stable::detail::to<bool>(answer);
}

}  // namespace dcn
