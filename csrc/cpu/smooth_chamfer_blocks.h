// How smooth_chamfer.cpp cuts a problem into blocks that fit the caches: what is known of the sets, the sizes of blocks
// and tiles, packed parts of either side, and what a thread works in.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "smooth_chamfer.h"

namespace setemb {

// Row stride of a tile wherever its columns fit: not a power of two, so that a column of it does not share one cache
// set.
constexpr int64_t kTileStride = 528;
constexpr int64_t kTileRows = 96;

// exponent(v): the e of |v| < 2^e; 0 for 0 and for what is not finite
int exponent_of(double v) {
  int e = 0;
  if (std::isfinite(v)) std::frexp(v, &e);
  return e;
}

// By how many powers of two a sum of `terms` products below 2^exponent may leave the range of T.
template <class T>
int excess_exponent(int exponent, int64_t terms) {
  return std::max(0, exponent + exponent_of(static_cast<double>(terms)) + 1 - Format<T>::bias);
}

// The sets of one side with what is known of each.
template <class In, class T>
class Side {
 public:
  explicit Side(const SetBatch& b) : batch(b), norm(b.sets), weight(b.sets), largest_of_(b.sets) {}

  // Vector `v` of set `i`, null where it is masked.
  const In* vector(int64_t i, int64_t v) const {
    if (batch.mask != nullptr && !batch.mask[i * batch.vectors + v]) return nullptr;
    return static_cast<const In*>(batch.data) + i * batch.set_stride + v * batch.vector_stride;
  }

  const SetBatch batch;
  std::vector<double> norm;  // of the longest vector of a set; NaN where it holds one
  std::vector<T> weight;     // 1 / (2 |set|), 0 where it is empty

  double largest() const { return *std::max_element(largest_of_.begin(), largest_of_.end()); }  // |value|

  // Fills in what is known of set i.
  void measure(int64_t i, int64_t features) {
    int64_t valid = 0;
    double longest = 0, largest_here = 0;
    for (int64_t v = 0; v < batch.vectors; ++v) {
      const In* p = vector(i, v);
      if (p == nullptr) continue;
      ++valid;
      constexpr int parts = 16;  // independent sums: the loop vectorises
      T squares[parts] = {}, maxima[parts] = {};
      int64_t d = 0;
      for (; d + parts <= features; d += parts) {
        for (int j = 0; j < parts; ++j) add(to_float(p[d + j]), squares[j], maxima[j]);
      }
      for (; d < features; ++d) add(to_float(p[d]), squares[0], maxima[0]);
      double square = 0;
      for (int j = 0; j < parts; ++j) {
        square += squares[j];
        largest_here = std::max<double>(largest_here, maxima[j]);
      }
      const double length = std::sqrt(square);
      longest = length > longest || std::isnan(length) ? length : longest;
    }
    norm[i] = longest;
    largest_of_[i] = largest_here;
    weight[i] = valid == 0 ? T(0) : T(0.5) / static_cast<T>(valid);
  }

 private:
  static void add(T value, T& square, T& maximum) {
    square += value * value;
    const T magnitude = value < 0 ? -value : value;
    maximum = magnitude > maximum ? magnitude : maximum;
  }

  std::vector<double> largest_of_;
};

// Both sides of a problem, measured.
template <class In, class T>
struct Sides {
  Side<In, T> x, y;

  explicit Sides(const ChamferProblem& p) : x(p.x), y(p.y) {
    constexpr int64_t piece = 64;  // sets
    const int64_t x_tasks = div_up(p.x.sets, piece), y_tasks = div_up(p.y.sets, piece);
    run_tasks(x_tasks + y_tasks, [&](int64_t task, int64_t) {
      Side<In, T>& side = task < x_tasks ? x : y;
      const int64_t first = (task < x_tasks ? task : task - x_tasks) * piece;
      for (int64_t i = first; i < std::min(side.batch.sets, first + piece); ++i) side.measure(i, p.features);
    });
  }
};

// How sets are cut into blocks, and the sizes that follow.
template <class P>
struct Blocks {
  using T = typename P::Acc;

  int64_t K, L, D;
  int64_t x_sets, y_sets;    // sets in a block
  int64_t x_count, y_count;  // blocks
  int64_t rows, columns;     // of a tile, padded: whole micro-tiles
  int64_t ld;                // of a tile

