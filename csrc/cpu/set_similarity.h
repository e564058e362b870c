// Similarities of sets of any sizes on the CPU: what the binding hands to the kernel. Nothing here depends on torch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace setemb {

enum class SimilarityKind { kSmoothChamfer, kChamfer, kMaxSim, kSoftMaxSim, kMax, kMatchProbability };

// Packed sets: set i is the rows offsets[i] to offsets[i + 1] of a matrix [rows, features] of unit stride over
// features.
struct PackedSets {
  const void* data;
  int64_t rows, stride;    // stride in elements
  const int64_t* offsets;  // [sets + 1]
  int64_t sets;
};

struct SimilarityProblem {
  PackedSets x, y;
  int64_t features;
  const int64_t* candidates;  // [x.sets, choices] of y, -1 for none; null: all pairs
  int64_t choices;            // y.sets for all pairs
  SimilarityKind kind;
  bool mean;     // of kMaxSim and kSoftMaxSim: divided by |X|
  double alpha;  // of kMatchProbability the scale
  double bias;
  const float *x_scale, *y_scale;  // of codes: [rows], what each vector is times; null: 1
};

// What the backward pass writes, all of it: contiguous [rows, features], or null where not needed. alpha and bias are
// sums of gradient times derivative.
struct SimilarityGradients {
  void* x;
  void* y;
  double* alpha;
  double* bias;
};

// out and grad are contiguous [x.sets, choices], of dtype or, if `wide`, of what sums are accumulated in.
void set_similarity_forward(DType dtype, const SimilarityProblem& problem, void* out, bool wide);
// Sets of y are codes, those of x float, or int8 like those of y. out is float.
enum class Code { kInt8, kFloat8 };
void set_similarity_of_codes(const SimilarityProblem& problem, bool x_is_int8, Code y, float* out);
void set_similarity_backward(DType dtype, const SimilarityProblem& problem, const void* grad, bool wide,
                             const SimilarityGradients& out);

}  // namespace setemb
