// All-pairs smooth-Chamfer similarity on the CPU, forward and backward. The formula and its derivative in words:
// setemb_kernels/ops/smooth_chamfer/reference.py.
//
// Scores are made a tile at a time (gemm.h), and what the similarity does with a tile happens while it is in cache
// (smooth_chamfer_tile.h). Operands are packed panel-wise, a bounded part at a time (`Budget`), so the working memory
// does not grow with N, M.
//
// The backward pass makes each tile again, turns it into the weights w = g ds/dc, and multiplies: dX += w Y at once, by
// the task that owns those rows of x; dY += w^T X in a second step, by the task that owns those rows of y, from a
// bounded store of tiles. Every output element is summed by one task in one order: the result does not depend on the
// number of threads.
#include "smooth_chamfer.h"

#include <cmath>
#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "smooth_chamfer_blocks.h"
#include "smooth_chamfer_tile.h"
#include "smooth_chamfer_upstream.h"

namespace setemb {
namespace {

// Bytes of packed operands and stored tiles at a time: constant for up to 8 threads, then what keeps each of them busy.
struct Budget {
  static int64_t x() { return mebibytes(12); }
  static int64_t y() { return mebibytes(16); }
  static int64_t tiles() { return mebibytes(12); }

 private:
  static int64_t mebibytes(int64_t n) { return (n << 20) * std::max<int64_t>(1, threads() / 8); }
};

// Above this a float32 sum of all of dY is not kept for 16-bit types.
constexpr int64_t kSumBytes = int64_t{24} << 20;

template <class In, class P>
class SmoothChamfer {
  using T = typename P::Acc;
  using E = typename P::Element;

 public:
  explicit SmoothChamfer(const ChamferProblem& p)
      : sides_(p),
        b_(p.x.sets, p.y.sets, p.x.vectors, p.y.vectors, p.features),
        alpha_(p.alpha),
        exponent_(excess_exponent<T>(exponent_of(x_.largest()) + exponent_of(y_.largest()), p.features)),
        masked_(p.x.mask != nullptr || p.y.mask != nullptr),
        y_weight_(b_.y_count * b_.y_sets),
        x_norm_(block_norms(x_.norm, b_.x_sets)),
        y_norm_(block_norms(y_.norm, b_.y_sets)) {
    std::copy(y_.weight.begin(), y_.weight.end(), y_weight_.begin());
    for (int64_t i = 0; i < threads(); ++i) scratch_.emplace_back(b_);
  }

  // Whether products overflow T: then scores are made of x times 2^-exponent_.
  bool scaled() const { return exponent_ != 0; }

  // Out: In or T.
  template <class Out>
  void forward(Out* out) {
    const int64_t x_part = Packed<P>::fitting(b_.x_count, Budget::x(), b_.x_outer());
    const int64_t y_part = Packed<P>::fitting(b_.y_count, Budget::y(), b_.y_outer());
    Packed<P> xs(x_part, b_.x_outer(), 0, 0), ys(y_part, b_.y_outer(), 0, b_.L * b_.y_sets);
    for_each_part(ys, b_.y_count, y_part, [&] {
      for_each_part(xs, b_.x_count, x_part, [&] {
        pack(xs, ys);
        run_tasks(xs.size() * ys.size(), [&](int64_t task, int64_t worker) {
          forward_tile(xs, xs.first + task / ys.size(), ys, ys.first + task % ys.size(), scratch_[worker], out);
        });
      });
    });
  }

