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

// What the CPU may run, in the order of what it asks of the processor.
enum CpuKernels : int { kPortable = 0, kTunedBaseline = 1, kTunedV3 = 3, kTunedV4 = 4 };

inline const char* name_of(CpuKernels kernels) {
  switch (kernels) {
    case kPortable:
      return "portable";
    case kTunedBaseline:  // the compiler's own vectors
      return "tuned baseline";
    case kTunedV3:
      return "tuned x86-64-v3";
    default:
      return "tuned x86-64-v4";
  }
}

// What the CPU may run at most. _choose_cpu_kernels sets it, for tests, which hold all against the same truth, and for
// benchmarks.
inline std::atomic<CpuKernels>& chosen_cpu_kernels() {
  static std::atomic<CpuKernels> chosen{kTunedV4};
  return chosen;
}

// Whether CUDA may run fused kernels. Looked at in every call; not the default, since they have not run on a GPU yet.
inline bool chooses_fused_kernels() {
  const char* const given = std::getenv("DCN_PLUGIN_CUDA_KERNELS");
  const std::string choice = given && *given ? given : "portable";
  check(choice == "portable" || choice == "fused", "DCN_PLUGIN_CUDA_KERNELS: expected 'portable' or 'fused', got '",
        choice, "'");
  return choice == "fused";
}

// The kernels that served one operator last, in any thread. Made once for each operator, when the library is loaded; a
// note is two stores.
class KernelLog {
 public:
  explicit KernelLog(const char* op) : op_(op), next_(first()) { first() = this; }
  KernelLog(const KernelLog&) = delete;

  // `kernels` is a string that stays.
  void note(const char* kernels) {
    kernels_.store(kernels, std::memory_order_relaxed);
    time_.store(std::chrono::steady_clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  }

  // A line for each operator of this library that has run: name, time, kernels, between tabs.
  // dcn_plugin.ops.kernels_used reads them: the CPU's library and CUDA's have a log each.
  static std::string lines() {
    std::string text;
    for (const KernelLog* log = first(); log; log = log->next_)
      if (const char* const kernels = log->kernels_.load(std::memory_order_relaxed))
        text += std::string(log->op_) + "\t" + std::to_string(log->time_.load(std::memory_order_relaxed)) + "\t" +
                kernels + "\n";
    return text;
  }

 private:
  static KernelLog*& first() {
    static KernelLog* log = nullptr;
    return log;
  }
  const char* op_;
  KernelLog* next_;
  std::atomic<const char*> kernels_{nullptr};
  std::atomic<int64_t> time_{0};
};

}  // namespace dcn
