// Which kernel served an operator last, for tests, benchmarks and people who wonder (dcn_plugin.ops.kernels_used).
#pragma once

#include <map>
#include <mutex>
#include <sstream>
#include <string>

namespace dcn {

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
