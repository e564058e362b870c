// What the CPU's bindings share: each op's <op>_op.cpp turns tensors into a problem of plain pointers for its kernel.
//
// The ops' schemas are declared in Python (setemb_kernels/ops/<op>/op.py); here only their CPU implementations.
#pragma once

#include "../binding.h"
#include "dtype.h"

namespace setemb {

using torch::stable::detail::StableLibrary;

void register_smooth_chamfer(StableLibrary& library);
void register_slot_attention(StableLibrary& library);
void register_set_similarity(StableLibrary& library);
void register_gather_rows(StableLibrary& library);

// What values of a type are accumulated in.
inline ScalarType accumulated_in(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      throw std::invalid_argument("expected float32, bfloat16, float16 or float64");
  }
}

}  // namespace setemb
