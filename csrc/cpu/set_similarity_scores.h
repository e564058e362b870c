// Scores of vectors of y (rows) with a group of sets of x (columns), a tile at a time.
//
// The vectors of y, the long side, are read where they lie: the micro-kernel of gemm.h takes its left operand at any
// row stride, and broadcasts from it. They are copied only where they have to be decoded or where their stride would
// let twelve of them fall upon each other in the first-level cache. The group is packed once for all rows it meets.
// Next to few columns, of which a micro-tile would leave most empty, dot products of rows.h do it instead.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "rows.h"
#include "set_similarity_tile.h"

namespace setemb {

// In: of y; X: of x.
template <class In, class P, class X = In>
class SetScores {
 public:
  using Value = typename P::Acc;

 private:
  using T = Value;
  using E = typename P::Element;
  static constexpr int64_t width = kMicroColumns<P>;

 public:
  explicit SetScores(const SimilarityProblem& p, bool few_allowed)
      : x_(p.x), y_(p.y), D_(p.features), few_allowed_(few_allowed && P::group == 1) {}

  int64_t rows() const { return rows_; }  // of a tile
  int64_t ld() const { return ld_; }
  T* tile() const { return tile_.get(); }

  const X* x_row(int64_t r) const { return static_cast<const X*>(x_.data) + r * x_.stride; }
  const In* y_row(int64_t r) const { return static_cast<const In*>(y_.data) + r * y_.stride; }

  // Packs the columns of a group.
  template <class G>
  void select(const ColumnGroup<G>& g) {
    columns_ = g.columns;
    const int64_t padded = round_up(std::max<int64_t>(columns_, 1), width);
    ld_ = padded + 16;
    rows_ = std::clamp<int64_t>((int64_t{1} << 16) / padded, kRowUnit, kMostRows) / kRowUnit * kRowUnit;
    reserve(tile_, tile_size_, rows_ * ld_);
    pointers_.resize(columns_);
    for (int64_t c = 0; c < columns_; ++c) pointers_[c] = x_row(g.row + c);
    few_ = few_allowed_ && dots_pay();
    if (few_) {
      const int64_t count = round_up(columns_, kRowPadding);
      if constexpr (!std::is_same_v<X, T>) reserve(packed_, packed_size_, columns_ * D_);
      few_rows_.resize(count);
      for (int64_t c = 0; c < count; ++c) {
        const int64_t from = std::min(c, columns_ - 1);
        if constexpr (std::is_same_v<X, T>) {
          few_rows_[c] = pointers_[from];
        } else if constexpr (P::group == 1) {
          few_rows_[c] = packed_.get() + from * D_;
          if (c < columns_) decode(pointers_[c], packed_.get() + c * D_);
        }
      }
      return;
    }
    reserve(packed_, packed_size_, padded * steps());
    pack_outer<P>(pointers_.data(), columns_, D_, width, packed_.get(), T(1));
    if constexpr (P::group == 4) P::make_unsigned(packed_.get(), padded * steps());
  }

  // tile()[r][c] for `count` rows of y from `first` on.
  void make(int64_t first, int64_t count) {
    if (few_) {
      if constexpr (P::group == 1) make_few(first, count);
      return;
    }
    const int64_t panels = div_up(count, kMicroRows);
    c_.resize(panels * kMicroRows);
    for (int64_t r = 0; r < panels * kMicroRows; ++r) c_[r] = tile_.get() + r * ld_;
    // rows beyond the last are read too, and make rows of the tile that nobody wants
    const int64_t whole = in_place() ? std::min(panels, (y_.rows - first) / kMicroRows) : 0;
    const int64_t stride = y_.stride / P::group;
    if (columns_ <= 2 * width) {  // memory is what takes the time
      for (int64_t p = 0; p < whole; ++p) {
        prefetch(first + p * kMicroRows + ahead(), kMicroRows);
        product({reinterpret_cast<const E*>(y_row(first + p * kMicroRows)), 0, stride, 1}, 1, p);
      }
    } else if (whole > 0) {
      product({reinterpret_cast<const E*>(y_row(first)), kMicroRows * stride, stride, 1}, whole, 0);
    }
    if (whole < panels) {
      const int64_t copied = stage(first + whole * kMicroRows, count - whole * kMicroRows);
      product({staged_.get(), kMicroRows * copied, copied, 1}, panels - whole, whole);
    }
  }

 private:
  static constexpr int64_t kRowUnit = std::lcm(kMicroRows, kRowPadding);  // both ways write whole tiles
  static constexpr int64_t kMostRows = 96;

