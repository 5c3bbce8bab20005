// The element types that kernels in csrc/cuda take, numbered as fastattn/backends/tensors.py has them.
#pragma once

#include <stdint.h>

namespace fastattn::cuda {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

inline int size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace fastattn::cuda
