// A CUDA stream, for files that know nothing of CUDA.
#pragma once

namespace setemb::cuda {

using Stream = void*;  // a cudaStream_t

}  // namespace setemb::cuda
