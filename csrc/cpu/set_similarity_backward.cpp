// Similarities of sets of any sizes on the CPU, backward: makes scores again.
//
// Tasks that own sets of x add up dX, then tasks that own sets of y add up dY, each output element by one task in one
// order: the result does not depend on the number of threads. Where the gradient of a maximum is wanted for both, its
// places are kept in between if that takes no more memory than the gradients.
#include <vector>

#include "set_similarity.h"
#include "set_similarity_worker.h"

namespace setemb {
namespace {

// out += w row, or = w row
template <bool kFirst, class T, class In>
void add_row(T* __restrict out, T w, const In* __restrict row, int64_t features) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t d = 0;
  for (; d + lanes <= features; d += lanes) {
    const Vec<T> v = w * load_as<T>(row + d);
    store(out + d, kFirst ? v : load(out + d) + v);
  }
  for (; d < features; ++d) {
    const T v = w * static_cast<T>(to_float(row[d]));
    out[d] = kFirst ? v : out[d] + v;
  }
}

// Sums of many rows that are chosen one at a time. Each is made of parts of eight, so that rounding does not grow with
// how many there are.
template <class T>
class SumInParts {
 public:
  SumInParts(T* total, int64_t rows, int64_t features)
      : total_(total), features_(features), part_(rows * features), count_(rows, 0) {}

  template <class In>
  void add(int64_t row, T w, const In* values) {
    T* const part = part_.get() + row * features_;
    // most rows get few, so the first is written rather than added to zeros
    count_[row] == 0 ? add_row<true>(part, w, values, features_) : add_row<false>(part, w, values, features_);
    if (++count_[row] == 8) flush(row);
  }

  void flush() {
    for (int64_t row = 0; row < static_cast<int64_t>(count_.size()); ++row) {
      if (count_[row] > 0) flush(row);
    }
  }

 private:
  void flush(int64_t row) {
    T* const part = part_.get() + row * features_;
    add_row<false>(total_ + row * features_, T(1), part, features_);
    count_[row] = 0;
  }

  T* const total_;
  const int64_t features_;
  const Buffer<T> part_;
  std::vector<uint8_t> count_;
};

// Which pairs (set of x, place among its candidates) hold a set of y: those of set j are places[begin[j]..begin[j +
// 1]).
struct Holders {
  std::vector<int64_t> begin, places;

  explicit Holders(const SimilarityProblem& p) : begin(p.y.sets + 1, 0) {
    const int64_t count = p.x.sets * p.choices;
    for (int64_t i = 0; i < count; ++i) {
      if (p.candidates[i] >= 0) ++begin[p.candidates[i] + 1];
    }
    for (int64_t j = 0; j < p.y.sets; ++j) begin[j + 1] += begin[j];
    places.resize(begin.back());
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < count; ++i) {
      if (p.candidates[i] >= 0) places[next[p.candidates[i]]++] = i;
    }
  }
};

template <class In>
class Backward {
  using T = AccOf<In>;
  using Scores = SetScores<In, Plain<T>>;

 public:
  Backward(const SimilarityProblem& p, const void* grad, bool wide, const SimilarityGradients& out)
      : p_(p), grad_(grad), wide_(wide), out_(out), hard_(is_hard(p.kind)), workers_(workers<In, Scores>(p, !hard_)) {}

  void run() {
    const bool sums = out_.alpha != nullptr || out_.bias != nullptr;
    zero_beyond(p_.x, out_.x);
    zero_beyond(p_.y, out_.y);
    const bool by_y = out_.y != nullptr, by_x = out_.x != nullptr || (sums && !hard_ && !by_y);
    if (hard_ && !by_x && !by_y) return;
    if (by_x) owned_by_x(sums);
    if (by_y) owned_by_y(sums && !by_x);
    if (out_.alpha != nullptr) {
      const bool scale = p_.kind == SimilarityKind::kMatchProbability;
      *out_.alpha = hard_ ? 0 : scale ? entropy_ : -entropy_ / p_.alpha / p_.alpha;
    }
    if (out_.bias != nullptr) *out_.bias = by_bias_;
  }

 private:
  static bool is_hard(SimilarityKind kind) {
    return kind == SimilarityKind::kChamfer || kind == SimilarityKind::kMaxSim || kind == SimilarityKind::kMax;
  }

