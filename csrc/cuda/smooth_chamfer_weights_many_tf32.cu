// One kernel in one arithmetic.
#include "smooth_chamfer_launch.h"

namespace setemb::cuda {

template void launch_weights<tf32, true>(const WeightParams&, int, int, Stream);

}  // namespace setemb::cuda
