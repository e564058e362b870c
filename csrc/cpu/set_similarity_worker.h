// What one thread does with a group of sets of x and sets of y that meet it, forward and backward.
#pragma once

#include <algorithm>
#include <vector>

#include "set_similarity_scores.h"
#include "set_similarity_tile.h"

namespace setemb {

inline constexpr int64_t kGroupColumns = 256;
inline constexpr int64_t kRunRows = 1024;  // of y in a task, about

struct Run {
  int64_t first, last;
};

// Whole sets of about so many vectors.
inline std::vector<Run> runs_of(const PackedSets& p, int64_t vectors) {
  std::vector<Run> runs;
  for (int64_t first = 0; first < p.sets;) {
    int64_t last = first + 1;
    while (last < p.sets && p.offsets[last + 1] - p.offsets[first] <= vectors && last - first < 4096) ++last;
    runs.push_back({first, last});
    first = last;
  }
  return runs;
}

// What one thread works with: a group of sets of x, and sets of y that meet it.
template <class In, class Scores>
class Worker {
  using T = typename Scores::Value;

 public:
  explicit Worker(const SimilarityProblem& p, bool backward_dense) : p_(p), epilogue_(p), scores_(p, !backward_dense) {}

  SetEpilogue<T>& epilogue() { return epilogue_; }

  void select(Run sets) {
    ColumnGroup<T> g;
    g.first = sets.first, g.sets = sets.last - sets.first;
    g.row = p_.x.offsets[sets.first];
    g.columns = p_.x.offsets[sets.last] - g.row;
    g.offsets = p_.x.offsets;
    group_ = g;
    epilogue_.select(g);
    if (g.columns > 0) scores_.select(g);
  }

  // Calls done(j) for each set of y of a run that is not empty, once the epilogue has seen all of its rows; and
  // seen(j, tile, rows, first row) for each part of it.
  template <bool kGradient, class Seen, class Done>
  void walk(Run run, const Seen& seen, const Done& done) {
    if (group_.columns == 0) return;
    const int64_t* const offsets = p_.y.offsets;
    const int64_t end = offsets[run.last];
    int64_t j = run.first;
    for (int64_t top = offsets[run.first]; top < end;) {
      const int64_t bottom = std::min(end, top + scores_.rows());
      scores_.make(top, bottom - top);
      for (; j < run.last && offsets[j] < bottom; ++j) {
        if (offsets[j] == offsets[j + 1]) continue;
        const int64_t a = std::max(offsets[j], top), b = std::min(offsets[j + 1], bottom);
        if (a == offsets[j]) epilogue_.start();
        const T* const tile = scores_.tile() + (a - top) * scores_.ld();
        epilogue_.template update<kGradient>(tile, scores_.ld(), b - a, a - offsets[j]);
        seen(j, tile, b - a, a);
        if (offsets[j + 1] > bottom) break;
        done(j);
      }
      top = bottom;
    }
  }

  template <class Out>
  void forward(Run run, int64_t slot, Out* out) {
    walk<false>(
        run, [](int64_t, const T*, int64_t, int64_t) {},
        [&](int64_t j) {
          epilogue_.finish();
          const int64_t count = p_.y.offsets[j + 1] - p_.y.offsets[j];
          for (int64_t s = 0; s < group_.sets; ++s) {
            if (group_.size(s) == 0) continue;
            Out& place = out[(group_.first + s) * p_.choices + (slot >= 0 ? slot : j)];
            place = saturate<Out>(static_cast<T>(limited(epilogue_.similarity(s, count))));
          }
        });
  }

  // Calls by_column(column, row, w): w times the row of y goes to the column of x, and the other way round.
  template <class Gradient, class Add>
  void hard(Run run, const Gradient& g, const Add& add) {
    const bool chamfer = p_.kind == SimilarityKind::kChamfer;
    walk<true>(
        run,
        [&](int64_t j, const T* tile, int64_t rows, int64_t first) {
          if (!chamfer) return;
          const int64_t count = p_.y.offsets[j + 1] - p_.y.offsets[j];
          for (int64_t s = 0; s < group_.sets; ++s) {
            if (group_.size(s) == 0) continue;
            const T w = static_cast<T>(SetEpilogue<T>::y_factor(g(group_.first + s, j), count));
            for (int64_t r = 0; r < rows; ++r)
              add(group_.row + epilogue_.largest_of_row(tile + r * scores_.ld(), s), first + r, w);
          }
        },
        [&](int64_t j) {
          const int64_t top = p_.y.offsets[j];
          for (int64_t s = 0; s < group_.sets; ++s) {
            if (group_.size(s) == 0) continue;
            const double upstream = g(group_.first + s, j);
            if (p_.kind == SimilarityKind::kMax) {
              const int64_t c = epilogue_.largest(s);
              add(group_.row + c, top + epilogue_.best_row(c), static_cast<T>(upstream));
              continue;
            }
            const T w = static_cast<T>(epilogue_.x_factor(upstream, s));
            for (int64_t c = group_.begin(s); c < group_.end(s); ++c)
              add(group_.row + c, top + epilogue_.best_row(c), w);
          }
        });
  }

