// Residual add, dropout and layer norm or RMS norm, backward. With n = (sum - mean) * rstd and g = grad_out * weight,
//
//     grad_residual = rstd * (g - mean(g) - n * mean(g * n)) + grad_sum        (RMS norm: without mean(g))
//     grad_x        = dropout mask * grad_residual
//     grad_weight   = sum over rows of grad_out * n,    grad_bias = sum over rows of grad_out
//
// One pass over 3 to 5 tensors. A fixed number of programs (blocks, or warps where a warp takes a row) go through the rows
// with a stride; each sums its rows' grad_weight and grad_bias in registers and writes them once, (programs, dim) float32,
// to be summed afterwards. No atomics: the bits depend on the shape alone.
#include "norm_rows.h"

namespace fastattn::cuda {
namespace {

template <class T, class W>
struct Arguments {
    const T *grad_out, *grad_sum, *sum;
    const W* weight;
    const float *mean, *rstd;
    T *grad_residual, *grad_x;
    float *partial_weight, *partial_bias;
    int64_t rows, dim, programs;
    Dropout dropout;
};

template <class T, class W, int kVectors, bool kBlock, bool kAligned>
__global__ void __launch_bounds__(kBlock ? kMostThreads : kWarp * kWarpsOfBlock) norm_backward(Arguments<T, W> a) {
    constexpr int kSize = Vector<T>::kSize;
    __shared__ float sums[kWarp];
    const int threads = kBlock ? blockDim.x : kWarp;
    const int thread = threadIdx.x % threads;
    const int64_t program = kBlock ? blockIdx.x : int64_t{blockIdx.x} * kWarpsOfBlock + threadIdx.x / kWarp;
    if (program >= a.programs) return;
    float sum_weight[kVectors][kSize] = {}, sum_bias[kVectors][kSize] = {};

    for (int64_t row = program; row < a.rows; row += a.programs) {
        const int64_t at = row * a.dim;
        const float mean = a.mean ? a.mean[row] : 0.0f, rstd = a.rstd[row];
        float grad[kVectors][kSize], normed[kVectors][kSize];
        float along_grad = 0.0f, along_normed = 0.0f;
        for (int v = 0; v < kVectors; ++v) {
            const int64_t column = (int64_t{v} * threads + thread) * kSize;
            load<T, kAligned>(a.grad_out + at, column, a.dim, grad[v]);
            load<T, kAligned>(a.sum + at, column, a.dim, normed[v]);
            float factor[kSize];
            if (a.weight) load_parameter<T>(a.weight, column, a.dim, factor);
            for (int i = 0; i < kSize; ++i) {
                normed[v][i] = column + i < a.dim ? (normed[v][i] - mean) * rstd : 0.0f;
                sum_weight[v][i] += grad[v][i] * normed[v][i];
                sum_bias[v][i] += grad[v][i];
                if (a.weight) grad[v][i] *= factor[i];
                along_grad += grad[v][i];
                along_normed += grad[v][i] * normed[v][i];
            }
        }
        along_normed = sum_of_row<kBlock>(along_normed, sums) / a.dim;
        along_grad = a.mean ? sum_of_row<kBlock>(along_grad, sums) / a.dim : 0.0f;

        const uint64_t key = a.dropout.seed ? a.dropout.row_key(row) : 0;
        for (int v = 0; v < kVectors; ++v) {
            const int64_t column = (int64_t{v} * threads + thread) * kSize;
            for (int i = 0; i < kSize; ++i) grad[v][i] = (grad[v][i] - normed[v][i] * along_normed - along_grad) * rstd;
            if (a.grad_sum) {
                float received[kSize];
                load<T, kAligned>(a.grad_sum + at, column, a.dim, received);
                for (int i = 0; i < kSize; ++i) grad[v][i] += received[i];
            }
            store<T, kAligned>(a.grad_residual + at, column, a.dim, grad[v]);
            if (a.grad_x) {
                for (int i = 0; i < kSize; ++i) grad[v][i] = a.dropout.apply(key, column + i, grad[v][i]);
                store<T, kAligned>(a.grad_x + at, column, a.dim, grad[v]);
            }
        }
    }

    for (int v = 0; v < kVectors; ++v) {
        const int64_t column = (int64_t{v} * threads + thread) * kSize;
        for (int i = 0; i < kSize; ++i) {
            if (column + i >= a.dim) continue;
            if (a.partial_weight) a.partial_weight[program * a.dim + column + i] = sum_weight[v][i];
            if (a.partial_bias) a.partial_bias[program * a.dim + column + i] = sum_bias[v][i];
        }
    }
}

}  // namespace

// More vectors a thread would not leave registers for the sums beside the row.
static RowPlan plan_of(DType dtype, int64_t dim) { return plan_rows<1>(dim, size_of(dtype)); }

int64_t norm_backward_programs(DType dtype, int64_t rows, int64_t dim, int64_t multiprocessors) {
    const RowPlan plan = plan_of(dtype, dim);
    const int64_t blocks = multiprocessors * (2048 / plan.threads), most = blocks * plan.rows_of_block();
    return rows < most ? rows : most;
}

void norm_backward(const NormBackward& n) {
    const int size = size_of(n.dtype);
    const RowPlan plan = plan_of(n.dtype, n.dim);
    const bool whole = n.dim * size % 16 == 0 && aligned(n.grad_out) && aligned(n.grad_sum) && aligned(n.sum) &&
                       aligned(n.grad_residual) && aligned(n.grad_x);
    with_variant<1>(n.dtype, n.weight_dtype, plan, whole,
                    [&](auto t, auto w, auto vectors, auto block, auto all_aligned) {
                        using T = decltype(t);
                        using W = decltype(w);
                        auto rows = [](const void* p) { return static_cast<const T*>(p); };
                        auto outputs = [](void* p) { return static_cast<T*>(p); };
                        const Arguments<T, W> arguments{rows(n.grad_out),
                                                        rows(n.grad_sum),
                                                        rows(n.sum),
                                                        static_cast<const W*>(n.weight),
                                                        n.mean,
                                                        n.rstd,
                                                        outputs(n.grad_residual),
                                                        outputs(n.grad_x),
                                                        n.partial_weight,
                                                        n.partial_bias,
                                                        n.rows,
                                                        n.dim,
                                                        n.programs,
                                                        dropout_of(n.seed, n.dropout_p)};
                        const int64_t of_block = plan.rows_of_block();
                        launch(norm_backward<T, W, vectors.value, block.value, all_aligned.value>,
                               (n.programs + of_block - 1) / of_block, plan.threads, n.stream, arguments);
                    });
}

}  // namespace fastattn::cuda
