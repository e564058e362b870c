// Smooth-Chamfer on the CPU: what the binding hands to the kernel. Nothing here depends on torch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace setemb {

// One batch of sets, [sets, vectors, features] with unit stride over features.
struct SetBatch {
  const void* data;
  int64_t sets, vectors;
  int64_t set_stride, vector_stride;  // in elements
  const bool* mask;                   // [sets, vectors] or null
};

struct ChamferProblem {
  SetBatch x, y;
  int64_t features;
  double alpha;
};

// A matrix [rows, columns] of any strides; `wide`: of what sums are accumulated in, not of the type of the sets.
struct StridedMatrix {
  const void* data;
  int64_t row_stride, column_stride;
  bool wide;
};

// What the backward pass writes: contiguous [N, K, D] and [M, L, D], or null where not needed. alpha is ds/dalpha
// summed with g.
struct ChamferGradients {
  void* x;
  void* y;
  double* alpha;
};

// out is contiguous [N, M], of dtype or, if `wide`, of what sums are accumulated in.
void smooth_chamfer_forward(DType dtype, const ChamferProblem& problem, void* out, bool wide);
void smooth_chamfer_backward(DType dtype, const ChamferProblem& problem, StridedMatrix grad,
                             const ChamferGradients& out);

// What y may be stored in where it is only searched; int8 has a scale for each vector.
enum class StoredType { kFloat32, kBFloat16, kFloat16, kInt8 };

// The similarity in float32 of x, float32, with y of another type; a vector of y is y_scale (contiguous [sets,
// vectors], or null) times its entries. out is contiguous [N, M].
void smooth_chamfer_mixed(StoredType y_type, const ChamferProblem& problem, const float* y_scale, float* out);

}  // namespace setemb
