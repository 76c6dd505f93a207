// As CUDAException.h: there is one stream, on which everything is done when a launch returns.
#pragma once

struct CUstream_st;

namespace c10::cuda {

struct CUDAStream {
  CUstream_st* stream() const { return nullptr; }
};

inline CUDAStream getCurrentCUDAStream() { return {}; }

}  // namespace c10::cuda
