// Residual add, dropout and layer norm or RMS norm, forward:
//
//     sum = residual + dropout(x)
//     out = (sum - mean) * rstd * weight + bias        (RMS norm: no mean, no bias; rstd from the mean of squares)
//
// Each tensor is read or written once, in accesses of 16 bytes; a row stays in registers between its statistics and its
// output. Moved: 2 to 4 tensors of b bytes an element; about ten operations an element. Memory bounds it.
#include "norm_rows.h"

namespace fastattn::cuda {
namespace {

template <class T, class W>
struct Arguments {
    const T *x, *residual;
    const W *weight, *bias;
    T *out, *sum;
    float *mean, *rstd;
    int64_t rows, dim;
    float eps;
    Dropout dropout;
};

template <class T, class W, int kVectors, bool kBlock, bool kAligned>
__global__ void __launch_bounds__(kBlock ? kMostThreads : kWarp * kWarpsOfBlock) norm_forward(Arguments<T, W> a) {
    constexpr int kSize = Vector<T>::kSize;
    __shared__ float sums[kWarp];
    const int threads = kBlock ? blockDim.x : kWarp;
    const int thread = threadIdx.x % threads;
    const int64_t row = kBlock ? blockIdx.x : int64_t{blockIdx.x} * kWarpsOfBlock + threadIdx.x / kWarp;
    if (row >= a.rows) return;  // a warp as a whole
    const int64_t at = row * a.dim;
    const uint64_t key = a.dropout.seed ? a.dropout.row_key(row) : 0;

    float value[kVectors][kSize];
    float total = 0.0f;
    for (int v = 0; v < kVectors; ++v) {
        const int64_t column = (int64_t{v} * threads + thread) * kSize;
        load<T, kAligned>(a.x + at, column, a.dim, value[v]);
        if (a.dropout.seed) {  // rounded as in eager, whose dropout gives a tensor
            for (int i = 0; i < kSize; ++i) value[v][i] = rounded<T>(a.dropout.apply(key, column + i, value[v][i]));
        }
        if (a.residual) {
            float other[kSize];
            load<T, kAligned>(a.residual + at, column, a.dim, other);
            for (int i = 0; i < kSize; ++i) value[v][i] += other[i];
        }
        if (a.sum) {
            for (int i = 0; i < kSize; ++i) value[v][i] = rounded<T>(value[v][i]);
            store<T, kAligned>(a.sum + at, column, a.dim, value[v]);
        }
        for (int i = 0; i < kSize; ++i) total += column + i < a.dim ? value[v][i] : 0.0f;
    }

    const float mean = a.mean ? sum_of_row<kBlock>(total, sums) / a.dim : 0.0f;
    float squares = 0.0f;
    for (int v = 0; v < kVectors; ++v) {
        const int64_t column = (int64_t{v} * threads + thread) * kSize;
        for (int i = 0; i < kSize; ++i) {
            value[v][i] -= mean;
            squares += column + i < a.dim ? value[v][i] * value[v][i] : 0.0f;
        }
    }
    const float rstd = 1.0f / sqrtf(sum_of_row<kBlock>(squares, sums) / a.dim + a.eps);
    if (thread == 0) {
        if (a.mean) a.mean[row] = mean;
        a.rstd[row] = rstd;
    }

    for (int v = 0; v < kVectors; ++v) {
        const int64_t column = (int64_t{v} * threads + thread) * kSize;
        float parameter[kSize];
        for (int i = 0; i < kSize; ++i) value[v][i] *= rstd;
        if (a.weight) {
            load_parameter<T>(a.weight, column, a.dim, parameter);
            for (int i = 0; i < kSize; ++i) value[v][i] *= parameter[i];
        }
        if (a.bias) {
            load_parameter<T>(a.bias, column, a.dim, parameter);
            for (int i = 0; i < kSize; ++i) value[v][i] += parameter[i];
        }
        store<T, kAligned>(a.out + at, column, a.dim, value[v]);
    }
}

}  // namespace

int64_t norm_most_features() { return kMostFeatures; }

void norm_forward(const NormForward& n) {
    const int size = size_of(n.dtype);
    const RowPlan plan = plan_rows<2>(n.dim, size);
    const bool whole =
        n.dim * size % 16 == 0 && aligned(n.x) && aligned(n.residual) && aligned(n.out) && aligned(n.sum);
    with_variant<2>(n.dtype, n.weight_dtype, plan, whole,
                    [&](auto t, auto w, auto vectors, auto block, auto all_aligned) {
                        using T = decltype(t);
                        using W = decltype(w);
                        auto rows = [](const void* p) { return static_cast<const T*>(p); };
                        auto outputs = [](void* p) { return static_cast<T*>(p); };
                        const Arguments<T, W> arguments{rows(n.x),
                                                        rows(n.residual),
                                                        static_cast<const W*>(n.weight),
                                                        static_cast<const W*>(n.bias),
                                                        outputs(n.out),
                                                        outputs(n.sum),
                                                        n.mean,
                                                        n.rstd,
                                                        n.rows,
                                                        n.dim,
                                                        n.eps,
                                                        dropout_of(n.seed, n.dropout_p)};
                        const int64_t of_block = plan.rows_of_block();
                        launch(norm_forward<T, W, vectors.value, block.value, all_aligned.value>,
                               (n.rows + of_block - 1) / of_block, plan.threads, n.stream, arguments);
                    });
}

}  // namespace fastattn::cuda
