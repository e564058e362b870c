// One step of slot attention on the CPU, forward and backward. The formula and its derivative in words:
// setemb_kernels/ops/slot_attention/reference.py.
//
// The rows of one product are the slots of all heads that share their keys and values: few. So nothing is packed
// (rows.h): a task takes the tokens of one item a block at a time, and while a block is in cache makes its logits,
// their softmax over the slots, and what they add to the slots' sums; in the backward pass also the gradients of the
// block's tokens, which no other task touches.
//
// Where there are few items a task takes a chunk of an item's tokens, and the chunks' sums are added in their order
// afterwards. How tokens are cut depends on sizes alone, so the result does not depend on the number of threads.
#include "slot_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace setemb {
namespace {

constexpr int64_t kBlockBytes = int64_t{512} << 10;   // of the keys and values of a block: half of a second-level cache
constexpr int64_t kPartialBytes = int64_t{16} << 20;  // of the chunks' sums
constexpr int64_t kTasks = 64;                        // worth cutting items for
constexpr int64_t kChunkTokens = 256;                 // worth a task

template <class In>
const In* row_of(const HeadRows& rows, int64_t item, int64_t head, int64_t row) {
  return static_cast<const In*>(rows.data) + item * rows.item_stride + head * rows.head_stride + row * rows.row_stride;
}

template <class In>
In* row_of(const MutableHeadRows& rows, int64_t item, int64_t head, int64_t row) {
  return static_cast<In*>(rows.data) + item * rows.item_stride + head * rows.head_stride + row * rows.row_stride;
}

template <class In, class T>
void read_row(const In* in, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}

template <class In, class T>
void write_row(const T* in, int64_t count, In* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = round_to<In>(in[i]);
}

template <class In>
class SlotAttention {
  using T = AccOf<In>;
  using V = Vec<T>;
  static constexpr int lanes = kLanes<T>;
  static constexpr bool direct = std::is_same_v<In, T>;

 public:
  explicit SlotAttention(const SlotAttentionProblem& p)
      : p_(p),
        rows_(p.heads / p.groups * p.slots),
        padded_rows_(round_up(rows_, kRowPadding)),
        block_(block_tokens(p)),
        stride_(block_ + 16),
        chunks_(chunks(p, rows_)),
        scale_(static_cast<T>(p.scale)),
        token_eps_(static_cast<T>(p.token_eps)) {
    for (int64_t i = 0; i < std::min(threads(), tasks()); ++i) scratch_.emplace_back(*this);
  }

  void forward(const MutableHeadRows& out, T* total) {
    const int64_t size = rows_ * p_.value_features;
    Buffer<T> partial(chunks_ > 1 ? tasks() * (size + rows_) : 0);
    run_tasks(tasks(), [&](int64_t task, int64_t worker) {
      Scratch& s = scratch_[worker];
      const Place place = place_of(task);
      read_slots(p_.q, p_.key_features, place, s.q.get());
      std::fill_n(s.sums.get(), padded_rows_ * p_.value_features, T(0));
      std::fill_n(s.row_sums.get(), rows_, V{});
      for_blocks(place, s, [&](int64_t n) {
        attention_of_block(s, n);
        add_token_eps(s, n);
        for (int64_t r = 0; r < rows_; ++r) {
          for (int64_t j = 0; j < n; j += lanes) s.row_sums.get()[r] += load(s.attention.get() + r * stride_ + j);
        }
        output_rows(s, s.sums.get(), p_.value_features);
        combine(s.out_rows.data(), rows_, s.attention.get(), stride_, 1, s.v_rows.data(), n, p_.value_features, true);
      });
      T* const totals = chunks_ > 1 ? partial.get() + task * (size + rows_) + size : total + first_row(place);
      for (int64_t r = 0; r < rows_; ++r) totals[r] = sum(s.row_sums.get()[r]);
      if (chunks_ > 1) {
        std::copy_n(s.sums.get(), size, partial.get() + task * (size + rows_));
      } else {
        finish(place, s.sums.get(), totals, out);
      }
    });
    if (chunks_ == 1) return;
    run_tasks(p_.items * p_.groups, [&](int64_t task, int64_t) {
      const Place place = place_of(task * chunks_);
      T* const sums = partial.get() + task * chunks_ * (size + rows_);
      add_chunks(sums, size + rows_);
      T* const totals = std::copy_n(sums + size, rows_, total + first_row(place)) - rows_;
      finish(place, sums, totals, out);
    });
  }