  Blocks(int64_t N, int64_t M, int64_t K, int64_t L, int64_t D) : K(K), L(L), D(D) {
    // whole sets in as many rows as leave the least of the last micro-tile empty
    x_sets = 1;
    double best = 0;
    for (int64_t sets = std::max<int64_t>(1, kTileRows * 2 / 3 / K);
         sets <= std::max<int64_t>(1, kTileRows * 4 / 3 / K); ++sets) {
      const double use = static_cast<double>(sets * K) / static_cast<double>(round_up(sets * K, kMicroRows));
      if (use > best) best = use, x_sets = sets;
    }
    x_sets = balanced(N, x_sets, 1);
    constexpr int64_t lanes = kLanes<T>;
    y_sets = balanced(M, std::max<int64_t>(1, (kTileStride - 16) / (L * lanes)) * lanes, lanes);
    x_count = div_up(N, x_sets);
    y_count = div_up(M, y_sets);
    rows = round_up(x_sets * K, kMicroRows);
    columns = round_up(L * y_sets, kMicroColumns<P>);
    ld = columns <= kTileStride ? kTileStride : columns + 16;
  }

  int64_t steps() const { return div_up(D, P::group); }  // of the product over features
  int64_t feature_panels() const { return div_up(D, kMicroColumns<P>); }
  int64_t row_steps() const { return div_up(x_sets * K, P::group); }  // of the product over rows of a tile
  int64_t column_steps() const { return div_up(L * y_sets, P::group); }
  int64_t x_outer() const { return rows * steps(); }  // elements of a packed block, for the product over features
  int64_t y_outer() const { return columns * steps(); }
  int64_t x_inner() const {
    return feature_panels() * row_steps() * kMicroColumns<P>;
  }  // for the product that makes dY
  int64_t y_inner() const { return feature_panels() * column_steps() * kMicroColumns<P>; }

 private:
  // At most `most` sets a block, whole units, all blocks alike: the last is not nearly empty.
  static int64_t balanced(int64_t sets, int64_t most, int64_t unit) {
    return round_up(div_up(sets, div_up(sets, most)), unit);
  }
};

// A part of one side, packed: blocks [first, last). `outer` is for the product over features, `inner` for the one that
// makes a gradient.
template <class P>
class Packed {
  using E = typename P::Element;

 public:
  // Room for `capacity` blocks of so many elements.
  Packed(int64_t capacity, int64_t outer, int64_t inner, int64_t valid)
      : outer_size_(outer),
        inner_size_(inner),
        valid_size_(valid),
        outer_(capacity * outer),
        inner_(capacity * inner),
        valid_(capacity * valid) {}

  // How many blocks fit into `budget` bytes: at least one, at most `blocks`.
  static int64_t fitting(int64_t blocks, int64_t budget, int64_t elements) {
    return std::clamp<int64_t>(budget / std::max<int64_t>(1, elements * static_cast<int64_t>(sizeof(E))), 1, blocks);
  }

  void select(int64_t begin, int64_t end) {
    stale = stale || begin != first || end != last;
    first = begin;
    last = end;
  }

  int64_t size() const { return last - first; }
  E* outer(int64_t block) const { return outer_.get() + (block - first) * outer_size_; }
  E* inner(int64_t block) const { return inner_size_ == 0 ? nullptr : inner_.get() + (block - first) * inner_size_; }
  typename P::Acc* valid(int64_t block) const {
    return valid_.get() + (block - first) * valid_size_;
  }  // y: 1 or 0 a column

  int64_t first = 0, last = 0;
  bool stale = true;  // the selected blocks are not packed yet

 private:
  const int64_t outer_size_, inner_size_, valid_size_;
  const Buffer<E> outer_, inner_;
  const Buffer<typename P::Acc> valid_;
};

// What one thread works in.
template <class P>
struct Scratch {
  using T = typename P::Acc;
  Buffer<T> tile;                     // [rows][ld]
  Buffer<typename P::Element> pairs;  // weights rounded to the element, [rows][ld / group]
  Buffer<T> line;                     // a value for each set of y of a block
  Buffer<T> idle_row;                 // where the rows of a micro-tile go that nobody wants
  Buffer<Vec<T>> sums;
  std::vector<T*> rows;

  explicit Scratch(const Blocks<P>& b)
      : tile(b.rows * b.ld),
        pairs(P::group == 1 ? 0 : b.rows * b.ld / P::group),
        line(b.y_sets),
        idle_row(std::max(b.ld, b.D)),
        sums(4 * (b.K + b.L)),
        rows(round_up(std::max(b.rows, b.columns), kMicroRows)) {}
};

}  // namespace setemb
