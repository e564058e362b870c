// From a dtype at run time to a type of the compiler.
#pragma once

#include <type_traits>

#include "simd.h"

namespace setemb {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// What values of type In are accumulated in.
template <class In>
using AccOf = std::conditional_t<std::is_same_v<In, double>, double, float>;

// Calls f with a value of the type.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(bfloat16_t{});
    case DType::kFloat16:
      return f(float16_t{});
  }
}

}  // namespace setemb
