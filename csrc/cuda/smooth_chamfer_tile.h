// Scores of 128 x 128 rows of two packed operands, in registers, and which of them a lane holds.
#pragma once

#include <type_traits>

#include "smooth_chamfer.h"
#include "warp.h"

namespace setemb::cuda {

// A lane's scores of 64 x 64: [t][u][2 h + e] is of row 16 t + 8 h + lane / 4 and column 8 u + 2 (lane % 4) + e.
using Scores = float[4][8][4];

// Which slots and sets a lane's rows are of, in a group of sets of S slots. With i = 2 t + h, row 8 i + lane / 4 is
// slot row / (64 / S) of set row % (64 / S).
template <int S>
struct RowSlots {
  static constexpr int kSets = kGroup / S;
  static constexpr int kSlots = S < 8 ? S : 8;  // of a set that one lane holds
  static constexpr int kItems = 8 / kSlots;     // sets that one lane holds
  static SETEMB_DEVICE int index(int item, int slot) { return slot * kItems + item; }
  static SETEMB_DEVICE int set(int item) { return S <= 8 ? item * 8 + lane_index() / 4 : lane_index() / 4 % kSets; }
  static SETEMB_DEVICE bool is_first() { return S <= 8 || lane_index() / 4 < kSets; }  // of the lanes of a set
  template <class Combine>
  static SETEMB_DEVICE float over_lanes(float v, Combine combine) {
    if (S >= 16) v = combine(v, shuffle_xor(v, 16));
    if (S >= 32) v = combine(v, shuffle_xor(v, 8));
    if (S >= 64) v = combine(v, shuffle_xor(v, 4));
    return v;
  }
};

// Of a lane's columns: column 8 u + 2 (lane % 4) + e. With index = 2 u + e.
template <int S>
struct ColumnSlots {
  static constexpr int kSets = kGroup / S;
  static constexpr int kSlots = S < 8 ? S : S < 64 ? 8 : 16;
  static constexpr int kItems = 16 / kSlots;
  static SETEMB_DEVICE int index(int item, int slot) { return slot * kItems + item; }
  static SETEMB_DEVICE int set(int item) {
    return S <= 8 ? item / 2 * 8 + 2 * (lane_index() % 4) + item % 2 : (2 * (lane_index() % 4) + item) % kSets;
  }
  static SETEMB_DEVICE bool is_first() { return S <= 8 || 2 * (lane_index() % 4) < kSets; }
  template <class Combine>
  static SETEMB_DEVICE float over_lanes(float v, Combine combine) {
    if (S >= 16) v = combine(v, shuffle_xor(v, 2));
    if (S >= 32) v = combine(v, shuffle_xor(v, 1));
    return v;
  }
};

SETEMB_DEVICE float& score(Scores& c, int row_index, int column_index) {
  return c[row_index / 2][column_index / 2][row_index % 2 * 2 + column_index % 2];
}

// --- products

// Where chunk c (16 bytes) of a row lies in a step of kStepBytes a row, so that neither copies nor ldmatrix meet in a
// bank of shared memory.
SETEMB_DEVICE int swizzled(int row, int c) { return row * kStepBytes + (c ^ (row >> 1 & 3)) * 16; }

// 64 x 64 scores more, over one step of features: tensor cores.
template <class A>
struct Multiply {
  static SETEMB_DEVICE void add(Scores& c, const char* x, const char* y, int lane) {
    SETEMB_UNROLL
    for (int k = 0; k < kStepBytes / 32; ++k) {
      uint32_t a[4][4];
      SETEMB_UNROLL
      for (int t = 0; t < 4; ++t) load_matrices(a[t], x + swizzled(16 * t + lane % 16, 2 * k + lane / 16));
      SETEMB_UNROLL
      for (int u = 0; u < 8; u += 2) {
        uint32_t b[4];  // of columns 8 u ... and 8 (u + 1) ...
        load_matrices(b, y + swizzled(8 * u + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        SETEMB_UNROLL
        for (int t = 0; t < 4; ++t) {
          multiply_add<A>(c[t][u], a[t], first);
          multiply_add<A>(c[t][u + 1], a[t], second);
        }
      }
    }
  }
};

// The same in float32 arithmetic. Four products are summed before they are added: the error of a score grows with the
// number of additions to it.
template <>
struct Multiply<float> {
  struct alignas(16) Four {
    float v[4];
  };
  static SETEMB_DEVICE void add(Scores& c, const char* x, const char* y, int lane) {
    const int g = lane / 4, q = lane % 4;
    SETEMB_NO_UNROLL
    for (int k = 0; k < kStepBytes / 16; ++k) {
      Four a[8];
      SETEMB_UNROLL
      for (int i = 0; i < 8; ++i) a[i] = load(reinterpret_cast<const Four*>(x + swizzled(8 * i + g, k)));
      SETEMB_UNROLL
      for (int j = 0; j < 16; ++j) {
        const int column = j / 2 * 8 + 2 * q + j % 2;
        const Four b = load(reinterpret_cast<const Four*>(y + swizzled(column, k)));
        SETEMB_UNROLL
        for (int i = 0; i < 8; ++i) {
          float sum = a[i].v[0] * b.v[0];
          sum += a[i].v[1] * b.v[1];
          sum += a[i].v[2] * b.v[2];
          sum += a[i].v[3] * b.v[3];
          score(c, i, j) += sum;
        }
      }
    }
  }
};

// All tiles of a launch: of two operands, or of a chunk of them.
struct Tiles {
  int rows, columns;     // tiles
  int x_first, y_first;  // first group
  SETEMB_DEVICE int count() const { return rows * columns; }
};

SETEMB_DEVICE Tiles all_tiles(const TileParams& p) { return {p.x.groups / 2, p.y.groups / 2, 0, 0}; }

// Row and column of a tile: down eight tiles before one to the right, to find operands in the cache.
struct TilePosition {
  int row, column;
};
SETEMB_DEVICE TilePosition tile_position(int tile, int rows, int columns) {
  constexpr int kBand = 8;
  const int band = tile / (kBand * columns);
  const int left = rows - band * kBand;
  const int height = left < kBand ? left : kBand;
  const int within = tile - band * kBand * columns;
  return {band * kBand + within % height, within / height};
}

// Starts to copy one step of a tile's operands; x and y are its first rows.
template <class A>
SETEMB_DEVICE void start_step(const TileParams& p, const char* x, const char* y, int step, int steps, int thread) {
  const int64_t row_bytes = static_cast<int64_t>(p.features) * static_cast<int>(sizeof(Storage<A>));
  if (step < steps) {
    char* target = shared_memory() + step % kStages * (2 * kTile * kStepBytes);
    SETEMB_UNROLL
    for (int i = 0; i < kTile * 4 / kThreads; ++i) {
      const int row = (thread + i * kThreads) / 4, chunk = thread % 4;
      const int64_t source = row * row_bytes + step * kStepBytes + chunk * 16;
      copy_async(target + swizzled(row, chunk), x + source);
      copy_async(target + kTile * kStepBytes + swizzled(row, chunk), y + source);
    }
  }
  copy_commit();
}

// Whether a block makes several tiles, and copies the operands of the next while it takes exponentials of one. Next to
// products without tensor cores those are little, and between sets of one vector there are none; a block ends with
// its tile then, and another takes its place.
template <class A, int SX, int SY>
constexpr bool kSeveralTiles = !std::is_same_v<A, float> && SX * SY > 1;

// Calls use(scores, x group, y group) for each of the block's tiles, with this warp's groups and their scores; while it
// runs, the first steps of the next tile are copied. Products, copies and `use` each work out anew where their thread
// is: kept in registers all the while, that would spill.
template <class A, bool several, class Use>
SETEMB_DEVICE void for_tiles(const TileParams& p, const Tiles& tiles, const Use& use) {
  const int64_t row_bytes = static_cast<int64_t>(p.features) * static_cast<int>(sizeof(Storage<A>));
  const int steps = static_cast<int>(row_bytes / kStepBytes);
  const auto x_of = [&](TilePosition at) {
    return static_cast<const char*>(p.x.rows) + static_cast<int64_t>(tiles.x_first + 2 * at.row) * kGroup * row_bytes;
  };
  const auto y_of = [&](TilePosition at) {
    return static_cast<const char*>(p.y.rows) +
           static_cast<int64_t>(tiles.y_first + 2 * at.column) * kGroup * row_bytes;
  };
  const auto begin = [&](int tile) {
    if (tile >= tiles.count()) return;
    const TilePosition at = tile_position(tile, tiles.rows, tiles.columns);
    const int thread = opaque(thread_index());
    SETEMB_UNROLL
    for (int step = 0; step < kStages - 1; ++step) start_step<A>(p, x_of(at), y_of(at), step, steps, thread);
  };
  const auto make = [&](int tile) {
    const TilePosition at = tile_position(tile, tiles.rows, tiles.columns);
    const char *x = x_of(at), *y = y_of(at);
    const int thread = opaque(thread_index()), warp = thread / kWarp;
    Scores c;
    SETEMB_UNROLL
    for (int t = 0; t < 4; ++t) {
      SETEMB_UNROLL
      for (int u = 0; u < 8; ++u) {
        SETEMB_UNROLL
        for (int i = 0; i < 4; ++i) c[t][u][i] = 0;
      }
    }
    SETEMB_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      copy_wait<kStages - 2>();
      sync_threads();  // what was copied is there, and the oldest step has been read by all
      start_step<A>(p, x, y, step + kStages - 1, steps, thread);  // in its place
      const char* from = shared_memory() + step % kStages * (2 * kTile * kStepBytes);
      Multiply<A>::add(c, from + warp / 2 * kGroup * kStepBytes, from + (kTile + warp % 2 * kGroup) * kStepBytes,
                       thread % kWarp);
    }
    copy_wait<0>();
    if (several) {
      sync_threads();  // all has been read
      begin(tile + block_count());
    }
    use(c, 2 * at.row + warp_index() / 2, 2 * at.column + warp_index() % 2);
  };
  begin(block_index());
  if constexpr (several) {
    SETEMB_NO_UNROLL
    for (int tile = block_index(); tile < tiles.count(); tile += block_count()) make(tile);
  } else {
    make(block_index());
  }
}

}  // namespace setemb::cuda
