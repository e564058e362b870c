// From scores to similarities, and to weights of the backward.
//
// Names: `scale` is alpha log2(e), so that exp(alpha c) = exp2(scale c). A lane visits its pairs of sets one after
// another; of each it holds the scores of RowSlots::kSlots x ColumnSlots::kSlots vectors, and up to S = 8 that is all.
#pragma once

#include "smooth_chamfer.h"
#include "smooth_chamfer_pack.h"
#include "smooth_chamfer_tile.h"
#include "warp.h"

namespace setemb::cuda {

constexpr float kLargest = 3.4028234663852886e38f;
constexpr float kSmallest = 1.1754943508222875e-38f;
// 2^-56 <= exp(alpha c) <= 2^56 needs no shift: sums and their inverses are normal numbers.
constexpr float kUnshifted = 56;

template <class T>
SETEMB_DEVICE float largest_of();
template <>
SETEMB_DEVICE float largest_of<float>() {
  return kLargest;
}
template <>
SETEMB_DEVICE float largest_of<bfloat16>() {
  return 3.3895313892515355e38f;
}
template <>
SETEMB_DEVICE float largest_of<float16>() {
  return 65504;
}

struct Add {
  SETEMB_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Max {  // NaN stays
  SETEMB_DEVICE float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// alpha log2(e) and its inverse, both within the range of float32.
struct Sharpness {
  float scale, inverse;
};
SETEMB_DEVICE Sharpness sharpness(const TileParams& p) {
  const float alpha = p.device_alpha == nullptr ? p.alpha : load(p.device_alpha);
  const float scale = alpha * 1.4426950408889634f;
  const float inverse = 1.0f / scale;
  return {scale < kSmallest ? kSmallest : scale > kLargest ? kLargest : scale, inverse > kLargest ? kLargest : inverse};
}

// log2(v[0] v[1] ...) of at most 16 positive normal numbers, by one logarithm: exponents are added, mantissas
// multiplied. Entropies, most of which cancel in a gradient of alpha, take the exact one.
template <bool exact = false, int n>
SETEMB_DEVICE float log2_of_product(const float (&v)[n]) {
  int exponent = -127 * n;
  float mantissa = 1;
  SETEMB_UNROLL
  for (int i = 0; i < n; ++i) {
    exponent += static_cast<int>(bits_of(v[i]) >> 23);
    mantissa *= float_of((bits_of(v[i]) & 0x7fffffu) | 0x3f800000u);
  }
  return static_cast<float>(exponent) + (exact ? log2_exact(mantissa) : log2_fast(mantissa));
}

// The two groups of a warp, and what is known of them.
template <int SX, int SY>
struct Pair {
  using X = RowSlots<SX>;
  using Y = ColumnSlots<SY>;
  const TileParams& p;
  int x_group, y_group;
  Sharpness alpha;

  SETEMB_DEVICE int64_t x_set(int item) const { return static_cast<int64_t>(x_group) * X::kSets + X::set(item); }
  SETEMB_DEVICE int64_t y_set(int item) const { return static_cast<int64_t>(y_group) * Y::kSets + Y::set(item); }
  // Cauchy-Schwarz bounds |alpha c| for all pairs; false for NaN
  SETEMB_DEVICE bool is_bounded() const {
    return alpha.scale * load(p.x.peak + x_group) * load(p.y.peak + y_group) <= kUnshifted;
  }
  SETEMB_DEVICE int exponent(int x_item, int y_item) const {
    return static_cast<int>(load(p.x.exponent + x_set(x_item)) + load(p.y.exponent + y_set(y_item)));
  }
  // of the scores of a pair whose operands were scaled
  SETEMB_DEVICE float unit(int exponent) const {
    const float scale = alpha.scale * power_of_two(exponent / 2) * power_of_two(exponent - exponent / 2);
    return scale > kLargest ? kLargest : scale;
  }
};

// -inf where one of the two vectors is masked or does not exist.
template <int SX, int SY>
SETEMB_DEVICE void drop_invalid(Scores& c, const Pair<SX, SY>& pair) {
  const uint32_t *x = pair.p.x.valid + 2 * pair.x_group, *y = pair.p.y.valid + 2 * pair.y_group;
  const uint32_t x_words[2] = {load(x), load(x + 1)}, y_words[2] = {load(y), load(y + 1)};
  if ((x_words[0] & x_words[1] & y_words[0] & y_words[1]) == 0xffffffffu) return;
  const int g = lane_index() / 4, q = lane_index() % 4;
  SETEMB_UNROLL
  for (int i = 0; i < 8; ++i) {
    const bool row = x_words[i / 4] >> (8 * (i % 4) + g) & 1;
    SETEMB_UNROLL
    for (int j = 0; j < 16; ++j) {
      const bool column = y_words[j / 8] >> (8 * (j / 2 % 4) + 2 * q + j % 2) & 1;
      if (!(row && column)) score(c, i, j) = -kInfinity;
    }
  }
}

// One pair of sets: a lane's scores of it, and sums over its slots.
template <int SX, int SY>
struct Block {
  using X = RowSlots<SX>;
  using Y = ColumnSlots<SY>;
  static constexpr int K = X::kSlots, L = Y::kSlots;
  Scores& c;
  int x_item, y_item;

  SETEMB_DEVICE float& at(int k, int l) const { return score(c, X::index(x_item, k), Y::index(y_item, l)); }

  // e = exp2(scale c) in place, and its sums over l and over k; 1 where no vector is valid.
  SETEMB_DEVICE void exponentials(float scale, float (&by_row)[K], float (&by_column)[L]) const {
    SETEMB_UNROLL
    for (int k = 0; k < K; ++k) {
      SETEMB_UNROLL
      for (int l = 0; l < L; ++l) {
        const float e = exp2_fast(at(k, l) * scale);
        at(k, l) = e;
        by_row[k] = l ? by_row[k] + e : e;
        by_column[l] = k ? by_column[l] + e : e;
      }
    }
    SETEMB_UNROLL
    for (int k = 0; k < K; ++k) by_row[k] = nonzero(Y::over_lanes(by_row[k], Add()));
    SETEMB_UNROLL
    for (int l = 0; l < L; ++l) by_column[l] = nonzero(X::over_lanes(by_column[l], Add()));
  }
  static SETEMB_DEVICE float nonzero(float v) { return v == 0 ? 1.0f : v; }

  // Of each row: the maximum (0 where no vector is valid) and sum over l of exp2(unit (c - maximum)).
  SETEMB_DEVICE void shifted_rows(float unit, float (&top)[K], float (&total)[K]) const {
    SETEMB_UNROLL
    for (int k = 0; k < K; ++k) {
      float v = at(k, 0);
      SETEMB_UNROLL
      for (int l = 1; l < L; ++l) v = Max()(v, at(k, l));
      v = Y::over_lanes(v, Max());
      top[k] = v == -kInfinity ? 0.0f : v;
      float sum = 0;
      SETEMB_UNROLL
      for (int l = 0; l < L; ++l) sum += exp2_fast((at(k, l) - top[k]) * unit);
      total[k] = nonzero(Y::over_lanes(sum, Add()));
    }
  }
  SETEMB_DEVICE void shifted_columns(float unit, float (&top)[L], float (&total)[L]) const {
    SETEMB_UNROLL
    for (int l = 0; l < L; ++l) {
      float v = at(0, l);
      SETEMB_UNROLL
      for (int k = 1; k < K; ++k) v = Max()(v, at(k, l));
      v = X::over_lanes(v, Max());
      top[l] = v == -kInfinity ? 0.0f : v;
      float sum = 0;
      SETEMB_UNROLL
      for (int k = 0; k < K; ++k) sum += exp2_fast((at(k, l) - top[l]) * unit);
      total[l] = nonzero(X::over_lanes(sum, Add()));
    }
  }

  template <int n>
  static SETEMB_DEVICE float sum_of(const float (&v)[n]) {
    float sum = 0;
    SETEMB_UNROLL
    for (int i = 0; i < n; ++i) sum += v[i];
    return sum;
  }
  // Sums over all rows of the pair, or all its columns.
  static SETEMB_DEVICE float over_rows(float v) { return X::over_lanes(v, Add()); }
  static SETEMB_DEVICE float over_columns(float v) { return Y::over_lanes(v, Add()); }
};

SETEMB_DEVICE float saturated(float v, float limit) {
  return v > limit ? limit : v < -limit ? -limit : v;
}  // NaN stays

// Of one pair of sets, whether or not they exist. The scores are overwritten. The same bits in `forward` and `hardest`.
template <int SX, int SY>
SETEMB_DEVICE float similarity(const Block<SX, SY>& block, const Pair<SX, SY>& pair, bool bounded) {
  using B = Block<SX, SY>;
  const float x_weight = load(pair.p.x.weight + pair.x_set(block.x_item));
  const float y_weight = load(pair.p.y.weight + pair.y_set(block.y_item));
  float s;
  if (SX == 1 && SY == 1) {
    s = times_power(block.at(0, 0) * (x_weight + y_weight), pair.exponent(block.x_item, block.y_item));
  } else if (bounded) {
    float by_row[B::K], by_column[B::L];
    block.exponentials(pair.alpha.scale, by_row, by_column);
    s = fused_multiply_add(x_weight, B::over_rows(log2_of_product(by_row)),
                           y_weight * B::over_columns(log2_of_product(by_column))) *
        pair.alpha.inverse;
  } else {
    const int e = pair.exponent(block.x_item, block.y_item);
    const float unit = pair.unit(e);
    float row_top[B::K], row_total[B::K], column_top[B::L], column_total[B::L];
    block.shifted_rows(unit, row_top, row_total);
    block.shifted_columns(unit, column_top, column_total);
    s = fused_multiply_add(x_weight, B::over_rows(B::sum_of(row_top)),
                           y_weight * B::over_columns(B::sum_of(column_top)));
    const float log = fused_multiply_add(x_weight, B::over_rows(log2_of_product(row_total)),
                                         y_weight * B::over_columns(log2_of_product(column_total)));
    s = times_power(s + times_power(log * pair.alpha.inverse, -e), e);
  }
  return x_weight == 0 || y_weight == 0 ? 0.0f : s;  // next to an empty set
}

// Of an array of T or, if `wide`, of float32.
template <class T>
SETEMB_DEVICE float load_either(const void* array, int64_t i, bool wide) {
  return wide ? load(static_cast<const float*>(array) + i) : to_float(load(static_cast<const T*>(array) + i));
}
template <class T>
SETEMB_DEVICE void store_either(void* array, int64_t i, bool wide, float v) {
  if (wide) {
    store(static_cast<float*>(array) + i, saturated(v, kLargest));
  } else {
    store(static_cast<T*>(array) + i, from_float<T>(saturated(v, largest_of<T>())));
  }
}

template <class T, int SX, int SY>
SETEMB_DEVICE void store_similarities(Scores& c, const Pair<SX, SY>& pair, const ForwardParams& p) {
  using B = Block<SX, SY>;
  const bool bounded = pair.is_bounded();
  SETEMB_UNROLL
  for (int i = 0; i < B::X::kItems; ++i) {
    SETEMB_UNROLL
    for (int j = 0; j < B::Y::kItems; ++j) {
      const float s = similarity(B{c, i, j}, pair, bounded);
      const int64_t n = pair.x_set(i), m = pair.y_set(j);
      if (n < p.tile.x.sets && m < p.tile.y.sets && B::X::is_first() && B::Y::is_first()) {
        store_either<T>(p.out, n * p.stride_n + m * p.stride_m, p.wide, s);
      }
    }
  }
}

// Two blocks of threads share a processor: one takes exponentials, while the other multiplies and its own next operands
// are on their way.
template <class A, int SX, int SY>
SETEMB_KERNEL(kThreads, kBlocksAProcessor)
forward_kernel(ForwardParams p) {
  for_tiles<A, kSeveralTiles<A, SX, SY>>(p.tile, all_tiles(p.tile), [&](Scores& c, int x_group, int y_group) {
    const Pair<SX, SY> pair{p.tile, x_group, y_group, sharpness(p.tile)};
    drop_invalid(c, pair);
    store_similarities<Storage<A>>(c, pair, p);
  });
}

// --- the most similar negative of each set

// A finite similarity as an integer: the larger the more similar, and never 0.
SETEMB_DEVICE uint32_t ordered(float s) {
  const uint32_t bits = bits_of(s + 0.0f);  // -0 becomes 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
// With the index of a set: of equals the lower index is the larger key. 0: none.
using Key = uint64_t;
SETEMB_DEVICE Key key_of(uint32_t similarity, int64_t index) {
  return similarity == 0 ? 0 : static_cast<Key>(similarity) << 32 | ~static_cast<uint32_t>(index);
}
SETEMB_DEVICE Key larger(Key a, Key b) { return a > b ? a : b; }
SETEMB_DEVICE Key larger_over_lanes(Key v, int lanes) {
  const uint32_t low = shuffle_xor(static_cast<uint32_t>(v), lanes);
  const uint32_t high = shuffle_xor(static_cast<uint32_t>(v >> 32), lanes);
  return larger(v, static_cast<Key>(high) << 32 | low);
}
SETEMB_DEVICE int64_t id_of(const int64_t* ids, int64_t i) { return ids == nullptr ? i : load(ids + i); }

// Keys by atomic maxima, which do not depend on the order of blocks. A similarity that is NaN takes no part.
template <int SX, int SY>
SETEMB_DEVICE void keep_hardest(Scores& c, const Pair<SX, SY>& pair, const HardestParams& p) {
  using B = Block<SX, SY>;
  const bool bounded = pair.is_bounded();
  // similarities where the first scores of their pairs were; then in order, 0 for what takes no part
  SETEMB_UNROLL
  for (int i = 0; i < B::X::kItems; ++i) {
    SETEMB_UNROLL
    for (int j = 0; j < B::Y::kItems; ++j) {
      const B block{c, i, j};
      block.at(0, 0) = saturated(similarity(block, pair, bounded), kLargest);
    }
  }
  SETEMB_UNROLL
  for (int i = 0; i < B::X::kItems; ++i) {
    const int64_t n = pair.x_set(i);
    const int64_t x_id = n < p.tile.x.sets ? id_of(p.x_ids, n) : 0;
    SETEMB_UNROLL
    for (int j = 0; j < B::Y::kItems; ++j) {
      const int64_t m = pair.y_set(j);
      float& s = B{c, i, j}.at(0, 0);
      const bool takes_part = n < p.tile.x.sets && m < p.tile.y.sets && x_id != id_of(p.y_ids, m) && s == s;
      s = float_of(takes_part ? ordered(s) : 0);
    }
  }
  SETEMB_UNROLL
  for (int i = 0; i < B::X::kItems; ++i) {
    uint32_t best = 0;
    int best_j = 0;
    SETEMB_UNROLL
    for (int j = 0; j < B::Y::kItems; ++j) {
      const uint32_t s = bits_of(B{c, i, j}.at(0, 0));
      if (s > best) best = s, best_j = j;
    }
    Key key = key_of(best, pair.y_set(best_j));
    key = larger_over_lanes(larger_over_lanes(key, 1), 2);
    if (key != 0 && lane_index() % 4 == 0 && B::X::is_first()) atomic_max(p.x_best + pair.x_set(i), key);
  }
  SETEMB_UNROLL
  for (int j = 0; j < B::Y::kItems; ++j) {
    uint32_t best = 0;
    int best_i = 0;
    SETEMB_UNROLL
    for (int i = 0; i < B::X::kItems; ++i) {
      const uint32_t s = bits_of(B{c, i, j}.at(0, 0));
      if (s > best) best = s, best_i = i;
    }
    Key key = key_of(best, pair.x_set(best_i));
    key = larger_over_lanes(larger_over_lanes(larger_over_lanes(key, 4), 8), 16);
    if (key != 0 && lane_index() / 4 == 0 && B::Y::is_first()) atomic_max(p.y_best + pair.y_set(j), key);
  }
}

template <class A, int SX, int SY>
SETEMB_KERNEL(kThreads, kBlocksAProcessor)
hardest_kernel(HardestParams p) {
  for_tiles<A, kSeveralTiles<A, SX, SY>>(p.tile, all_tiles(p.tile), [&](Scores& c, int x_group, int y_group) {
    const Pair<SX, SY> pair{p.tile, x_group, y_group, sharpness(p.tile)};
    drop_invalid(c, pair);
    keep_hardest(c, pair, p);
  });
}

// --- backward

// Sum over rows (and columns) of log2 total - sum p z: the entropies, in bits, of the softmaxes.
template <int SX, int SY>
SETEMB_DEVICE float entropy_of_rows(const Block<SX, SY>& block, float unit, const float (&top)[Block<SX, SY>::K],
                                    const float (&total)[Block<SX, SY>::K]) {
  using B = Block<SX, SY>;
  float mean = 0;
  SETEMB_UNROLL
  for (int k = 0; k < B::K; ++k) {
    float sum = 0;
    const float shift = opaque(top[k]);
    SETEMB_UNROLL
    for (int l = 0; l < B::L; ++l) {
      const float z = (block.at(k, l) - shift) * unit;
      sum += exp2_fast(z) * (z < -1e4f ? -1e4f : z);
    }
    mean += B::over_columns(sum) / total[k];
  }
  return B::over_rows(log2_of_product<true>(total) - mean);
}
template <int SX, int SY>
SETEMB_DEVICE float entropy_of_columns(const Block<SX, SY>& block, float unit, const float (&top)[Block<SX, SY>::L],
                                       const float (&total)[Block<SX, SY>::L]) {
  using B = Block<SX, SY>;
  float mean = 0;
  SETEMB_UNROLL
  for (int l = 0; l < B::L; ++l) {
    float sum = 0;
    const float shift = opaque(top[l]);
    SETEMB_UNROLL
    for (int k = 0; k < B::K; ++k) {
      const float z = (block.at(k, l) - shift) * unit;
      sum += exp2_fast(z) * (z < -1e4f ? -1e4f : z);
    }
    mean += B::over_rows(sum) / total[l];
  }
  return B::over_columns(log2_of_product<true>(total) - mean);
}

// W in place of the scores. Returns this lane's part of the sum for the gradient of alpha.
template <class T, int SX, int SY>
SETEMB_DEVICE float make_weights(Scores& c, const Pair<SX, SY>& pair, const WeightParams& p) {
  using B = Block<SX, SY>;
  const int grad_exponent = load(p.exponents);
  const int chunk_exponent = kWeightExponent - load(p.exponents + 1);
  const bool unshifted = p.alpha_parts == nullptr && pair.is_bounded();
  float alpha_part = 0;
  SETEMB_UNROLL
  for (int i = 0; i < B::X::kItems; ++i) {
    SETEMB_UNROLL
    for (int j = 0; j < B::Y::kItems; ++j) {
      const B block{c, i, j};
      const int64_t n = pair.x_set(i), m = pair.y_set(j);
      const float x_weight = load(p.tile.x.weight + n), y_weight = load(p.tile.y.weight + m);
      const bool exists = n < p.tile.x.sets && m < p.tile.y.sets && x_weight != 0 && y_weight != 0;
      const float g = exists ? load_either<T>(p.grad, n * p.stride_n + m * p.stride_m, p.wide) : 0.0f;
      if (unshifted) {
        const float scaled = times_power(g, chunk_exponent);
        float by_row[B::K], by_column[B::L];
        block.exponentials(pair.alpha.scale, by_row, by_column);
        SETEMB_UNROLL
        for (int k = 0; k < B::K; ++k) by_row[k] = scaled * x_weight * reciprocal_fast(by_row[k]);
        SETEMB_UNROLL
        for (int l = 0; l < B::L; ++l) by_column[l] = scaled * y_weight * reciprocal_fast(by_column[l]);
        SETEMB_UNROLL
        for (int k = 0; k < B::K; ++k) {
          SETEMB_UNROLL
          for (int l = 0; l < B::L; ++l) block.at(k, l) *= by_row[k] + by_column[l];
        }
        continue;
      }
      const int e = pair.exponent(i, j);
      const float unit = pair.unit(e);
      float row_top[B::K], row[B::K], column_top[B::L], column[B::L];
      block.shifted_rows(unit, row_top, row);
      block.shifted_columns(unit, column_top, column);
      if (p.alpha_parts != nullptr) {
        const float entropy = x_weight * entropy_of_rows(block, unit, row_top, row) +
                              y_weight * entropy_of_columns(block, unit, column_top, column);
        if (exists && B::X::is_first() && B::Y::is_first()) alpha_part += times_power(g, -grad_exponent) * entropy;
      }
      if (p.chunk == nullptr) continue;
      const float scaled = times_power(g, chunk_exponent + e);
      SETEMB_UNROLL
      for (int k = 0; k < B::K; ++k) {
        row[k] = scaled * x_weight * reciprocal_fast(row[k]);
        row_top[k] = opaque(row_top[k]);
      }
      SETEMB_UNROLL
      for (int l = 0; l < B::L; ++l) {
        column[l] = scaled * y_weight * reciprocal_fast(column[l]);
        column_top[l] = opaque(column_top[l]);
      }
      SETEMB_UNROLL
      for (int k = 0; k < B::K; ++k) {
        SETEMB_UNROLL
        for (int l = 0; l < B::L; ++l) {
          const float v = block.at(k, l);
          block.at(k, l) =
              exp2_fast((v - row_top[k]) * unit) * row[k] + exp2_fast((v - column_top[l]) * unit) * column[l];
        }
      }
    }
  }
  return alpha_part;
}

// 64 x 64 weights from row `row` and column `column` of the chunk on. An instruction fills sectors of 32 bytes.
template <class T>
SETEMB_DEVICE void store_weights(Scores& c, T* chunk, int64_t width) {
  const int g = lane_index() / 4, q = lane_index() % 4;
  struct alignas(8) Two {
    uint32_t word[2];
  };
  SETEMB_UNROLL
  for (int i = 0; i < 8; ++i) {
    T* row = chunk + (8 * i + g) * width;
    if constexpr (sizeof(T) == 4) {
      SETEMB_UNROLL
      for (int u = 0; u < 8; ++u) {
        store(reinterpret_cast<Two*>(row + 8 * u + 2 * q),
              Two{{bits_of(score(c, i, 2 * u)), bits_of(score(c, i, 2 * u + 1))}});
      }
    } else {  // of two neighbouring lanes one stores four columns of block u, the other of block u + 1
      SETEMB_UNROLL
      for (int u = 0; u < 8; u += 2) {
        const uint32_t here = pack_two<T>(score(c, i, 2 * u), score(c, i, 2 * u + 1));
        const uint32_t next = pack_two<T>(score(c, i, 2 * u + 2), score(c, i, 2 * u + 3));
        const bool odd = q % 2;
        const uint32_t other = shuffle_xor(odd ? here : next, 1);
        const Two words = odd ? Two{{other, next}} : Two{{here, other}};
        store(reinterpret_cast<Two*>(row + 8 * (u + odd) + q / 2 * 4), words);
      }
    }
  }
}

template <class A, int SX, int SY>
SETEMB_KERNEL(kThreads, kBlocksAProcessor)
weights_kernel(WeightParams p) {
  using T = Storage<A>;
  const Tiles tiles{p.x_groups / 2, p.y_groups / 2, p.x_first, p.y_first};
  for_tiles<A, kSeveralTiles<A, SX, SY>>(
      p.tile, tiles, [&](Scores& c, int x_group, int y_group) {  // groups of the chunk
        const Pair<SX, SY> pair{p.tile, p.x_first + x_group, p.y_first + y_group, sharpness(p.tile)};
        drop_invalid(c, pair);
        const float alpha_part = make_weights<T>(c, pair, p);
        if (p.alpha_parts != nullptr) {
          const float sum = warp_sum(alpha_part);
          if (lane_index() == 0) {
            store(p.alpha_parts + static_cast<int64_t>(pair.x_group) * p.tile.y.groups + pair.y_group, sum);
          }
        }
        if (p.chunk != nullptr) {
          const int64_t width = static_cast<int64_t>(p.y_groups) * kGroup;
          store_weights(c, static_cast<T*>(p.chunk) + x_group * kGroup * width + y_group * kGroup, width);
        }
      });
}

}  // namespace setemb::cuda
