// Products of matrices, for the kernels that have more to do with C than to store it:
//
//     C (rows x columns)  =  A (rows x depth) . B (depth x columns),   given to an epilogue a row's stretch at a time
//
// What is compiled for all of them lies in gemm.cpp; an epilogue alone is compiled where it is written.
#pragma once

#include "matrix.h"

namespace fastattn::FASTATTN_ISA {

namespace gemm_detail {

template <class Step>  // a multiple of kStripRows<Step>
constexpr int64_t kBlockRows = kOnUnit<Step> ? 384 : 8 * kTileRows;

template <class Epilogue>
inline void finish_rows(const void* epilogue, int64_t row, int64_t rows, int64_t column, int64_t columns,
                        const float* sums, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) {
        (*static_cast<const Epilogue*>(epilogue))(row + r, column, columns, sums + r * stride);
    }
}

// Of parts of C^T: `row` is a column of C.
template <class Epilogue>
inline void finish_transposed(const void* epilogue, int64_t row, int64_t rows, int64_t column, int64_t columns,
                              const float* sums, int64_t stride) {
    constexpr int64_t kRows = kMatrixUnit ? kBlockRows<BFloat16Pair> : kBlockRows<float>;
    constexpr int64_t kWidth = (kRows + kLanes - 1) / kLanes * kLanes;
    float turned[kLanes][kWidth];
    for (int64_t c = 0; c < columns; c += kLanes) {
        for (int64_t r = 0; r < rows; r += kLanes) {
            Vec square[kLanes];
            for (int i = 0; i < kLanes; ++i) square[i] = r + i < rows ? load(sums + (r + i) * stride + c) : Vec{};
            transpose(square);
            for (int i = 0; i < kLanes; ++i) store(&turned[i][r], square[i]);
        }
        for (int64_t i = 0; i < kLanes && c + i < columns; ++i) {
            (*static_cast<const Epilogue*>(epilogue))(column + c + i, row, rows, turned[i]);
        }
    }
}

// For parts of C and for parts of C^T, which are whole blocks.
template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, Matrix<T> a, Matrix<T> b, const Finish& finish,
              const Finish& finish_transposed);

}  // namespace gemm_detail

// epilogue(row, column, columns, sums): C's elements (row, column) … (row, column + columns - 1) in float32; `sums` may
// be read up to whole vectors. Each element is given once; different threads give different ones.
// `out` and `other` are what the epilogue writes, if it pays to say so.
template <class T, class Epilogue>
inline void gemm(int64_t rows, int64_t columns, int64_t depth, Matrix<T> a, Matrix<T> b, const Epilogue& epilogue,
                 Written out = {}, Written other = {}) {
    gemm_detail::multiply(rows, columns, depth, a, b,
                          {gemm_detail::finish_rows<Epilogue>, &epilogue, false, {out, other}},
                          {gemm_detail::finish_transposed<Epilogue>, &epilogue, true, {out, other}});
}

// out = [out +] A . B, rounded to T. `out` has unit stride along either dimension.
template <class T>
void product_into(int64_t rows, int64_t columns, int64_t depth, Matrix<T> a, Matrix<T> b, const Tensor& out,
                  bool accumulate = false);

}  // namespace fastattn::FASTATTN_ISA
