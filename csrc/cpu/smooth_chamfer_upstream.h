// Where the backward pass of smooth-Chamfer has the upstream gradient from: a matrix, or a loss that makes it from the
// similarity itself, while the tile of scores is at hand. Formulas of the losses: setemb_kernels/losses/contrast.py.
//
// A source has `row(n, first, width, line, sums)`: a function of (m, similarity) for set n of x, which gives g of the
// sets first + m, ..., first + m + lanes of y; `similarity()` makes s of those pairs. What is beyond `width` has g = 0.
// A matrix works in `line`, a loss adds to `sums`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "dtype.h"
#include "gemm.h"
#include "parallel.h"
#include "smooth_chamfer.h"

namespace setemb {

// Sums over pairs: of dL/dz s and of dL/dz, where z = scale s + bias are the logits of a loss. By lanes, to be added
// without waiting for one another.
template <class T>
struct LaneSums {
  alignas(kVectorBytes) double by_scale[kLanes<T>] = {}, by_bias[kLanes<T>] = {};

  void add(Vec<T> scale, Vec<T> bias) {
    for (int i = 0; i < kLanes<T>; ++i) {
      by_scale[i] += static_cast<double>(scale[i]);
      by_bias[i] += static_cast<double>(bias[i]);
    }
  }

  void add_to(ContrastSums& total) const {
    for (int i = 0; i < kLanes<T>; ++i) {
      total.by_scale += by_scale[i];
      total.by_bias += by_bias[i];
    }
  }
};

// A matrix of type In or T, times 2^-shrink.
template <class In, class T>
class GivenGradient {
 public:
  explicit GivenGradient(const StridedMatrix& matrix) : matrix_(matrix) {}

  // |g| at most, of [N, M].
  double largest(int64_t N, int64_t M) const {
    std::vector<double> found(N, 0.0);
    run_tasks(div_up(N, 16), [&](int64_t task, int64_t) {
      for (int64_t n = task * 16; n < std::min(N, task * 16 + 16); ++n) {
        with_elements(n, 0, [&](const auto* g) {
          for (int64_t m = 0; m < M; ++m)
            found[n] = std::max<double>(found[n], std::abs(to_float(g[m * matrix_.column_stride])));
        });
      }
    });
    return *std::max_element(found.begin(), found.end());
  }

  void shrink(int exponent) { factor_ = static_cast<T>(std::ldexp(1.0, -exponent)); }

  // `line` has room for a multiple of the lanes.
  auto row(int64_t n, int64_t first, int64_t width, T* line, LaneSums<T>&) const {
    std::fill(line + width, line + round_up(width, kLanes<T>), T(0));
    with_elements(n, first, [&](const auto* g) {
      for (int64_t m = 0; m < width; ++m) line[m] = to_float(g[m * matrix_.column_stride]) * factor_;
    });
    return [line, width](int64_t m, const auto&) { return m < width ? load(line + m) : Vec<T>{}; };
  }

 private:
  template <class F>
  void with_elements(int64_t n, int64_t m, const F& f) const {
    const int64_t offset = n * matrix_.row_stride + m * matrix_.column_stride;
    matrix_.wide ? f(static_cast<const T*>(matrix_.data) + offset) : f(static_cast<const In*>(matrix_.data) + offset);
  }

  const StridedMatrix matrix_;
  T factor_ = 1;
};

// That of a loss, times 2^-shrink.
template <class T>
class ContrastGradient {
  using V = Vec<T>;
  using VI = Vec<IntOf<T>>;
  static constexpr int lanes = kLanes<T>;

 public:
  ContrastGradient(const Contrast& loss, int64_t N, int64_t M)
      : loss_(loss), N_(N), scale_(static_cast<T>(loss.scale)), bias_(static_cast<T>(loss.bias)) {
    if (loss.columns != nullptr) {  // whole vectors may be read of both
      const T* const columns = static_cast<const T*>(loss.columns);
      column_lse_.assign(columns, columns + M);
      column_weight_.assign(columns + M, columns + 2 * M);
      column_lse_.resize(M + lanes, T(0));
      column_weight_.resize(M + lanes, T(0));
    }
    if (loss.y_ids != nullptr) {
      y_ids_.assign(loss.y_ids, loss.y_ids + M);
      y_ids_.resize(M + lanes, 0);
    }
  }

