// Of the emulator (see emulator.h): loads, stores and where a thread is.
#pragma once

#include <cstdint>

#include "emulator_machine.h"

namespace setemb::cuda::emulator {

// --- memory

inline bool in_shared(const void* p, std::size_t bytes) {
  const Machine& m = machine();
  const char* c = static_cast<const char*>(p);
  return c >= m.shared && c + bytes <= m.shared + m.shared_bytes;
}

inline std::string described(const char* what, const void* p, std::size_t bytes) {
  char text[128];
  std::snprintf(text, sizeof(text), "%s of %zu bytes at %p", what, bytes, p);
  return text;
}

inline void check_alignment(const char* what, const void* p, std::size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(described(what, p, bytes) + " is not aligned");
}

inline void touch_shared(const void* p, std::size_t bytes, bool writes) {
  Machine& m = machine();
  const std::size_t offset = static_cast<std::size_t>(static_cast<const char*>(p) - m.shared);
  const int warp = m.current / 32;
  const uint32_t me = 1u << warp, lane = 1u << m.current % 32;
  for (std::size_t i = offset / 2; i <= (offset + bytes - 1) / 2; ++i) {
    Touch& t = m.touches[i];
    const bool written = t.write_epoch == m.epoch && (t.writers & ~me);
    const bool read = t.read_epoch == m.epoch && (t.readers & ~me);
    if (written || (writes && read)) {
      fail("race at byte " + std::to_string(2 * i) + " of shared memory: " + (writes ? "written" : "read") +
           " after another warp has " + (written ? "written" : "read") + " it, without a barrier in between");
    }
    if (t.warp != warp || t.warp_epoch != m.warps[warp].epoch) {
      t.warp = warp, t.warp_epoch = m.warps[warp].epoch;
      t.writing_lanes = t.reading_lanes = 0;
    }
    if (t.writing_lanes & ~lane || (writes && t.reading_lanes & ~lane)) {
      fail("race at byte " + std::to_string(2 * i) + " of shared memory: " + (writes ? "written" : "read") +
           " after another lane has " + (t.writing_lanes & ~lane ? "written" : "read") +
           " it, without a barrier of the warp in between");
    }
    (writes ? t.writing_lanes : t.reading_lanes) |= lane;
    uint32_t& epoch = writes ? t.write_epoch : t.read_epoch;
    uint32_t& warps = writes ? t.writers : t.readers;
    warps = epoch == m.epoch ? warps | me : me;
    epoch = m.epoch;
  }
}

inline Buffer* buffer_of(const void* p, std::size_t bytes) {
  const char* c = static_cast<const char*>(p);
  for (Buffer& b : machine().buffers) {
    if (c >= b.begin && c + bytes <= b.end) return &b;
  }
  return nullptr;
}

inline void check_load(const void* p, std::size_t bytes, std::size_t alignment) {
  check_alignment("load", p, alignment);
  if (in_shared(p, bytes)) return touch_shared(p, bytes, false);
  if (buffer_of(p, bytes) == nullptr) fail(described("load", p, bytes) + " is outside all buffers");
}

inline void check_store(void* p, std::size_t bytes, std::size_t alignment) {
  check_alignment("store", p, alignment);
  if (in_shared(p, bytes)) return touch_shared(p, bytes, true);
  Buffer* b = buffer_of(p, bytes);
  if (b == nullptr) fail(described("store", p, bytes) + " is outside all buffers");
  if (!b->writable) fail(described("store", p, bytes) + " is to an input");
  const std::size_t first = static_cast<std::size_t>(static_cast<char*>(p) - b->begin);
  for (std::size_t i = first / b->element; i < (first + bytes + b->element - 1) / b->element; ++i) {
    if (b->writes[i] < 255) ++b->writes[i];
  }
}

// Not counted as a write, and no race.
inline void check_atomic(void* p, std::size_t bytes) {
  check_alignment("atomic", p, bytes);
  const Buffer* b = buffer_of(p, bytes);
  if (b == nullptr || !b->writable) fail(described("atomic", p, bytes) + " is outside all outputs");
}

inline int processors() { return 1; }  // few, so that blocks have several tiles
inline int thread_index() { return machine().current; }
inline int block_index() { return machine().block; }
inline int block_count() { return machine().blocks; }
inline char* shared_memory() { return machine().shared; }

}  // namespace setemb::cuda::emulator
