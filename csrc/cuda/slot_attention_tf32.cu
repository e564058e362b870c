// The kernels of one arithmetic.
#include "slot_attention_launch.h"

namespace setemb::cuda::slots {

template void launch_weights<tf32>(const WeightParams&, Stream);
template void launch_logit_gradients<tf32>(const WeightParams&, Stream);
template void launch_gather<tf32>(const GatherParams&, Stream);
template void launch_spread<tf32>(const SpreadParams&, Stream);

}  // namespace setemb::cuda::slots
