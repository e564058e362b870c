// Of the emulator (see emulator.h): where threads meet, asynchronous copies, products of tensor cores.
#pragma once

#include <cstdint>

#include "emulator_memory.h"

namespace setemb::cuda::emulator {

// --- meetings

inline void sync_threads() {
  Machine& m = machine();
  if (m.done) fail("waits at a barrier that others will not reach: they have ended");
  Fiber& fiber = m.fibers[m.current];
  fiber.state = State::kWaiting;
  if (++m.at_barrier == m.threads) {
    m.at_barrier = 0;
    ++m.epoch;
    for (WarpState& warp : m.warps) ++warp.epoch;
    for (int i = 0; i < m.threads; ++i) {
      for (const Copy& copy : m.fibers[i].landed) std::memcpy(copy.target, copy.bytes, 16);
      m.fibers[i].landed.clear();
      m.fibers[i].state = State::kReady;
    }
  }
  to_scheduler();
}

// The last of a warp's lanes to come does what `meeting` says with the operands of all.
inline void meet(int place, Meeting meeting, const void* in, void* out, int tag) {
  Machine& m = machine();
  WarpState& warp = m.warps[m.current / 32];
  if (warp.arrived == 0) {
    warp.place = place;
    warp.meeting = meeting;
    warp.tag = tag;
  } else if (warp.place != place || warp.meeting != meeting || warp.tag != tag) {
    fail("lanes of a warp meet at different places");
  }
  warp.in[m.current % 32] = in;
  warp.out[m.current % 32] = out;
  Fiber& fiber = m.fibers[m.current];
  fiber.state = State::kWaiting;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    meeting(warp.in, warp.out, tag);
    const int first = m.current / 32 * 32;
    for (int i = first; i < first + 32; ++i) m.fibers[i].state = State::kReady;
    if (m.order != Order::kRandom) return;
  }
  to_scheduler();
}

inline void sync_warp(int place) {
  const auto order = [](const void* const*, void* const*, int) { ++machine().warps[machine().current / 32].epoch; };
  meet(place, order, nullptr, nullptr, 0);
}

inline uint32_t shuffle_xor(uint32_t v, int lanes, int place) {
  uint32_t result;
  const auto exchange = [](const void* const* in, void* const* out, int tag) {
    for (int i = 0; i < 32; ++i) *static_cast<uint32_t*>(out[i]) = *static_cast<const uint32_t*>(in[i ^ (tag & 31)]);
  };
  meet(place, exchange, &v, &result, lanes);
  return result;
}

inline uint32_t shuffle(uint32_t v, int lane, int place) {
  struct Operand {
    uint32_t value;
    int lane;
  } operand{v, lane};
  uint32_t result;
  const auto exchange = [](const void* const* in, void* const* out, int) {
    for (int i = 0; i < 32; ++i) {
      const int source = static_cast<const Operand*>(in[i])->lane & 31;
      *static_cast<uint32_t*>(out[i]) = static_cast<const Operand*>(in[source])->value;
    }
  };
  meet(place, exchange, &operand, &result, 0);
  return result;
}

inline uint32_t vote(bool v, int place) {
  uint32_t result;
  const auto collect = [](const void* const* in, void* const* out, int) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(*static_cast<const bool*>(in[i])) << i;
    for (int i = 0; i < 32; ++i) *static_cast<uint32_t*>(out[i]) = bits;
  };
  meet(place, collect, &v, &result, 0);
  return result;
}

// --- asynchronous copies

inline void copy_async(void* shared, const void* global, bool inside) {
  Machine& m = machine();
  check_alignment("asynchronous copy", shared, 16);
  if (!in_shared(shared, 16)) fail(described("asynchronous copy", shared, 16) + " is not to shared memory");
  touch_shared(shared, 16, true);
  Copy copy{static_cast<char*>(shared), {}};
  if (inside) {
    check_alignment("asynchronous copy", global, 16);
    if (buffer_of(global, 16) == nullptr) fail(described("asynchronous copy", global, 16) + " is outside all buffers");
    std::memcpy(copy.bytes, global, 16);
  }
  std::memset(shared, 0xff, 16);
  m.fibers[m.current].open.push_back(copy);
}

inline void copy_commit() {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

inline void copy_wait(int pending) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  while (static_cast<int>(fiber.groups.size()) > pending) {
    for (const Copy& copy : fiber.groups.front()) fiber.landed.push_back(copy);
    fiber.groups.erase(fiber.groups.begin());
  }
}

// --- tensor cores

// Word q of row g of a matrix of 8 rows x 4 words; row i is where rows[i] points.
inline uint32_t word_of(const void* const* rows, int g, int q) {
  uint32_t word;
  std::memcpy(&word, static_cast<const char*>(rows[g]) + 4 * q, 4);
  return word;
}