  // Sums into x_sum, y_sum and alpha, each null where not needed; x_out: that of x is wanted in In, times 2^shrink. The
  // upstream gradient, and its sums, are those of smooth_chamfer_upstream.h.
  template <class Upstream>
  ContrastSums backward(const Upstream& upstream, int shrink, T* x_sum, In* x_out, T* y_sum, double* alpha) {
    const bool need_x = x_sum != nullptr || x_out != nullptr, need_y = y_sum != nullptr;
    const int64_t x_inner = need_y ? b_.x_inner() : 0, y_inner = need_x ? b_.y_inner() : 0;
    const int64_t tiles = std::max<int64_t>(1, Budget::tiles() / (tile_elements() * static_cast<int64_t>(sizeof(E))));
    const int64_t y_part =
        std::min<int64_t>({Packed<P>::fitting(b_.y_count, Budget::y(), b_.y_outer() + y_inner), 4, tiles});
    const int64_t x_part =
        std::min(Packed<P>::fitting(b_.x_count, Budget::x(), b_.x_outer() + x_inner), tiles / y_part);
    Packed<P> xs(x_part, b_.x_outer(), x_inner, 0), ys(y_part, b_.y_outer(), y_inner, b_.L * b_.y_sets);
    Buffer<E> store(need_y ? x_part * y_part * tile_elements() : 0);
    Buffer<T> part_sum(x_out != nullptr ? x_part * b_.x_sets * b_.K * b_.D : 0);
    std::vector<double> entropy(b_.x_count, 0.0);
    std::vector<LaneSums<T>> sums(b_.x_count);
    for_each_part(xs, b_.x_count, x_part, [&] {
      T* const sum = x_out != nullptr   ? part_sum.get()
                     : x_sum == nullptr ? nullptr
                                        : x_sum + xs.first * b_.x_sets * b_.K * b_.D;
      for_each_part(ys, b_.y_count, y_part, [&] {
        pack(xs, ys);
        const auto tile_of = [&](int64_t x, int64_t y) {
          return store.get() + ((x - xs.first) * y_part + (y - ys.first)) * tile_elements();
        };
        run_tasks(xs.size(), [&](int64_t task, int64_t worker) {
          const int64_t x = xs.first + task;
          for (int64_t y = ys.first; y < ys.last; ++y) {
            E* const kept = need_y ? tile_of(x, y) : nullptr;
            weights_tile(xs, x, ys, y, upstream, scratch_[worker], kept, alpha != nullptr ? &entropy[x] : nullptr,
                         sums[x]);
            if (need_x) add_to_x(x, ys, y, scratch_[worker], kept, sum + task * b_.x_sets * b_.K * b_.D);
          }
        });
        if (!need_y) return;
        // as many tasks as keep all threads busy, a whole number of panels of features each
        const int64_t panels = std::clamp<int64_t>(b_.feature_panels() * ys.size() / (4 * threads()), 4, 64);
        const int64_t pieces = div_up(b_.feature_panels(), panels);
        run_tasks(ys.size() * pieces, [&](int64_t task, int64_t worker) {
          const int64_t y = ys.first + task / pieces;
          for (int64_t x = xs.first; x < xs.last; ++x) {
            add_to_y(xs, x, y, tile_of(x, y), task % pieces * panels, panels, scratch_[worker], y_sum);
          }
        });
      });
      if (x_out != nullptr) {
        const int64_t first = xs.first * b_.x_sets, last = std::min(x_.batch.sets, xs.last * b_.x_sets);
        convert(sum, x_out + first * b_.K * b_.D, (last - first) * b_.K * b_.D, shrink);
      }
    });
    ContrastSums total = {};
    for (int64_t x = 0; x < b_.x_count; ++x) {
      if (alpha != nullptr) *alpha += entropy[x];
      sums[x].add_to(total);
    }
    return total;
  }

  // By how many powers of two an upstream gradient of at most `largest` is made smaller, so that no sum of g w y
  // overflows.
  int shrink_of(double largest) const {
    return excess_exponent<T>(exponent_of(largest) + std::max(exponent_of(x_.largest()), exponent_of(y_.largest())),
                              std::max(x_.batch.sets * b_.K, y_.batch.sets * b_.L));
  }

 private:
  // Elements of a tile of weights as it is kept for dY.
  int64_t tile_elements() const { return div_up(b_.rows, P::group) * b_.ld; }

