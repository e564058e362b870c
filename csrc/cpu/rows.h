// Products of a few rows with many: what is left of a matrix product where one side is a handful of slots.
//
// Rows are given by pointers, unit stride within, so that nothing is packed or copied: with few rows on one side,
// packing the other would cost as much as the product. A row that is not wanted (masked) is simply not in the list.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "simd.h"

namespace setemb {

// Rows of `dots` and `combine` come in tiles of so many; lists and buffers are padded to whole ones.
template <class T>
inline constexpr int kDotRows = kLanes<T> >= 8 ? 4 : 2;  // of a
template <class T>
inline constexpr int kDotColumns = kLanes<T> / kDotRows<T>;  // rows of b: a tile has as many sums as a vector has lanes
inline constexpr int kCombineRows = 4;
#if defined(__AVX512F__)
inline constexpr int kCombineVectors = 4;
#else
inline constexpr int kCombineVectors = 2;
#endif
// Every list of rows is padded to a multiple of this.
inline constexpr int kRowPadding = 4;

// The first n < kLanes values, then zeros.
template <class T>
inline Vec<T> load_part(const T* p, int64_t n) {
  Vec<T> v = {};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
}

template <class T>
inline void store_part(T* p, Vec<T> v, int64_t n) {
  std::memcpy(p, &v, n * sizeof(T));
}

// Lanes of a and b, the lane numbers known when compiling; those of b count on from kLanes.
template <class T, int... kLane>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kLane...);
#else
  return __builtin_shuffle(a, b, Vec<IntOf<T>>{kLane...});
#endif
}

// Where lane `lane` of `fold` comes from: segments of 2 kHalf lanes of a and b become halves of its own.
template <class T, int kHalf>
constexpr int fold_source(int lane, bool high) {
  const int within = lane % (2 * kHalf);
  const int source = within < kHalf ? lane : lane - kHalf + kLanes<T>;
  return source + (high ? kHalf : 0);
}

template <class T, int kHalf, int... kLane>
inline Vec<T> fold(Vec<T> a, Vec<T> b, std::integer_sequence<int, kLane...>) {
  return shuffle<T>(a, b, std::integer_sequence<int, fold_source<T, kHalf>(kLane, false)...>{}) +
         shuffle<T>(a, b, std::integer_sequence<int, fold_source<T, kHalf>(kLane, true)...>{});
}

// Sums of lanes, as far as kCount vectors make one: halves of 2 kHalf lanes first, then of kHalf. v is overwritten.
// For kCount = kLanes lane i is the sum of the lanes of v[i].
template <class T, int kHalf = kLanes<T> / 2, int kCount = kLanes<T>>
inline Vec<T> sums_of_lanes(Vec<T>* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i)
      v[i] = fold<T, kHalf>(v[i], v[i + kCount / 2], std::make_integer_sequence<int, kLanes<T>>{});
    return sums_of_lanes<T, kHalf / 2, kCount / 2>(v);
  }
}

// Of the bits of float8_t; see to_float.
inline Vec<float> from_float8(Vec<int32_t> v) {
  const Vec<int32_t> magnitude = v & 0x7f, sign = (v & 0x80) << 24;
  const Vec<float> f = reinterpret_cast<Vec<float>>(magnitude << 20) * 0x1p120f;
  const Vec<int32_t> bits = magnitude == 0x7f ? splat<int32_t>(0x7fc00000) : reinterpret_cast<Vec<int32_t>>(f);
  return reinterpret_cast<Vec<float>>(bits | sign);
}

