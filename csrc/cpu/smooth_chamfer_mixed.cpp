// Smooth-Chamfer of float32 sets with sets stored in another type: what search does. Forward only.
//
// Next to many rows of x, y is decoded a part at a time and goes the usual way (smooth_chamfer.cpp). Next to a few,
// that would write and read again what is used once: there dot products are taken as y is read (rows.h), in the order
// it lies in memory, and the epilogue is the usual one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "rows.h"
#include "smooth_chamfer.h"
#include "smooth_chamfer_tile.h"

namespace setemb {
namespace {

constexpr int64_t kFewRows = 16;         // of x
constexpr int64_t kBlockColumns = 1024;  // vectors of y in a tile
constexpr int64_t kAhead = 64;  // vectors of y fetched before they are needed, as far as the second-level cache
constexpr int kGroups = kLanes<float> / kDotColumns<float>;  // of sets, in a vector of scores
constexpr int64_t kDecodedValues = int64_t{4} << 20;         // at a time: 16 MiB

template <class Y>
class MixedChamfer {
#if defined(__AVX512BF16__)
  static constexpr bool kShort = std::is_same_v<Y, bfloat16_t>;  // products of pairs of bfloat16 may serve
#else
  static constexpr bool kShort = false;
#endif

 public:
  MixedChamfer(const ChamferProblem& problem, const float* y_scale)
      : p_(problem), scale_(y_scale), N_(p_.x.sets), M_(p_.y.sets), K_(p_.x.vectors), L_(p_.y.vectors) {}

  void forward(float* out) const { N_* K_ <= kFewRows ? few_rows(out) : decoded(0, M_, out, M_); }

 private:
  const Y* vector(int64_t m, int64_t l) const {
    return static_cast<const Y*>(p_.y.data) + m * p_.y.set_stride + l * p_.y.vector_stride;
  }
  bool valid(int64_t m, int64_t l) const { return p_.y.mask == nullptr || p_.y.mask[m * L_ + l]; }
  float scale(int64_t m, int64_t l) const { return scale_ == nullptr ? 1.0f : scale_[m * L_ + l]; }

  // Sets [first, last) of y by way of float32; out [N][stride].
  void decoded(int64_t first, int64_t last, float* out, int64_t stride) const {
    const int64_t D = p_.features;
    const int64_t part = std::clamp<int64_t>(kDecodedValues / std::max<int64_t>(1, L_ * D), 1, last - first);
    const bool direct = part == last - first && stride == part;
    const Buffer<float> values(part * L_ * D), line(direct ? 0 : N_ * part);
    float* const target = direct ? out : line.get();
    for (int64_t begin = first; begin < last; begin += part) {
      const int64_t count = std::min(part, last - begin);
      run_tasks(div_up(count, 16), [&](int64_t task, int64_t) {
        for (int64_t m = task * 16; m < std::min(count, task * 16 + 16); ++m) {
          for (int64_t l = 0; l < L_; ++l) decode(begin + m, l, values.get() + (m * L_ + l) * D);
        }
      });
      ChamferProblem part_problem = p_;
      part_problem.y = {values.get(), count, L_, L_ * D, D, p_.y.mask == nullptr ? nullptr : p_.y.mask + begin * L_};
      smooth_chamfer_forward(DType::kFloat32, part_problem, target, false);
      for (int64_t n = 0; n < N_ && !direct; ++n)
        std::copy_n(target + n * count, count, out + n * stride + begin - first);
    }
  }

  void decode(int64_t m, int64_t l, float* out) const {
    if (!valid(m, l)) return;  // nobody reads it
    constexpr int lanes = kLanes<float>;
    const Y* const v = vector(m, l);
    const float s = scale(m, l);
    int64_t d = 0;
    for (; d + lanes <= p_.features; d += lanes) store(out + d, load_as<float>(v + d) * s);
    for (; d < p_.features; ++d) out[d] = to_float(v[d]) * s;
  }

  // What one thread works in: the scores of all rows of x with a block of y, slot-major.
  struct Block {
    int64_t width, ld;  // sets, columns
    int64_t first = 0;  // set
    Buffer<float> scores, valid, weight, line, scale;
    Buffer<Vec<float>> sums, parts;
    std::vector<const Y*> vectors;  // unless `whole`
    bool whole = false;             // every vector exists, and `valid` and `weight` say so

    Block(int64_t rows, int64_t K, int64_t L, int64_t width)
        : width(width),
          ld(L * width),
          scores(rows * ld),
          valid(ld),
          weight(width),
          line(width),
          scale(ld),
          sums(4 * (K + L)),
          parts(rows * L * kGroups),
          vectors(ld) {
      std::fill_n(scale.get(), ld, 1.0f);
    }
  };

