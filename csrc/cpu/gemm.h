// The matrix product inside the fused kernels: packing and a register-blocked micro-kernel after the scheme of BLIS.
//
// A library product would serve, but the kernels want its tiles in cache, its operands in an order of their own (the
// packing is where that order is made), and three operand layouts without copies. Rows x columns of a micro-tile stay
// in registers over one run of the reduction; a panel of the right operand stays in the first-level cache over all rows
// of a block.
//
// A policy says what is multiplied: `Element` is what is packed, `Acc` what is accumulated, `group` how many reduction
// steps one element holds.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace setemb {

template <class T>
struct Plain {
  using Acc = T;
  using Element = T;
  static constexpr int group = 1;
  static Vec<T> multiply_add(T a, Vec<T> b, Vec<T> c) { return c + a * b; }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16, products and sums in float32 by the processor's own instruction.
struct BFloat16Pairs {
  using Acc = float;
  using Element = uint32_t;
  static constexpr int group = 2;
  static Vec<float> multiply_add(uint32_t a, Vec<uint32_t> b, Vec<float> c) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(a));
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)pair, (__m512bh)b);
  }

  // Rounds a tile [rows][ld] twice over: `by_row` holds pairs of neighbouring columns, [rows][ld / 2]; `by_column`,
  // unless null, pairs of neighbouring rows, [rows / 2][ld]. rows is even, columns a multiple of 16.
  static void round_tile(const float* tile, int64_t rows, int64_t columns, int64_t ld, uint32_t* by_row,
                         uint32_t* by_column) {
    for (int64_t r = 0; r < rows; r += 2) {
      for (int64_t j = 0; j < columns; j += 16) {
        const __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(tile + r * ld + j));
        const __m256i high = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(tile + (r + 1) * ld + j));
        std::memcpy(by_row + (r * ld + j) / 2, &low, 32);
        std::memcpy(by_row + ((r + 1) * ld + j) / 2, &high, 32);
        if (by_column == nullptr) continue;
        const __m512i pair =
            _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        _mm512_storeu_si512(by_column + r / 2 * ld + j, pair);
      }
    }
  }
};
#endif

#if defined(__AVX512VNNI__)
// Four int8 in a lane, their products summed in int32: exact, for up to 2^16 features. The instruction takes its right
// operand unsigned, which is packed as value + 128; what that adds to a row of scores is `excess` of the left one.
struct Int8Quads {
  using Acc = int32_t;
  using Element = uint32_t;
  static constexpr int group = 4;
  static constexpr int64_t most_features = int64_t{1} << 16;

  static Vec<int32_t> multiply_add(uint32_t a, Vec<uint32_t> b, Vec<int32_t> c) {
    return (Vec<int32_t>)_mm512_dpbusd_epi32((__m512i)c, (__m512i)b, _mm512_set1_epi32(static_cast<int>(a)));
  }

  static void make_unsigned(uint32_t* packed, int64_t count) {
    for (int64_t i = 0; i < count; ++i) packed[i] ^= 0x80808080u;
  }

  // 128 times the sum of a row.
  static int32_t excess(const int8_t* row, int64_t features) {
    const __m512i by = _mm512_set1_epi32(static_cast<int>(0x80808080u));
    __m512i sum = _mm512_setzero_si512();
    for (int64_t d = 0; d < features; d += 64) {
      const int64_t left = features - d;
      const __mmask64 here = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
      sum = _mm512_dpbusd_epi32(sum, by, _mm512_maskz_loadu_epi8(here, row + d));
    }
    return _mm512_reduce_add_epi32(sum);
  }
};
#endif

// Rows of a micro-tile: as many accumulators as the registers hold beside two columns of b.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kMicroRows = 12;
#else
inline constexpr int kMicroRows = 6;
#endif
inline constexpr int kMicroVectors = 2;

template <class P>
inline constexpr int kMicroColumns = kMicroVectors * kLanes<typename P::Acc>;

// Reduction steps between two visits of the output: a panel of that many steps is 32 KiB.
inline constexpr int64_t kReductionChunk = 256;

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// Element (row i of panel p, step s) is data[p * panel + i * row + s * step].
template <class P>
struct Left {
  const typename P::Element* data;
  int64_t panel, row, step;
};

// Element (step s, column j of panel q) is data[q * panel + s * kMicroColumns + j].
template <class P>
struct Right {
  const typename P::Element* data;
  int64_t panel;
};

// A stride known when compiling lets the compiler address twelve rows from one register.
template <int64_t kStride>
inline int64_t fixed_or(int64_t stride) {
  return kStride != 0 ? kStride : stride;
}