// kLanes<T> values of another type as T. (GCC's own conversion of vectors goes through scalars here.)
template <class T, class B>
inline Vec<T> load_as(const B* p) {
  if constexpr (std::is_same_v<T, B>) {
    return load(p);
  } else {
    static_assert(std::is_same_v<T, float>);
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<B, int8_t>) {
      return (Vec<T>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    } else if constexpr (std::is_same_v<B, float8_t>) {
      return from_float8((Vec<int32_t>)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    } else {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      if constexpr (std::is_same_v<B, float16_t>) return (Vec<T>)_mm512_cvtph_ps(bits);
      return (Vec<T>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
    }
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<B, int8_t>) {
      return (Vec<T>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    } else if constexpr (std::is_same_v<B, float8_t>) {
      return from_float8((Vec<int32_t>)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    } else {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (std::is_same_v<B, float16_t>) return (Vec<T>)_mm256_cvtph_ps(bits);
      return (Vec<T>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
    }
#else
    Vec<T> v;
    for (int i = 0; i < kLanes<T>; ++i) v[i] = to_float(p[i]);
    return v;
#endif
  }
}

// The first n < kLanes of them, then zeros.
template <class T, class B>
inline Vec<T> load_part_as(const B* p, int64_t n) {
  B values[kLanes<T>] = {};
  std::memcpy(values, p, n * sizeof(B));
  return load_as<T>(values);
}

// The lanes of acc[r * kDotColumns + c] sum to a_r . b_c, for kDotRows rows of a and kDotColumns of b; acc is zero.
template <class T, class B>
inline void dot_lanes(const T* const* a, const B* const* b, int64_t features, Vec<T>* acc) {
  constexpr int rows = kDotRows<T>, columns = kDotColumns<T>, lanes = kLanes<T>;
  const T* ra[rows];
  const B* rb[columns];
  for (int r = 0; r < rows; ++r) ra[r] = a[r];
  for (int c = 0; c < columns; ++c) rb[c] = b[c];
  int64_t d = 0;
  const auto step = [&](auto read_a, auto read_b) {
    Vec<T> bv[columns];
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) bv[c] = read_b(rb[c] + d);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Vec<T> av = read_a(ra[r] + d);
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) acc[r * columns + c] += av * bv[c];
    }
  };
  for (; d + lanes <= features; d += lanes) {
    step([](const T* p) { return load(p); }, [](const B* p) { return load_as<T>(p); });
  }
  if (d < features) {
    const int64_t n = features - d;
    step([&](const T* p) { return load_part(p, n); }, [&](const B* p) { return load_part_as<T>(p, n); });
  }
}

#if defined(__AVX512BF16__)
// The same of bfloat16 on both sides, by the processor's products of pairs: exact, but that it takes numbers and sums
// below the normal ones for 0.
inline void dot_lanes_of_pairs(const bfloat16_t* const* a, const bfloat16_t* const* b, int64_t features,
                               Vec<float>* acc) {
  constexpr int rows = kDotRows<float>, columns = kDotColumns<float>, step = 2 * kLanes<float>;
  for (int64_t d = 0; d < features; d += step) {
    const __mmask32 here = features - d >= step ? ~__mmask32{0} : (__mmask32{1} << (features - d)) - 1;
    __m512i bv[columns];
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) bv[c] = _mm512_maskz_loadu_epi16(here, b[c] + d);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const __m512i av = _mm512_maskz_loadu_epi16(here, a[r] + d);
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) {
        Vec<float>& sum = acc[r * columns + c];
        sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)av, (__m512bh)bv[c]);
      }
    }
  }
}
#endif

// Lane r * kDotColumns + c is a_r . b_c.
template <class T, class B>
inline Vec<T> dot_tile(const T* const* a, const B* const* b, int64_t features) {
  Vec<T> acc[kLanes<T>] = {};
  dot_lanes<T>(a, b, features, acc);
  return sums_of_lanes<T>(acc);
}

// out[i * ld + j] = a_i . b_j. Both lists are padded; so are rows and columns of out.
template <class T>
void dots(const T* const* a, int64_t a_count, const T* const* b, int64_t b_count, int64_t features, T* out,
          int64_t ld) {
  constexpr int A = kDotRows<T>, B = kDotColumns<T>;
  for (int64_t j = 0; j < b_count; j += B) {
    for (int64_t i = 0; i < a_count; i += A) {
      const Vec<T> sums = dot_tile<T>(a + i, b + j, features);
      for (int r = 0; r < A; ++r)
        std::memcpy(out + (i + r) * ld + j, reinterpret_cast<const T*>(&sums) + r * B, B * sizeof(T));
    }
  }
}

template <class T, int V, class Read, class Write>
inline void combine_tile(T* const* out, const T* w, int64_t row_stride, int64_t step_stride, const T* const* x,
                         int64_t x_count, int64_t column, bool accumulate, Read read, Write write) {
  constexpr int I = kCombineRows, lanes = kLanes<T>;
  Vec<T> acc[I][V] = {};
  for (int64_t j = 0; j < x_count; ++j) {
    const T* const row = x[j] + column;
    Vec<T> xv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) xv[v] = read(row + v * lanes);
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i) {
      const T weight = w[i * row_stride + j * step_stride];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[i][v] += weight * xv[v];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* const p = out[i] + column + v * lanes;
      write(p, accumulate ? read(p) + acc[i][v] : acc[i][v]);
    }
  }
}

// out_i (+)= sum over j of w[i * row_stride + j * step_stride] x_j. The list of outputs is padded, by rows that nobody
// wants, and so are the rows of w.
template <class T>
void combine(T* const* out, int64_t out_count, const T* w, int64_t row_stride, int64_t step_stride, const T* const* x,
             int64_t x_count, int64_t features, bool accumulate) {
  constexpr int V = kCombineVectors, lanes = kLanes<T>;
  const auto whole = [](const T* p) { return load(p); };
  const auto write_whole = [](T* p, Vec<T> v) { store(p, v); };
  for (int64_t column = 0; column < features;) {
    const int64_t left = features - column;
    for (int64_t i = 0; i < out_count; i += kCombineRows) {
      const auto tile = [&](auto vectors, auto read, auto write) {
        combine_tile<T, decltype(vectors)::value>(out + i, w + i * row_stride, row_stride, step_stride, x, x_count,
                                                  column, accumulate, read, write);
      };
      if (left >= V * lanes) {
        tile(std::integral_constant<int, V>{}, whole, write_whole);
      } else if (left >= lanes) {
        tile(std::integral_constant<int, 1>{}, whole, write_whole);
      } else {
        tile(
            std::integral_constant<int, 1>{}, [&](const T* p) { return load_part(p, left); },
            [&](T* p, Vec<T> v) { store_part(p, v, left); });
      }
    }
    column += left >= V * lanes ? V * lanes : std::min<int64_t>(left, lanes);
  }
}

}  // namespace setemb