  void few_rows(float* out) const {
    constexpr int64_t lanes = kLanes<float>;
    const int64_t width = std::max<int64_t>(1, kBlockColumns / (L_ * lanes)) * lanes;
    const int64_t rows = round_up(N_ * K_, kRowPadding), blocks = div_up(M_, width);
    const std::vector<float> no_x(p_.features);
    const std::vector<Y> no_y(p_.features);
    std::vector<const float*> x(rows, no_x.data());
    std::vector<float> x_weight(N_);
    for (int64_t n = 0; n < N_; ++n) {
      int64_t count = 0;
      for (int64_t k = 0; k < K_; ++k) {
        if (p_.x.mask != nullptr && !p_.x.mask[n * K_ + k]) continue;
        x[n * K_ + k] = static_cast<const float*>(p_.x.data) + n * p_.x.set_stride + k * p_.x.vector_stride;
        ++count;
      }
      x_weight[n] = count == 0 ? 0 : 0.5f / static_cast<float>(count);
    }
    std::vector<bfloat16_t> values;
    const std::vector<const bfloat16_t*> short_x = shortened(x, values);
    std::vector<Block> scratch;
    for (int64_t i = 0; i < threads(); ++i) scratch.emplace_back(rows, K_, L_, width);
    std::vector<char> out_of_range(blocks);
    run_tasks(blocks, [&](int64_t task, int64_t worker) {
      Block& b = scratch[worker];
      const int64_t first = task * width, count = std::min(width, M_ - first);
      list(first, count, no_y.data(), b);
      if constexpr (kShort) {
        short_x.empty() ? scores(x, b) : scores(short_x, b);
      } else {
        scores(x, b);
      }
      const float largest = largest_score(b);
      if (!(largest <= Format<float>::largest)) {
        out_of_range[task] = 1;
        return;
      }
      const double most = Format<float>::largest;
      const ChamferTile<float> tile = {b.scores.get(),
                                       b.ld,
                                       N_,
                                       K_,
                                       L_,
                                       width,
                                       largest * p_.alpha <= kSharedShiftLimit,
                                       p_.x.mask != nullptr || p_.y.mask != nullptr,
                                       p_.x.mask,
                                       b.valid.get(),
                                       x_weight.data(),
                                       b.weight.get(),
                                       static_cast<float>(std::min(most, p_.alpha)),
                                       static_cast<float>(std::min(most, 1 / p_.alpha)),
                                       b.sums.get()};
      ChamferEpilogue<float> epilogue(tile);
      for (int64_t n = 0; n < N_; ++n) {
        epilogue.similarity(n, b.line.get());
        for (int64_t m = 0; m < count; ++m) out[n * M_ + first + m] = saturate<float>(b.line.get()[m]);
      }
    });
    // A score beyond float32, or a NaN somewhere: the usual way knows what to do.
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * width;
      if (out_of_range[block] != 0) decoded(first, std::min(M_, first + width), out + first, M_);
    }
  }

  // The rows of x as bfloat16, kept in `values`, where y is that too, the processor has products for it, and nothing is
  // lost: all numbers of x are of that type, none subnormal, and none so large that a product with a subnormal y would
  // be felt.
  std::vector<const bfloat16_t*> shortened(const std::vector<const float*>& x, std::vector<bfloat16_t>& values) const {
    std::vector<const bfloat16_t*> rows;
#if defined(__AVX512BF16__)
    if (!kShort || !__builtin_cpu_supports("avx512bf16")) return rows;
    for (const float* row : x) {
      for (int64_t d = 0; d < p_.features; ++d) {
        uint32_t bits;
        std::memcpy(&bits, row + d, 4);
        const float size = std::abs(row[d]);
        if ((bits & 0xffffu) != 0 || !(size < 0x1p64f) || (size < 0x1p-126f && size != 0)) return rows;
        values.push_back({static_cast<uint16_t>(bits >> 16)});
      }
    }
    for (size_t i = 0; i < x.size(); ++i) rows.push_back(values.data() + i * p_.features);
#else
    static_cast<void>(x), static_cast<void>(values);
#endif
    return rows;
  }