  void backward(const HeadRows& grad, const HeadRows& out, const T* total, const SlotAttentionGradients& to) {
    const int64_t size = rows_ * p_.key_features;
    const bool need_q = to.q.data != nullptr, need_bias = to.bias != nullptr;
    const bool need_slope = need_q || need_bias || to.k.data != nullptr;
    Buffer<T> partial(chunks_ > 1 ? tasks() * (size + rows_) : 0);
    run_tasks(tasks(), [&](int64_t task, int64_t worker) {
      Scratch& s = scratch_[worker];
      s.for_backward(*this);
      const Place place = place_of(task);
      read_slots(p_.q, p_.key_features, place, s.q.get());
      read_gradient(grad, out, total + first_row(place), place, s);
      std::fill_n(s.sums.get(), need_q ? padded_rows_ * p_.key_features : 0, T(0));
      std::fill_n(s.row_sums.get(), rows_, V{});
      for_blocks(place, s, [&](int64_t n) {
        attention_of_block(s, n);
        if (need_slope) slope_of_block(s, n);
        if (p_.keys_are_values || to.v.data != nullptr) add_token_eps(s, n);
        if (to.v.data != nullptr) {
          token_gradients(place, s, n, s.attention.get(), s.both_rows.data(), rows_, p_.value_features, to.v);
        }
        if (to.k.data != nullptr && p_.keys_are_values) {
          token_gradients(place, s, n, s.attention.get(), s.both_rows.data(), 2 * rows_, p_.key_features, to.k);
        } else if (to.k.data != nullptr) {
          token_gradients(place, s, n, s.slope, s.both_rows.data() + rows_, rows_, p_.key_features, to.k);
        }
        if (need_q) {
          output_rows(s, s.sums.get(), p_.key_features);
          combine(s.out_rows.data(), rows_, s.slope, stride_, 1, s.k_rows.data(), n, p_.key_features, true);
        }
      });
      zero_masked(place, to.k, p_.key_features);
      zero_masked(place, to.v, p_.value_features);
      T* const sums = chunks_ > 1 ? partial.get() + task * (size + rows_) : s.sums.get();
      if (chunks_ > 1 && need_q) std::copy_n(s.sums.get(), size, sums);
      T* const by_bias = chunks_ > 1 ? sums + size : s.bias.get();  // overwrites the bias: it was used
      for (int64_t r = 0; r < rows_; ++r) by_bias[r] = sum(s.row_sums.get()[r]);
      if (chunks_ == 1) finish_slots(place, sums, by_bias, to);
    });
    if (chunks_ == 1 || !(need_q || need_bias)) return;
    run_tasks(p_.items * p_.groups, [&](int64_t task, int64_t) {
      T* const sums = partial.get() + task * chunks_ * (size + rows_);
      need_q ? add_chunks(sums, size + rows_) : add_chunks(sums, size + rows_, size);
      finish_slots(place_of(task * chunks_), sums, sums + size, to);
    });
  }

 private:
  // What one task works on: a chunk of the tokens of one item, for the heads of one group.
  struct Place {
    int64_t item, group, begin, end;
  };

  struct Scratch {
    Buffer<T> q, h;            // the slots' rows: queries, upstream gradient / total; [padded rows][features]
    Buffer<T> sums;            // what is summed over tokens for each slot, likewise
    Buffer<T> attention;       // [padded rows][block]: A, then W
    T* slope;                  // likewise, right behind the rows of A: ds/dA, then ds/dz
    Buffer<T> k, v, gradient;  // [block][features], where the type is converted
    Buffer<T> bias, delta;     // [rows]
    Buffer<T> idle;            // where rows go that nobody wants
    Buffer<V> row_sums;        // [rows]
    std::vector<const T*> q_rows, h_rows, k_rows, v_rows;
    std::vector<const T*> both_rows;  // h, then q, in the order of W and ds/dz
    std::vector<T*> out_rows;
    std::vector<int64_t> tokens;  // of the block
    bool backward = false;

    explicit Scratch(const SlotAttention& a)
        : q(a.padded_rows_ * a.p_.key_features),
          sums(a.padded_rows_ * std::max(a.p_.key_features, a.p_.value_features)),
          attention((a.rows_ + a.padded_rows_) * a.stride_),
          slope(attention.get() + a.rows_ * a.stride_),
          k(direct ? 0 : a.block_ * a.p_.key_features),
          v(direct || a.p_.keys_are_values ? 0 : a.block_ * a.p_.value_features),
          bias(a.rows_),
          idle(std::max(a.p_.key_features, a.p_.value_features)),
          row_sums(a.rows_),
          q_rows(a.padded_rows_),
          h_rows(a.padded_rows_),
          k_rows(a.block_ + kRowPadding),
          v_rows(a.block_ + kRowPadding),
          out_rows(std::max(a.padded_rows_, a.block_ + kRowPadding)),
          tokens(a.block_) {
      // rows beyond the last one repeat it: their results are not used, but must be there to read
      for (int64_t r = 0; r < a.padded_rows_; ++r) q_rows[r] = q.get() + std::min(r, a.rows_ - 1) * a.p_.key_features;
    }

