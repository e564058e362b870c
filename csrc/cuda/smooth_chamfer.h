// Smooth-Chamfer on a GPU: the kernels' arguments, and how a packed operand lies in memory.
//
//   pack      x or y -> packed operand, and what the other kernels need to know of its sets
//   forward   packed operands -> similarity [N, M]
//   hardest   packed operands, ids -> the most similar negative of each set of x and of y
//   weights   packed operands, upstream gradient -> a chunk of W = g ds/dc, and partial sums for d/dalpha
//   unpack    float32 sums in packed order -> gradients in the layout and dtype of the inputs
//
// setemb_kernels/ops/smooth_chamfer/cuda.py calls them in this order, and makes the plain products of the backward,
// dX += W Y and dY += W^T X, with torch.
//
// **Packed operand.** Rows in groups of 64, each of 64 / S whole sets, S >= K a power of two. Within a group rows are
// slot-major: vector k of its set n is row k * (64 / S) + n. Rows that are masked or do not exist are zero, features
// padded with zeros to whole steps of 64 bytes. A warp makes the scores of one group of x with one of y, 64 x 64, and
// its tensor cores leave to a lane the rows lane / 4 + 8 i and the columns 2 (lane % 4) + {0, 1} + 8 u: up to S = 8 all
// slots of a set are the same lane's on both sides, and the sums over slots cost no shuffle. Above that they cost one
// for each doubling.
#pragma once

#include <cstdint>

#include "arithmetic.h"
#include "stream.h"

namespace setemb::cuda {

constexpr int kGroup = 64;         // rows
constexpr int kTile = 128;         // rows and columns of a block of threads: two groups each
constexpr int kStepBytes = 64;     // of one row that a block loads at a time
constexpr int kStages = 4;         // steps under way
constexpr int kThreads = 128;      // of a block: a warp for each pair of groups
constexpr int kPackThreads = 512;  // of a block that packs or unpacks a group
constexpr int kBlocksAProcessor = 2;
constexpr int kTileShared = kStages * 2 * kTile * kStepBytes;
constexpr int kMaxSlots = 64;
constexpr int kFewSlots = 4;         // of x: see launch_weights
constexpr int kWeightExponent = 15;  // |W| <= 2^15, whatever the upstream gradient: fits float16

struct PackParams {
  const void* v;        // [N, K, D], any strides
  const uint8_t* mask;  // [N, K], any strides, or null
  void* packed;         // [groups * 64, features]
  uint32_t* valid;      // [groups, 2] bit r % 32 of word r / 32: whether row r is a valid vector
  float* weight;        // [sets] 1 / (2 |X|), 0 for an empty set, NaN for one that is not finite
  float* exponent;      // [sets] packed is v times 2^-exponent
  float* peak;          // [groups] at least the longest vector; infinite where not finite or scaled
  int64_t stride_n, stride_k, stride_d, mask_stride_n, mask_stride_k;
  int64_t N;
  int K, D, slots, features;
  int largest_exponent;  // |packed| < 2^largest_exponent: no dot product overflows
  int round_to_tf32;
  bool by_four;  // features are neighbours, and each vector begins where four may be read at once
};

struct UnpackParams {
  const float* sums;      // [rows, features] in packed order, from the first row of set `first` on
  const uint8_t* mask;    // as in PackParams
  const float* exponent;  // as in PackParams
  const int32_t* shift;   // [2], its second element: see WeightParams::exponents
  void* out;              // [N, K, D] contiguous
  int64_t mask_stride_n, mask_stride_k;
  int64_t N, first, last;  // writes sets first ... last - 1
  int K, D, slots, features;
};

struct Operand {
  const void* rows;  // and so on, as in PackParams
  const uint32_t* valid;
  const float *weight, *exponent, *peak;
  int64_t sets;  // that exist: N or M
  int groups;
};

struct TileParams {
  Operand x, y;  // x has at least as many slots as y
  int features;
  float alpha;
  const float* device_alpha;  // instead, if not null
};

struct ForwardParams {
  TileParams tile;
  void* out;
  int64_t stride_n, stride_m;
  bool wide;  // out is of float32, whatever the operands are
};

struct HardestParams {
  TileParams tile;
  const int64_t *x_ids, *y_ids;  // [N], [M]: pairs of equal ids are positives; null: of equal index
  uint64_t *x_best, *y_best;     // [N], [M], 0 at first: see key_of
};

struct WeightParams {
  TileParams tile;
  const void* grad;  // [N, M]
  int64_t stride_n, stride_m;
  bool wide;                 // grad is of float32, whatever the operands are
  const int32_t* exponents;  // [2]: e of max |grad| < 2^e; e + the largest exponents of x and of y
  void* chunk;               // [x_groups * 64, y_groups * 64], or null if only alpha needs a gradient
  float* alpha_parts;        // [x.groups, y.groups], or null
  int x_first, y_first;      // first group of the chunk
  int x_groups, y_groups;    // of the chunk
};

// What starts them. Each is compiled in a file of its own for each arithmetic (bfloat16, float16, tf32 or float), the
// weights in two, where x has few slots and where it has many: a build takes as long as its longest file.
void launch_pack(Arithmetic arithmetic, const PackParams& p, int64_t groups, Stream stream);
void launch_unpack(Arithmetic arithmetic, const UnpackParams& p, Stream stream);
template <class A>
void launch_forward(const ForwardParams& p, int x_slots, int y_slots, Stream stream);
template <class A>
void launch_hardest(const HardestParams& p, int x_slots, int y_slots, Stream stream);
template <class A, bool kMany>
void launch_weights(const WeightParams& p, int x_slots, int y_slots, Stream stream);

}  // namespace setemb::cuda
