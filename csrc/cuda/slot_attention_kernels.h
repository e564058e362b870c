// The kernels of slot attention. See slot_attention.h for what they make.
#pragma once

#include <type_traits>

#include "slot_attention.h"
#include "slot_attention_tile.h"
#include "warp.h"

namespace setemb::cuda::slots {

constexpr float kInfinity = __builtin_inff();

// What to divide by so that the quotient is 0 where the total is.
SETEMB_DEVICE float divisor_of(float total) { return total > 0 ? total : total == total ? kInfinity : total; }

template <class T>
struct alignas(2 * sizeof(T)) Two {
  T first, second;
};

// Neighbours, by one instruction where they lie so.
template <class T>
SETEMB_DEVICE void store_pair(T* p, int64_t stride, float first, float second, bool has_second) {
  if (has_second && stride == 1 && reinterpret_cast<uintptr_t>(p) % sizeof(Two<T>) == 0) {
    return store(reinterpret_cast<Two<T>*>(p), Two<T>{from_float<T>(first), from_float<T>(second)});
  }
  store(p, from_float<T>(first));
  if (has_second) store(p + stride, from_float<T>(second));
}

// --- weights

// Which rows and tokens a block of threads works on.
struct WeightBlock {
  int64_t item, group, token;
  int head, rows, heads;  // first head of the group, rows and heads that exist
};

SETEMB_DEVICE WeightBlock weight_block(const WeightParams& p) {
  int64_t rest = block_index();
  WeightBlock b;
  b.head = static_cast<int>(rest % p.head_blocks) * p.heads_in_block;
  rest /= p.head_blocks;
  b.token = rest % p.token_blocks * kTokens;
  rest /= p.token_blocks;
  b.group = rest % p.sizes.groups;
  b.item = rest / p.sizes.groups;
  const int left = p.sizes.heads - b.head;
  b.heads = left < p.heads_in_block ? left : p.heads_in_block;
  b.rows = b.heads * p.sizes.slots;
  return b;
}

// rows . tokens of a block, [16 MT, 64], into `products` in shared memory, [.., kPitch].
template <class A, int MT>
SETEMB_DEVICE void products_of_block(const WeightParams& p, const WeightBlock& b, const Rows& rows, const Rows& tokens,
                                     float* products) {
  using T = Storage<A>;
  constexpr int kTile = (16 * MT + kTokens) * kStepBytes;
  char* shared = shared_memory();
  const int chunk = thread_index() % 4, first = thread_index() / 4;
  const T *row[(MT + 1) / 2], *token[2];
  bool token_inside[2];
  SETEMB_UNROLL
  for (int i = 0; i < (MT + 1) / 2; ++i) {
    const int r = first + 32 * i;
    row[i] = row_of<T>(rows, b.item, b.group * p.sizes.heads + b.head + r / p.sizes.slots, r % p.sizes.slots);
  }
  SETEMB_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int64_t t = b.token + first + 32 * i;
    token_inside[i] = t < p.sizes.tokens && is_valid(p.mask, b.item, t);
    token[i] = row_of<T>(tokens, b.item, b.group, t);
  }
  Sums<MT, 2> c;
  c.clear();
  pipeline((rows.features + kStep<T> - 1) / kStep<T>,
           [&](int step, int stage) {
             char* target = shared + stage * kTile;
             const int feature = step * kStep<T> + chunk * kChunk<T>;
             SETEMB_UNROLL
             for (int i = 0; i < (MT + 1) / 2; ++i) {
               const int r = first + 32 * i;
               if (r < 16 * MT) {
                 copy_chunk(target + narrow(r, chunk), row[i], rows.feature, feature, rows.features, r < b.rows,
                            rows.chunked != 0);
               }
             }
             SETEMB_UNROLL
             for (int i = 0; i < 2; ++i) {
               copy_chunk(target + 16 * MT * kStepBytes + narrow(first + 32 * i, chunk), token[i], tokens.feature,
                          feature, tokens.features, token_inside[i], tokens.chunked != 0);
             }
           },
           [&](int stage) {
             const char* from = shared + stage * kTile;
             add_narrow_narrow<A>(c, from, from + 16 * MT * kStepBytes);
           });
  struct alignas(8) Two {
    float value[2];
  };
  sync_threads();
  c.for_pairs([&](int r, int column, float first_value, float second_value) {
    store(reinterpret_cast<Two*>(products + r * kPitch + 16 * warp_index() + column), Two{first_value, second_value});
  });
  sync_threads();
}

