// What products are made in, and how their operands lie in memory. setemb_kernels/_cuda.py has the same numbers.
#pragma once

#include <stdexcept>

namespace setemb::cuda {

// float32 on tensor cores (tf32), or not.
enum class Arithmetic { kBFloat16, kFloat16, kTf32, kFloat32 };
struct bfloat16;
struct float16;
struct tf32;

template <class A>
struct StorageOf {
  using type = A;
};
template <>
struct StorageOf<tf32> {
  using type = float;
};
template <class A>
using Storage = typename StorageOf<A>::type;

// Calls f with a null pointer to the type of an arithmetic.
template <class F>
void with_arithmetic(Arithmetic arithmetic, const F& f) {
  switch (arithmetic) {
    case Arithmetic::kBFloat16:
      return f(static_cast<bfloat16*>(nullptr));
    case Arithmetic::kFloat16:
      return f(static_cast<float16*>(nullptr));
    case Arithmetic::kTf32:
      return f(static_cast<tf32*>(nullptr));
    case Arithmetic::kFloat32:
      return f(static_cast<float*>(nullptr));
  }
  throw std::runtime_error("unknown arithmetic");
}

}  // namespace setemb::cuda
