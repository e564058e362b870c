// The kernels of one arithmetic.
#include "slot_attention_launch.h"

namespace setemb::cuda::slots {

template void launch_weights<float16>(const WeightParams&, Stream);
template void launch_logit_gradients<float16>(const WeightParams&, Stream);
template void launch_gather<float16>(const GatherParams&, Stream);
template void launch_spread<float16>(const SpreadParams&, Stream);

}  // namespace setemb::cuda::slots
