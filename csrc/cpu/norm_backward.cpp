// Layer norm and RMS norm of sum = residual + dropout(x), backward.
//
//     normed      = (sum - mean) * rstd                               RMS norm: sum * rstd
//     g           = grad_out * weight
//     d sum       = rstd * (g - mean(g) - normed * mean(g * normed)) + grad_sum        RMS norm: without mean(g)
//     grad_residual = d sum,    grad_x = dropout mask * d sum
//     grad_weight = Σ over rows of grad_out * normed,    grad_bias = Σ over rows of grad_out
//
// Tile: one row, read from memory once; the second pass finds it and g, in float32, in the first-level cache. The sums
// over rows stay in cache, too: the rows are cut into parts by the shape alone (never by the number of threads), each
// part adds its rows to sums of its own, in blocks of about the square root of their number for accuracy, and the parts
// are added in order at the end.
//
//     rows of a part ──► block sums (dim) ──► part sums (dim) ──► grad_weight, grad_bias
//
// Must move, in elements a row: grad_out, sum, d sum = 3 dim, and dim each for grad_sum and, with dropout, grad_x.
// About 12 dim flops. So memory bounds it wherever the rows do not lie in cache.
#include <type_traits>

#include "norm.h"

namespace fastattn::FASTATTN_ISA {
namespace norm {
namespace {

constexpr int64_t kMostParts = 64;
constexpr int64_t kPartElements = 1 << 15;

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

// to += from, and from = 0.
inline void flush(float* from, float* to, int64_t count) {
    each_vector(0, count, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
        store(to + i, load(to + i, lanes) + load(from + i, lanes), lanes);
        store(from + i, Vec{}, lanes);
    });
}

void write_gradient(const Tensor& gradient, const float* from, int64_t begin, int64_t end) {
    auto write = [&](auto* to) {
        each_vector(begin, end,
                    [&](int64_t i, int, auto lanes) FASTATTN_BODY { store(to + i, load(from + i, lanes), lanes); });
    };
    if (gradient.dtype == DType::kFloat32) write(gradient.as<float>());
    if (gradient.dtype == DType::kBFloat16) write(gradient.as<BFloat16>());
    if (gradient.dtype == DType::kFloat16) write(gradient.as<Half>());
}

template <class T, Norm kNorm, bool kDropout>
void backward(const NormBackward& args) {
    const int64_t dim = args.dim, rows = args.rows;
    const Scratch<float> affine(dim);
    const float* weight = as_float(args.weight, dim, 1.0f, affine.get());
    const Dropout dropout(args.dropout_p, args.seed);

    const int64_t least_rows = dim < kPartElements ? kPartElements / (dim ? dim : 1) : 1;
    const int64_t even_rows = (rows + kMostParts - 1) / kMostParts;
    const int64_t part_rows = even_rows > least_rows ? even_rows : least_rows;
    const int64_t parts = rows > 0 ? (rows + part_rows - 1) / part_rows : 1;
    int64_t block_rows = 16;
    while (block_rows * block_rows < part_rows) block_rows *= 2;
    // Of each part: sums for weight (dim), bias (dim), then the same of the block under way.
    const Scratch<float> sums(4 * dim, static_cast<int>(parts));
    const Scratch<float> g_rows(dim, thread_count(parts));
    parallel_for(parts, [&](int64_t part, int thread) {
        float* of_part = sums.of(static_cast<int>(part));
        float* of_block = of_part + 2 * dim;
        for (int64_t i = 0; i < 4 * dim; ++i) of_part[i] = 0.0f;
        const int64_t begin = part * part_rows, end = begin + part_rows < rows ? begin + part_rows : rows;
        for (int64_t row = begin; row < end; ++row) {
            backward_row<T, kNorm, kDropout>(args, dropout, weight, g_rows.of(thread), of_block, of_block + dim, row);
            if ((row - begin) % block_rows == block_rows - 1) flush(of_block, of_part, 2 * dim);
        }
        flush(of_block, of_part, 2 * dim);
    });

    constexpr int64_t kColumns = 512;
    parallel_for((dim + kColumns - 1) / kColumns, [&](int64_t task, int) {
        const int64_t begin = task * kColumns, end = begin + kColumns < dim ? begin + kColumns : dim;
        for (int64_t part = 1; part < parts; ++part) {
            flush(sums.of(static_cast<int>(part)) + begin, sums.get() + begin, end - begin);
            flush(sums.of(static_cast<int>(part)) + dim + begin, sums.get() + dim + begin, end - begin);
        }
        write_gradient(args.grad_weight, sums.get(), begin, end);
        write_gradient(args.grad_bias, sums.get() + dim, begin, end);
    });
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
