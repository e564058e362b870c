// Rows of a matrix by their places, zeros where there is none, in one pass: how masked sets are packed, and how their
// gradients go back. Nothing is added up, as each row goes to one place.
#include <algorithm>
#include <cstring>

#include "ops.h"
#include "parallel.h"

namespace setemb {
namespace {

constexpr int64_t kTaskBytes = 256 << 10;

Tensor gather_rows(const Tensor& rows_in, const Tensor& places_in, const Tensor&) {
  if (places_in.scalar_type() != ScalarType::Long) throw std::invalid_argument("places: expected int64");
  const Tensor rows = torch::stable::contiguous(rows_in), places = torch::stable::contiguous(places_in);
  const int64_t count = places.size(0), last = rows.size(0) - 1;
  const size_t bytes = static_cast<size_t>(rows.size(1)) * rows.element_size();
  Tensor out = torch::stable::new_empty(rows, {count, rows.size(1)});
  if (out.numel() == 0) return out;
  const int64_t* const from = static_cast<const int64_t*>(places.data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    if (from[i] < -1 || from[i] > last) throw std::invalid_argument("places: expected -1 (none) or the index of a row");
  }
  const char* const source = static_cast<const char*>(rows.data_ptr());
  char* const target = static_cast<char*>(out.mutable_data_ptr());
  const int64_t step = std::max<int64_t>(1, kTaskBytes / static_cast<int64_t>(bytes));
  run_tasks((count + step - 1) / step, [&](int64_t task, int64_t) {
    for (int64_t i = task * step; i < std::min(count, (task + 1) * step); ++i) {
      if (from[i] < 0) {
        std::memset(target + i * bytes, 0, bytes);
      } else {
        std::memcpy(target + i * bytes, source + from[i] * bytes, bytes);
      }
    }
  });
  return out;
}

}  // namespace

void register_gather_rows(StableLibrary& library) { library.impl("gather_rows", TORCH_BOX(&gather_rows)); }

}  // namespace setemb
