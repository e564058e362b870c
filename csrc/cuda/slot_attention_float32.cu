// The kernels of one arithmetic.
#include "slot_attention_launch.h"

namespace setemb::cuda::slots {

template void launch_weights<float>(const WeightParams&, Stream);
template void launch_logit_gradients<float>(const WeightParams&, Stream);
template void launch_gather<float>(const GatherParams&, Stream);
template void launch_spread<float>(const SpreadParams&, Stream);

}  // namespace setemb::cuda::slots
