// Checks that the bindings of linear and feed_forward share.
#pragma once

#include "bindings.h"

namespace fastattn {

Activation read_activation(const std::string& name);

// The matrix (rows, columns) that `tensor` is, in x's dtype; the second asks for unit stride along the columns.
Tensor matrix_like(const Tensor& tensor, const char* name, const Tensor& x, int64_t rows, int64_t columns);
Tensor row_matrix_like(const Tensor& tensor, const char* name, const Tensor& x, int64_t rows, int64_t columns);

// The latter to be written to; None only where it says so.
Tensor written_rows(const Tensor& tensor, const char* name, const Tensor& x, int64_t rows, int64_t columns);
Tensor written_rows_or_absent(const Tensor& tensor, const char* name, const Tensor& x, int64_t rows, int64_t columns);

// The gradient of a weight, to be written: (rows, columns) in x's dtype with unit stride along either dimension, or
// absent.
Tensor weight_gradient(const Tensor& gradient, const char* name, const Tensor& x, int64_t rows, int64_t columns);

// (size,) in x's dtype, or absent; the second asks for a contiguous one.
void check_size(const Tensor& bias, const char* name, const Tensor& x, int64_t size);
void check_bias(const Tensor& bias, const char* name, const Tensor& x, int64_t size);

}  // namespace fastattn
