// The definitions of launch_pack and launch_unpack.
#pragma once

#include "launch.h"
#include "smooth_chamfer.h"
#include "smooth_chamfer_pack.h"

namespace setemb::cuda {

// Calls f with a value of the type that operands of this arithmetic are stored in.
template <class F>
void with_storage(Arithmetic arithmetic, const F& f) {
  switch (arithmetic) {
    case Arithmetic::kBFloat16:
      return f(bfloat16{});
    case Arithmetic::kFloat16:
      return f(float16{});
    default:
      return f(float{});
  }
}

void launch_pack(Arithmetic arithmetic, const PackParams& p, int64_t groups, Stream stream) {
  with_storage(arithmetic, [&](auto t) {
    launch("smooth_chamfer pack", pack_kernel<decltype(t)>, p, groups, kPackThreads, kPackShared, stream);
  });
}

void launch_unpack(Arithmetic arithmetic, const UnpackParams& p, Stream stream) {
  const int64_t in_group = kGroup / p.slots;
  const int64_t groups = (p.last - p.first + in_group - 1) / in_group;
  with_storage(arithmetic, [&](auto t) {
    launch("smooth_chamfer unpack", unpack_kernel<decltype(t)>, p, groups, kPackThreads, 0, stream);
  });
}

}  // namespace setemb::cuda