template <int MT>
constexpr int kWeightsRing = kStages * (16 * MT + kTokens) * kStepBytes;
template <int MT, bool backward>
constexpr int kWeightsTiles = kWeightsRing<MT> + (backward ? 16 * MT * kPitch * 4 : 0);
template <int MT, bool backward>
constexpr int kWeightsShared = kWeightsTiles<MT, backward> + 3 * kMaxSlots * 4;

// W, or in the backward W / total and dz, of a block of heads and kTokens tokens.
template <class A, int MT, bool backward>
SETEMB_KERNEL(kThreads, 1)
weights_kernel(WeightParams p) {
  using T = Storage<A>;
  constexpr float kLog2e = 1.4426950408889634f;
  const WeightBlock b = weight_block(p);
  const int K = p.sizes.slots, thread = thread_index();
  const int64_t head = b.group * p.sizes.heads + b.head;
  const int64_t first_row = (b.item * p.sizes.groups * p.sizes.heads + head) * K;
  // logits; in the backward behind the ring, which holds grad . v then
  auto* logits = reinterpret_cast<float*>(shared_memory() + (backward ? kWeightsRing<MT> : 0));
  auto* by_weight = reinterpret_cast<float*>(shared_memory());
  auto* bias = reinterpret_cast<float*>(shared_memory() + kWeightsTiles<MT, backward>);
  auto* delta = bias + kMaxSlots;
  auto* divisor = delta + kMaxSlots;
  if (thread < b.rows) {
    float v = 0;
    if (p.bias != nullptr) {
      const int64_t at = b.item * p.bias_item + (head + thread / K) * p.bias_head + thread % K * p.bias_slot;
      v = to_float(load(static_cast<const T*>(p.bias) + at));
    }
    store(bias + thread, v * kLog2e);
    if constexpr (backward) {
      store(delta + thread, p.delta == nullptr ? 0.0f : load(p.delta + first_row + thread));
      store(divisor + thread, divisor_of(load(p.total + first_row + thread)));
    }
  }
  products_of_block<A, MT>(p, b, p.q, p.k, logits);
  if (backward && p.by_logit != nullptr) products_of_block<A, MT>(p, b, p.grad, p.v, by_weight);

  const float scale = p.scale * kLog2e;
  const float over_factor = 1.0f / p.factor;
  const float item_factor = p.factors == nullptr ? 1.0f : load(p.factors + b.item);
  SETEMB_NO_UNROLL
  for (int pair = thread; pair < b.heads * kTokens; pair += kThreads) {
    const int column = pair % kTokens, row = pair / kTokens * K;
    const int64_t token = b.token + column;
    const bool valid = token < p.sizes.tokens && is_valid(p.mask, b.item, token);
    float* z = logits + row * kPitch + column;
    float* u = by_weight + row * kPitch + column;
    const int64_t target = (first_row + row) * p.sizes.padded + token;
    float top = -kInfinity;
    for (int k = 0; k < K; ++k) {
      const float v = load(z + k * kPitch) * scale + load(bias + row + k);
      store(z + k * kPitch, v);
      top = v > top ? v : top;
    }
    float sum = 0;
    for (int k = 0; k < K; ++k) {
      const float e = exp2_fast(load(z + k * kPitch) - top);
      store(z + k * kPitch, e);
      sum += e;
    }
    const float inverse = 1.0f / sum;
    if constexpr (!backward) {
      for (int k = 0; k < K; ++k) {
        const float w = valid ? (load(z + k * kPitch) * inverse + p.token_eps) * p.factor : 0.0f;
        const T rounded = operand_of<A>(w);
        store(static_cast<T*>(p.weights) + target + static_cast<int64_t>(k) * p.sizes.padded, rounded);
        // sums of the rounded weights, so that their quotient with those of weighted values is a mean
        store(z + k * kPitch, to_float(rounded) * over_factor);
      }
    } else {
      float inner = 0;
      for (int k = 0; k < K; ++k) {
        const float a = load(z + k * kPitch) * inverse, by = load(divisor + row + k);
        if (p.weights != nullptr) {
          const float w = valid ? (a + p.token_eps) / by * p.factor : 0.0f;
          store(static_cast<T*>(p.weights) + target + static_cast<int64_t>(k) * p.sizes.padded, operand_of<A>(w));
        }
        if (p.by_logit != nullptr) {
          // A / total is at most 1, whereas grad / total may leave the range of 16 bits
          const float v = (load(u + k * kPitch) - load(delta + row + k)) * (a / by);
          store(u + k * kPitch, v);
          inner += v;
        }
      }
      if (p.by_logit != nullptr) {
        for (int k = 0; k < K; ++k) {
          const float a = load(z + k * kPitch) * inverse;
          const float dz = valid ? load(u + k * kPitch) - a * inner : 0.0f;
          store(u + k * kPitch, dz);
          store(static_cast<T*>(p.by_logit) + target + static_cast<int64_t>(k) * p.sizes.padded,
                operand_of<A>(dz / item_factor));
        }
      }
    }
  }
  if (p.sums == nullptr) return;
  sync_threads();
  const float* summed = backward ? by_weight : logits;
  SETEMB_NO_UNROLL
  for (int row = warp_index(); row < b.rows; row += kThreads / kWarp) {
    const float* values = summed + row * kPitch + lane_index();
    const float sum = warp_sum(load(values) + load(values + kWarp));
    if (lane_index() == 0) store(p.sums + (first_row + row) * p.token_blocks + b.token / kTokens, sum);
  }
}

