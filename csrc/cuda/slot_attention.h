// Slot attention on a GPU: the kernels' arguments.
//
//   weights            q, k -> W = softmax over slots + token_eps, and its sums over blocks of tokens
//   logit_gradients    q, k, grad, v -> W / total, dz, and sums of dz over blocks of tokens
//   gather             W or dz, tokens -> what each slot takes from its tokens: U, dq
//   combine            the same, where several blocks of threads shared the tokens
//   spread             W or dz, slots -> what each token takes from its slots: dv, dk
//
// setemb_kernels/ops/slot_attention/cuda.py calls them. The formulas and their derivatives in words are in
// setemb_kernels/ops/slot_attention/reference.py; why weights pass through memory (mostly the level-2 cache) and what
// powers of two keep them in the range of float16 is said in cuda.py.
//
// The rows of a product are the slots of all heads that share their keys and values; an item of keys and values is one
// of `items * groups`. Weights lie as [items, heads, slots, padded], `padded` a multiple of kTokens tokens.
#pragma once

#include <cstdint>

#include "arithmetic.h"
#include "stream.h"

namespace setemb::cuda::slots {

constexpr int kTokens = 64;     // that a block of threads works on at a time
constexpr int kFeatures = 64;   // of a result, of a block of threads
constexpr int kStepBytes = 64;  // along the summed axis, a step; kStepBytes / 2 rows in 16 bits, kStepBytes / 4 in 32
constexpr int kStages = 4;      // steps under way
constexpr int kThreads = 128;
constexpr int kMaxSlots = 64;
constexpr int kPitch = kTokens + 8;  // floats between rows of logits: half a warp writes two each to all banks

// [items, heads, rows, features], any strides, in elements.
struct Rows {
  const void* data;
  int64_t item, head, row, feature;
  int features;
  int chunked;  // aligned, so that rows can be read 16 bytes at a time
};

struct Sizes {
  int items, groups;  // heads of keys and values
  int heads, slots;   // heads that share them; slots of each
  int tokens, padded;
};

struct Mask {
  const uint8_t* data;  // [items, tokens], or null
  int64_t item, token;
};

struct WeightParams {
  Sizes sizes;
  Mask mask;
  Rows q, k;
  Rows grad, v;          // backward only, and all that follows up to `factors`
  const float* delta;    // [items, heads, slots]: grad . out
  const float* total;    // [items, heads, slots]
  const float* factors;  // [items], what dz is divided by, or null
  const void* bias;      // [items, heads, slots], any strides, or null
  int64_t bias_item, bias_head, bias_slot;
  void* weights;   // times `factor`, or null
  void* by_logit;  // or null
  float* sums;     // [items, heads, slots, token_blocks] of W, in the backward of dz; or null
  int heads_in_block, head_blocks, token_blocks;
  float scale, token_eps, factor;
};

struct GatherParams {
  Sizes sizes;
  Mask mask;
  const void* weights;
  Rows tokens;
  const float* factors;  // [items] or null
  const float* sums;     // [items, heads, slots, token_blocks] of weights, where a mean is taken
  void* out;             // [items, heads, slots, features]
  int64_t out_item, out_head, out_slot, out_feature;
  float* total;    // contiguous [items, heads, slots]: sums + eps; or null
  float* partial;  // [splits, items * heads * slots, features] instead of out and total, or null
  int token_blocks, row_blocks, feature_blocks, splits, split_tokens;
  float factor, eps;
};

struct SpreadParams {
  Sizes sizes;
  Mask mask;
  const void* weights;
  Rows slots;
  const float* factors;  // [items] or null
  void* out;             // contiguous [items, groups, tokens, features]
  int token_blocks, feature_blocks;
  float factor;
};

// What starts them. Each arithmetic (bfloat16, float16, tf32 or float) is compiled in a file of its own.
template <class A>
void launch_weights(const WeightParams& p, Stream stream);
template <class A>
void launch_logit_gradients(const WeightParams& p, Stream stream);
template <class A>
void launch_gather(const GatherParams& p, Stream stream);
template <class A>
void launch_spread(const SpreadParams& p, Stream stream);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace setemb::cuda::slots
