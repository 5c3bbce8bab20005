// What the bindings of whole layers check alike.
#pragma once

#include "bindings_linear.h"

namespace fastattn {

// (rows, columns) in x's dtype, of any strides.
Tensor checked_weight(const Tensor& tensor, const char* name, const Tensor& x, int64_t rows, int64_t columns);

// (size,), contiguous, in x's dtype, or absent; the second, a norm's, may be float32 beside another dtype.
Tensor checked_bias(const Tensor& tensor, const char* name, const Tensor& x, int64_t size);
Tensor checked_vector(const Tensor& tensor, const char* name, const Tensor& x, int64_t size);

// A contiguous (batch, seq, width) tensor as a matrix, with strides that hold for a single row and for none.
Tensor as_rows(const Tensor& tensor, const char* name);

}  // namespace fastattn
