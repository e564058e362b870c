// Scores next to codes with scales: those of set_similarity_scores.h, times the scale of each vector.
#pragma once

#include <cmath>

#include "set_similarity_scores.h"

namespace setemb {

// Y: the codes of y; X: those of x, or float. P: Int8Quads where both are int8 and the processor has products of them,
// else Plain<float>.
template <class Y, class P, class X = Y>
class CodeScores {
  using Sum = typename P::Acc;

 public:
  using Value = float;

  CodeScores(const SimilarityProblem& p, bool few_allowed)
      : sums_(p, few_allowed), features_(p.features), x_scale_(p.x_scale), y_scale_(p.y_scale) {}

  int64_t rows() const { return sums_.rows(); }
  int64_t ld() const { return sums_.ld(); }
  float* tile() const { return reinterpret_cast<float*>(sums_.tile()); }
  const Y* y_row(int64_t r) const { return sums_.y_row(r); }

  void select(const ColumnGroup<float>& g) {
    sums_.select(g);
    column_scale_.assign(ld(), 1.0f);
    if (x_scale_ != nullptr) std::copy_n(x_scale_ + g.row, g.columns, column_scale_.begin());
    columns_ = round_up(g.columns, kLanes<float>);
  }

  // tile()[r][c] for `count` rows of y from `first` on. The numbers take the place of the sums they are made of.
  void make(int64_t first, int64_t count) {
    sums_.make(first, count);
    for (int64_t r = 0; r < count; ++r) {
      Sum* const sums = sums_.tile() + r * ld();
      float* const scores = tile() + r * ld();
      const float scale = y_scale_ != nullptr ? y_scale_[first + r] : 1.0f;
      Sum excess = 0;
      if constexpr (P::group == 4) excess = P::excess(y_row(first + r), features_);
      for (int64_t c = 0; c < columns_; c += kLanes<float>) {
        const Vec<float> sum = __builtin_convertvector(load(sums + c) - excess, Vec<float>);
        // Neither the product of the scales nor a partial product may leave the range of the result.
        const Vec<float> by_column = load(column_scale_.data() + c);
        store(scores + c, std::abs(scale) <= 1 ? sum * scale * by_column : sum * by_column * scale);
      }
    }
  }

 private:
  SetScores<Y, P, X> sums_;
  const int64_t features_;
  const float *const x_scale_, *const y_scale_;
  int64_t columns_ = 0;
  std::vector<float> column_scale_;
};

}  // namespace setemb
