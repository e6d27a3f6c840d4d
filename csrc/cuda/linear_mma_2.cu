#include "cuda/linear_mma_launch.cuh"

namespace bitfold::cuda {

template Status launch_mma<2>(const MmaTask& task, FloatType dtype, cudaStream_t stream);

}  // namespace bitfold::cuda
