// What the similarities do with a tile of scores while it is in cache.
//
// Rows of a tile are vectors of y, one set after the other; columns are vectors of x, whole sets of a group. What a
// vector of x wants over the vectors of one set of y (a maximum, a sum of exponentials) is one number a column, kept
// while the set's rows go by: rows meet lane by lane, for any number of rows, also over several tiles. Sums over the
// vectors of a set of x come once for each pair of sets. Only what a vector of y wants over a set of x, in the kinds
// that go both ways, lies along the lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "set_similarity.h"
#include "simd.h"

namespace setemb {

// A group of sets of x, as the columns of a tile see it.
template <class T>
struct ColumnGroup {
  int64_t first = 0, sets = 0;  // which sets
  int64_t columns = 0;          // vectors in them
  int64_t row = 0;              // the first of them in x
  const int64_t* offsets;       // of the sets, [sets + 1]

  int64_t begin(int64_t s) const { return offsets[first + s] - row; }
  int64_t end(int64_t s) const { return offsets[first + s + 1] - row; }
  int64_t size(int64_t s) const { return end(s) - begin(s); }
};

inline bool is_soft(SimilarityKind kind) {
  return kind == SimilarityKind::kSmoothChamfer || kind == SimilarityKind::kSoftMaxSim;
}
inline bool goes_both_ways(SimilarityKind kind) {
  return kind == SimilarityKind::kSmoothChamfer || kind == SimilarityKind::kChamfer;
}

// A product of numbers from 1 to 2^16, whose logarithm is wanted.
struct ScalarLogProduct {
  double mantissa = 1;
  int64_t exponent = 0;
  int factors = 0;

  void multiply(double v) {
    mantissa *= v;
    if (++factors == 32) normalise();
  }
  void normalise() {
    if (!std::isfinite(mantissa)) return;
    int e;
    mantissa = std::frexp(mantissa, &e);
    exponent += e;
    factors = 0;
  }
  double log() const { return std::log(mantissa) + static_cast<double>(exponent) * 0.6931471805599453; }
};

// The state of a group of columns and one set of y.
template <class T>
class SetEpilogue {
  using V = Vec<T>;
  using I = IntOf<T>;
  using VI = Vec<I>;
  static constexpr int lanes = kLanes<T>;
  static constexpr T log2_e = T(1.4426950408889634), ln_2 = T(0.6931471805599453);

  const SimilarityKind kind_;
  const bool mean_;
  const T sharpness_, inverse_alpha_, alpha_, bias_;
  ColumnGroup<T> group_;
  int64_t width_ = 0;                    // columns, whole vectors
  Buffer<T> best_, sum_, dot_, factor_;  // a column
  Buffer<I> arg_;                        // a column: which row of the set, the first of equals
  using Sum = std::conditional_t<sizeof(T) == 8, long double, double>;  // of the numbers of a pair's vectors

  std::vector<Sum> along_y_, of_pairs_;     // a set of x: the sum over rows, over rows and columns
  std::vector<ScalarLogProduct> row_sums_;  // a set of x
  std::vector<double> row_factor_;          // a set of x

 public:
  explicit SetEpilogue(const SimilarityProblem& p)
      : kind_(p.kind),
        mean_(p.mean),
        sharpness_(in_range(p.alpha * 1.4426950408889634)),
        inverse_alpha_(in_range(1 / p.alpha)),
        alpha_(in_range(p.alpha)),
        bias_(in_range(p.bias)) {}

  double entropy = 0, by_bias = 0;  // what adds up to the gradients of alpha and bias

  const ColumnGroup<T>& group() const { return group_; }

  void select(const ColumnGroup<T>& group) {
    const int64_t width = (group.columns + lanes - 1) / lanes * lanes;
    if (width > width_) {
      best_ = Buffer<T>(width), sum_ = Buffer<T>(width), dot_ = Buffer<T>(width), factor_ = Buffer<T>(width);
      arg_ = Buffer<I>(width);
    }
    width_ = width;
    group_ = group;
    if (static_cast<int64_t>(along_y_.size()) < group.sets) {
      along_y_.resize(group.sets), of_pairs_.resize(group.sets), row_sums_.resize(group.sets);
      row_factor_.resize(group.sets);
    }
  }