// --- sums over tokens

// The sums of weights of a row over all blocks of tokens, plus eps. All lanes of a warp.
SETEMB_DEVICE float total_of(const float* sums, int64_t row, int token_blocks, float eps) {
  float sum = 0;
  for (int i = lane_index(); i < token_blocks; i += kWarp) sum += load(sums + row * token_blocks + i);
  return warp_sum(sum) + eps;
}

template <class T, int MT>
constexpr int kGatherTile = 16 * MT * kStepBytes + kWideTile<T>;
template <class T, int MT>
constexpr int kGatherShared = kStages * kGatherTile<T, MT> + 16 * MT * 4;

// 16 MT rows of the slots of an item, kFeatures features, a part of the tokens.
template <class A, int MT>
SETEMB_KERNEL(kThreads, 1)
gather_kernel(GatherParams p) {
  using T = Storage<A>;
  constexpr int kTile = kGatherTile<T, MT>;
  constexpr int kChunks = 64 / kChunk<T>;  // of a row of a wide tile
  char* shared = shared_memory();
  auto* divisor = reinterpret_cast<float*>(shared + kStages * kTile);
  const int thread = thread_index(), rows = p.sizes.heads * p.sizes.slots;
  int64_t rest = block_index();
  const int first_row = static_cast<int>(rest % p.row_blocks) * 16 * MT;
  rest /= p.row_blocks;
  const int first_feature = static_cast<int>(rest % p.feature_blocks) * kFeatures;
  rest /= p.feature_blocks;
  const int64_t split = rest % p.splits;
  rest /= p.splits;
  const int64_t group = rest % p.sizes.groups, item = rest / p.sizes.groups;
  const int64_t item_row = (item * p.sizes.groups + group) * rows + first_row;  // of all rows
  const int begin = static_cast<int>(split) * p.split_tokens;
  const int end = p.sizes.tokens - begin < p.split_tokens ? p.sizes.tokens : begin + p.split_tokens;
  const T* weights = static_cast<const T*>(p.weights) + item_row * p.sizes.padded;
  const T* tokens = row_of<T>(p.tokens, item, group, 0);

  Sums<MT, 2> c;
  c.clear();
  pipeline((end - begin + kStep<T> - 1) / kStep<T>,
           [&](int step, int stage) {
             char* target = shared + stage * kTile;
             const int token = begin + step * kStep<T>;
             SETEMB_UNROLL
             for (int i = 0; i < (MT + 1) / 2; ++i) {
               const int r = thread / 4 + 32 * i, chunk = thread % 4;
               if (r < 16 * MT) {
                 copy_chunk(target + narrow(r, chunk), weights + r * static_cast<int64_t>(p.sizes.padded), 1,
                            token + chunk * kChunk<T>, p.sizes.padded, first_row + r < rows, true);
               }
             }
             SETEMB_UNROLL
             for (int i = 0; i < kStep<T> * kChunks / kThreads; ++i) {
               const int r = (thread + i * kThreads) / kChunks, chunk = (thread + i * kThreads) % kChunks;
               const bool inside = token + r < end && is_valid(p.mask, item, token + r);
               copy_chunk(target + 16 * MT * kStepBytes + wide<T>(r, chunk), tokens + (token + r) * p.tokens.row,
                          p.tokens.feature, first_feature + chunk * kChunk<T>, p.tokens.features, inside,
                          p.tokens.chunked != 0);
             }
           },
           [&](int stage) {
             const char* from = shared + stage * kTile;
             add_narrow_wide<A>(c, from, from + 16 * MT * kStepBytes);
           });

  const bool is_mean = p.total != nullptr && p.partial == nullptr;
  if (is_mean) {
    SETEMB_NO_UNROLL
    for (int r = warp_index(); r < 16 * MT && first_row + r < rows; r += kThreads / kWarp) {
      const float total = total_of(p.sums, item_row + r, p.token_blocks, p.eps);
      if (lane_index() == 0) store(divisor + r, divisor_of(total));
      if (lane_index() == 0 && first_feature == 0) store(p.total + item_row + r, total);
    }
    sync_threads();
  }
  const float factor = p.factor * (p.factors == nullptr || p.partial != nullptr ? 1.0f : load(p.factors + item));
  c.for_pairs([&](int r, int column, float first, float second) {
    const int row = first_row + r, feature = first_feature + 16 * warp_index() + column;
    if (row >= rows || feature >= p.tokens.features) return;
    const bool has_second = feature + 1 < p.tokens.features;
    if (p.partial != nullptr) {
      const int64_t all = static_cast<int64_t>(p.sizes.items) * p.sizes.groups * rows;
      store_pair(p.partial + (split * all + item_row + r) * p.tokens.features + feature, 1, first, second, has_second);
      return;
    }
    const float by = is_mean ? load(divisor + r) : 1.0f;
    T* target = static_cast<T*>(p.out) + item * p.out_item +
                (group * p.sizes.heads + row / p.sizes.slots) * p.out_head + row % p.sizes.slots * p.out_slot +
                feature * p.out_feature;
    store_pair(target, p.out_feature, first * factor / by, second * factor / by, has_second);
  });
}

