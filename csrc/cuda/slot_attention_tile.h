// Tiles of rows in shared memory, and products of two of them. The arithmetic A is bfloat16, float16 or tf32 (tensor
// cores) or float (none), and T = Storage<A>.
//
// *Narrow* tiles hold kStepBytes of a row along the summed axis; *wide* tiles hold 64 numbers of each row, and the
// summed axis runs over rows. Both are swizzled so that what a warp reads at once lies in different banks: eight rows
// of ldmatrix; of a wide tile of floats, which ldmatrix does not transpose, 8 neighbours of each of four rows.
#pragma once

#include <type_traits>

#include "slot_attention.h"
#include "warp.h"

namespace setemb::cuda::slots {

template <class T>
constexpr int kStep = kStepBytes / static_cast<int>(sizeof(T));  // numbers of a step along the summed axis
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kWideBytes = 64 * static_cast<int>(sizeof(T));  // of one row
template <class T>
constexpr int kWideTile = kStep<T> * kWideBytes<T>;

SETEMB_DEVICE int narrow(int row, int chunk) { return row * kStepBytes + (chunk ^ (row >> 1 & 3)) * 16; }
template <class T>
SETEMB_DEVICE int wide(int row, int chunk) {
  return row * kWideBytes<T> + (chunk ^ (sizeof(T) == 4 ? 2 * (row & 3) : row & 7)) * 16;
}

// v as an operand of products.
template <class A>
SETEMB_DEVICE Storage<A> operand_of(float v) {
  if constexpr (std::is_same_v<A, tf32>) {
    return float_of(to_tf32(v));
  } else {
    return from_float<A>(v);
  }
}

// Rounds words that came as they are in memory, where the tensor cores would cut bits off.
template <class A>
SETEMB_DEVICE void round_words(uint32_t (&words)[4]) {
  if constexpr (std::is_same_v<A, tf32>) {
    SETEMB_UNROLL
    for (int i = 0; i < 4; ++i) words[i] = to_tf32(float_of(words[i]));
  }
}

SETEMB_DEVICE float warp_sum(float v) {
  for (int lanes = 16; lanes; lanes /= 2) v += shuffle_xor(v, lanes);
  return v;
}

template <class T>
SETEMB_DEVICE const T* row_of(const Rows& rows, int64_t item, int64_t head, int64_t row) {
  return static_cast<const T*>(rows.data) + item * rows.item + head * rows.head + row * rows.row;
}

SETEMB_DEVICE bool is_valid(const Mask& mask, int64_t item, int64_t token) {
  return mask.data == nullptr || load(mask.data + item * mask.item + token * mask.token) != 0;
}

// Starts to copy kChunk numbers from the `first` of a row on: zeros beyond `end`, and where the row is not `inside`.
template <class T>
SETEMB_DEVICE void copy_chunk(char* target, const T* row, int64_t stride, int first, int end, bool inside,
                              bool chunked) {
  if (chunked) return copy_async(target, row + first, inside && first < end);
  Chunk chunk = {};
  SETEMB_UNROLL
  for (int i = 0; i < kChunk<T>; ++i) {
    T v = {};
    if (inside && first + i < end) v = load(row + (first + i) * stride);
    if constexpr (sizeof(T) == 4) {
      chunk.word[i] = bits_of(v);
    } else {
      chunk.word[i / 2] |= static_cast<uint32_t>(v.bits) << 16 * (i % 2);
    }
  }
  store(reinterpret_cast<Chunk*>(target), chunk);
}

// Runs `use` on each of `steps` steps once `start` has copied it, kStages - 1 steps ahead. Leaves no copy behind, but
// warps may still read the last step.
template <class Start, class Use>
SETEMB_DEVICE void pipeline(int steps, const Start& start, const Use& use) {
  const auto begin = [&](int step) {
    if (step < steps) start(step, step % kStages);
    copy_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) begin(step);
  SETEMB_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    sync_threads();  // this step is there, and the oldest has been read by all
    begin(step + kStages - 1);
    use(step % kStages);
  }
  copy_wait<0>();
}