  // Before the first rows of a set.
  void start() {
    std::fill_n(best_.get(), width_, -std::numeric_limits<T>::infinity());
    std::fill_n(sum_.get(), width_, T(0));
    std::fill_n(dot_.get(), width_, T(0));
    std::fill_n(arg_.get(), width_, I(0));
    std::fill_n(along_y_.begin(), group_.sets, Sum(0));
    std::fill_n(of_pairs_.begin(), group_.sets, Sum(0));
    std::fill_n(row_sums_.begin(), group_.sets, ScalarLogProduct());
  }

  // Takes in some rows of the set; `place` is the first one's place in it. kGradient: also what the weights need.
  template <bool kGradient>
  void update(const T* scores, int64_t ld, int64_t rows, int64_t place) {
    switch (kind_) {
      case SimilarityKind::kMaxSim:
      case SimilarityKind::kMax:
        return maxima<kGradient>(scores, ld, rows, place);
      case SimilarityKind::kChamfer:
        maxima<kGradient>(scores, ld, rows, place);
        if (!kGradient) row_maxima(scores, ld, rows);
        return;
      case SimilarityKind::kSoftMaxSim:
        return exponentials<kGradient>(scores, ld, rows);
      case SimilarityKind::kSmoothChamfer:
        exponentials<kGradient>(scores, ld, rows);
        if (!kGradient) row_exponentials(scores, ld, rows);
        return;
      case SimilarityKind::kMatchProbability:
        if (!kGradient) probabilities(scores, ld, rows);
    }
  }

  // Once all its rows are in: the similarity of set s of the group with it. `finish` comes before.
  double similarity(int64_t s, int64_t y_count) const {
    const int64_t begin = group_.begin(s), end = group_.end(s);
    const double x_weight = 1.0 / static_cast<double>(end - begin), y_weight = 1.0 / static_cast<double>(y_count);
    if (kind_ == SimilarityKind::kMatchProbability) return static_cast<double>(of_pairs_[s]) * x_weight * y_weight;
    if (kind_ == SimilarityKind::kMax) return static_cast<double>(best_.get()[largest(s)]);
    Sum columns = 0;
    for (int64_t c = begin; c < end; ++c) columns += static_cast<Sum>(best_.get()[c]);
    const double sum = static_cast<double>(columns);
    if (!goes_both_ways(kind_)) return mean_ ? sum * x_weight : sum;
    double other = static_cast<double>(along_y_[s]);
    if (is_soft(kind_)) other += row_sums_[s].log() * static_cast<double>(inverse_alpha_);
    return 0.5 * (sum * x_weight + other * y_weight);
  }

  void finish() {
    if (!is_soft(kind_)) return;
    for (int64_t c = 0; c < width_; c += lanes) {
      LogProduct<T> one;
      one.multiply(load(sum_.get() + c));
      store(best_.get() + c, load(best_.get() + c) + one.log2() * ln_2 * inverse_alpha_);
    }
  }

  // --- gradients

  // The column of set s with the largest score, the first of equals (or of NaN).
  int64_t largest(int64_t s) const {
    int64_t found = group_.begin(s);
    for (int64_t c = found + 1; c < group_.end(s); ++c) {
      const T v = best_.get()[c], b = best_.get()[found];
      if (v > b || (v != v && b == b)) found = c;
    }
    return found;
  }
  int64_t best_row(int64_t column) const { return arg_.get()[column]; }

  // What the gradient of one maximum over l is to be multiplied with, and of one over k.
  double x_factor(double g, int64_t s) const {
    const double weight = 1.0 / static_cast<double>(group_.size(s));
    if (goes_both_ways(kind_)) return 0.5 * g * weight;
    return mean_ ? g * weight : g;
  }
  static double y_factor(double g, int64_t y_count) { return 0.5 * g / static_cast<double>(y_count); }

