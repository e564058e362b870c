// What smooth-Chamfer does with one tile of scores while it is in cache: sums, logarithms and weights, in place.
//
// A tile holds the scores of a block of sets of x with a block of sets of y. Rows are set-major (n, k); columns are
// slot-major (l, m), so that one vector holds one slot of neighbouring sets m. Sums over l add vectors, sums over k add
// rows, and no lane ever needs its neighbour, for any K and L.
//
// Two ways to the same numbers. Where |alpha c| <= kSharedShiftLimit for every pair of the tile (Cauchy-Schwarz),
// exp(alpha c) can neither overflow nor underflow: one exponential an element serves the sums of both directions,
// unshifted. Else each row and each column of a pair is shifted by its own maximum.
#pragma once

#include <cmath>

#include "simd.h"

namespace setemb {

inline constexpr double kSharedShiftLimit = 40;

template <class T>
struct ChamferTile {
  T* scores;      // [sets * K][ld], becomes the weights in the backward pass
  int64_t ld;     // elements from row to row
  int64_t sets;   // of x in this tile
  int64_t K, L;   // vectors a set
  int64_t width;  // sets of y, a multiple of the lanes: slot l of set m is column l * width + m
  bool shared_shift;
  bool masked;         // any mask on either side
  const bool* x_mask;  // [sets * K] or null
  const T* y_valid;    // [L * width], 1 or 0; read only where masked
  const T* x_weight;   // [sets]   1 / (2 |X|), 0 for an empty set
  const T* y_weight;   // [width]
  T alpha;             // of these scores (see `exponent` in smooth_chamfer.cpp)
  T inverse_alpha;
  Vec<T>* scratch;  // 4 (K + L) vectors
};

template <class T>
class ChamferEpilogue {
  using V = Vec<T>;
  static constexpr int lanes = kLanes<T>;
  static constexpr T log2_e = T(1.4426950408889634), ln_2 = T(0.6931471805599453);

  const ChamferTile<T>& t_;
  V *row_sum_, *row_max_, *row_dot_, *row_scale_;              // [K]
  V *column_sum_, *column_max_, *column_dot_, *column_scale_;  // [L]
  T sharpness_;

  T* at(int64_t n, int64_t k, int64_t l, int64_t m) const {
    return t_.scores + (n * t_.K + k) * t_.ld + l * t_.width + m;
  }
  bool row_valid(int64_t n, int64_t k) const { return t_.x_mask == nullptr || t_.x_mask[n * t_.K + k]; }
  V column_valid(int64_t l, int64_t m) const { return load(t_.y_valid + l * t_.width + m); }

 public:
  explicit ChamferEpilogue(const ChamferTile<T>& t)
      : t_(t),
        row_sum_(t.scratch),
        row_max_(row_sum_ + t.K),
        row_dot_(row_max_ + t.K),
        row_scale_(row_dot_ + t.K),
        column_sum_(row_scale_ + t.K),
        column_max_(column_sum_ + t.L),
        column_dot_(column_max_ + t.L),
        column_scale_(column_dot_ + t.L),
        sharpness_(t.alpha > Format<T>::largest / 2 ? Format<T>::largest : t.alpha * log2_e) {}

  // out[m] for m in [0, width): the similarity of set n of the tile, times 2^-exponent.
  void similarity(int64_t n, T* out) {
    for (int64_t m = 0; m < t_.width; m += lanes)
      store(out + m, t_.masked ? similarity<true>(n, m) : similarity<false>(n, m));
  }

  // Replaces the scores of set n by the weights g ds/dc, zero for vectors that are not valid, with g from a function of
  // (m, similarity) as in smooth_chamfer_upstream.h. Where kAlpha, adds
  // g (1/(2|X|) sum_k H(p_k) + 1/(2|Y|) sum_l H(q_l)) for every set of y to `entropy`.
  template <bool kAlpha, class Gradient>
  void weights(int64_t n, const Gradient& gradient, double& entropy) {
    for (int64_t m = 0; m < t_.width; m += lanes) {
      const V h = t_.masked ? weights<true, kAlpha>(n, m, gradient) : weights<false, kAlpha>(n, m, gradient);
      if (kAlpha) {
        for (int i = 0; i < lanes; ++i) entropy += static_cast<double>(h[i]);
      }
    }
  }