    void for_backward(const SlotAttention& a) {
      if (backward) return;
      backward = true;
      h = Buffer<T>(a.padded_rows_ * a.p_.value_features);
      delta = Buffer<T>(a.rows_);
      gradient = Buffer<T>(direct ? 0 : a.block_ * std::max(a.p_.key_features, a.p_.value_features));
      for (int64_t r = 0; r < a.padded_rows_; ++r) h_rows[r] = h.get() + std::min(r, a.rows_ - 1) * a.p_.value_features;
      both_rows.assign(h_rows.begin(), h_rows.begin() + a.rows_);
      both_rows.insert(both_rows.end(), q_rows.begin(), q_rows.begin() + a.rows_);
    }
  };

  static int64_t block_tokens(const SlotAttentionProblem& p) {
    const int64_t features = p.key_features + (p.keys_are_values ? 0 : p.value_features);
    const int64_t bytes = std::max<int64_t>(1, features) * static_cast<int64_t>(sizeof(T));
    return std::clamp<int64_t>(kBlockBytes / bytes, 16, 128) / 16 * 16;
  }

  static int64_t chunks(const SlotAttentionProblem& p, int64_t rows) {
    const int64_t bytes = rows * (std::max(p.key_features, p.value_features) + 1) * static_cast<int64_t>(sizeof(T));
    const int64_t fitting = kPartialBytes / (p.items * p.groups * bytes);
    return std::max<int64_t>(1,
                             std::min({div_up(p.tokens, kChunkTokens), div_up(kTasks, p.items * p.groups), fitting}));
  }

  int64_t tasks() const { return p_.items * p_.groups * chunks_; }

  Place place_of(int64_t task) const {
    const int64_t chunk = task % chunks_, group = task / chunks_ % p_.groups, item = task / chunks_ / p_.groups;
    return {item, group, chunk * p_.tokens / chunks_, (chunk + 1) * p_.tokens / chunks_};
  }

  int64_t head_of(const Place& place, int64_t row) const {
    return place.group * (p_.heads / p_.groups) + row / p_.slots;
  }
  int64_t first_row(const Place& place) const { return place.item * p_.heads * p_.slots + place.group * rows_; }
  bool valid(const Place& place, int64_t token) const {
    return p_.mask == nullptr || p_.mask[place.item * p_.tokens + token];
  }

  static T sum(V v) {
    T total = 0;
    for (int i = 0; i < lanes; ++i) total += v[i];
    return total;
  }

  // The slots of the heads of one group, [rows][features].
  void read_slots(const HeadRows& from, int64_t features, const Place& place, T* out) const {
    for (int64_t r = 0; r < rows_; ++r) {
      read_row(row_of<In>(from, place.item, head_of(place, r), r % p_.slots), features, out + r * features);
    }
  }

  void read_gradient(const HeadRows& grad, const HeadRows& out, const T* total, const Place& place, Scratch& s) const {
    read_slots(grad, p_.value_features, place, s.h.get());
    for (int64_t r = 0; r < rows_; ++r) {
      T* const h = s.h.get() + r * p_.value_features;
      const In* const u = row_of<In>(out, place.item, head_of(place, r), r % p_.slots);
      const T inverse = total[r] == 0 ? T(0) : T(1) / total[r];
      constexpr int parts = 16;  // independent sums: the loop vectorises
      T delta[parts] = {};
      const auto add = [&](int64_t d, T& part) {
        h[d] *= inverse;
        part += h[d] * to_float(u[d]);
      };
      int64_t d = 0;
      for (; d + parts <= p_.value_features; d += parts) {
        for (int j = 0; j < parts; ++j) add(d + j, delta[j]);
      }
      for (; d < p_.value_features; ++d) add(d, delta[0]);
      s.delta.get()[r] = 0;
      for (T part : delta) s.delta.get()[r] += part;
    }
  }

