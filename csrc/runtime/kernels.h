// Which kernels may serve a call, and which served an operator last, on the CPU and on CUDA. Each path has one name,
// here, in Python and in the documents:
//
//   portable  the bodies of an operator, an element at a time; serves every call on every device
//   tuned     the CPU's own: vectors over channels, in tiles that stay in the cache
//   fused     CUDA's own: sampling in 16-byte vectors, with what follows it (tensor cores, sums over points) in one
//   kernel
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <string>

#include "tensor.h"

namespace dcn {

// What the CPU may run, in the order of what it asks of the processor. `kTuned` is what is fastest on the one at hand;
// `kTunedBFloat16` multiplies bfloat16 as pairs on every processor, by its own instruction or else by widening.
enum CpuKernels : int { kPortable = 0, kTunedBaseline = 1, kTunedV3 = 3, kTunedV4 = 4, kTuned = 5, kTunedBFloat16 = 6 };

inline const char* name_of(CpuKernels kernels) {
  switch (kernels) {
    case kPortable:
      return "portable";
    case kTunedBaseline:  // the compiler's own vectors
      return "tuned baseline";
    case kTunedV3:
      return "tuned x86-64-v3";
    case kTunedV4:
      return "tuned x86-64-v4";
    case kTuned:
      return "tuned";
    default:
      return "tuned bfloat16";
  }
}

// What the CPU may run at most. _choose_cpu_kernels sets it, for tests, which hold all against the same truth, and for
// benchmarks.
inline std::atomic<CpuKernels>& chosen_cpu_kernels() {
  static std::atomic<CpuKernels> chosen{kTuned};
  return chosen;
}

// What CUDA runs where the environment does not say. Not the fused kernels, since these have not run on a GPU yet:
// docs/gpu-runbook.md says when this line changes.
inline constexpr char kDefaultCudaKernels[] = "portable";

// Whether CUDA may run fused kernels. Looked at in every call.
inline bool chooses_fused_kernels() {
  const char* const given = std::getenv("DCN_PLUGIN_CUDA_KERNELS");
  const std::string choice = given && *given ? given : kDefaultCudaKernels;
  check(choice == "portable" || choice == "fused", "DCN_PLUGIN_CUDA_KERNELS: expected 'portable' or 'fused', got '",
        choice, "'");
  return choice == "fused";
}

// Why fused kernels do not serve, where a reason is no operator's own.
inline constexpr char kNotChosen[] = "DCN_PLUGIN_CUDA_KERNELS: expected 'fused'";
inline constexpr char kOldProcessor[] = "the GPU: expected compute capability 8.0 or newer";
inline constexpr char kNotLaunched[] = "the GPU: expected shared memory for a block, and fewer than 2^31 blocks";

// The kernels that served one operator last, in any thread, and why these and no faster ones. Made once for each
// operator, when the library is loaded; a note is three stores.
class KernelLog {
 public:
  explicit KernelLog(const char* op) : op_(op), next_(first()) { first() = this; }
  KernelLog(const KernelLog&) = delete;

  // Strings that stay. `reason` says why kernels made for the device do not serve the call; null where they do.
  void note(const char* kernels, const char* reason = nullptr) {
    kernels_.store(kernels, std::memory_order_relaxed);
    reason_.store(reason, std::memory_order_relaxed);
    time_.store(std::chrono::steady_clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  }

  // A line for each operator of this library that has run: name, time, kernels, reason or nothing, between tabs.
  // dcn_plugin.ops.kernels_used reads them: the CPU's library and CUDA's have a log each.
  static std::string lines() {
    std::string text;
    for (const KernelLog* log = first(); log; log = log->next_)
      if (const char* const kernels = log->kernels_.load(std::memory_order_relaxed)) {
        const char* const reason = log->reason_.load(std::memory_order_relaxed);
        text += std::string(log->op_) + "\t" + std::to_string(log->time_.load(std::memory_order_relaxed)) + "\t" +
                kernels + "\t" + (reason ? reason : "") + "\n";
      }
    return text;
  }

 private:
  static KernelLog*& first() {
    static KernelLog* log = nullptr;
    return log;
  }
  const char* op_;
  KernelLog* next_;
  std::atomic<const char*> kernels_{nullptr}, reason_{nullptr};
  std::atomic<int64_t> time_{0};
};

}  // namespace dcn