  static std::vector<double> block_norms(const std::vector<double>& norm, int64_t sets) {
    std::vector<double> out;
    for (size_t i = 0; i < norm.size(); ++i) {
      if (i % sets == 0) out.push_back(0);
      if (!std::isnan(out.back()) && !(norm[i] <= out.back())) out.back() = norm[i];  // NaN too, for good
    }
    return out;
  }

  template <class F>
  static void for_each_part(Packed<P>& packed, int64_t blocks, int64_t part, const F& f) {
    for (int64_t first = 0; first < blocks; first += part) {
      packed.select(first, std::min(blocks, first + part));
      f();
    }
  }

  int64_t x_sets_in(int64_t block) const { return std::min(b_.x_sets, x_.batch.sets - block * b_.x_sets); }

  // Packs what is selected and not packed yet.
  void pack(Packed<P>& xs, Packed<P>& ys) const {
    const int64_t x_tasks = xs.stale ? xs.size() : 0, y_tasks = ys.stale ? ys.size() : 0;
    run_tasks(x_tasks + y_tasks, [&](int64_t task, int64_t) {
      task < x_tasks ? pack_x(xs, xs.first + task) : pack_y(ys, ys.first + task - x_tasks);
    });
    xs.stale = ys.stale = false;
  }

  void pack_x(const Packed<P>& xs, int64_t block) const {
    const int64_t count = x_sets_in(block) * b_.K;
    std::vector<const In*> rows(count);
    for (int64_t r = 0; r < count; ++r) rows[r] = x_.vector(block * b_.x_sets + r / b_.K, r % b_.K);
    pack_outer<P>(rows.data(), count, b_.D, kMicroRows, xs.outer(block), static_cast<T>(std::ldexp(1.0, -exponent_)));
    if (xs.inner(block) != nullptr) pack_inner<P>(rows.data(), count, b_.D, xs.inner(block));
  }

  void pack_y(const Packed<P>& ys, int64_t block) const {
    const int64_t count = b_.L * b_.y_sets;
    std::vector<const In*> columns(count);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t m = block * b_.y_sets + j % b_.y_sets;
      columns[j] = m < y_.batch.sets ? y_.vector(m, j / b_.y_sets) : nullptr;
      ys.valid(block)[j] = columns[j] == nullptr ? 0 : 1;
    }
    pack_outer<P>(columns.data(), count, b_.D, kMicroColumns<P>, ys.outer(block), T(1));
    if (ys.inner(block) != nullptr) pack_inner<P>(columns.data(), count, b_.D, ys.inner(block));
  }

  // The scores of block x with block y into `scores`, and the tile that describes them.
  ChamferTile<T> score_tile(const Packed<P>& xs, int64_t x, const Packed<P>& ys, int64_t y, Scratch<P>& s,
                            T* scores) const {
    const int64_t sets = x_sets_in(x), panels = div_up(sets * b_.K, kMicroRows);
    for (int64_t r = 0; r < panels * kMicroRows; ++r) s.rows[r] = scores + r * b_.ld;
    multiply<P>({xs.outer(x), kMicroRows * b_.steps(), 1, kMicroRows}, {ys.outer(y), kMicroColumns<P> * b_.steps()},
                panels, b_.columns, b_.steps(), s.rows.data(), false);
    const double largest = Format<T>::largest;
    return {scores,
            b_.ld,
            sets,
            b_.K,
            b_.L,
            b_.y_sets,
            exponent_ == 0 && x_norm_[x] * y_norm_[y] * alpha_ <= kSharedShiftLimit,
            masked_,
            x_.batch.mask == nullptr ? nullptr : x_.batch.mask + x * b_.x_sets * b_.K,
            ys.valid(y),
            x_.weight.data() + x * b_.x_sets,
            y_weight_.data() + y * b_.y_sets,
            static_cast<T>(std::min(largest, std::ldexp(alpha_, exponent_))),
            static_cast<T>(std::min(largest, std::ldexp(1 / alpha_, -exponent_))),
            s.sums.get()};
  }