  template <class B>
  static void reserve(Buffer<B>& buffer, int64_t& size, int64_t wanted) {
    if (wanted <= size) return;
    buffer = Buffer<B>(wanted);
    std::memset(static_cast<void*>(buffer.get()), 0, wanted * sizeof(B));
    size = wanted;
  }

  int64_t steps() const { return div_up(D_, P::group); }

  // Fewer operations by dot products? Each tile of them ends with a reduction that costs as much as ~45 steps.
  bool dots_pay() const {
    if (columns_ == 0 || D_ == 0) return false;
    return round_up(columns_, kRowPadding) * (D_ + 45) < round_up(columns_, width) * D_;
  }

  bool in_place() const {
    if constexpr (P::group == 1) {
      if (!std::is_same_v<In, E>) return false;
    } else {
      if (D_ % P::group != 0 || y_.stride % P::group != 0 || reinterpret_cast<uintptr_t>(y_.data) % 4 != 0)
        return false;
    }
    const bool aliases = y_.stride * static_cast<int64_t>(sizeof(In)) % 4096 == 0;
    return !aliases || columns_ <= 2 * width;
  }

  void product(const Left<P>& a, int64_t panels, int64_t from) {
    multiply<P, 128 / P::group>(a, {packed_.get(), width * steps()}, panels, round_up(columns_, width), steps(),
                                c_.data() + from * kMicroRows, false);
  }

  template <class B>
  void decode(const B* row, T* out) const {
    int64_t d = 0;
    for (; d + kLanes<T> <= D_; d += kLanes<T>) store(out + d, load_as<T>(row + d));
    for (; d < D_; ++d) out[d] = to_float(row[d]);
  }

  // Brings rows of y that will be read soon into the second-level cache: by itself the processor does not see far
  // enough ahead, and into the first level too few lines can be on their way at a time.
  void prefetch(int64_t first, int64_t count) const {
    const int64_t last = std::min(first + count, y_.rows);
    for (int64_t r = first; r < last; ++r) {
      const char* const row = reinterpret_cast<const char*>(y_row(r));
      for (int64_t b = 0; b < row_bytes(); b += 64) {
        __builtin_prefetch(row + b, 0, 2);
        asm volatile("");  // else the compiler finds that the function does nothing, and leaves out its calls
      }
    }
  }

  int64_t row_bytes() const { return D_ * static_cast<int64_t>(sizeof(In)); }
  int64_t ahead() const { return std::max<int64_t>(16, (32 << 10) / std::max<int64_t>(row_bytes(), 1)); }  // rows

  // Copies rows of y, decoded; returns their stride.
  int64_t stage(int64_t first, int64_t count) {
    const int64_t stride = round_up(std::max<int64_t>(steps(), 1), 16) + 16;
    reserve(staged_, staged_size_, round_up(count, kMicroRows) * stride);
    for (int64_t r = 0; r < count; ++r) {
      E* const out = staged_.get() + r * stride;
      if constexpr (P::group == 1) {
        decode(y_row(first + r), out);
      } else {
        out[std::max<int64_t>(steps() - 1, 0)] = 0;
        std::memcpy(out, y_row(first + r), D_ * sizeof(In));
      }
    }
    return stride;
  }

  void make_few(int64_t first, int64_t count) {
    y_rows_.resize(round_up(count, kRowPadding));
    int64_t stride = 0;
    if constexpr (!std::is_same_v<In, T>) stride = stage(first, count);
    for (int64_t r = 0; r < static_cast<int64_t>(y_rows_.size()); ++r) {
      const int64_t from = std::min(r, count - 1);
      if constexpr (std::is_same_v<In, T>) {
        y_rows_[r] = y_row(first + from);
      } else {
        y_rows_[r] = reinterpret_cast<const T*>(staged_.get()) + from * stride;
      }
    }
    constexpr int64_t step = 2 * kRowPadding;
    const int64_t rows = static_cast<int64_t>(y_rows_.size());
    for (int64_t r = 0; r < rows; r += step) {
      prefetch(first + r + ahead(), step);
      dots<T>(y_rows_.data() + r, std::min(step, rows - r), few_rows_.data(), few_rows_.size(), D_,
              tile_.get() + r * ld_, ld_);
    }
  }

  const PackedSets x_, y_;
  const int64_t D_;
  const bool few_allowed_;
  bool few_ = false;
  int64_t columns_ = 0, rows_ = 0, ld_ = 0;
  int64_t tile_size_ = 0, packed_size_ = 0, staged_size_ = 0;
  Buffer<T> tile_;
  Buffer<E> packed_, staged_;
  std::vector<const X*> pointers_;
  std::vector<const T*> few_rows_, y_rows_;
  std::vector<T*> c_;
};

}  // namespace setemb
