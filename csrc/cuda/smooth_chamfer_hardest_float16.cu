// One kernel in one arithmetic.
#include "smooth_chamfer_launch.h"

namespace setemb::cuda {

template void launch_hardest<float16>(const HardestParams&, int, int, Stream);

}  // namespace setemb::cuda