  // Calls consume(tile, ld, first row, rows) with tiles of weights g ds/dc.
  template <class Gradient, class Consume>
  void soft(Run run, const Gradient& g, bool sums, const Consume& consume) {
    if (group_.columns == 0) return;
    const int64_t* const offsets = p_.y.offsets;
    for (int64_t j = run.first; j < run.last;) {
      const int64_t top = offsets[j];
      int64_t last = j + 1;  // as many whole sets as fit a tile
      while (last < run.last && offsets[last + 1] - top <= scores_.rows()) ++last;
      const int64_t rows = offsets[last] - top;
      if (rows <= scores_.rows()) {
        if (rows > 0) {
          scores_.make(top, rows);
          for (int64_t i = j; i < last; ++i) {
            if (offsets[i] == offsets[i + 1]) continue;
            T* const tile = scores_.tile() + (offsets[i] - top) * scores_.ld();
            const int64_t count = offsets[i + 1] - offsets[i];
            epilogue_.start();
            epilogue_.template update<true>(tile, scores_.ld(), count, 0);
            epilogue_.prepare_weights([&](int64_t s) { return g(group_.first + s, i); }, count, sums);
            epilogue_.weights(tile, scores_.ld(), count, sums);
          }
          consume(scores_.tile(), scores_.ld(), top, rows);
        }
      } else {  // a long set: once for its sums, and again
        walk<true>({j, j + 1}, [](int64_t, const T*, int64_t, int64_t) {}, [](int64_t) {});
        epilogue_.prepare_weights([&](int64_t s) { return g(group_.first + s, j); }, rows, sums);
        for (int64_t a = top; a < offsets[last]; a += scores_.rows()) {
          const int64_t n = std::min(scores_.rows(), offsets[last] - a);
          scores_.make(a, n);
          epilogue_.weights(scores_.tile(), scores_.ld(), n, sums);
          consume(scores_.tile(), scores_.ld(), a, n);
        }
      }
      j = last;
    }
  }

  // sum[column][D] += weights^T Y
  void add_to_x(const T* tile, int64_t ld, int64_t first, int64_t rows, T* sum) {
    pack(rows, [&](int64_t r) { return scores_.y_row(first + r); });
    outputs(group_.columns, sum);
    multiply<Plain<T>>({tile, kMicroRows, 1, ld}, {inner_.get(), kMicroColumns<Plain<T>> * rows},
                       div_up(group_.columns, kMicroRows), p_.features, rows, out_.data(), true);
  }

  // sum[row][D] += weights X, `rows` rows; prepare_y once a group.
  void prepare_y() {
    pack(group_.columns, [&](int64_t c) { return scores_.x_row(group_.row + c); });
  }
  void add_to_y(const T* tile, int64_t ld, int64_t rows, T* sum) {
    outputs(rows, sum);
    multiply<Plain<T>>({tile, kMicroRows * ld, ld, 1}, {inner_.get(), kMicroColumns<Plain<T>> * group_.columns},
                       div_up(rows, kMicroRows), p_.features, group_.columns, out_.data(), true);
  }

  const ColumnGroup<T>& group() const { return group_; }
  const In* x_row(int64_t r) const { return scores_.x_row(r); }
  const In* y_row(int64_t r) const { return scores_.y_row(r); }

 private:
  // What is finite stays finite in T.
  static double limited(double v) {
    constexpr double largest = Format<T>::largest;
    return v > largest ? largest : v < -largest ? -largest : v;
  }

  template <class Row>
  void pack(int64_t count, const Row& row) {
    rows_.resize(count);
    for (int64_t i = 0; i < count; ++i) rows_[i] = row(i);
    const int64_t wanted = round_up(p_.features, kMicroColumns<Plain<T>>) * count;
    if (wanted > inner_size_) inner_ = Buffer<T>(wanted), inner_size_ = wanted;
    pack_inner<Plain<T>>(rows_.data(), count, p_.features, inner_.get());
  }

  void outputs(int64_t count, T* sum) {
    if (p_.features > idle_size_) idle_ = Buffer<T>(p_.features), idle_size_ = p_.features;
    out_.resize(round_up(count, kMicroRows));
    for (int64_t i = 0; i < static_cast<int64_t>(out_.size()); ++i)
      out_[i] = i < count ? sum + i * p_.features : idle_.get();
    std::fill_n(idle_.get(), p_.features, T(0));
  }

  const SimilarityProblem p_;
  ColumnGroup<T> group_{};
  SetEpilogue<T> epilogue_;
  Scores scores_;
  Buffer<T> inner_, idle_;
  int64_t inner_size_ = 0, idle_size_ = 0;
  std::vector<const In*> rows_;
  std::vector<T*> out_;
};

template <class In, class Scores>
std::vector<Worker<In, Scores>> workers(const SimilarityProblem& p, bool backward_dense) {
  std::vector<Worker<In, Scores>> all;
  for (int64_t i = 0; i < threads(); ++i) all.emplace_back(p, backward_dense);
  return all;
}

}  // namespace setemb