  // Rows that belong to no set.
  void zero_beyond(const PackedSets& sets, void* out) const {
    const int64_t used = sets.offsets[sets.sets] * p_.features;
    if (out != nullptr) std::fill_n(static_cast<In*>(out) + used, sets.rows * p_.features - used, In{});
  }

  double gradient(int64_t i, int64_t slot) const {
    const int64_t at = i * p_.choices + slot;
    return wide_ ? static_cast<const T*>(grad_)[at] : to_float(static_cast<const In*>(grad_)[at]);
  }

  // Runs task(index, worker) and adds up, in the order of the tasks, what their epilogues added up.
  template <class F>
  void summed_tasks(int64_t count, bool sums, const F& task) {
    std::vector<double> entropy(count, 0.0), by_bias(count, 0.0);
    run_tasks(count, [&](int64_t i, int64_t worker) {
      SetEpilogue<T>& e = workers_[worker].epilogue();
      e.entropy = e.by_bias = 0;
      task(i, workers_[worker]);
      entropy[i] = e.entropy, by_bias[i] = e.by_bias;
    });
    for (int64_t i = 0; sums && i < count; ++i) entropy_ += entropy[i], by_bias_ += by_bias[i];
  }

  // Whether an array of `places` indices is smaller than the gradients.
  bool worth_keeping(int64_t places) const {
    return places * static_cast<int64_t>(sizeof(int32_t)) <=
           (p_.x.rows + p_.y.rows) * p_.features * static_cast<int64_t>(sizeof(In));
  }

  void owned_by_x(bool sums) {
    const std::vector<Run> groups = p_.candidates != nullptr ? runs_of(p_.x, -1) : runs_of(p_.x, group_columns());
    keeps_ = p_.kind == SimilarityKind::kMaxSim && out_.y != nullptr && worth_keeping(p_.choices * p_.x.rows);
    if (keeps_) kept_ = Buffer<int32_t>(p_.choices * p_.x.rows);
    summed_tasks(groups.size(), sums, [&](int64_t task, Worker<In, Scores>& w) {
      w.select(groups[task]);
      const int64_t columns = w.group().columns, row = w.group().row;
      if (columns == 0) return;
      Buffer<T> own;
      T* sum = nullptr;
      if (out_.x != nullptr) sum = sums_of(out_.x, row, columns, own);
      SumInParts<T> parts(sum, hard_ ? columns : 0, p_.features);
      const auto meet = [&](Run run, int64_t slot) {
        const auto g = [&](int64_t i, int64_t j) { return gradient(i, slot >= 0 ? slot : j); };
        if (hard_) {
          const int64_t* const offsets = p_.y.offsets;
          int64_t j = run.first;
          w.hard(run, g, [&](int64_t column, int64_t y_row, T weight) {
            parts.add(column - row, weight, w.y_row(y_row));
            if (keeps_) {  // sets come one after the other
              while (offsets[j + 1] <= y_row) ++j;
              kept_.get()[(slot >= 0 ? slot : j) * p_.x.rows + column] = static_cast<int32_t>(y_row - offsets[j]);
            }
          });
        } else {
          w.soft(run, g, sums, [&](const T* tile, int64_t ld, int64_t first, int64_t rows) {
            if (sum != nullptr) w.add_to_x(tile, ld, first, rows, sum);
          });
        }
      };
      if (p_.candidates == nullptr) {
        meet({0, p_.y.sets}, -1);
      } else {
        const int64_t i = groups[task].first;
        for (int64_t slot = 0; slot < p_.choices; ++slot) {
          const int64_t j = p_.candidates[i * p_.choices + slot];
          if (j >= 0) meet({j, j + 1}, slot);
        }
      }
      parts.flush();
      if (sum != nullptr) convert(sum, out_.x, row, columns);
    });
  }

