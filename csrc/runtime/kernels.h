// Which kernels may serve a call, and which one served an operator last.
#pragma once

#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>
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

struct KernelLog {
  std::mutex mutex;
  std::map<std::string, std::string> last;
};

inline KernelLog& kernel_log() {
  static KernelLog log;
  return log;
}

template <typename... Parts>
void note_kernel(const std::string& op, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  KernelLog& log = kernel_log();
  const std::lock_guard<std::mutex> lock(log.mutex);
  log.last[op] = text.str();
}

// Lines of "operator: kernel".
inline std::string kernels_used() {
  KernelLog& log = kernel_log();
  const std::lock_guard<std::mutex> lock(log.mutex);
  std::string text;
  for (const auto& [op, kernel] : log.last) text += op + ": " + kernel + "\n";
  return text;
}

}  // namespace dcn
