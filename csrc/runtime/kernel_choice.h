// The choice between plain and fused CUDA kernels: DCN_PLUGIN_CUDA_KERNELS, looked at in every call.
#pragma once

#include <cstdlib>
#include <string>

#include "tensor.h"

namespace dcn {

// The fused kernels have not run on a GPU yet, so they are not the default.
inline bool wants_fused_kernels() {
  const char* const given = std::getenv("DCN_PLUGIN_CUDA_KERNELS");
  const std::string choice = given && *given ? given : "plain";
  check(choice == "plain" || choice == "fused", "DCN_PLUGIN_CUDA_KERNELS must be 'plain' or 'fused', got '", choice,
        "'");
  return choice == "fused";
}

}  // namespace dcn