  template <class Out>
  void forward_tile(const Packed<P>& xs, int64_t x, const Packed<P>& ys, int64_t y, Scratch<P>& s, Out* out) const {
    const ChamferTile<T> tile = score_tile(xs, x, ys, y, s, s.tile.get());
    ChamferEpilogue<T> epilogue(tile);
    const int64_t M = y_.batch.sets, first = y * b_.y_sets, width = std::min(b_.y_sets, M - first);
    T* const line = s.line.get();
    for (int64_t n = 0; n < tile.sets; ++n) {
      epilogue.similarity(n, line);
      Out* const row = out + (x * b_.x_sets + n) * M + first;
      for (int64_t m = 0; m < width; ++m) row[m] = saturate<Out>(line[m] * low_ * high_);
    }
  }

  // Similarities from those of scaled scores.
  Vec<T> in_range(Vec<T> s) const {
    const Vec<T> largest = splat(Format<T>::largest);
    return at_most<T>(at_least<T>(s * low_ * high_, -largest), largest);
  }

  // Makes the weights of one tile: in s.tile, and where dY needs them in `kept`, as add_to_y reads them.
  template <class Upstream>
  void weights_tile(const Packed<P>& xs, int64_t x, const Packed<P>& ys, int64_t y, const Upstream& upstream,
                    Scratch<P>& s, E* kept, double* entropy, LaneSums<T>& sums) const {
    T* scores = s.tile.get();
    if constexpr (P::group == 1) scores = kept != nullptr ? kept : scores;
    const ChamferTile<T> tile = score_tile(xs, x, ys, y, s, scores);
    ChamferEpilogue<T> epilogue(tile);
    const int64_t first = y * b_.y_sets, width = std::min(b_.y_sets, y_.batch.sets - first);
    double sum = 0;
    for (int64_t n = 0; n < tile.sets; ++n) {
      const auto row = upstream.row(x * b_.x_sets + n, first, width, s.line.get(), sums);
      const auto gradient = [&](int64_t m, const auto& similarity) {
        return row(m, [&] { return in_range(similarity()); });
      };
      entropy != nullptr ? epilogue.template weights<true>(n, gradient, sum)
                         : epilogue.template weights<false>(n, gradient, sum);
    }
    if (entropy != nullptr) *entropy += sum;
    if constexpr (P::group == 2)
      P::round_tile(scores, div_up(tile.sets * b_.K, kMicroRows) * kMicroRows, b_.columns, b_.ld, s.pairs.get(), kept);
  }

  // dX of block x += weights * Y. The weights of a tile are read as they lie.
  void add_to_x(int64_t x, const Packed<P>& ys, int64_t y, Scratch<P>& s, const E* kept, T* sum) const {
    const int64_t rows = x_sets_in(x) * b_.K, panels = div_up(rows, kMicroRows), stride = b_.ld / P::group;
    for (int64_t r = 0; r < panels * kMicroRows; ++r) s.rows[r] = r < rows ? sum + r * b_.D : s.idle_row.get();
    const E* weights;
    if constexpr (P::group == 1) {
      weights = kept != nullptr ? kept : s.tile.get();
    } else {
      weights = s.pairs.get();
    }
    multiply<P, kTileStride / P::group>({weights, kMicroRows * stride, stride, 1},
                                        {ys.inner(y), kMicroColumns<P> * b_.column_steps()}, panels, b_.D,
                                        b_.column_steps(), s.rows.data(), y > 0);
  }

