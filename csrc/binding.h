// From torch's stable tensors to plain pointers and sizes. Every op's binding uses it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>

namespace setemb {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Of a 0-dim tensor on the CPU.
inline double number(const Tensor& t) {
  const Tensor as_double = t.scalar_type() == ScalarType::Double ? t : torch::stable::to(t, ScalarType::Double);
  return *static_cast<const double*>(as_double.data_ptr());
}

// The same, a finite number > 0.
inline double sharpness(const Tensor& alpha) {
  const double value = number(alpha);
  if (!(value > 0 && std::isfinite(value))) {
    throw std::invalid_argument("alpha: expected a finite number > 0, got " + std::to_string(value));
  }
  return value;
}

// Itself where its last dimension has unit stride, else a contiguous copy.
inline Tensor unit_last_stride(const Tensor& t) {
  return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

}  // namespace setemb