// A lane's part of a product of 16 MT rows and 8 NT columns: [t][u][2 h + e] is of row 16 t + 8 h + lane / 4 and
// column 8 u + 2 (lane % 4) + e.
template <int MT, int NT>
struct Sums {
  float v[MT][NT][4];

  SETEMB_DEVICE void clear() {
    SETEMB_UNROLL
    for (int t = 0; t < MT; ++t) {
      SETEMB_UNROLL
      for (int u = 0; u < NT; ++u) {
        SETEMB_UNROLL
        for (int i = 0; i < 4; ++i) v[t][u][i] = 0;
      }
    }
  }

  // Calls f(row, column, value of the column, of the next one) for each pair of neighbours.
  template <class F>
  SETEMB_DEVICE void for_pairs(const F& f) const {
    SETEMB_UNROLL
    for (int t = 0; t < MT; ++t) {
      SETEMB_UNROLL
      for (int u = 0; u < NT; ++u) {
        SETEMB_UNROLL
        for (int h = 0; h < 2; ++h) {
          f(16 * t + 8 * h + lane_index() / 4, 8 * u + 2 * (lane_index() % 4), v[t][u][2 * h], v[t][u][2 * h + 1]);
        }
      }
    }
  }
};

// One step more. `a(row, k)` and `b(k, column)` say where a number lies, for float; the others are fragments.
template <class A, int MT, int NT, class LoadA, class LoadB>
SETEMB_DEVICE void add_on_tensor_cores(Sums<MT, NT>& c, const LoadA& load_a, const LoadB& load_b) {
  SETEMB_UNROLL
  for (int k = 0; k < kStepBytes / 32; ++k) {
    uint32_t a[MT][4];
    SETEMB_UNROLL
    for (int t = 0; t < MT; ++t) load_a(a[t], t, k);
    SETEMB_UNROLL
    for (int u = 0; u < NT; u += 2) {
      uint32_t b[4];  // of columns 8 u ... and 8 (u + 1) ...
      load_b(b, u, k);
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
      SETEMB_UNROLL
      for (int t = 0; t < MT; ++t) {
        multiply_add<A>(c.v[t][u], a[t], first);
        multiply_add<A>(c.v[t][u + 1], a[t], second);
      }
    }
  }
}

template <int MT, int NT, class LoadA, class LoadB>
SETEMB_DEVICE void add_in_float(Sums<MT, NT>& c, const LoadA& a, const LoadB& b) {
  const int g = lane_index() / 4, q = lane_index() % 4;
  SETEMB_NO_UNROLL
  for (int k = 0; k < kStep<float>; ++k) {
    float rows[MT][2];
    SETEMB_UNROLL
    for (int t = 0; t < MT; ++t) {
      rows[t][0] = load(a(16 * t + g, k));
      rows[t][1] = load(a(16 * t + 8 + g, k));
    }
    SETEMB_UNROLL
    for (int u = 0; u < NT; ++u) {
      SETEMB_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float column = load(b(k, 8 * u + 2 * q + e));
        SETEMB_UNROLL
        for (int t = 0; t < MT; ++t) {
          c.v[t][u][e] += rows[t][0] * column;
          c.v[t][u][2 + e] += rows[t][1] * column;
        }
      }
    }
  }
}

SETEMB_DEVICE const float* narrow_float(const char* tile, int row, int k) {
  return reinterpret_cast<const float*>(tile + narrow(row, k / 4)) + k % 4;
}
SETEMB_DEVICE const float* wide_float(const char* tile, int row, int column) {
  return reinterpret_cast<const float*>(tile + wide<float>(row, column / 4)) + column % 4;
}

