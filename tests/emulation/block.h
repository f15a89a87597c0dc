// A block of a GPU's threads on the CPU: the interface of csrc/runtime/cuda_block.cuh, as the PTX manual specifies it.
// A thread waits for the others at barriers and matrix operations. Between these a schedule chooses the order of
// threads and whether asynchronous copies arrive as early or as late as the manual allows.
#pragma once

#include <algorithm>
#include <array>
#include <deque>

#include "fibers.h"
#include "runtime/gpu_values.h"

namespace emulation {

struct Schedule {
  Order order = Order::kUp;
  bool late_copies = false;
  bool blocks_backwards = false;
  unsigned seed = 1;
  bool adds_vectors = true;
};

struct Copy {
  void* to;
  const void* from;
  bool wanted;
  void run() const { wanted ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); }
};

// Where the threads of a block, or of a warp, wait for each other.
struct Barrier {
  int members = 0, arrived = 0;
};

using Words = std::array<uint32_t, 4>;

// What a lane of a warp hands to the others in one exchange.
struct LaneData {
  const void* row;
  Words a;
  std::array<uint32_t, 2> b;
  std::array<float, 4> sums;
  uint32_t word;
};

class BlockState {
 public:
  BlockState(int threads, int shared_bytes, const Schedule& schedule)
      : schedule(schedule),
        fibers(threads, schedule.order, schedule.seed),
        copies(threads),
        lanes(threads),
        exchanges(threads, 0),
        shared(new unsigned char[shared_bytes + 128]),
        size(shared_bytes) {
    whole.members = threads;
    warps.resize(threads / 32);
    for (Barrier& w : warps) w.members = 32;
  }
  unsigned char* shared_begin() {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared.get()) + 127) & ~uintptr_t(127));
  }

  Schedule schedule;
  Fibers fibers;
  Barrier whole;
  std::vector<Barrier> warps;
  std::vector<std::deque<std::vector<Copy>>> copies;
  std::vector<std::array<LaneData, 2>> lanes;
  std::vector<int> exchanges;
  std::unique_ptr<unsigned char[]> shared;
  int size;
  int64_t index = 0;
};

class Block {
 public:
  Block(BlockState& state, int thread) : s_(state), thread_(thread) { pending().emplace_back(); }

  int64_t index() const { return s_.index; }
  int thread() const { return thread_; }
  unsigned char* shared() const { return s_.shared_begin(); }

  void sync() {
    wait(s_.whole, 0, [] {});
  }
  void sync_warp() {
    wait(warp(), first(), [] {});
  }

