// What every operator needs of torch, through its stable ABI only: types, views, layouts, checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../core/view.h"

// Newer torch passes on what went wrong in a call across the ABI; the oldest only says that something did.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace dcn {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << "]";
  return text.str();
}

inline std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "a device without these operators";
}

// The type that a stored type S is computed and summed in, as torch's opmath_t.
template <typename S>
using Accumulate = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename S>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<S, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<S, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<S, Half>) return ScalarType::Half;
  if constexpr (std::is_same_v<S, BFloat16>) return ScalarType::BFloat16;
}

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline void check_type(const char* op, const char* name, const Tensor& t) {
  check(is_supported(t.scalar_type()), op, ": ", name, ": expected Double, Float, Half or BFloat16, got ",
        t.scalar_type());
}

// That an argument is on the device of the operator's first tensor and of its type, or, where that is none for
// positions, Float.
inline void check_like(const char* op, const char* name, const Tensor& t, const char* first_name, const Tensor& first,
                       bool or_float) {
  const ScalarType type = first.scalar_type();
  const bool may_be_float = or_float && type != ScalarType::Double && type != ScalarType::Float;
  const char* const also = may_be_float ? " or Float" : "";
  check(t.scalar_type() == type || (may_be_float && t.scalar_type() == ScalarType::Float), op, ": ", name,
        ": expected ", type, " like ", first_name, also, ", got ", t.scalar_type());
  check(t.device() == first.device(), op, ": ", name, ": expected a tensor on ", device_of(first), " like ", first_name,
        ", got ", device_of(t));
}

// Calls `f` with a value of the C++ type that `type` names.
template <typename F>
auto dispatch_floating(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      throw std::logic_error("dcn_plugin: a type that check_input_type has not refused");
  }
}

template <typename S>
View<S> view(const Tensor& t) {
  return {static_cast<S*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// torch's own rule for the layout of a result (c10::is_channels_last_strides_2d); ops/_layout.py has it for tracing.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.stride(1) == 0) return false;
  int64_t smallest = 0;
  for (int d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < smallest) return false;
    if (d == 0 && smallest == t.stride(1)) return false;  // N111 and the like stay contiguous
    smallest = t.stride(d) * (t.size(d) > 1 ? t.size(d) : 1);
  }
  return true;
}

// Whether a tensor lies in memory with just these strides; a dimension of size 1 may have any.
inline bool is_stored(const Tensor& t, const std::vector<int64_t>& strides) {
  for (size_t d = 0; d < strides.size(); ++d)
    if (t.size(d) > 1 && t.stride(d) != strides[d]) return false;
  return true;
}

inline Tensor new_image(const Tensor& like, std::vector<int64_t> sizes, ScalarType type, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// A matrix over memory that somebody else keeps alive, for torch's matrix products.
template <typename M>
Tensor matrix(M* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, const Tensor& like) {
  return torch::stable::from_blob(const_cast<std::remove_const_t<M>*>(data), {rows, columns},
                                  {row_stride, column_stride}, like.device(), scalar_type_of<std::remove_const_t<M>>());
}

}  // namespace dcn