  // g(s): the upstream gradient of set s of the group with this set of y.
  template <class G>
  void prepare_weights(const G& g, int64_t y_count, bool sums) {
    std::fill_n(factor_.get(), width_, T(0));
    for (int64_t s = 0; s < group_.sets; ++s) {
      if (group_.size(s) == 0) continue;
      const double upstream = g(s);
      double f = x_factor(upstream, s);
      row_factor_[s] = y_factor(upstream, y_count);
      if (kind_ == SimilarityKind::kMatchProbability)
        f = upstream / (static_cast<double>(group_.size(s)) * static_cast<double>(y_count));
      for (int64_t c = group_.begin(s); c < group_.end(s); ++c) factor_.get()[c] = static_cast<T>(f);
    }
    if (kind_ == SimilarityKind::kMatchProbability) return;
    for (int64_t c = 0; c < width_; c += lanes) {
      const V f = load(factor_.get() + c), sum = load(sum_.get() + c);
      if (sums) {
        LogProduct<T> one;
        one.multiply(sum);
        const V h = (one.log2() - load(dot_.get() + c) / sum) * ln_2;
        for (int i = 0; i < lanes && c + i < group_.columns; ++i)
          entropy += static_cast<double>(f[i]) * static_cast<double>(h[i]);
      }
      store(factor_.get() + c, f / sum);
    }
  }

  // Replaces the scores of some rows of the set by g ds/dc.
  void weights(T* scores, int64_t ld, int64_t rows, bool sums) {
    for (int64_t r = 0; r < rows; ++r) {
      T* const row = scores + r * ld;
      if (kind_ == SimilarityKind::kMatchProbability) {
        probability_weights(row, sums);
        continue;
      }
      if (kind_ == SimilarityKind::kSmoothChamfer) {
        for (int64_t s = 0; s < group_.sets; ++s) row_weights(row, s, sums);
        continue;
      }
      for (int64_t c = 0; c < width_; c += lanes) store(row + c, column_weight(load(row + c), c));
    }
  }

  // The column of set s with the largest score of one row, the first of equals.
  int64_t largest_of_row(const T* row, int64_t s) const {
    int64_t found = group_.begin(s);
    for (int64_t c = found + 1; c < group_.end(s); ++c) {
      const T v = row[c], b = row[found];
      if (v > b || (v != v && b == b)) found = c;
    }
    return found;
  }

 private:
  static T in_range(double v) {
    constexpr double largest = Format<T>::largest;
    return static_cast<T>(v > largest ? largest : v < -largest ? -largest : v);
  }

  static VI iota() {
    VI v;
    for (int i = 0; i < lanes; ++i) v[i] = i;
    return v;
  }

  // alpha (c - shift) in base 2, never positive; below the normal numbers cut to where exp2_in_range gives 0.
  V shifted(V c, V shift) const {
    return at_most<T>(at_least<T>((c - shift) * sharpness_, splat<T>(-Format<T>::bias)), V{});
  }

  V column_weight(V c, int64_t column) const {
    return exp2_in_range<T>(shifted(c, load(best_.get() + column))) * load(factor_.get() + column);
  }

  template <bool kArg>
  void maxima(const T* scores, int64_t ld, int64_t rows, int64_t place) {
    if (!kArg) return maxima_alone(scores, ld, rows);
    for (int64_t c = 0; c < width_; c += lanes) {
      const T* p = scores + c;
      V best = load(best_.get() + c);
      VI arg = load(arg_.get() + c);
      for (int64_t r = 0; r < rows; ++r, p += ld) {
        const V v = load(p);
        const auto take = (v > best) | (v != v);  // a NaN enters and stays
        best = take ? v : best;
        arg = take ? static_cast<I>(place + r) - VI{} : arg;
      }
      store(best_.get() + c, best);
      store(arg_.get() + c, arg);
    }
  }