  // Of |g|, for [N, M]: exponentials of negatives are at most 1, and so are sigmoids.
  double largest(int64_t N, int64_t M) const {
    double most = loss_.rows == nullptr ? 1 : 2;
    for (const auto& [side, count] : {std::pair(loss_.rows, N), std::pair(loss_.columns, M)}) {
      if (side == nullptr) continue;
      const T* const weights = static_cast<const T*>(side) + count;
      double largest = 0;
      for (int64_t i = 0; i < count; ++i) largest = std::max<double>(largest, weights[i]);
      most += largest;
    }
    return most * std::abs(loss_.weight * loss_.scale);
  }

  void shrink(int exponent) { factor_ = static_cast<T>(std::ldexp(loss_.weight * loss_.scale, -exponent)); }

  // Adds to `sums` what the pairs give for scale and bias, but for the weight.
  auto row(int64_t n, int64_t first, int64_t width, T*, LaneSums<T>& sums) const {
    const T* const rows = static_cast<const T*>(loss_.rows);
    const T row_lse = rows == nullptr ? 0 : rows[n], row_weight = rows == nullptr ? 0 : rows[N_ + n];
    return [this, n, first, width, row_lse, row_weight, &sums](int64_t m, const auto& similarity) {
      if (m >= width) return V{};
      const V s = similarity();
      const VI positive = positives(n, first + m);
      V by_logit =
          loss_.rows == nullptr ? pairwise(s, positive) : competing(s, positive, row_lse, row_weight, first + m);
      V by_scale = by_logit * s;
      for (int64_t i = width - m; i < lanes; ++i) by_logit[i] = by_scale[i] = 0;
      sums.add(by_scale, loss_.rows == nullptr ? by_logit : V{});
      return by_logit * factor_;
    };
  }

 private:
  // -1 in the lanes of positive pairs.
  VI positives(int64_t n, int64_t m) const {
    IntOf<T> found[lanes] = {};
    if (loss_.y_ids != nullptr) {
      const int64_t id = loss_.x_ids[n];
      for (int i = 0; i < lanes; ++i) found[i] = y_ids_[m + i] == id ? -1 : 0;
    } else {
      const int64_t lane = n - m;
      if (lane >= 0 && lane < lanes) found[lane] = -1;
    }
    VI mask;
    std::memcpy(&mask, found, sizeof mask);
    return mask;
  }

  V competing(V s, VI positive, T row_lse, T row_weight, int64_t m) const {
    const V z = opaque<T>(s * scale_);  // rounded as in the log-sum-exps, which it is compared with
    V by_logit = from_side(z, positive, splat(row_lse), splat(row_weight));
    if (loss_.columns != nullptr)
      by_logit += from_side(z, positive, load(column_lse_.data() + m), load(column_weight_.data() + m));
    return by_logit;
  }

  static V from_side(V z, VI positive, V lse, V weight) {
    const V attraction = -sigmoid(lse - z), repulsion = exp(z - lse) * weight;
    return positive ? attraction : repulsion;
  }

  V pairwise(V s, VI positive) const {
    const V z = s * scale_ + bias_;
    return positive ? -sigmoid(-z) : sigmoid(z);
  }

  static V sigmoid(V v) { return T(1) / (T(1) + exp(-v)); }

  // 0 and infinity out of range; NaN stays.
  static V exp(V v) {
    constexpr T lowest = -Format<T>::bias, highest = Format<T>::bias - 2;
    const V t = v * T(1.4426950408889634);
    const V e = exp2_in_range<T>(at_most<T>(at_least<T>(t, splat(lowest)), splat(highest)));
    return t > highest ? splat(std::numeric_limits<T>::infinity()) : e;
  }

  const Contrast loss_;
  const int64_t N_;
  const T scale_, bias_;
  T factor_ = 1;
  std::vector<T> column_lse_, column_weight_;
  std::vector<int64_t> y_ids_;
};

}  // namespace setemb
