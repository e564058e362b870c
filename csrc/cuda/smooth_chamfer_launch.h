// From numbers of slots at run time to kernels: the definitions of launch_forward, launch_hardest and
// launch_weights.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch.h"
#include "smooth_chamfer.h"
#include "smooth_chamfer_kernels.h"

namespace setemb::cuda {

// Calls f with the slots as a constant: 1, 2, 4, 8, 16 or 64.
template <class F>
void with_slots(int slots, const F& f) {
  switch (slots) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 8:
      return f(std::integral_constant<int, 8>());
    case 16:
      return f(std::integral_constant<int, 16>());
    case 64:
      return f(std::integral_constant<int, 64>());
    default:
      throw std::runtime_error("smooth_chamfer: no kernel for " + std::to_string(slots) + " slots");
  }
}

// Calls f with the slots of x and of y, x having at least as many.
template <class F>
void with_both_slots(int x_slots, int y_slots, const F& f) {
  with_slots(x_slots, [&](auto x) {
    with_slots(y_slots, [&](auto y) {
      if constexpr (x() >= y()) {
        f(x, y);
      } else {
        throw std::runtime_error("smooth_chamfer: x has fewer slots than y");
      }
    });
  });
}

// Of a kernel that makes the tiles of so many groups: see for_tiles.
template <class A, int SX, int SY>
int64_t blocks_of_tiles(int64_t x_groups, int64_t y_groups) {
  const int64_t tiles = x_groups / 2 * (y_groups / 2), at_once = int64_t{kBlocksAProcessor} * processors();
  if (tiles > 0x7fffffff - at_once) throw std::runtime_error("smooth_chamfer: too many tiles");
  return kSeveralTiles<A, SX, SY> && at_once < tiles ? at_once : tiles;
}

template <class A>
void launch_forward(const ForwardParams& p, int x_slots, int y_slots, Stream stream) {
  with_both_slots(x_slots, y_slots, [&](auto x, auto y) {
    launch("smooth_chamfer forward", forward_kernel<A, x(), y()>, p,
           blocks_of_tiles<A, x(), y()>(p.tile.x.groups, p.tile.y.groups), kThreads, kTileShared, stream);
  });
}

template <class A>
void launch_hardest(const HardestParams& p, int x_slots, int y_slots, Stream stream) {
  with_both_slots(x_slots, y_slots, [&](auto x, auto y) {
    if constexpr (x() == 1) {  // would need more registers than there are
      throw std::runtime_error("smooth_chamfer: no kernel for the hardest negatives of sets of 1 slot");
    } else {
      launch("smooth_chamfer hardest", hardest_kernel<A, x(), y()>, p,
             blocks_of_tiles<A, x(), y()>(p.tile.x.groups, p.tile.y.groups), kThreads, kTileShared, stream);
    }
  });
}

template <class A, bool kMany>
void launch_weights(const WeightParams& p, int x_slots, int y_slots, Stream stream) {
  with_both_slots(x_slots, y_slots, [&](auto x, auto y) {
    if constexpr ((x() > kFewSlots) != kMany) {
      throw std::runtime_error("smooth_chamfer: weights of so many slots are compiled elsewhere");
    } else {
      launch("smooth_chamfer weights", weights_kernel<A, x(), y()>, p,
             blocks_of_tiles<A, x(), y()>(p.x_groups, p.y_groups), kThreads, kTileShared, stream);
    }
  });
}

}  // namespace setemb::cuda
