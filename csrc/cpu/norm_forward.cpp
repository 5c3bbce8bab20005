// Layer norm (Ba, Kiros and Hinton, 2016) and RMS norm (Zhang and Sennrich, 2019) of residual + dropout(x), forward.
//
//     sum  = residual + dropout(x)                         rounded to x's dtype: what the backward will read
//     out  = (sum - mean) * rstd * weight + bias           rstd = 1 / sqrt(mean of (sum - mean)^2 + eps)
//     out  = sum * rstd * weight                           rstd = 1 / sqrt(mean of sum^2 + eps)             (RMS norm)
//
// Tile: one row, read from memory once. The first pass leaves it in float32 in a buffer that stays in the first-level
// cache (a float32 row that needs no sum is its own buffer); dim above 6144 spills into the second level.
//
//     row ──► sum, Σ sum ──► Σ (sum - mean), Σ (sum - mean)² ──► out           layer norm: the mean is corrected by the
//     row ──► sum, Σ sum² ─────────────────────────────────────► out           second pass's first sum
//
// Must move, in elements a row: x, residual, sum, out = 4 dim (2 dim without residual and dropout), and 2 floats of
// statistics. About 8 dim flops. So memory bounds it wherever the rows do not lie in cache.
#include <type_traits>

#include "norm.h"

namespace fastattn::FASTATTN_ISA {
namespace norm {
namespace {

// Rounded once: every element of the row carries its error.
inline float reciprocal_root(float x) { return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(x))); }

template <class T, Norm kNorm, bool kDropout>
void forward_row(const NormForward& args, const Dropout& dropout, const float* weight, const float* bias, float* buffer,
                 int64_t row) {
    const int64_t dim = args.dim;
    const T* x = args.x.as<T>() + row * dim;
    const T* residual = args.residual.present() ? args.residual.as<T>() + row * dim : nullptr;
    T* sum = args.sum.present() ? args.sum.as<T>() + row * dim : nullptr;
    const RowKey key = kDropout ? dropout.row(static_cast<uint64_t>(row)) : RowKey{};
    const float first = row_sums<1>(dim, [&](int64_t i, auto lanes, Vec* sums) FASTATTN_BODY {
                            Vec value = load(x + i, lanes);
                            if (kDropout) {
                                const KeepVec keep = dropout.keep_columns(key, static_cast<uint32_t>(i));
                                value = select(keep, value * dropout.scale(), Vec{});
                            }
                            if (residual) value += load(residual + i, lanes);
                            if (sum) {
                                store(sum + i, value, lanes);
                                if (sizeof(T) < sizeof(float)) value = inside(rounded<T>(value), lanes);
                            }
                            if (sizeof(T) < sizeof(float)) store(buffer + i, value, lanes);
                            sums[0] += kNorm == Norm::kLayer ? value : value * value;
                        }).value[0];
    // The row in float32.
    const float* source = buffer;
    if constexpr (std::is_same_v<T, float>) source = sum ? sum : x;

    T* out = args.out.as<T>() + row * dim;
    const float count = static_cast<float>(dim);
    if (kNorm == Norm::kLayer) {
        const float rough = first / count;
        const auto centred = row_sums<2>(dim, [&](int64_t i, auto lanes, Vec* sums) FASTATTN_BODY {
            const Vec value = inside(load(source + i, lanes) - rough, lanes);
            sums[0] += value;
            sums[1] += value * value;
        });
        const float correction = centred.value[0] / count;
        const float mean = rough + correction;
        const float variance = centred.value[1] / count - correction * correction;
        // A negative variance is rounding; NaN passes.
        const float rstd = reciprocal_root((variance < 0.0f ? 0.0f : variance) + args.eps);
        args.mean.as<float>()[row] = mean;
        args.rstd.as<float>()[row] = rstd;
        each_vector(0, dim, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
            const Vec normed = (load(source + i, lanes) - mean) * rstd;
            store(out + i, normed * load(weight + i, lanes) + load(bias + i, lanes), lanes);
        });
    } else {
        const float rstd = reciprocal_root(first / count + args.eps);
        args.rstd.as<float>()[row] = rstd;
        each_vector(0, dim, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
            store(out + i, load(source + i, lanes) * rstd * load(weight + i, lanes), lanes);
        });
    }
}

template <class T, Norm kNorm, bool kDropout>
void forward(const NormForward& args) {
    const int64_t dim = args.dim;
    const Scratch<float> affine(2 * dim);
    const float* weight = as_float(args.weight, dim, 1.0f, affine.get());
    const float* bias = kNorm == Norm::kLayer ? as_float(args.bias, dim, 0.0f, affine.get() + dim) : nullptr;
    const Dropout dropout(args.dropout_p, args.seed);
    constexpr int64_t kTaskElements = 1 << 15;  // some microseconds of work
    const int64_t task_rows = dim < kTaskElements ? kTaskElements / (dim ? dim : 1) : 1;
    const int64_t tasks = (args.rows + task_rows - 1) / task_rows;
    const Scratch<float> buffers(sizeof(T) < sizeof(float) ? dim : 0, thread_count(tasks));
    parallel_for(tasks, [&](int64_t task, int thread) {
        const int64_t end = (task + 1) * task_rows;
        for (int64_t row = task * task_rows; row < end && row < args.rows; ++row) {
            forward_row<T, kNorm, kDropout>(args, dropout, weight, bias, buffers.of(thread), row);
        }
    });
}

}  // namespace
}  // namespace norm

void norm_forward(const NormForward& args) {
    norm::dispatch(args.x.dtype, args.norm, [&](auto* element, auto tag) {
        using T = std::remove_pointer_t<decltype(element)>;
        if (args.dropout_p > 0.0) {
            norm::forward<T, tag.value, true>(args);
        } else {
            norm::forward<T, tag.value, false>(args);
        }
    });
}

}  // namespace fastattn::FASTATTN_ISA
