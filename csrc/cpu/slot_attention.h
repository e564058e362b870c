// Slot attention on the CPU: what the binding hands to the kernel. Nothing here depends on torch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace setemb {

// [items, heads, rows, features] with unit stride over features; strides in elements.
struct HeadRows {
  const void* data;
  int64_t item_stride, head_stride, row_stride;
};

struct MutableHeadRows {
  void* data;  // null where not needed
  int64_t item_stride, head_stride, row_stride;
};

struct SlotAttentionProblem {
  int64_t items, heads, slots;
  int64_t groups;  // heads of k and v: as many, or one for all
  int64_t tokens, key_features, value_features;
  HeadRows q, k, v;
  bool keys_are_values;  // v is k, and k gets both gradients
  const void* bias;      // contiguous [items, heads, slots], of the type of q, or null
  const bool* mask;      // contiguous [items, tokens], or null
  double scale, eps, token_eps;
};

// out [items, heads, slots, value_features]; total is contiguous [items, heads, slots] in the accumulation type.
void slot_attention_forward(DType dtype, const SlotAttentionProblem& problem, MutableHeadRows out, void* total);

struct SlotAttentionGradients {
  MutableHeadRows q, k, v;
  void* bias;  // contiguous [items, heads, slots], or null
};

void slot_attention_backward(DType dtype, const SlotAttentionProblem& problem, HeadRows grad, HeadRows out,
                             const void* total, const SlotAttentionGradients& gradients);

}  // namespace setemb