  // Vectors of sets [first, first + count), and what is known of them.
  void list(int64_t first, int64_t count, const Y* none, Block& b) const {
    const bool whole = count == b.width && p_.y.mask == nullptr;
    b.first = first;
    if (scale_ != nullptr) {
      for (int64_t m = 0; m < b.width; ++m) {
        for (int64_t l = 0; l < L_; ++l) b.scale.get()[l * b.width + m] = m < count ? scale(first + m, l) : 1.0f;
      }
    }
    if (whole && b.whole) return;
    b.whole = whole;
    for (int64_t m = 0; m < b.width; ++m) {
      int64_t here = 0;
      for (int64_t l = 0; l < L_; ++l) {
        const bool exists = m < count && valid(first + m, l);
        b.vectors[m * L_ + l] = exists ? vector(first + m, l) : none;
        b.valid.get()[l * b.width + m] = exists ? 1 : 0;
        here += exists ? 1 : 0;
      }
      b.weight.get()[m] = here == 0 ? 0 : 0.5f / static_cast<float>(here);
    }
  }

  // Vector l of set m of a block.
  const Y* vector_of(const Block& b, int64_t m, int64_t l) const {
    return b.whole ? vector(b.first + m, l) : b.vectors[m * L_ + l];
  }

  // Dot products with a few sets at a time, slot by slot: their lanes are summed only as far as one vector for each of
  // the few goes, so that those of as many sets as a vector has lanes end in one, where the epilogue wants them.
  template <class X>
  void scores(const std::vector<const X*>& x, Block& b) const {
    constexpr int64_t lanes = kLanes<float>, A = kDotRows<float>, B = kDotColumns<float>;
    const int64_t rows = x.size(), ahead = div_up(kAhead, L_);
    for (int64_t set = 0; set < b.width; set += lanes) {
      for (int64_t group = 0; group < kGroups; ++group) {
        const int64_t first = set + group * B;
        for (int64_t l = 0; l < L_; ++l) {
          // Short pieces of memory in turn are more than the processor foresees.
          for (int64_t m = first + ahead; m < std::min(b.width, first + ahead + B); ++m) {
            const char* const next = reinterpret_cast<const char*>(vector_of(b, m, l));
            for (int64_t byte = 0; byte < p_.features * static_cast<int64_t>(sizeof(Y)); byte += 64)
              __builtin_prefetch(next + byte, 0, 1);
          }
          const Y* y[B];
          for (int64_t c = 0; c < B; ++c) y[c] = vector_of(b, first + c, l);
          for (int64_t i = 0; i < rows; i += A) {
            Vec<float> acc[lanes] = {};
            if constexpr (std::is_same_v<X, float>) {
              dot_lanes<float>(x.data() + i, y, p_.features, acc);
            } else {
              dot_lanes_of_pairs(x.data() + i, y, p_.features, acc);
            }
            Vec<float>* const part = b.parts.get() + (i * L_ + l) * kGroups + group;
            for (int64_t r = 0; r < A; ++r) part[r * L_ * kGroups] = sums_of_lanes<float, B / 2, B>(acc + r * B);
          }
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t l = 0; l < L_; ++l) {
          const Vec<float> dots = sums_of_lanes<float, lanes / 2, kGroups>(b.parts.get() + (i * L_ + l) * kGroups);
          const int64_t column = l * b.width + set;
          store(b.scores.get() + i * b.ld + column, dots * load(b.scale.get() + column));
        }
      }
    }
  }

  // NaN or infinite where one is.
  float largest_score(const Block& b) const {
    constexpr int64_t lanes = kLanes<float>;
    Vec<float> largest = {}, rest = {};
    for (int64_t i = 0; i < N_ * K_ * b.ld; i += lanes) {
      const Vec<float> c = load(b.scores.get() + i);
      const Vec<float> size = c < 0 ? -c : c;
      largest = size > largest ? size : largest;
      rest += c * 0;  // NaN unless c is finite
    }
    float most = 0;
    for (int i = 0; i < lanes; ++i) most = std::max(most, largest[i] + rest[i]) + rest[i];
    return most;
  }

  const ChamferProblem p_;
  const float* const scale_;
  const int64_t N_, M_, K_, L_;
};

}  // namespace

void smooth_chamfer_mixed(StoredType y_type, const ChamferProblem& problem, const float* y_scale, float* out) {
  if (y_type == StoredType::kFloat32 && y_scale == nullptr && problem.x.sets * problem.x.vectors > kFewRows)
    return smooth_chamfer_forward(DType::kFloat32, problem, out, false);
  switch (y_type) {
    case StoredType::kFloat32:
      return MixedChamfer<float>(problem, y_scale).forward(out);
    case StoredType::kBFloat16:
      return MixedChamfer<bfloat16_t>(problem, y_scale).forward(out);
    case StoredType::kFloat16:
      return MixedChamfer<float16_t>(problem, y_scale).forward(out);
    case StoredType::kInt8:
      return MixedChamfer<int8_t>(problem, y_scale).forward(out);
  }
}

}  // namespace setemb
