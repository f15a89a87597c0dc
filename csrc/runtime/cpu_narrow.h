// Products of narrow groups: as many inputs as outputs to a group, and fewer than a vector has lanes. A product of
// matrices would fill few lanes and cost more calls than sums; here vectors run over the channels of several groups.
#pragma once

#include "cpu_product.h"

namespace dcn::narrow {

// Sums over taps k, pixels q or the members i of each group, for channels c. spread(v, i) gives every channel the value
// that member i of its group has.
template <typename T>
struct Sums {
  int64_t count, taps, channels;  // pixels; channels in whole vectors
  const T* weight;                // [tap, member, channel]
  T* gradient;                    // of the weight, likewise
  T *columns, *rows;              // [tap, pixel, channel] by strides, and [pixel, channel]
  int64_t tap, pixel, row;
};

template <typename T>
struct Kernels {
  int lanes;
  // By the logarithm of the group's width; null where a group fills a vector.
  void (*forward[4])(const Sums<T>&);   // rows[q, c] += sum over k, i of weight[k, i, c] * spread(columns[k, q], i)[c]
  void (*columns[4])(const Sums<T>&);   // columns[k, q, c] = sum over i of weight[k, i, c] * spread(rows[q], i)[c]
  void (*gradient[4])(const Sums<T>&);  // gradient[k, i, c] += sum over q of columns[k, q, c] * spread(rows[q], i)[c]
};

}  // namespace dcn::narrow

#define DCN_ISA baseline
#define DCN_TARGET
#define DCN_VECTOR_BYTES 16
#include "cpu_narrow_kernel.h"
#undef DCN_ISA
#undef DCN_TARGET
#undef DCN_VECTOR_BYTES

#if defined(DCN_X86_LEVELS)
#define DCN_ISA v3
#define DCN_TARGET DCN_TARGET_V3
#define DCN_VECTOR_BYTES 32
#include "cpu_narrow_kernel.h"
#undef DCN_ISA
#undef DCN_TARGET
#undef DCN_VECTOR_BYTES

#define DCN_ISA v4
#define DCN_TARGET DCN_TARGET_V4
#define DCN_VECTOR_BYTES 64
#include "cpu_narrow_kernel.h"
#undef DCN_ISA
#undef DCN_TARGET
#undef DCN_VECTOR_BYTES
#endif

namespace dcn::narrow {

template <typename T>
const Kernels<T>& kernels() {
#if defined(DCN_X86_LEVELS)
  static constexpr Kernels<T> with_v3 = v3::kernels<T>(), with_v4 = v4::kernels<T>();
  const CpuKernels chosen = tuned_kernels();
  if (chosen >= kTunedV4) return with_v4;
  if (chosen >= kTunedV3) return with_v3;
#endif
  static constexpr Kernels<T> with_baseline = baseline::kernels<T>();
  return with_baseline;
}

// The logarithm of a group's width, if there are sums for it; else 0.
template <typename T>
int width_of(int64_t channels, int64_t outputs) {
  for (int log = 1; channels == outputs && log < 4; ++log)
    if (channels == 1 << log && kernels<T>().forward[log]) return log;
  return 0;
}

}  // namespace dcn::narrow
