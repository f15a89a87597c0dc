// Adding to a value that several threads may add to, on host and device.
#pragma once

#include "sampling.h"

namespace dcn {

template <typename A>
DCN_HOST_DEVICE void atomic_add(A* address, A value) {
#if defined(__CUDA_ARCH__)
  atomicAdd(address, value);
#elif defined(__GNUC__)
  A expected, desired;
  __atomic_load(address, &expected, __ATOMIC_RELAXED);
  do {
    desired = expected + value;
  } while (!__atomic_compare_exchange(address, &expected, &desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
#else
#error "atomic_add needs a compiler with __atomic builtins"
#endif
}

// Adds to a count and returns what it was before.
DCN_HOST_DEVICE int32_t fetch_add(int32_t* address, int32_t value) {
#if defined(__CUDA_ARCH__)
  return atomicAdd(address, value);
#elif defined(__GNUC__)
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
#else
#error "fetch_add needs a compiler with __atomic builtins"
#endif
}

}  // namespace dcn