  // Calls f(n) for each block of n valid tokens of a chunk, their keys and values at hand.
  template <class F>
  void for_blocks(const Place& place, Scratch& s, const F& f) const {
    const In* const bias = p_.bias == nullptr ? nullptr : static_cast<const In*>(p_.bias) + first_row(place);
    for (int64_t r = 0; r < rows_; ++r) s.bias.get()[r] = bias == nullptr ? T(0) : to_float(bias[r]) * log2_e;
    int64_t count = 0;
    for (int64_t token = place.begin; token < place.end; ++token) count += valid(place, token);
    const int64_t most = count == 0 ? 0 : div_up(count, div_up(count, block_));  // all blocks alike
    for (int64_t token = place.begin; token < place.end;) {
      int64_t n = 0;
      for (; token < place.end && n < most; ++token) {
        if (valid(place, token)) s.tokens[n++] = token;
      }
      if (n == 0) break;
      for (int64_t j = 0; j < n; ++j) {
        s.k_rows[j] = token_row(p_.k, place, s.tokens[j], p_.key_features, s.k.get() + j * p_.key_features);
        s.v_rows[j] = p_.keys_are_values
                          ? s.k_rows[j]
                          : token_row(p_.v, place, s.tokens[j], p_.value_features, s.v.get() + j * p_.value_features);
      }
      std::fill_n(s.k_rows.begin() + n, kRowPadding, s.k_rows[n - 1]);
      std::fill_n(s.v_rows.begin() + n, kRowPadding, s.v_rows[n - 1]);
      f(n);
    }
  }

  const T* token_row(const HeadRows& from, const Place& place, int64_t token, int64_t features, T* converted) const {
    const In* const row = row_of<In>(from, place.item, place.group, token);
    if constexpr (direct) {
      return row;
    } else {
      read_row(row, features, converted);
      return converted;
    }
  }

  // out_rows: `rows_` rows of a buffer, then rows that nobody wants.
  void output_rows(Scratch& s, T* first, int64_t features) const {
    for (int64_t r = 0; r < padded_rows_; ++r) s.out_rows[r] = r < rows_ ? first + r * features : s.idle.get();
  }

  // Columns n .. of the last vector become 0.
  void clear_tail(T* matrix, int64_t n) const {
    const int64_t end = round_up(n, lanes);
    for (int64_t r = 0; r < rows_ && n < end; ++r)
      std::fill(matrix + r * stride_ + n, matrix + r * stride_ + end, T(0));
  }

  // A of n tokens, 0 in the columns up to the next whole vector.
  void attention_of_block(Scratch& s, int64_t n) const {
    T* const a = s.attention.get();
    const int64_t K = p_.slots;
    dots(s.q_rows.data(), padded_rows_, s.k_rows.data(), round_up(n, kDotColumns<T>), p_.key_features, a, stride_);
    clear_tail(a, n);
    const T scale = scale_ * log2_e;
    const V lowest = splat<T>(-Format<T>::bias);
    for (int64_t first = 0; first < rows_; first += K) {
      for (int64_t j = 0; j < n; j += lanes) {
        T* const column = a + first * stride_ + j;
        const T* const bias = s.bias.get() + first;
        V top = load(column) * scale + bias[0];
        for (int64_t k = 1; k < K; ++k) top = at_least<T>(top, load(column + k * stride_) * scale + bias[k]);
        V sum = V{};
        for (int64_t k = 0; k < K; ++k) {
          // below the normal numbers it is cut to where exp2_in_range gives 0; NaN stays
          const V z = load(column + k * stride_) * scale + bias[k] - top;
          const V e = exp2_in_range<T>(at_least<T>(z, lowest));
          sum += e;
          store(column + k * stride_, e);
        }
        const V inverse = T(1) / sum;
        for (int64_t k = 0; k < K; ++k) store(column + k * stride_, load(column + k * stride_) * inverse);
      }
    }
    clear_tail(a, n);
  }

