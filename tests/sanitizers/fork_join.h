// Included before everything else when the library is compiled for a sanitizer (scripts/sanitize.py): puts itself
// around the calls of torch::stable::parallel_for, whose threads remain torch's own. ThreadSanitizer does not know
// those, since their OpenMP runtime is not compiled for it, and is told here what a parallel loop orders. It notes
// which loops threads have really shared; and it can spoil a loop, by which a test knows that the sanitizers see.
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

// What a spoiled loop does: an element twice, the first of the next part; ends untold; an element too
// many; one that no product holds.
enum Fault { kNone, kOverlap, kUntold, kBeyond, kOverflow };

// Whatever is kept of a loop is relaxed: it must not order what the threads do.
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

// What the threads are given in the place of a loop's body. Nothing of it is read before the acquisition.
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
  // F is the type of a lambda: one for each loop of the sources, and each of its types.
  static auto& loop = dcn::sanitizers::Loop::add(file, line, __PRETTY_FUNCTION__);
  const Watched watched{loop, body, std::this_thread::get_id(), end};
  __tsan_release(watched.begins());
  parallel_for(begin, end, grain, watched);
  __tsan_acquire(watched.ends());
}

}  // namespace torch::stable

#define parallel_for watched_parallel_for

extern "C" {

// The loops that have run, a line each; those whose bodies have run on several threads begin with a star.
[[gnu::visibility("default"), gnu::used]] inline const char* dcn_loops() {
  static std::string listed;
  listed.clear();
  for (const auto& loop : dcn::sanitizers::Loop::all()) listed += (loop.shared ? "*" : " ") + loop.name + "\n";
  return listed.c_str();
}

// Loops of this beginning have that fault from now on.
[[gnu::visibility("default"), gnu::used]] inline void dcn_spoil(const char* beginning, int fault) {
  for (auto& loop : dcn::sanitizers::Loop::all())
    if (loop.name.rfind(beginning, 0) == 0) loop.fault = fault;
}
}