// Words of a product that lie in a tile: those of its 8 words along the summed axis from word 8 k on.
//
// Of a narrow tile: 16 rows from `row` on, as `a`; or, as two `b`, of rows 0 ... 7 and 8 ... 15.
SETEMB_DEVICE void narrow_a(uint32_t (&a)[4], const char* tile, int row, int k) {
  load_matrices(a, tile + narrow(row + lane_index() % 16, 2 * k + lane_index() / 16));
}
SETEMB_DEVICE void narrow_b(uint32_t (&b)[4], const char* tile, int row, int k) {
  const int lane = lane_index();
  load_matrices(b, tile + narrow(row + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
}
// Of a wide tile, transposed: 16 columns from `column` on.
SETEMB_DEVICE uint32_t wide_word(const char* tile, int row, int column) {
  return load_together(reinterpret_cast<const uint32_t*>(tile + wide<float>(row, column / 4)) + column % 4);
}
template <class A>
SETEMB_DEVICE void wide_a(uint32_t (&a)[4], const char* tile, int column, int k) {
  const int lane = lane_index();
  if constexpr (std::is_same_v<A, tf32>) {
    SETEMB_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = wide_word(tile, 8 * k + lane % 4 + i / 2 * 4, column + lane / 4 + i % 2 * 8);
  } else {
    load_matrices_transposed(a, tile + wide<A>(16 * k + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2));
  }
}
template <class A>
SETEMB_DEVICE void wide_b(uint32_t (&b)[4], const char* tile, int column, int k) {
  const int lane = lane_index();
  if constexpr (std::is_same_v<A, tf32>) {
    SETEMB_UNROLL
    for (int i = 0; i < 4; ++i) b[i] = wide_word(tile, 8 * k + lane % 4 + i % 2 * 4, column + lane / 4 + i / 2 * 8);
  } else {
    load_matrices_transposed(b, tile + wide<A>(16 * k + lane % 16, column / 8 + lane / 16));
  }
}

// rows [16 MT] . columns [16 of this warp], both narrow.
template <class A, int MT>
SETEMB_DEVICE void add_narrow_narrow(Sums<MT, 2>& c, const char* rows, const char* columns) {
  const int first = 16 * warp_index();
  if constexpr (std::is_same_v<A, float>) {
    add_in_float(
        c, [&](int row, int k) { return narrow_float(rows, row, k); },
        [&](int k, int column) { return narrow_float(columns, first + column, k); });
  } else {
    add_on_tensor_cores<A>(
        c, [&](uint32_t (&a)[4], int t, int k) { narrow_a(a, rows, 16 * t, k), round_words<A>(a); },
        [&](uint32_t (&b)[4], int, int k) { narrow_b(b, columns, first, k), round_words<A>(b); });
  }
}

// narrow rows [16 MT] of weights times the 16 columns of this warp of a wide tile.
template <class A, int MT>
SETEMB_DEVICE void add_narrow_wide(Sums<MT, 2>& c, const char* rows, const char* columns) {
  const int first = 16 * warp_index();
  if constexpr (std::is_same_v<A, float>) {
    add_in_float(
        c, [&](int row, int k) { return narrow_float(rows, row, k); },
        [&](int k, int column) { return wide_float(columns, k, first + column); });
  } else {
    add_on_tensor_cores<A>(
        c, [&](uint32_t (&a)[4], int t, int k) { narrow_a(a, rows, 16 * t, k); },  // weights were rounded
        [&](uint32_t (&b)[4], int, int k) { wide_b<A>(b, columns, first, k), round_words<A>(b); });
  }
}

// The 16 columns of this warp of one wide tile, of weights, transposed, times the 64 columns of another.
template <class A>
SETEMB_DEVICE void add_wide_wide(Sums<1, 8>& c, const char* rows, const char* columns) {
  const int first = 16 * warp_index();
  if constexpr (std::is_same_v<A, float>) {
    add_in_float(
        c, [&](int row, int k) { return wide_float(rows, k, first + row); },
        [&](int k, int column) { return wide_float(columns, k, column); });
  } else {
    add_on_tensor_cores<A>(
        c, [&](uint32_t (&a)[4], int, int k) { wide_a<A>(a, rows, first, k); },  // weights were rounded
        [&](uint32_t (&b)[4], int u, int k) { wide_b<A>(b, columns, 8 * u, k), round_words<A>(b); });
  }
}

}  // namespace setemb::cuda::slots
