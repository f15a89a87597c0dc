// Included before everything else when the library is compiled for a sanitizer (scripts/sanitize.py): wraps the calls
// of torch::stable::parallel_for. Threads remain torch's own, whose OpenMP runtime is not compiled for ThreadSanitizer,
// so this file tells it what a parallel loop orders. It also records which loops several threads have shared, and can
// give a loop a fault, so that tests see whether the sanitizers find it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <list>
#include <mutex>
#include <string>
#include <thread>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#else
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif

namespace dcn::sanitizers {

// What a loop with a fault does: the first element of the next thread as well; does not tell that it has ended; one
// element too many; one whose number overflows in every product.
enum Fault { kNone, kOverlap, kUntold, kBeyond, kOverflow };

// Atomics are relaxed: what is recorded of a loop must not order what its threads do.
struct Loop {
  std::string name;
  std::atomic<bool> shared{false};
  std::atomic<int> fault{kNone};

  static std::mutex& lock() {
    static std::mutex lock;
    return lock;
  }
  static std::list<Loop>& all() {
    static std::list<Loop> loops;
    return loops;
  }
  static Loop& add(const char* file, int line, const char* body) {
    const std::lock_guard<std::mutex> guard(lock());
    Loop& added = all().emplace_back();
    added.name = std::string(file) + ":" + std::to_string(line) + " " + body;
    return added;
  }
};

// Takes the place of a loop's body. Reads none of its members before the acquisition.
template <typename F>
struct Watched {
  Loop& loop;
  const F& body;
  std::thread::id caller;
  int64_t end, after = 0;

  void* begins() const { return const_cast<Watched*>(this); }
  void* ends() const { return const_cast<int64_t*>(&after); }

  void operator()(int64_t first, int64_t last) const {
    __tsan_acquire(begins());
    const int fault = loop.fault.load(std::memory_order_relaxed);
    if (std::this_thread::get_id() != caller) loop.shared.store(true, std::memory_order_relaxed);
    if (fault == kOverlap) last = std::min(last + 1, end);
    if (fault == kBeyond && last == end) ++last;
    if (fault == kOverflow) last = std::numeric_limits<int64_t>::max(), first = last - 1;
    body(first, last);
    if (fault != kUntold) __tsan_release(ends());
  }
};

}  // namespace dcn::sanitizers

namespace torch::stable {

template <typename F>
void watched_parallel_for(int64_t begin, int64_t end, int64_t grain, const F& body, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  using Watched = dcn::sanitizers::Watched<F>;
  // F is the type of a lambda, so there is one for each loop of the sources and each of its template arguments.
  static auto& loop = dcn::sanitizers::Loop::add(file, line, __PRETTY_FUNCTION__);
  const Watched watched{loop, body, std::this_thread::get_id(), end};
  __tsan_release(watched.begins());
  parallel_for(begin, end, grain, watched);
  __tsan_acquire(watched.ends());
}

}  // namespace torch::stable

#define parallel_for watched_parallel_for

extern "C" {

// The loops that have run, one a line; those that several threads have shared begin with a star.
[[gnu::visibility("default"), gnu::used]] inline const char* dcn_loops() {
  static std::string listed;
  listed.clear();
  for (const auto& loop : dcn::sanitizers::Loop::all()) listed += (loop.shared ? "*" : " ") + loop.name + "\n";
  return listed.c_str();
}

// Loops whose names begin so have that fault from now on.
[[gnu::visibility("default"), gnu::used]] inline void dcn_spoil(const char* beginning, int fault) {
  for (auto& loop : dcn::sanitizers::Loop::all())
    if (loop.name.rfind(beginning, 0) == 0) loop.fault = fault;
}
}
