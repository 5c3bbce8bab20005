// Residual add, dropout and layer norm or RMS norm on a GPU. Plain pointers and a stream; bindings.cpp checks them.
#pragma once

#include <stdint.h>

#include "dtype.h"

namespace fastattn::cuda {

struct NormForward {
    DType dtype, weight_dtype;  // of the rows; of weight and bias
    int64_t rows, dim;
    const void *x, *residual;   // (rows, dim); residual may be null
    const void *weight, *bias;  // (dim,), may be null
    void *out, *sum;            // (rows, dim); sum is null where it is x
    float *mean, *rstd;         // (rows,); mean is null for RMS norm
    const int64_t* seed;        // null without dropout
    float eps;
    double dropout_p;
    void* stream;
};
void norm_forward(const NormForward& arguments);

struct NormBackward {
    DType dtype, weight_dtype;
    int64_t rows, dim;
    const void *grad_out, *grad_sum, *sum;  // (rows, dim); grad_sum may be null
    const void* weight;
    const float *mean, *rstd;
    const int64_t* seed;
    void *grad_residual, *grad_x;          // (rows, dim); grad_x is null without dropout
    int64_t programs;                      // how many blocks share the rows
    float *partial_weight, *partial_bias;  // (programs, dim), or null
    double dropout_p;
    void* stream;
};
void norm_backward(const NormBackward& arguments);

// How many programs share the rows on a GPU with so many multiprocessors, and the features that a row may have.
int64_t norm_backward_programs(DType dtype, int64_t rows, int64_t dim, int64_t multiprocessors);
int64_t norm_most_features();

}  // namespace fastattn::cuda