 private:
  template <bool kMasked>
  V similarity(int64_t n, int64_t m) {
    const V x_weight = splat(t_.x_weight[n]), y_weight = load(t_.y_weight + m);
    if (t_.K == 1 && t_.L == 1 && t_.shared_shift) {  // the dot product, exactly
      const V c = load(at(n, 0, 0, m));
      return kMasked ? (x_weight * y_weight > 0 ? c : V{}) : c;
    }
    V maxima = V{};
    if (t_.shared_shift) {
      shared_sums<kMasked, false, false>(n, m);
    } else {
      maxima = shifts<kMasked>(n, m);
      shifted_sums<kMasked, false>(n, m);
    }
    return from_sums<kMasked>(n, m, maxima);
  }

  // From row_sum_ and column_sum_, and the weighted sum of the maxima.
  template <bool kMasked>
  V from_sums(int64_t n, int64_t m, V maxima) const {
    const V x_weight = splat(t_.x_weight[n]), y_weight = load(t_.y_weight + m);
    LogProduct<T> rows, columns;
    for (int64_t k = 0; k < t_.K; ++k) {
      if (!kMasked || row_valid(n, k)) rows.multiply(row_sum_[k]);
    }
    for (int64_t l = 0; l < t_.L; ++l) columns.multiply(column_sum_[l]);
    // The factor is last: where alpha is tiny it may be the largest number there is.
    const V logs = (x_weight * rows.log2() + y_weight * columns.log2()) * ln_2;
    const V s = maxima + logs * t_.inverse_alpha;
    return kMasked ? (x_weight * y_weight > 0 ? s : V{}) : s;
  }

  template <bool kMasked, bool kAlpha, class Gradient>
  V weights(int64_t n, int64_t m, const Gradient& gradient) {
    const bool dot_product = t_.K == 1 && t_.L == 1 && t_.shared_shift;
    const V only = dot_product ? similarity<kMasked>(n, m) : V{};  // of one vector with one, exactly
    V maxima = V{};
    if (t_.shared_shift) {
      shared_sums<kMasked, true, kAlpha>(n, m);
    } else {
      maxima = shifts<kMasked>(n, m);
      shifted_sums<kMasked, kAlpha>(n, m);
    }
    const V g = gradient(m, [&] { return dot_product ? only : from_sums<kMasked>(n, m, maxima); });
    const V poison = maxima - maxima;  // 0, or NaN where a vector holds one
    const V x_factor = g * t_.x_weight[n], y_factor = g * load(t_.y_weight + m);
    V entropy = V{};
    if (kAlpha && t_.L > 1) {  // the entropy of one element is 0, exactly
      for (int64_t k = 0; k < t_.K; ++k) {
        if (!kMasked || row_valid(n, k)) entropy += x_factor * softmax_entropy(row_sum_[k], row_dot_[k]);
      }
    }
    if (kAlpha && t_.K > 1) {
      for (int64_t l = 0; l < t_.L; ++l) entropy += y_factor * softmax_entropy(column_sum_[l], column_dot_[l]);
    }
    for (int64_t k = 0; k < t_.K; ++k) row_scale_[k] = x_factor / row_sum_[k] + poison;
    for (int64_t l = 0; l < t_.L; ++l) {
      column_scale_[l] = y_factor / column_sum_[l];
      if (kMasked) column_scale_[l] *= column_valid(l, m);
    }
    for (int64_t k = 0; k < t_.K; ++k) {
      if (kMasked && !row_valid(n, k)) {
        for (int64_t l = 0; l < t_.L; ++l) store(at(n, k, l, m), V{});
        continue;
      }
      const V a = row_scale_[k];
      for (int64_t l = 0; l < t_.L; ++l) {
        T* p = at(n, k, l, m);
        const V c = load(p);
        if (t_.shared_shift) {  // c is exp(alpha c) by now
          store(p, c * (a + column_scale_[l]));
        } else {
          V by_row = exp2_in_range<T>(log2_shifted(c, row_max_[k]));
          if (kMasked) by_row *= column_valid(l, m);
          store(p, by_row * a + exp2_in_range<T>(log2_shifted(c, column_max_[l])) * column_scale_[l]);
        }
      }
    }
    return entropy;
  }

  // Entropy of a softmax from the sum of its exponentials and of exponential times base-2 logarithm. 0 for (1, 0):
  // nothing to sum.
  static V softmax_entropy(V sum, V dot) {
    LogProduct<T> one;
    one.multiply(sum);
    return (one.log2() - dot / sum) * ln_2;
  }