  // A becomes W.
  void add_token_eps(Scratch& s, int64_t n) const {
    if (token_eps_ == 0) return;
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t j = 0; j < n; ++j) s.attention.get()[r * stride_ + j] += token_eps_;
    }
  }

  // scale times the gradient of each logit; adds the gradients themselves to row_sums.
  void slope_of_block(Scratch& s, int64_t n) const {
    T* const slope = s.slope;
    const int64_t K = p_.slots;
    dots(s.h_rows.data(), padded_rows_, s.v_rows.data(), round_up(n, kDotColumns<T>), p_.value_features, slope,
         stride_);
    clear_tail(slope, n);
    for (int64_t first = 0; first < rows_; first += K) {
      for (int64_t j = 0; j < n; j += lanes) {
        T* const column = slope + first * stride_ + j;
        const T* const a = s.attention.get() + first * stride_ + j;
        const T* const delta = s.delta.get() + first;
        V mean = V{};
        for (int64_t k = 0; k < K; ++k) mean += load(a + k * stride_) * (load(column + k * stride_) - delta[k]);
        for (int64_t k = 0; k < K; ++k) {
          const V by_logit = load(a + k * stride_) * (load(column + k * stride_) - delta[k] - mean);
          s.row_sums.get()[first + k] += by_logit;
          store(column + k * stride_, by_logit * scale_);
        }
      }
    }
  }

  // For each token of the block: the sum over the slots of weight times the slot's row.
  void token_gradients(const Place& place, Scratch& s, int64_t n, const T* weights, const T* const* slots,
                       int64_t slot_count, int64_t features, const MutableHeadRows& to) const {
    for (int64_t j = 0; j < round_up(n, kCombineRows); ++j) {
      if (j >= n) {
        s.out_rows[j] = s.idle.get();
      } else if constexpr (direct) {
        s.out_rows[j] = row_of<T>(to, place.item, place.group, s.tokens[j]);
      } else {
        s.out_rows[j] = s.gradient.get() + j * features;
      }
    }
    combine(s.out_rows.data(), n, weights, 1, stride_, slots, slot_count, features, false);
    if constexpr (!direct) {
      for (int64_t j = 0; j < n; ++j)
        write_row(s.out_rows[j], features, row_of<In>(to, place.item, place.group, s.tokens[j]));
    }
  }

  void zero_masked(const Place& place, const MutableHeadRows& to, int64_t features) const {
    if (p_.mask == nullptr || to.data == nullptr) return;
    for (int64_t token = place.begin; token < place.end; ++token) {
      if (!valid(place, token)) std::fill_n(row_of<In>(to, place.item, place.group, token), features, In{});
    }
  }

  // The sums of all chunks, from `begin` on, into those of the first.
  void add_chunks(T* sums, int64_t size, int64_t begin = 0) const {
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
      for (int64_t i = begin; i < size; ++i) sums[i] += sums[chunk * size + i];
    }
  }

  // Numerators and sums of weights become the result; `total` gets its eps.
  void finish(const Place& place, T* sums, T* total, const MutableHeadRows& out) const {
    for (int64_t r = 0; r < rows_; ++r) {
      total[r] += static_cast<T>(p_.eps);
      T* const row = sums + r * p_.value_features;
      for (int64_t d = 0; d < p_.value_features; ++d) row[d] = total[r] == 0 ? T(0) : row[d] / total[r];
      write_row(row, p_.value_features, row_of<In>(out, place.item, head_of(place, r), r % p_.slots));
    }
  }

  void finish_slots(const Place& place, const T* sums, const T* by_bias, const SlotAttentionGradients& to) const {
    for (int64_t r = 0; r < rows_; ++r) {
      if (to.q.data != nullptr) {
        In* const row = row_of<In>(to.q, place.item, head_of(place, r), r % p_.slots);
        write_row(sums + r * p_.key_features, p_.key_features, row);
      }
      if (to.bias != nullptr) static_cast<In*>(to.bias)[first_row(place) + r] = round_to<In>(by_bias[r]);
    }
  }

  static constexpr T log2_e = T(1.4426950408889634);

  const SlotAttentionProblem p_;
  const int64_t rows_, padded_rows_;  // the slots of the heads of one group
  const int64_t block_;               // tokens at a time
  const int64_t stride_;              // of a row of weights: not a power of two, so that rows don't share cache sets
  const int64_t chunks_;              // an item
  const T scale_, token_eps_;
  std::vector<Scratch> scratch_;
};

}  // namespace

void slot_attention_forward(DType dtype, const SlotAttentionProblem& problem, MutableHeadRows out, void* total) {
  with_type(dtype, [&](auto zero) {
    using In = decltype(zero);
    SlotAttention<In>(problem).forward(out, static_cast<AccOf<In>*>(total));
  });
}

void slot_attention_backward(DType dtype, const SlotAttentionProblem& problem, HeadRows grad, HeadRows out,
                             const void* total, const SlotAttentionGradients& gradients) {
  with_type(dtype, [&](auto zero) {
    using In = decltype(zero);
    SlotAttention<In>(problem).backward(grad, out, static_cast<const AccOf<In>*>(total), gradients);
  });
}

}  // namespace setemb