  float from_lane_across(float value, int distance) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    word = exchange(word, (thread_ % 32 ^ distance) - thread_ % 32);
    std::memcpy(&value, &word, 4);
    return value;
  }

  bool adds_vectors() const { return s_.schedule.adds_vectors; }
  void add(float* to, float value) { *to += value; }
  void add_vector(float* to, const float* four) {
    if (reinterpret_cast<uintptr_t>(to) % 16) {
      std::fprintf(stderr, "emulated block: a vector that is added to is not aligned\n");
      std::abort();
    }
    for (int i = 0; i < 4; ++i) to[i] += four[i];
  }

  void copy_async(void* to, const void* from, bool wanted) {
    const Copy copy{to, from, wanted};
    if (s_.schedule.late_copies)
      pending().back().push_back(copy);
    else
      copy.run();
  }
  void commit_copies() { pending().emplace_back(); }
  template <int Pending>
  void wait_for_copies() {
    while (pending().size() > Pending + 1) {
      for (const Copy& copy : pending().front()) copy.run();
      pending().pop_front();
    }
  }

  void load_matrices(uint32_t (&m)[4], const void* row) {
    lane(thread_ % 32).row = row;
    // Shared memory is read once all lanes have arrived, which is as late as hardware may.
    sync_warp();
    const int l = thread_ % 32;
    for (int i = 0; i < 4; ++i) {
      const auto* from = static_cast<const unsigned char*>(lane(8 * i + l / 4).row);
      if (from < s_.shared_begin() || from + 16 > s_.shared_begin() + s_.size ||
          reinterpret_cast<uintptr_t>(from) % 16) {
        std::fprintf(stderr, "emulated block: a matrix row lies outside shared memory or is not aligned\n");
        std::abort();
      }
      std::memcpy(&m[i], from + l % 4 * 4, 4);
    }
    next_exchange();
  }

  template <typename S>
  void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    LaneData& mine = lane(thread_ % 32);
    std::copy(a, a + 4, mine.a.begin());
    mine.b = {b0, b1};
    std::copy(sums, sums + 4, mine.sums.begin());
    wait(warp(), first(), [&] { multiply_warp<S>(); });
    std::copy(mine.sums.begin(), mine.sums.end(), sums);
    next_exchange();
  }

 private:
  int first() const { return thread_ / 32 * 32; }
  Barrier& warp() { return s_.warps[thread_ / 32]; }
  std::deque<std::vector<Copy>>& pending() { return s_.copies[thread_]; }
  // Two buffers alternate: a thread that is at the next exchange already writes where nobody reads any more.
  LaneData& lane(int i) { return s_.lanes[first() + i][s_.exchanges[thread_] & 1]; }
  void next_exchange() { ++s_.exchanges[thread_]; }

  // Waits until all members have arrived; the last one does `act` before they go on.
  template <typename F>
  void wait(Barrier& m, int first_member, const F& act) {
    if (++m.arrived < m.members) {
      s_.fibers.sleep();
      return;
    }
    m.arrived = 0;
    act();
    for (int i = 0; i < m.members; ++i) s_.fibers.wake(first_member + i);
    s_.fibers.pause();
  }

  // The word of the lane `distance` above this one.
  uint32_t exchange(uint32_t word, int distance) {
    lane(thread_ % 32).word = word;
    sync_warp();
    const uint32_t found = lane(thread_ % 32 + distance).word;
    next_exchange();
    return found;
  }

  // Layout of the fragments: PTX ISA, mma.m16n8k16 for 16-bit types, mma.m16n8k8 for TF32. A word holds `kInWord`
  // terms, and four lanes side by side hold the words of 16 bytes.
  template <typename S>
  void multiply_warp() {
    constexpr int kInWord = 4 / sizeof(S), kTerms = 8 * kInWord;
    float a[16][kTerms], b[kTerms][8];
    for (int l = 0; l < 32; ++l) {
      const LaneData& of = lane(l);
      for (int e = 0; e < kInWord; ++e) {
        const int c = l % 4 * kInWord + e;
        for (int w = 0; w < 4; ++w) a[l / 4 + (w & 1) * 8][c + (w >> 1) * kTerms / 2] = operand<S>(of.a[w], e);
        for (int w = 0; w < 2; ++w) b[c + w * kTerms / 2][l / 4] = operand<S>(of.b[w], e);
      }
    }
    for (int l = 0; l < 32; ++l)
      for (int e = 0; e < 4; ++e) {
        const int r = l / 4 + (e >> 1) * 8, c = l % 4 * 2 + (e & 1);
        for (int k = 0; k < kTerms; ++k) lane(l).sums[e] += a[r][k] * b[k][c];
      }
  }

  // Value e of a word. The tensor cores ignore what float has beyond TF32, which is not what rounding would give.
  template <typename S>
  static float operand(uint32_t word, int e) {
    if constexpr (sizeof(S) == 4) {
      float value;
      std::memcpy(&value, &word, 4);
      if (value == value && (word & 0x1fff)) {
        std::fprintf(stderr, "emulated block: an operand of a product in TF32 is not rounded\n");
        std::abort();
      }
      return value;
    } else {
      S pair[2];
      std::memcpy(pair, &word, 4);
      return static_cast<float>(pair[e]);
    }
  }

  BlockState& s_;
  int thread_;
};

template <typename Kernel>
void run_grid(const Kernel& kernel, int64_t blocks, const Schedule& schedule) {
  BlockState state(Kernel::kThreads, Kernel::kSharedBytes, schedule);
  for (int64_t i = 0; i < blocks; ++i) {
    state.index = schedule.blocks_backwards ? blocks - 1 - i : i;
    // A block may find anything in shared memory; here it is NaN in every type.
    std::memset(state.shared_begin(), 0xff, Kernel::kSharedBytes);
    for (auto& copies : state.copies) copies.clear();
    state.fibers.run([&](int thread) {
      Block block(state, thread);
      kernel(block);
    });
  }
}

}  // namespace emulation
