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

// A loss whose derivative by a logit z = scale s + bias follows from s and what is known of the row and the column. The
// formulas: setemb_kernels/losses/contrast.py.
struct Contrast {
  double scale, bias, weight;
  // Of the type that sums are accumulated in, contiguous [2, N] and [2, M]: log-sum-exps of negatives, and weights.
  // Without rows every pair is judged by itself; without columns they do not compete.
  const void *rows, *columns;
  const int64_t *x_ids, *y_ids;  // pairs of equal ids are positive; null: those of equal places
};

// Sums over all pairs of dL/dz s and, without rows, of dL/dz.
struct ContrastSums {
  double by_scale, by_bias;
};

// out is contiguous [N, M], of dtype or, if `wide`, of what sums are accumulated in.
void smooth_chamfer_forward(DType dtype, const ChamferProblem& problem, void* out, bool wide);
void smooth_chamfer_backward(DType dtype, const ChamferProblem& problem, StridedMatrix grad,
                             const ChamferGradients& out);

// With that loss as the upstream gradient. What `out` has is of the type that sums are accumulated in.
ContrastSums smooth_chamfer_contrast_backward(DType dtype, const ChamferProblem& problem, const Contrast& loss,
                                              const ChamferGradients& out);

// What y may be stored in where it is only searched; int8 has a scale for each vector.
enum class StoredType { kFloat32, kBFloat16, kFloat16, kInt8 };

// The similarity in float32 of x, float32, with y of another type; a vector of y is y_scale (contiguous [sets,
// vectors], or null) times its entries. out is contiguous [N, M].
void smooth_chamfer_mixed(StoredType y_type, const ChamferProblem& problem, const float* y_scale, float* out);

}  // namespace setemb