template <class P, int64_t kRowStride>
inline void micro_kernel(int64_t steps, const typename P::Element* __restrict a, int64_t row_stride,
                         int64_t step_stride, const typename P::Element* __restrict b, typename P::Acc* const* c,
                         int64_t column, int64_t columns, bool accumulate) {
  using T = typename P::Acc;
  constexpr int R = kMicroRows, V = kMicroVectors, lanes = kLanes<T>;
  const int64_t row = fixed_or<kRowStride>(row_stride);
  Vec<T> acc[R][V] = {};
  for (int64_t s = 0; s < steps; ++s) {
    Vec<typename P::Element> bv[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) bv[v] = load(b + v * lanes);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[i][v] = P::multiply_add(a[i * row], bv[v], acc[i][v]);
    }
    a += step_stride;
    b += V * lanes;
  }
  if (columns >= V * lanes) {
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        T* out = c[i] + column + v * lanes;
        store(out, accumulate ? load(out) + acc[i][v] : acc[i][v]);
      }
    }
    return;
  }
  alignas(kVectorBytes) T edge[R][V * lanes];
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(edge[i] + v * lanes, acc[i][v]);
  }
  for (int i = 0; i < R; ++i) {
    for (int64_t j = 0; j < columns; ++j) c[i][column + j] = accumulate ? c[i][column + j] + edge[i][j] : edge[i][j];
  }
}

template <class P, int64_t kRowStride>
void multiply_with(const Left<P>& a, const Right<P>& b, int64_t row_panels, int64_t columns, int64_t steps,
                   typename P::Acc* const* c, bool accumulate) {
  constexpr int64_t width = kMicroColumns<P>;
  int64_t begin = 0;
  do {
    const int64_t chunk = std::min(kReductionChunk, steps - begin);
    for (int64_t q = 0; q * width < columns; ++q) {
      for (int64_t p = 0; p < row_panels; ++p) {
        micro_kernel<P, kRowStride>(chunk, a.data + p * a.panel + begin * a.step, a.row, a.step,
                                    b.data + q * b.panel + begin * width, c + p * kMicroRows, q * width,
                                    columns - q * width, accumulate || begin > 0);
      }
    }
    begin += chunk;
  } while (begin < steps);
}

// c = a b, or c += a b. `c` points to the rows of the output, kMicroRows for each panel of a.
template <class P, int64_t kFixedRowStride = 0>
void multiply(const Left<P>& a, const Right<P>& b, int64_t row_panels, int64_t columns, int64_t steps,
              typename P::Acc* const* c, bool accumulate) {
  if (a.row == 1) {
    multiply_with<P, 1>(a, b, row_panels, columns, steps, c, accumulate);
  } else if (a.row == kFixedRowStride) {
    multiply_with<P, kFixedRowStride>(a, b, row_panels, columns, steps, c, accumulate);
  } else {
    multiply_with<P, 0>(a, b, row_panels, columns, steps, c, accumulate);
  }
}

// Packs `count` rows of `features` values, a row being the output's row or column: out[panel][step][width], zero where
// a row is null, beyond the last row and beyond the last feature. Values are multiplied by `scale` (pairs of bfloat16
// are copied).
template <class P, class In>
void pack_outer(const In* const* rows, int64_t count, int64_t features, int width, typename P::Element* out,
                typename P::Acc scale) {
  using E = typename P::Element;
  constexpr int64_t block = 16;
  const int64_t steps = div_up(features, P::group);
  for (int64_t first = 0; first < count; first += width, out += steps * width) {
    for (int64_t begin = 0; begin < steps; begin += block) {
      const int64_t n = std::min(block, steps - begin);
      E values[kMicroRows > kMicroColumns<P> ? kMicroRows : kMicroColumns<P>][block] = {};
      for (int64_t i = 0; i < std::min<int64_t>(width, count - first); ++i) {
        const In* row = rows[first + i];
        if (row == nullptr) continue;
        row += begin * P::group;
        if constexpr (P::group == 1) {
          for (int64_t s = 0; s < n; ++s) values[i][s] = to_float(row[s]) * scale;
        } else {
          std::memcpy(values[i], row, std::min(n * P::group, features - begin * P::group) * sizeof(In));
        }
      }
      for (int64_t s = 0; s < n; ++s) {
        for (int i = 0; i < width; ++i) out[(begin + s) * width + i] = values[i][s];
      }
    }
  }
}

// Packs `count` rows of `features` values, a row being a step of the reduction: out[panel of
// features][step][kMicroColumns].
template <class P, class In>
void pack_inner(const In* const* rows, int64_t count, int64_t features, typename P::Element* out) {
  constexpr int width = kMicroColumns<P>;
  for (int64_t first = 0; first < features; first += width) {
    const int64_t n = std::min<int64_t>(width, features - first);
    for (int64_t begin = 0; begin < count; begin += P::group, out += width) {
      if (n < width) std::fill_n(out, width, typename P::Element{});
      if constexpr (P::group == 1) {
        const In* row = rows[begin];
        for (int64_t j = 0; j < n; ++j) out[j] = row == nullptr ? 0 : to_float(row[first + j]);
      } else {
        const In* low = rows[begin];
        const In* high = begin + 1 < count ? rows[begin + 1] : nullptr;
        for (int64_t j = 0; j < n; ++j) {
          const uint32_t l = low == nullptr ? 0 : low[first + j].bits, h = high == nullptr ? 0 : high[first + j].bits;
          out[j] = l | h << 16;
        }
      }
    }
  }
}

}  // namespace setemb
