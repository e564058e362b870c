// Similarities of sets of any sizes on the CPU, forward; backward: set_similarity_backward.cpp. The formulas and their
// derivatives in words: setemb_kernels/ops/set_similarity/reference.py.
//
// A group of sets of x becomes the columns of tiles, and sets of y walk by as rows (set_similarity_scores.h); what the
// similarity does with a tile happens while it is in cache (set_similarity_tile.h). All pairs, pairs and candidates
// differ in who meets whom alone. Working memory is a tile and a group for each thread, whatever N, M and the sets.
#include "set_similarity.h"

#include <limits>
#include <vector>

#include "set_similarity_codes.h"
#include "set_similarity_worker.h"

namespace setemb {
namespace {

constexpr int64_t kSlots = 32;  // candidates in a task

template <class In, class Scores, class Out>
void forward_as(const SimilarityProblem& p, Out* out) {
  const int64_t N = p.x.sets;
  for (int64_t i = 0; i < N * p.choices; ++i) {
    const bool none = p.candidates != nullptr && p.candidates[i] < 0;
    out[i] = none ? round_to<Out>(-std::numeric_limits<AccOf<Out>>::infinity()) : Out{};
  }
  auto threads_work = workers<In, Scores>(p, false);
  if (p.candidates != nullptr) {
    // a query that reranks many sets is work for several threads
    const int64_t parts = div_up(p.choices, kSlots);
    run_tasks(N * parts, [&](int64_t task, int64_t worker) {
      Worker<In, Scores>& w = threads_work[worker];
      const int64_t i = task / parts, first = task % parts * kSlots;
      w.select({i, i + 1});
      for (int64_t slot = first; slot < std::min(first + kSlots, p.choices); ++slot) {
        const int64_t j = p.candidates[i * p.choices + slot];
        if (j >= 0) w.forward({j, j + 1}, slot, out);
      }
    });
    return;
  }
  const std::vector<Run> groups = runs_of(p.x, kGroupColumns), runs = runs_of(p.y, kRunRows);
  const int64_t G = static_cast<int64_t>(groups.size());
  run_tasks(G * static_cast<int64_t>(runs.size()), [&](int64_t task, int64_t worker) {
    threads_work[worker].select(groups[task % G]);
    threads_work[worker].forward(runs[task / G], -1, out);
  });
}

template <class In, class Out>
void forward_with_policy(const SimilarityProblem& p, Out* out) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<In, bfloat16_t>) {
    if (__builtin_cpu_supports("avx512bf16")) return forward_as<In, SetScores<In, BFloat16Pairs>>(p, out);
  }
#endif
  forward_as<In, SetScores<In, Plain<AccOf<In>>>>(p, out);
}

}  // namespace

void set_similarity_forward(DType dtype, const SimilarityProblem& problem, void* out, bool wide) {
  with_type(dtype, [&](auto zero) {
    using In = decltype(zero);
    wide ? forward_with_policy<In>(problem, static_cast<AccOf<In>*>(out))
         : forward_with_policy<In>(problem, static_cast<In*>(out));
  });
}

void set_similarity_of_codes(const SimilarityProblem& problem, bool x_is_int8, Code y, float* out) {
  if (y == Code::kFloat8) return forward_as<float8_t, CodeScores<float8_t, Plain<float>, float>>(problem, out);
  if (!x_is_int8) return forward_as<int8_t, CodeScores<int8_t, Plain<float>, float>>(problem, out);
#if defined(__AVX512VNNI__)
  if (__builtin_cpu_supports("avx512vnni") && problem.features <= Int8Quads::most_features)
    return forward_as<int8_t, CodeScores<int8_t, Int8Quads>>(problem, out);
#endif
  forward_as<int8_t, CodeScores<int8_t, Plain<float>>>(problem, out);
}

}  // namespace setemb
