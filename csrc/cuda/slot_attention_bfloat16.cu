// The kernels of one arithmetic.
#include "slot_attention_launch.h"

namespace setemb::cuda::slots {

template void launch_weights<bfloat16>(const WeightParams&, Stream);
template void launch_logit_gradients<bfloat16>(const WeightParams&, Stream);
template void launch_gather<bfloat16>(const GatherParams&, Stream);
template void launch_spread<bfloat16>(const SpreadParams&, Stream);

}  // namespace setemb::cuda::slots