  // Sums of exp(alpha c) over rows and columns; 1 where there is nothing to sum. Where kStore the exponentials replace
  // the scores. Where kAlpha the sums of z exp(z) are made too, z the base-2 logarithm of the exponential.
  template <bool kMasked, bool kStore, bool kAlpha>
  void shared_sums(int64_t n, int64_t m) {
    for (int64_t l = 0; l < t_.L; ++l) column_sum_[l] = column_dot_[l] = V{};
    for (int64_t k = 0; k < t_.K; ++k) {
      if (kMasked && !row_valid(n, k)) continue;
      V sum = V{}, dot = V{};
      for (int64_t l = 0; l < t_.L; ++l) {
        T* p = at(n, k, l, m);
        const V c = load(p);
        V e = exp2_in_range<T>(c * sharpness_);  // rounded as it is without kAlpha: a loss compares similarities
        if (kMasked) e *= column_valid(l, m);
        if (kStore) store(p, e);
        sum += e;
        column_sum_[l] += e;
        if (kAlpha) {
          const V z = opaque<T>(c) * sharpness_;
          dot += e * z;
          column_dot_[l] += e * z;
        }
      }
      row_sum_[k] = sum;
      row_dot_[k] = dot;
    }
    if (kMasked) replace_empty_sums(n);
  }

  template <bool kMasked, bool kAlpha>
  void shifted_sums(int64_t n, int64_t m) {
    for (int64_t l = 0; l < t_.L; ++l) column_sum_[l] = column_dot_[l] = V{};
    for (int64_t k = 0; k < t_.K; ++k) {
      if (kMasked && !row_valid(n, k)) continue;
      V sum = V{}, dot = V{};
      for (int64_t l = 0; l < t_.L; ++l) {
        const V c = load(at(n, k, l, m));
        const V by_row = log2_shifted(c, row_max_[k]), by_column = log2_shifted(c, column_max_[l]);
        V e = exp2_in_range<T>(by_row), f = exp2_in_range<T>(by_column);
        if (kMasked) {
          e *= column_valid(l, m);
          f *= column_valid(l, m);
        }
        sum += e;
        column_sum_[l] += f;
        if (kAlpha) {
          dot += e * by_row;
          column_dot_[l] += f * by_column;
        }
      }
      row_sum_[k] = sum;
      row_dot_[k] = dot;
    }
    if (kMasked) replace_empty_sums(n);
  }

  // alpha (c - shift) in base 2. Never positive for valid scores; what is not valid is multiplied by 0 later and must
  // be finite. Below the normal numbers it is cut to where exp2_in_range gives 0.
  V log2_shifted(V c, V shift) const {
    return at_most<T>(at_least<T>((c - shift) * sharpness_, splat<T>(-Format<T>::bias)), V{});
  }

  void replace_empty_sums(int64_t n) {
    for (int64_t k = 0; k < t_.K; ++k) {
      row_sum_[k] = !row_valid(n, k) ? splat<T>(1) : row_sum_[k] == 0 ? splat<T>(1) : row_sum_[k];
    }
    for (int64_t l = 0; l < t_.L; ++l) column_sum_[l] = column_sum_[l] == 0 ? splat<T>(1) : column_sum_[l];
  }

  // The maximum of each row and column of valid scores, 0 where there is none. Returns their weighted sum, which is NaN
  // where any score is.
  template <bool kMasked>
  V shifts(int64_t n, int64_t m) {
    const V lowest = splat<T>(-Format<T>::largest);
    V poison = V{};
    for (int64_t l = 0; l < t_.L; ++l) column_max_[l] = lowest;
    for (int64_t k = 0; k < t_.K; ++k) {
      V maximum = lowest;
      if (!kMasked || row_valid(n, k)) {
        for (int64_t l = 0; l < t_.L; ++l) {
          const V c = load(at(n, k, l, m));
          poison += c - c;
          V valid = c;
          if (kMasked) valid = column_valid(l, m) > 0 ? c : lowest;
          maximum = at_least<T>(maximum, valid);
          column_max_[l] = at_least<T>(column_max_[l], valid);
        }
      }
      row_max_[k] = maximum == lowest ? V{} : maximum;
    }
    V rows = poison, columns = V{};
    for (int64_t k = 0; k < t_.K; ++k) rows += row_max_[k] * t_.x_weight[n];
    const V y_weight = load(t_.y_weight + m);
    for (int64_t l = 0; l < t_.L; ++l) {
      column_max_[l] = column_max_[l] == lowest ? V{} : column_max_[l];
      columns += column_max_[l] * y_weight;
    }
    return rows + columns;
  }
};

}  // namespace setemb
