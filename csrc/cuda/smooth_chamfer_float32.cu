// The kernels of one arithmetic.
#include "smooth_chamfer_launch.h"

namespace setemb::cuda {

template void launch_forward<float>(const ForwardParams&, int, int, Stream);
template void launch_hardest<float>(const HardestParams&, int, int, Stream);
template void launch_weights<float>(const WeightParams&, int, int, Stream);

}  // namespace setemb::cuda