// The sums over all splits: a warp for each row.
template <class A>
SETEMB_KERNEL(kThreads, 1)
combine_kernel(GatherParams p) {
  using T = Storage<A>;
  const int heads = p.sizes.groups * p.sizes.heads;
  const int64_t rows = static_cast<int64_t>(p.sizes.items) * heads * p.sizes.slots;
  const int64_t row = static_cast<int64_t>(block_index()) * (kThreads / kWarp) + warp_index();
  if (row >= rows) return;
  const int64_t item = row / p.sizes.slots / heads, head = row / p.sizes.slots % heads;
  const float factor = p.factor * (p.factors == nullptr ? 1.0f : load(p.factors + item));
  float by = 1;
  if (p.total != nullptr) {
    const float total = total_of(p.sums, row, p.token_blocks, p.eps);
    if (lane_index() == 0) store(p.total + row, total);
    by = divisor_of(total);
  }
  T* target = static_cast<T*>(p.out) + item * p.out_item + head * p.out_head + row % p.sizes.slots * p.out_slot;
  for (int feature = lane_index(); feature < p.tokens.features; feature += kWarp) {
    float sum = 0;
    for (int split = 0; split < p.splits; ++split) {
      sum += load(p.partial + (split * rows + row) * p.tokens.features + feature);
    }
    store(target + feature * p.out_feature, from_float<T>(sum * factor / by));
  }
}

