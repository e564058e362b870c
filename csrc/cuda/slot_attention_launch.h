// From numbers of rows at run time to kernels: the definitions of what slot_attention.h declares.
#pragma once

#include <type_traits>

#include "launch.h"
#include "slot_attention.h"
#include "slot_attention_kernels.h"

namespace setemb::cuda::slots {

// Calls f with how many times 16 rows a tile has: 1, 2 or 4.
template <class F>
void with_row_tiles(int64_t rows, const F& f) {
  if (rows <= 16) return f(std::integral_constant<int, 1>());
  if (rows <= 32) return f(std::integral_constant<int, 2>());
  return f(std::integral_constant<int, 4>());
}

template <class A, bool backward>
void launch_weights_kernel(const WeightParams& p, Stream stream) {
  const int64_t blocks = static_cast<int64_t>(p.head_blocks) * p.token_blocks * p.sizes.groups * p.sizes.items;
  with_row_tiles(p.heads_in_block * p.sizes.slots, [&](auto tiles) {
    launch("slot_attention weights", weights_kernel<A, tiles(), backward>, p, blocks, kThreads,
           kWeightsShared<tiles(), backward>, stream);
  });
}

template <class A>
void launch_weights(const WeightParams& p, Stream stream) {
  launch_weights_kernel<A, false>(p, stream);
}

template <class A>
void launch_logit_gradients(const WeightParams& p, Stream stream) {
  launch_weights_kernel<A, true>(p, stream);
}

template <class A>
void launch_gather(const GatherParams& params, Stream stream) {
  GatherParams p = params;
  const int64_t rows = static_cast<int64_t>(p.sizes.heads) * p.sizes.slots;
  const int64_t items = static_cast<int64_t>(p.sizes.items) * p.sizes.groups;
  with_row_tiles(rows, [&](auto tiles) {
    p.row_blocks = static_cast<int>(ceil_div(rows, 16 * tiles()));
    launch("slot_attention gather", gather_kernel<A, tiles()>, p, items * p.row_blocks * p.feature_blocks * p.splits,
           kThreads, kGatherShared<Storage<A>, tiles()>, stream);
  });
  if (p.partial == nullptr) return;
  launch("slot_attention combine", combine_kernel<A>, p, ceil_div(items * rows, kThreads / kWarp), kThreads, 0, stream);
}

template <class A>
void launch_spread(const SpreadParams& p, Stream stream) {
  const int64_t blocks = static_cast<int64_t>(p.token_blocks) * p.feature_blocks * p.sizes.groups * p.sizes.items;
  launch("slot_attention spread", spread_kernel<A>, p, blocks, kThreads, kSpreadShared<Storage<A>>, stream);
}

}  // namespace setemb::cuda::slots
