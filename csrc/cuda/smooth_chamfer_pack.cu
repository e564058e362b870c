// The kernels that pack and unpack, of all dtypes.
#include "smooth_chamfer_pack_launch.h"
