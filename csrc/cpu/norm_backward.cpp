// Layer norm and RMS norm of sum = residual + dropout(x), backward.
//
//     normed      = (sum - mean) * rstd                               RMS norm: sum * rstd
//     g           = grad_out * weight
//     d sum       = rstd * (g - mean(g) - normed * mean(g * normed)) + grad_sum        RMS norm: without mean(g)
//     grad_residual = d sum,    grad_x = dropout mask * d sum
//     grad_weight = Σ over rows of grad_out * normed,    grad_bias = Σ over rows of grad_out
//
// Tile: one row, read from memory once; the second pass finds it and g, in float32, in the first-level cache. The sums
// over rows (column_sums.h) stay in cache, too.
//
// Must move, in elements a row: grad_out, sum, d sum = 3 dim, and dim each for grad_sum and, with dropout, grad_x.
// About 12 dim flops. So memory bounds it wherever the rows do not lie in cache.
#include <type_traits>

#include "column_sums.h"
#include "norm.h"

namespace fastattn::FASTATTN_ISA {
namespace norm {
namespace {

template <class T, Norm kNorm, bool kDropout>
void backward_row(const NormBackward& args, const Dropout& dropout, const float* weight, float* g_row,
                  float* weight_sum, float* bias_sum, int64_t row) {
    const int64_t dim = args.dim, start = row * dim;
    const T* grad_out = args.grad_out.as<T>() + start;
    const T* source = args.sum.as<T>() + start;
    const float mean = kNorm == Norm::kLayer ? args.mean.as<float>()[row] : 0.0f;
    const float rstd = args.rstd.as<float>()[row];
    auto normed_at = [&](int64_t i, auto lanes) FASTATTN_BODY {
        const Vec value = load(source + i, lanes);
        return kNorm == Norm::kLayer ? inside((value - mean) * rstd, lanes) : value * rstd;
    };

    const auto sums = row_sums<2>(dim, [&](int64_t i, auto lanes, Vec* sums) FASTATTN_BODY {
        const Vec grad = load(grad_out + i, lanes), normed = normed_at(i, lanes);
        const Vec g = grad * load(weight + i, lanes);
        store(g_row + i, g, lanes);
        if (kNorm == Norm::kLayer) sums[0] += g;
        sums[1] += g * normed;
        store(weight_sum + i, load(weight_sum + i, lanes) + grad * normed, lanes);
        if (kNorm == Norm::kLayer) store(bias_sum + i, load(bias_sum + i, lanes) + grad, lanes);
    });
    const float mean_g = kNorm == Norm::kLayer ? sums.value[0] / static_cast<float>(dim) : 0.0f;
    const float mean_g_normed = sums.value[1] / static_cast<float>(dim);

    const T* grad_sum = args.grad_sum.present() ? args.grad_sum.as<T>() + start : nullptr;
    T* grad_residual = args.grad_residual.as<T>() + start;
    T* grad_x = kDropout ? args.grad_x.as<T>() + start : nullptr;
    const RowKey key = kDropout ? dropout.row(static_cast<uint64_t>(row)) : RowKey{};
    each_vector(0, dim, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
        Vec grad = (load(g_row + i, lanes) - mean_g - normed_at(i, lanes) * mean_g_normed) * rstd;
        if (grad_sum) grad += load(grad_sum + i, lanes);
        store(grad_residual + i, grad, lanes);
        if (kDropout) {
            const KeepVec keep = dropout.keep_columns(key, static_cast<uint32_t>(i));
            store(grad_x + i, select(keep, grad * dropout.scale(), Vec{}), lanes);
        }
    });
}

template <class T, Norm kNorm, bool kDropout>
void backward(const NormBackward& args) {
    const int64_t dim = args.dim, rows = args.rows;
    const Scratch<float> affine(dim);
    const float* weight = as_float(args.weight, dim, 1.0f, affine.get());
    const Dropout dropout(args.dropout_p, args.seed);

    const ColumnSums sums(rows, 2 * dim, dim);  // for weight, for bias
    const Scratch<float> g_rows(dim, thread_count(sums.parts()));
    sums.add_rows([&](int64_t row, int thread, float* to) {
        backward_row<T, kNorm, kDropout>(args, dropout, weight, g_rows.of(thread), to, to + dim, row);
    });
    sums.write(args.grad_weight);
    sums.write(args.grad_bias, dim);
}

}  // namespace
}  // namespace norm

void norm_backward(const NormBackward& args) {
    norm::dispatch(args.sum.dtype, args.norm, [&](auto* element, auto tag) {
        using T = std::remove_pointer_t<decltype(element)>;
        if (args.dropout_p > 0.0) {
            norm::backward<T, tag.value, true>(args);
        } else {
            norm::backward<T, tag.value, false>(args);
        }
    });
}

}  // namespace fastattn::FASTATTN_ISA