  void owned_by_y(bool sums) {
    const bool all = p_.candidates == nullptr;
    const Holders holders = all ? Holders(SimilarityProblem{}) : Holders(p_);
    const std::vector<Run> groups = runs_of(p_.x, kGroupColumns);
    const std::vector<Run> runs = runs_of(p_.y, all ? kRunRows / 2 : -1);
    summed_tasks(runs.size(), sums, [&](int64_t task, Worker<In, Scores>& w) {
      const Run run = runs[task];
      const int64_t top = p_.y.offsets[run.first], count = p_.y.offsets[run.last] - top;
      if (count == 0) return;
      Buffer<T> own;
      T* const sum = sums_of(out_.y, top, count, own);
      SumInParts<T> parts(sum, hard_ && !(keeps_ && all) ? count : 0, p_.features);
      if (keeps_ && all) {
        for (int64_t j = run.first; j < run.last; ++j) {
          SumInParts<T> kept(sum + (p_.y.offsets[j] - top) * p_.features, p_.y.offsets[j + 1] - p_.y.offsets[j],
                             p_.features);
          for (int64_t i = 0; p_.y.offsets[j] != p_.y.offsets[j + 1] && i < p_.x.sets; ++i) add_kept(i, j, w, kept);
          kept.flush();
        }
      } else if (all) {
        for (const Run group : groups) meet_y(group, run, -1, sums, w, sum, parts);
      } else {
        const int64_t j = run.first;
        for (int64_t n = holders.begin[j]; n < holders.begin[j + 1]; ++n) {
          const int64_t i = holders.places[n] / p_.choices, slot = holders.places[n] % p_.choices;
          if (keeps_) {
            add_kept(i, slot, w, parts);
          } else {
            meet_y({i, i + 1}, run, slot, sums, w, sum, parts);
          }
        }
      }
      parts.flush();
      convert(sum, out_.y, top, count);
    });
  }

  void meet_y(Run group, Run run, int64_t slot, bool sums, Worker<In, Scores>& w, T* sum, SumInParts<T>& parts) {
    const int64_t top = p_.y.offsets[run.first];
    const auto g = [&](int64_t i, int64_t j) { return gradient(i, slot >= 0 ? slot : j); };
    w.select(group);
    if (w.group().columns == 0) return;
    if (hard_) {
      w.hard(run, g, [&](int64_t column, int64_t y_row, T weight) { parts.add(y_row - top, weight, w.x_row(column)); });
    } else {
      w.prepare_y();
      w.soft(run, g, sums, [&](const T* tile, int64_t ld, int64_t first, int64_t rows) {
        w.add_to_y(tile, ld, rows, sum + (first - top) * p_.features);
      });
    }
  }

  // What set i of x gives its set of y in a place, of maxsim, from where the maxima were.
  void add_kept(int64_t i, int64_t slot, const Worker<In, Scores>& w, SumInParts<T>& parts) {
    const int64_t begin = p_.x.offsets[i], end = p_.x.offsets[i + 1];
    if (begin == end) return;
    const double g = gradient(i, slot);
    const T weight = static_cast<T>(p_.mean ? g / static_cast<double>(end - begin) : g);
    const int32_t* const places = kept_.get() + slot * p_.x.rows;
    for (int64_t k = begin; k < end; ++k) parts.add(places[k], weight, w.x_row(k));
  }

  // Columns in a group, so that there are enough of them for several threads.
  int64_t group_columns() const { return std::clamp<int64_t>(p_.x.rows / 16, 32, kGroupColumns); }

  // Zeros to add up rows of a gradient in: in place, or where its type is narrower in memory of their own. Its task
  // makes them, just before it adds.
  T* sums_of(void* out, int64_t row, int64_t count, Buffer<T>& own) const {
    if constexpr (std::is_same_v<In, T>) {
      T* const sum = static_cast<T*>(out) + row * p_.features;
      std::fill_n(sum, count * p_.features, T(0));
      return sum;
    } else {
      own = Buffer<T>(count * p_.features);
      std::fill_n(own.get(), count * p_.features, T(0));
      return own.get();
    }
  }

  void convert(const T* sum, void* out, int64_t row, int64_t count) const {
    if constexpr (!std::is_same_v<In, T>) {
      In* const to = static_cast<In*>(out) + row * p_.features;
      for (int64_t i = 0; i < count * p_.features; ++i) to[i] = round_to<In>(sum[i]);
    }
  }

  const SimilarityProblem p_;
  const void* const grad_;
  const bool wide_;
  const SimilarityGradients out_;
  const bool hard_;
  std::vector<Worker<In, Scores>> workers_;
  Buffer<int32_t> kept_;  // of maxsim: [choice][vector of x], which vector of that set of y is the largest
  bool keeps_ = false;
  double entropy_ = 0, by_bias_ = 0;
};

}  // namespace

void set_similarity_backward(DType dtype, const SimilarityProblem& problem, const void* grad, bool wide,
                             const SimilarityGradients& out) {
  with_type(dtype, [&](auto zero) { Backward<decltype(zero)>(problem, grad, wide, out).run(); });
}

}  // namespace setemb
