// The CPU as a device: torch's own thread pool, torch's own matrix product, and the instruction set chosen at run time.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <limits>
#include <memory>

#include "kernels.h"
#include "tensor.h"

namespace dcn {

// How many elements of a body a thread of the CPU takes at least: the body's kGrain where it has one.
template <typename Body, typename = void>
struct GrainOf {
  static constexpr int64_t value = 1024;
};
template <typename Body>
struct GrainOf<Body, std::void_t<decltype(Body::kGrain)>> {
  static constexpr int64_t value = Body::kGrain;
};

struct Cpu {
  // Operands of matrix products are in the accumulator type.
  template <typename S>
  using Product = Accumulate<S>;
  static constexpr int64_t column_bytes = 4 << 20;

  template <typename Body>
  static void for_each(const Body& body, const Tensor& /*device*/) {
    torch::stable::parallel_for(0, body.size(), GrainOf<Body>::value, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

  static constexpr int kLanes = 1;  // threads that may share an element (shared_sums.h)

  // What elements may be numbered with in 32 bits.
  static int64_t largest_index() { return std::numeric_limits<int32_t>::max(); }

  // out = a @ b. Straight to the CPU kernel: safe in worker threads, where it runs on one core.
  static void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
  // out = added + a @ b, where `added` is out itself or a row for all of its rows.
  static void multiply_and_add(const Tensor& out, const Tensor& added, const Tensor& a, const Tensor& b) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), added.get(), a.get(), b.get(), 1.0, 1.0));
  }

  // sums[i] = counts[0] + ... + counts[i], in the type of the counts.
  static Tensor running_sum(const Tensor& counts) {
    AtenTensorHandle sums = nullptr;
    int32_t type = aoti_torch_dtype_int32();
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_cumsum(counts.get(), 0, &type, &sums));
    return Tensor(sums);
  }
};

#if defined(__GNUC__) && defined(__x86_64__)
#define DCN_X86_LEVELS
#define DCN_TARGET_V3 __attribute__((target("arch=x86-64-v3")))
#if defined(__clang__)
// Without it clang keeps to 32-byte vectors, which it takes for faster.
#define DCN_TARGET_V4 __attribute__((target("arch=x86-64-v4"), min_vector_width(512)))
#define DCN_TARGET_BFLOAT16 __attribute__((target("arch=x86-64-v4,avx512bf16"), min_vector_width(512)))
#else
#define DCN_TARGET_V4 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#define DCN_TARGET_BFLOAT16 __attribute__((target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")))
#endif

// The same body compiled for newer instruction sets. Everything a body calls in its loops must be DCN_HOST_DEVICE
// (always inlined): a function that is called keeps the instruction set it was compiled for.
template <typename Body>
DCN_TARGET_V4 void run_v4(const Body& body) {
  body();
}
template <typename Body>
DCN_TARGET_V3 void run_v3(const Body& body) {
  body();
}

// The widest vectors that the processor has and that are chosen.
inline CpuKernels tuned_kernels() {
  static const CpuKernels widest = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
      return kTunedV4;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
      return kTunedV3;
    return kTunedBaseline;
  }();
  return std::min(widest, chosen_cpu_kernels().load(std::memory_order_relaxed));
}

inline bool has_bfloat16_products() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has && tuned_kernels() == kTunedV4;
}
// AMD's processors do 32 products of bfloat16 in the time of a fused multiply-add, which does 16. Intel's take more
// than twice that time, so there widening to float is faster.
inline bool bfloat16_products_are_fast() {
  static const bool fast = __builtin_cpu_is("amd");
  return fast && has_bfloat16_products();
}

template <typename Body>
void run_vectorised(const Body& body) {
  const CpuKernels kernels = tuned_kernels();
  if (kernels >= kTunedV4) return run_v4(body);
  if (kernels >= kTunedV3) return run_v3(body);
  body();
}
#else
inline CpuKernels tuned_kernels() { return kTunedBaseline; }
inline bool bfloat16_products_are_fast() { return false; }

template <typename Body>
void run_vectorised(const Body& body) {
  body();
}
#endif

// Whether bfloat16 is multiplied as pairs (runtime/cpu_pairs.h).
inline bool multiplies_pairs() {
  const CpuKernels chosen = chosen_cpu_kernels().load(std::memory_order_relaxed);
  return chosen == kTunedBFloat16 || (chosen == kTuned && bfloat16_products_are_fast());
}

// What serves a call that the tuned path can serve.
inline CpuKernels chosen_kernels() {
  return chosen_cpu_kernels().load(std::memory_order_relaxed) == kPortable ? kPortable : tuned_kernels();
}

// What serves a call, unless there is a reason why the tuned path cannot. Noted in the log.
inline CpuKernels choose_kernels(KernelLog& log, const char* reason) {
  const CpuKernels kernels = reason ? kPortable : chosen_kernels();
  log.note(name_of(kernels), reason);
  return kernels;
}

// Vectors run over the inner of two loops: without this GCC may merge iterations of the outer one, which undoes them.
DCN_HOST_DEVICE void keep_iterations_apart() {
#if defined(__GNUC__)
  __asm__("");
#endif
}

DCN_HOST_DEVICE void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}
// Not into the nearest cache, which is too small for all that is fetched before it is read.
DCN_HOST_DEVICE void prefetch_nearby([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 0, 2);
#endif
}

// Asks for large pages where the memory of a new tensor has none yet: filling some tens of megabytes takes several
// times as long with small ones, since the system hands them out one at a time.
inline void prefer_large_pages([[maybe_unused]] const Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.data_ptr()),
                  end = begin + fresh.numel() * fresh.element_size();
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (last >= first + 8 * page) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Scratch of one thread, kept between calls: fresh pages cost more than small tiles do.
template <typename A, int Slot>
A* thread_scratch(int64_t count) {
  struct Buffer {
    std::unique_ptr<A[]> data;
    int64_t capacity = 0;
  };
  static thread_local Buffer buffer;
  if (buffer.capacity < count) {
    buffer.data.reset();
    buffer.data.reset(new A[count]);
    buffer.capacity = count;
  }
  return buffer.data.get();
}

// Memory of one thread for the time of a task, kept between calls for the same reason. Everything begins on a cache
// line. Count first, with a Scratch of nothing, what a real one must hold.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t bytes) {
    next_ = reinterpret_cast<uintptr_t>(thread_scratch<char, -1>(bytes + line));
    next_ = (next_ + line - 1) / line * line;
  }
  template <typename T>
  T* take(int64_t count) {
    const uintptr_t taken = next_;
    next_ += (count * sizeof(T) + line - 1) / line * line;
    return reinterpret_cast<T*>(taken);
  }
  int64_t counted() const { return static_cast<int64_t>(next_); }

 private:
  static constexpr uintptr_t line = 64;
  uintptr_t next_ = 0;
};

}  // namespace dcn
