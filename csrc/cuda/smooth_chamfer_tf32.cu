// The kernels of one arithmetic.
#include "smooth_chamfer_launch.h"

namespace setemb::cuda {

template void launch_forward<tf32>(const ForwardParams&, int, int, Stream);
template void launch_hardest<tf32>(const HardestParams&, int, int, Stream);
template void launch_weights<tf32>(const WeightParams&, int, int, Stream);

}  // namespace setemb::cuda
