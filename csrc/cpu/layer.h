// What the kernels of a whole layer share (encoder_layer.cpp, decoder_layer.cpp): the kernels of its parts, called on matrices
// that lie in one piece of scratch.
#pragma once

#include "integers.h"
#include "kernels.h"
#include "parallel.h"

namespace fastattn::FASTATTN_ISA {

void attention_forward(const AttentionForward& args);
void feed_forward_forward(const FeedForwardForward& args);
void linear_forward(const LinearForward& args);
void norm_forward(const NormForward& args);

// Hands out contiguous (rows, columns) matrices of one dtype, each on cache lines of its own.
class ScratchMatrices {
  public:
    ScratchMatrices(char* memory, DType dtype, int64_t rows) : memory_(memory), dtype_(dtype), rows_(rows) {}

    // The bytes that `matrices` of them with `columns` together take.
    static int64_t size(DType dtype, int64_t rows, int64_t columns, int64_t matrices) {
        return rows * columns * element_size(dtype) + 64 * matrices;
    }

    Tensor take(int64_t columns) {
        Tensor matrix;
        matrix.data = memory_;
        matrix.dtype = dtype_, matrix.rank = 2;
        matrix.size[0] = rows_, matrix.size[1] = columns;
        matrix.stride[0] = columns, matrix.stride[1] = 1;
        memory_ += round_up(rows_ * columns * element_size(dtype_), 64);
        return matrix;
    }

  private:
    char* memory_;
    DType dtype_;
    int64_t rows_;
};

// A contiguous vector of floats, for statistics that a kernel writes and nobody reads.
inline Tensor float_vector(float* data, int64_t size) {
    Tensor vector;
    vector.data = data;
    vector.dtype = DType::kFloat32, vector.rank = 1;
    vector.size[0] = size, vector.stride[0] = 1;
    return vector;
}

inline void layer_linear(const Tensor& x, const Tensor& weight, const Tensor& bias, Activation activation,
                         const Tensor& residual, const Tensor& out) {
    linear_forward({activation, x, weight, bias, residual, out, {}});
}

// Of x's rows; `statistics` has room for two floats a row.
inline void layer_norm(Norm norm, const Tensor& x, const Tensor& weight, const Tensor& bias, float eps,
                       float* statistics, const Tensor& out) {
    NormForward args = {};
    args.norm = norm, args.rows = x.size[0], args.dim = x.size[1];
    args.x = x, args.weight = weight, args.bias = bias, args.out = out, args.eps = eps;
    if (norm == Norm::kLayer) args.mean = float_vector(statistics, args.rows);
    args.rstd = float_vector(statistics + args.rows, args.rows);
    norm_forward(args);
}

}  // namespace fastattn::FASTATTN_ISA