  // dY of block y += weights^T * X, for `panels` panels of features from `panel` on.
  void add_to_y(const Packed<P>& xs, int64_t x, int64_t y, const E* weights, int64_t panel, int64_t panels,
                Scratch<P>& s, T* sum) const {
    const int64_t M = y_.batch.sets, count = b_.L * b_.y_sets, begin = panel * kMicroColumns<P>;
    const int64_t end = std::min(b_.D, (panel + panels) * kMicroColumns<P>), rows = x_sets_in(x) * b_.K;
    for (int64_t j = 0; j < round_up(count, kMicroRows); ++j) {
      const int64_t m = y * b_.y_sets + j % b_.y_sets, l = j / b_.y_sets;
      s.rows[j] = j < count && m < M ? sum + (m * b_.L + l) * b_.D + begin : s.idle_row.get();
    }
    const int64_t steps = div_up(rows, P::group), panel_size = kMicroColumns<P> * steps;
    multiply<P>({weights, kMicroRows, 1, b_.ld}, {xs.inner(x) + panel * panel_size, panel_size},
                div_up(count, kMicroRows), end - begin, steps, s.rows.data(), x > 0);
  }

 public:
  // Out of range a gradient becomes infinite, as of any other op: a loss scaler looks for that.
  template <class Out>
  static void convert(const T* sum, Out* out, int64_t count, int shrink) {
    const T low = static_cast<T>(std::ldexp(1.0, shrink / 2)),
            high = static_cast<T>(std::ldexp(1.0, shrink - shrink / 2));
    constexpr int64_t piece = 1 << 16;
    run_tasks(div_up(count, piece), [&](int64_t task, int64_t) {
      for (int64_t i = task * piece; i < std::min(count, (task + 1) * piece); ++i)
        out[i] = round_to<Out>(sum[i] * low * high);
    });
  }

 private:
  const Sides<In, T> sides_;
  const Side<In, T>&x_ = sides_.x, &y_ = sides_.y;
  const Blocks<P> b_;
  const double alpha_;
  const int exponent_;
  // 2^exponent_ may not be a number of T, its halves are
  const T low_ = static_cast<T>(std::ldexp(1.0, exponent_ / 2)),
          high_ = static_cast<T>(std::ldexp(1.0, exponent_ - exponent_ / 2));
  const bool masked_;
  std::vector<T> y_weight_;              // as y_.weight, padded to whole blocks
  std::vector<double> x_norm_, y_norm_;  // of the longest vector of a block
  std::vector<Scratch<P>> scratch_;
};

// Calls f with the fastest policy that serves In on this processor and these values.
template <class In, class F>
void with_policy(const ChamferProblem& problem, const F& f) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<In, bfloat16_t>) {
    if (__builtin_cpu_supports("avx512bf16")) {
      SmoothChamfer<In, BFloat16Pairs> op(problem);
      if (!op.scaled()) return f(op);
    }
  }
#endif
  SmoothChamfer<In, Plain<AccOf<In>>> op(problem);
  f(op);
}

template <class In>
void backward_as(ChamferProblem problem, StridedMatrix grad, ChamferGradients out) {
  using T = AccOf<In>;
  constexpr bool direct = std::is_same_v<In, T>;
  const int64_t x_size = problem.x.sets * problem.x.vectors * problem.features;
  const int64_t y_size = problem.y.sets * problem.y.vectors * problem.features;
  if (!direct && out.y != nullptr && y_size * static_cast<int64_t>(sizeof(T)) > kSumBytes) {
    // The sums of dX are kept for a part at a time, those of dY are not. The similarity is symmetric: dY is the dX of
    // the swapped problem, at the price of making the scores twice.
    std::swap(problem.x, problem.y);
    std::swap(grad.row_stride, grad.column_stride);
    const ChamferGradients y_alone = {out.y, nullptr, nullptr};
    backward_as<In>(problem, grad, y_alone);
    std::swap(problem.x, problem.y);
    std::swap(grad.row_stride, grad.column_stride);
    out.y = nullptr;
    if (out.x == nullptr && out.alpha == nullptr) return;
  }
  with_policy<In>(problem, [&](auto& op) {
    GivenGradient<In, T> upstream(grad);
    const int shrink = op.shrink_of(upstream.largest(problem.x.sets, problem.y.sets));
    upstream.shrink(shrink);
    double entropy = 0;
    double* const alpha = out.alpha != nullptr ? &entropy : nullptr;
    In *const x = static_cast<In*>(out.x), *const y = static_cast<In*>(out.y);
    if constexpr (direct) {
      op.backward(upstream, shrink, x, nullptr, y, alpha);
      if (shrink != 0 && x != nullptr) op.convert(x, x, x_size, shrink);
      if (shrink != 0 && y != nullptr) op.convert(y, y, y_size, shrink);
    } else {
      Buffer<T> y_sum(y != nullptr ? y_size : 0);
      op.backward(upstream, shrink, nullptr, x, y != nullptr ? y_sum.get() : nullptr, alpha);
      if (y != nullptr) op.convert(y_sum.get(), y, y_size, shrink);
    }
    if (alpha != nullptr) *out.alpha = -std::ldexp(entropy, shrink) / problem.alpha / problem.alpha;
  });
}

