// Threads of a GPU's block as fibers of one CPU thread: each runs until it waits, then another goes on. The order is a
// parameter, so that code which works in one order only fails in another.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

// Written by hand for x86-64, since swapcontext makes two system calls each time.
#if defined(__x86_64__)
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

enum class Order { kUp, kDown, kRandom };

class Fibers {
 public:
  static constexpr size_t kStack = 256 << 10;

  Fibers(int count, Order order, unsigned seed) : order_(order), random_(seed), fibers_(count) {
    for (Fiber& f : fibers_) f.stack.reset(new char[kStack]);
  }

  // Runs body(i) for all fibers to their ends.
  void run(const std::function<void(int)>& body) {
    body_ = &body;
    left_ = static_cast<int>(fibers_.size());
    for (Fiber& f : fibers_) prepare(f);
    while (left_ > 0) {
      const int next = pick();
      if (next < 0) {
        std::fprintf(stderr, "emulated block: every thread waits for another (a barrier that not all reach)\n");
        std::abort();
      }
      enter(next);
    }
  }

  int current() const { return current_; }
  // The current fiber goes on when somebody wakes it.
  void sleep() {
    fibers_[current_].awake = false;
    leave(false);
  }
  void wake(int i) { fibers_[i].awake = true; }
  // Lets others go on first.
  void pause() { leave(false); }

 private:
  struct Fiber {
    std::unique_ptr<char[]> stack;
    void* top = nullptr;
    ucontext_t context;
    void* fake_stack = nullptr;
    bool awake = true, done = false;
  };

  int pick() {
    const int n = static_cast<int>(fibers_.size());
    const int start = order_ == Order::kRandom ? static_cast<int>(random_() % n) : (order_ == Order::kUp ? 0 : n - 1);
    const int step = order_ == Order::kDown ? n - 1 : 1;
    for (int tried = 0, i = start; tried < n; ++tried, i = (i + step) % n)
      if (fibers_[i].awake && !fibers_[i].done) return i;
    return -1;
  }

  static Fibers*& running() {
    static thread_local Fibers* now = nullptr;
    return now;
  }

  static void start() {
    Fibers* const self = running();
    self->arrived(nullptr);
    (*self->body_)(self->current_);
    self->leave(true);
    std::abort();
  }

  void prepare(Fiber& f) {
    f.awake = true, f.done = false, f.fake_stack = nullptr;
    forget_frames(f);
#if defined(__x86_64__)
    auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(f.stack.get()) + kStack) & ~uintptr_t(15));
    *--top = nullptr;                          // where `start` would return to
    *--top = reinterpret_cast<void*>(&start);  // where the first switch returns to
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    f.top = top;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    makecontext(&f.context, &start, 0);
#endif
  }

  void enter(int i) {
    current_ = i;
    running() = this;
    Fiber& f = fibers_[i];
    void* fake = nullptr;
    leaving(&fake, f.stack.get(), kStack);
#if defined(__x86_64__)
    emulation_switch(&scheduler_top_, f.top);
#else
    swapcontext(&scheduler_, &f.context);
#endif
    arrived(fake);
  }

  void leave(bool done) {
    Fiber& f = fibers_[current_];
    f.done = done;
    if (done) --left_;
    leaving(done ? nullptr : &f.fake_stack, scheduler_stack_, scheduler_size_);
#if defined(__x86_64__)
    emulation_switch(&f.top, scheduler_top_);
#else
    swapcontext(&f.context, &scheduler_);
#endif
    arrived(f.fake_stack);
  }

  // AddressSanitizer is told which stack is in use.
#if defined(__SANITIZE_ADDRESS__)
  void leaving(void** fake, const void* stack, size_t size) { __sanitizer_start_switch_fiber(fake, stack, size); }
  void arrived(void* fake) {
    const void* from = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(fake, &from, &size);
    bool ours = false;
    for (const Fiber& f : fibers_) ours |= f.stack.get() == from;
    if (!ours) scheduler_stack_ = from, scheduler_size_ = size;
  }
  // `start` never returns, so the poisoned memory around its variables has to be released here.
  static void forget_frames(Fiber& f) { __asan_unpoison_memory_region(f.stack.get(), kStack); }
#else
  void leaving(void**, const void*, size_t) {}
  void arrived(void*) {}
  static void forget_frames(Fiber&) {}
#endif

  Order order_;
  std::minstd_rand random_;
  std::vector<Fiber> fibers_;
  const std::function<void(int)>* body_ = nullptr;
  int current_ = 0, left_ = 0;
  void* scheduler_top_ = nullptr;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
};

}  // namespace emulation
