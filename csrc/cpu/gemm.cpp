// Which way a product of matrices takes (product.h), once for each type of elements.
//
// Where A has few rows and B's columns lie along the depth, nothing of B is packed: up to kFewRows rows are multiplied
// by dot products along the depth (few_rows.h); up to kSwapRows rows by C^T = B^T . A^T, with A as the packed one. All
// else is blocked for the caches (gemm.h).
#include "gemm.h"

#include "few_rows.h"
#include "product.h"

namespace fastattn::FASTATTN_ISA {

namespace gemm_detail {

constexpr int64_t kSwapRows = 256;

template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, Matrix<T> a, Matrix<T> b, const Finish& finish,
              const Finish& finish_transposed) {
    if (rows == 0 || columns == 0) return;
    if (rows <= kFewRows && b.row == 1) {
        few_rows(rows, columns, depth, a, b, finish);
    } else if (rows <= kSwapRows && columns > rows && b.row == 1) {
        Product<T>(columns, rows, depth, b.transposed(), a.transposed()).run(finish_transposed);
    } else {
        Product<T>(rows, columns, depth, a, b).run(finish);
    }
}

}  // namespace gemm_detail

template <class T>
void product_into(int64_t rows, int64_t columns, int64_t depth, Matrix<T> a, Matrix<T> b, const Tensor& out,
                  bool accumulate) {
    if (!out.unit_last_stride()) {
        Tensor turned = out;
        turned.size[0] = out.size[1], turned.size[1] = out.size[0];
        turned.stride[0] = out.stride[1], turned.stride[1] = out.stride[0];
        return product_into<T>(columns, rows, depth, b.transposed(), a.transposed(), turned, accumulate);
    }
    auto epilogue = [&](int64_t row, int64_t column, int64_t count, const float* sums) {
        T* to = out.as<T>() + row * out.stride[0] + column;
        each_vector(0, count, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
            const Vec value = load(sums + i);
            store(to + i, accumulate ? value + load(to + i, lanes) : value, lanes);
        });
    };
    gemm(rows, columns, depth, a, b, epilogue, written<T>(out));
}

#define FASTATTN_PRODUCT(T)                                                                             \
    template void gemm_detail::multiply(int64_t, int64_t, int64_t, Matrix<T>, Matrix<T>, const Finish&, \
                                        const Finish&);                                                 \
    template void product_into(int64_t, int64_t, int64_t, Matrix<T>, Matrix<T>, const Tensor&, bool);
FASTATTN_PRODUCT(float)
FASTATTN_PRODUCT(BFloat16)
FASTATTN_PRODUCT(Half)
#undef FASTATTN_PRODUCT

}  // namespace fastattn::FASTATTN_ISA