template <class In>
ContrastSums contrast_backward_as(const ChamferProblem& problem, const Contrast& loss, const ChamferGradients& out) {
  using T = AccOf<In>;
  ContrastSums sums = {};
  if (problem.x.vectors == 0 || problem.y.vectors == 0) {  // all similarities are 0, and count
    const ContrastGradient<T> upstream(loss, problem.x.sets, problem.y.sets);
    LaneSums<T> lanes;
    for (int64_t n = 0; n < problem.x.sets; ++n) {
      const auto row = upstream.row(n, 0, problem.y.sets, nullptr, lanes);
      for (int64_t m = 0; m < problem.y.sets; m += kLanes<T>) row(m, [] { return Vec<T>{}; });
    }
    lanes.add_to(sums);
  } else {
    with_policy<In>(problem, [&](auto& op) {
      ContrastGradient<T> upstream(loss, problem.x.sets, problem.y.sets);
      const int shrink = op.shrink_of(upstream.largest(problem.x.sets, problem.y.sets));
      upstream.shrink(shrink);
      double entropy = 0;
      T *const x = static_cast<T*>(out.x), *const y = static_cast<T*>(out.y);
      sums = op.backward(upstream, shrink, x, nullptr, y, out.alpha != nullptr ? &entropy : nullptr);
      for (const auto& [sum, side] : {std::pair(x, &problem.x), std::pair(y, &problem.y)}) {
        if (shrink != 0 && sum != nullptr) op.convert(sum, sum, side->sets * side->vectors * problem.features, shrink);
      }
      if (out.alpha != nullptr) *out.alpha = -std::ldexp(entropy, shrink) / problem.alpha / problem.alpha;
    });
  }
  sums.by_scale *= loss.weight;
  sums.by_bias *= loss.weight;
  return sums;
}

}  // namespace

void smooth_chamfer_forward(DType dtype, const ChamferProblem& problem, void* out, bool wide) {
  with_type(dtype, [&](auto zero) {
    using In = decltype(zero);
    with_policy<In>(problem, [&](auto& op) {
      wide ? op.forward(static_cast<AccOf<In>*>(out)) : op.forward(static_cast<In*>(out));
    });
  });
}

void smooth_chamfer_backward(DType dtype, const ChamferProblem& problem, StridedMatrix grad,
                             const ChamferGradients& out) {
  with_type(dtype, [&](auto zero) { backward_as<decltype(zero)>(problem, grad, out); });
}

ContrastSums smooth_chamfer_contrast_backward(DType dtype, const ChamferProblem& problem, const Contrast& loss,
                                              const ChamferGradients& out) {
  ContrastSums sums = {};
  with_type(dtype, [&](auto zero) { sums = contrast_backward_as<decltype(zero)>(problem, loss, out); });
  return sums;
}

}  // namespace setemb
