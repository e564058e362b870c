// The kernels of one arithmetic.
#include "smooth_chamfer_launch.h"

namespace setemb::cuda {

template void launch_forward<bfloat16>(const ForwardParams&, int, int, Stream);
template void launch_hardest<bfloat16>(const HardestParams&, int, int, Stream);
template void launch_weights<bfloat16>(const WeightParams&, int, int, Stream);

}  // namespace setemb::cuda