// --- sums over slots

template <class T>
constexpr int kSpreadShared = kStages * 2 * kWideTile<T>;

// kTokens tokens of an item, kFeatures features.
template <class A>
SETEMB_KERNEL(kThreads, 1)
spread_kernel(SpreadParams p) {
  using T = Storage<A>;
  constexpr int kChunks = 64 / kChunk<T>;
  char* shared = shared_memory();
  const int thread = thread_index(), rows = p.sizes.heads * p.sizes.slots;
  int64_t rest = block_index();
  const int first_feature = static_cast<int>(rest % p.feature_blocks) * kFeatures;
  rest /= p.feature_blocks;
  const int first_token = static_cast<int>(rest % p.token_blocks) * kTokens;
  rest /= p.token_blocks;
  const int64_t group = rest % p.sizes.groups, item = rest / p.sizes.groups;
  const T* weights =
      static_cast<const T*>(p.weights) + (item * p.sizes.groups + group) * rows * static_cast<int64_t>(p.sizes.padded);

  Sums<1, 8> c;
  c.clear();
  pipeline((rows + kStep<T> - 1) / kStep<T>,
           [&](int step, int stage) {
             char* target = shared + stage * 2 * kWideTile<T>;
             SETEMB_UNROLL
             for (int i = 0; i < kStep<T> * kChunks / kThreads; ++i) {
               const int r = (thread + i * kThreads) / kChunks, chunk = (thread + i * kThreads) % kChunks;
               const int row = step * kStep<T> + r;
               const bool inside = row < rows;
               copy_chunk(target + wide<T>(r, chunk), weights + row * static_cast<int64_t>(p.sizes.padded), 1,
                          first_token + chunk * kChunk<T>, p.sizes.padded, inside, true);
               const T* slot =
                   row_of<T>(p.slots, item, group * p.sizes.heads + row / p.sizes.slots, row % p.sizes.slots);
               copy_chunk(target + kWideTile<T> + wide<T>(r, chunk), slot, p.slots.feature,
                          first_feature + chunk * kChunk<T>, p.slots.features, inside, p.slots.chunked != 0);
             }
           },
           [&](int stage) {
             const char* from = shared + stage * 2 * kWideTile<T>;
             add_wide_wide<A>(c, from, from + kWideTile<T>);
           });

  const float factor = p.factor * (p.factors == nullptr ? 1.0f : load(p.factors + item));
  c.for_pairs([&](int r, int column, float first, float second) {
    const int token = first_token + 16 * warp_index() + r, feature = first_feature + column;
    if (token >= p.sizes.tokens || feature >= p.slots.features) return;
    const bool valid = is_valid(p.mask, item, token);
    T* target = static_cast<T*>(p.out) +
                ((item * p.sizes.groups + group) * p.sizes.tokens + token) * static_cast<int64_t>(p.slots.features) +
                feature;
    store_pair(target, 1, valid ? first * factor : 0.0f, valid ? second * factor : 0.0f,
               feature + 1 < p.slots.features);
  });
}

}  // namespace setemb::cuda::slots