  // Four rows at a time, so that none waits for the comparison before. NaNs are larger, as bits, than all numbers.
  void maxima_alone(const T* scores, int64_t ld, int64_t rows) {
    constexpr I magnitude = std::numeric_limits<I>::max();
    for (int64_t c = 0; c < width_; c += lanes) {
      const T* p = scores + c;
      const V before = load(best_.get() + c);
      V best[4] = {before, before, before, before};
      VI bits[4] = {};
      const auto take = [&](int i, const T* from) {
        const V v = load(from);
        best[i] = v > best[i] ? v : best[i];
        const VI b = reinterpret_cast<VI>(v) & magnitude;
        bits[i] = b > bits[i] ? b : bits[i];
      };
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4, p += 4 * ld) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) take(i, p + i * ld);
      }
      for (; r < rows; ++r, p += ld) take(0, p);
#pragma GCC unroll 4
      for (int i = 1; i < 4; ++i) {
        best[0] = best[i] > best[0] ? best[i] : best[0];
        bits[0] = bits[i] > bits[0] ? bits[i] : bits[0];
      }
      const VI limit = ((I{Format<T>::bias} * 2 + 1) << Format<T>::mantissa_bits) - VI{};
      const V nan = splat<T>(std::numeric_limits<T>::quiet_NaN());
      best[0] = before == before ? best[0] : before;
      store(best_.get() + c, bits[0] > limit ? nan : best[0]);
    }
  }

  template <bool kDot>
  void exponentials(const T* scores, int64_t ld, int64_t rows) {
    for (int64_t c = 0; c < width_; c += lanes) {
      const T* p = scores + c;
      const V before = load(best_.get() + c);
      V best = before;
      for (int64_t r = 0; r < rows; ++r, p += ld) {
        const V v = load(p);
        best = ((v > best) | (v != v)) ? v : best;
      }
      const V step = shifted(before, best), f = exp2_in_range<T>(step);
      V sum = V{}, dot = V{};
      p = scores + c;
      for (int64_t r = 0; r < rows; ++r, p += ld) {
        const V z = shifted(load(p), best), e = exp2_in_range<T>(z);
        sum += e;
        if (kDot) dot += e * z;
      }
      const V kept = load(sum_.get() + c);
      if (kDot) store(dot_.get() + c, dot + f * (load(dot_.get() + c) + kept * step));
      store(sum_.get() + c, sum + f * kept);
      store(best_.get() + c, best);
    }
  }

  void probabilities(const T* scores, int64_t ld, int64_t rows) {
    for (int64_t c = 0; c < width_; c += lanes) {
      const T* p = scores + c;
      V sum = V{};
      for (int64_t r = 0; r < rows; ++r, p += ld) sum += T(1) / (T(1) + opposite_odds(load(p)));
      store(sum_.get() + c, sum);
    }
    for (int64_t s = 0; s < group_.sets; ++s) {
      for (int64_t c = group_.begin(s); c < group_.end(s); ++c) of_pairs_[s] += static_cast<Sum>(sum_.get()[c]);
    }
  }

  // exp(-(scale c + bias)), so that sigmoid = 1 / (1 + it); cut to what exp2_in_range takes.
  V opposite_odds(V c) const {
    const V t = (c * alpha_ + bias_) * -log2_e;
    const V limit = splat<T>(Format<T>::bias - 1);
    return exp2_in_range<T>(at_most<T>(at_least<T>(t, -limit), limit));
  }

  void probability_weights(T* row, bool sums) {
    for (int64_t c = 0; c < width_; c += lanes) {
      const V v = load(row + c), odds = opposite_odds(v), e = T(1) / (T(1) + odds);
      const V slope = e * (e * odds) * load(factor_.get() + c);
      if (sums) {
        for (int i = 0; i < lanes && c + i < group_.columns; ++i) {
          by_bias += static_cast<double>(slope[i]);
          if (slope[i] != 0) entropy += static_cast<double>(slope[i]) * static_cast<double>(v[i]);
        }
      }
      store(row + c, slope * alpha_);
    }
  }

  // The largest of n values. The row has a vector's width to spare.
  static T segment_maximum(const T* p, int64_t n) {
    if (n < lanes) {
      T m = p[0];
      for (int64_t i = 1; i < n; ++i) m = (p[i] > m || p[i] != p[i]) ? p[i] : m;
      return m;
    }
    V m = load(p);
    for (int64_t i = lanes; i < n; i += lanes) {
      const V v = load(p + std::min(i, n - lanes));
      m = ((v > m) | (v != v)) ? v : m;
    }
    T best = m[0];
    for (int i = 1; i < lanes; ++i) best = (m[i] > best || m[i] != m[i]) ? m[i] : best;
    return best;
  }

  void row_maxima(const T* scores, int64_t ld, int64_t rows) {
    for (int64_t s = 0; s < group_.sets; ++s) {
      const int64_t begin = group_.begin(s), n = group_.size(s);
      if (n == 0) continue;
      Sum sum = 0;
      for (int64_t r = 0; r < rows; ++r) sum += static_cast<Sum>(segment_maximum(scores + r * ld + begin, n));
      along_y_[s] += sum;
    }
  }

  // Sum of the exponentials of n values less m, and of exponential times exponent.
  template <bool kDot>
  void segment_sums(const T* p, int64_t n, T m, T& sum, T& dot) const {
    V sums = V{}, dots = V{};
    for (int64_t i = 0; i < n; i += lanes) {
      const V z = shifted(load(p + i), splat(m));
      V e = exp2_in_range<T>(z);
      if (n - i < lanes) e = iota() < static_cast<I>(n - i) ? e : V{};
      sums += e;
      if (kDot) dots += e > 0 ? e * z : e;
    }
    sum = dot = T(0);
    for (int i = 0; i < lanes; ++i) sum += sums[i], dot += dots[i];
  }

  void row_exponentials(const T* scores, int64_t ld, int64_t rows) {
    for (int64_t s = 0; s < group_.sets; ++s) {
      const int64_t begin = group_.begin(s), n = group_.size(s);
      if (n == 0) continue;
      for (int64_t r = 0; r < rows; ++r) {
        const T* const p = scores + r * ld + begin;
        const T m = segment_maximum(p, n);
        T sum, dot;
        segment_sums<false>(p, n, m, sum, dot);
        along_y_[s] += static_cast<Sum>(m);
        row_sums_[s].multiply(static_cast<double>(sum));
      }
    }
  }

  void row_weights(T* row, int64_t s, bool sums) {
    const int64_t begin = group_.begin(s), n = group_.size(s);
    if (n == 0) return;
    T* const p = row + begin;
    const T m = segment_maximum(p, n);
    T sum, dot;
    segment_sums<true>(p, n, m, sum, dot);
    if (sums) {
      const double total = static_cast<double>(sum);
      entropy += row_factor_[s] * (std::log(total) - static_cast<double>(dot) / total * 0.6931471805599453);
    }
    const T f = static_cast<T>(row_factor_[s]) / sum;
    for (int64_t i = 0; i < n; i += lanes) {
      const V c = load(p + i);
      V best, factor;
      const int64_t count = std::min<int64_t>(lanes, n - i);
      if (count == lanes) {
        best = load(best_.get() + begin + i), factor = load(factor_.get() + begin + i);
      } else {
        best = factor = V{};
        std::memcpy(&best, best_.get() + begin + i, count * sizeof(T));
        std::memcpy(&factor, factor_.get() + begin + i, count * sizeof(T));
      }
      const V w = exp2_in_range<T>(shifted(c, best)) * factor + exp2_in_range<T>(shifted(c, splat(m))) * f;
      std::memcpy(p + i, &w, count * sizeof(T));
    }
  }
};

}  // namespace setemb
