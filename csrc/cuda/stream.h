// The name of a CUDA stream, for files that are compiled without CUDA's headers.
#pragma once

using cudaStream_t = struct CUstream_st*;