inline void load_matrices(uint32_t (&out)[4], const void* row, bool transposed, int place) {
  check_alignment("ldmatrix", row, 16);
  if (!in_shared(row, 16)) fail(described("ldmatrix", row, 16) + " is not of shared memory");
  touch_shared(row, 16, false);
  const auto exchange = [](const void* const* in, void* const* outs, int transposing) {
    Machine& m = machine();
    for (int j = 0; j < 4; ++j) {
      const void* const* rows = in + 8 * j;
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, q = lane % 4;
        uint32_t word = word_of(rows, g, q);
        if (transposing) {
          const auto half = [&](int r) { return word_of(rows, r, g / 2) >> 16 * (g % 2) & 0xffff; };
          word = half(2 * q) | half(2 * q + 1) << 16;
        }
        static_cast<uint32_t*>(outs[lane])[j] = word;
      }
      ++m.shared_phases;
      for (int a = 0; a < 8; ++a) {  // two rows in the same four banks, at different addresses
        bool conflict = false;
        for (int b = 0; b < a; ++b) {
          const auto first = reinterpret_cast<uintptr_t>(rows[a]) / 16,
                     second = reinterpret_cast<uintptr_t>(rows[b]) / 16;
          conflict |= first % 8 == second % 8 && first != second;
        }
        m.shared_conflicts += conflict;
      }
    }
  };
  meet(place, exchange, row, out, transposed);
}

// A word of shared memory for each lane: those of one address at once, those of others only from another bank.
inline uint32_t load_together(const uint32_t* p, int place) {
  check_load(p, 4, 4);
  if (!in_shared(p, 4)) fail(described("load of a warp", p, 4) + " is not of shared memory");
  const auto read = [](const void* const* in, void* const* out, int) {
    Machine& m = machine();
    ++m.shared_phases;
    for (int a = 0; a < 32; ++a) {
      std::memcpy(out[a], in[a], 4);
      bool conflict = false;
      for (int b = 0; b < a; ++b) {
        const auto first = reinterpret_cast<uintptr_t>(in[a]) / 4, second = reinterpret_cast<uintptr_t>(in[b]) / 4;
        conflict |= first % 32 == second % 32 && first != second;
      }
      m.shared_conflicts += conflict;
    }
  };
  uint32_t result;
  meet(place, read, p, &result, 0);
  return result;
}

// Towards zero.
inline float truncated(double v) {
  const float nearest = static_cast<float>(v);
  if (!std::isfinite(v)) return nearest;
  return std::fabs(static_cast<double>(nearest)) > std::fabs(v) ? std::nextafter(nearest, 0.0f) : nearest;
}

inline void multiply_add(const char* instruction, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         int place) {
  struct Operand {
    const uint32_t *a, *b;
    const float* c;
  } operand{a, b, c};
  const int kind = std::strstr(instruction, ".bf16.") ? 0 : std::strstr(instruction, ".f16.") ? 1 : 2;
  const auto exchange = [](const void* const* in, void* const* out, int tag) {
    const int numbers = tag == 2 ? 1 : 2;  // in a word
    const auto unpack = [&](uint32_t word, int i) -> double {
      if (tag == 0) return bit_cast<float>(word >> 16 * i << 16);
      if (tag == 1) return float_of_half(static_cast<uint16_t>(word >> 16 * i));
      return bit_cast<float>(word & 0xffffe000);
    };
    double rows[16][16], columns[8][16];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* o = static_cast<const Operand*>(in[lane]);
      const int g = lane / 4, q = lane % 4;
      for (int i = 0; i < numbers; ++i) {
        rows[g][numbers * q + i] = unpack(o->a[0], i);
        rows[g + 8][numbers * q + i] = unpack(o->a[1], i);
        rows[g][numbers * (q + 4) + i] = unpack(o->a[2], i);
        rows[g + 8][numbers * (q + 4) + i] = unpack(o->a[3], i);
        columns[g][numbers * q + i] = unpack(o->b[0], i);
        columns[g][numbers * (q + 4) + i] = unpack(o->b[1], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* result = static_cast<float*>(out[lane]);
      for (int i = 0; i < 4; ++i) {
        const double* row = rows[lane / 4 + i / 2 * 8];
        const double* column = columns[2 * (lane % 4) + i % 2];
        double sum = result[i];
        for (int k = 0; k < 8 * numbers; ++k) sum += row[k] * column[k];
        result[i] = truncated(sum);
      }
    }
    ++machine().products;
  };
  meet(place, exchange, &operand, c, kind);
}

}  // namespace setemb::cuda::emulator
