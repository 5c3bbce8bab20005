// Layer norm and RMS norm of sum = residual + dropout(x), backward.
//
//     normed      = (sum - mean) * rstd                               RMS norm: sum * rstd
//     g           = grad_out * weight
//     d sum       = rstd * (g - mean(g) - normed * mean(g * normed)) + grad_sum        RMS norm: without mean(g)
//     grad_residual = d sum,    grad_x = dropout mask * d sum
//     grad_weight = Σ over rows of grad_out * normed,    grad_bias = Σ over rows of grad_out
//
// Tile: one row, or a few short ones, read from memory once; the second pass finds grad_out and sum in the first-level
// cache and computes g anew. The sums over rows (column_sums.h) stay in cache, too. Gradients beyond the caches are
// streamed past them (row.h).
//
//     rows ──► Σ g, Σ g * normed ──► d sum, and to the sums over rows
//
// Must move, in elements a row: grad_out, sum, d sum = 3 dim, and dim each for grad_sum and, with dropout, grad_x.
// About 12 dim flops. So memory bounds it wherever the rows do not lie in cache; there it runs at three quarters of a
// copy's rate or more. In cache its nine loads and three stores a vector bound it, at half of a copy's rate in float32
// and a third in bfloat16. Rows side by side would share the sums' loads and stores, which wins in the second-level
// cache and loses beyond it: the machine prefetches no neighbours that are read side by side.
#include <type_traits>

#include "column_sums.h"
#include "norm.h"

namespace fastattn::FASTATTN_ISA {
namespace norm {
namespace {

// Rows that go through a pass together; as in norm_forward.cpp.
constexpr int64_t kMostRows = 4;
constexpr int64_t kBlockElements = 1024;

template <class T, Norm kNorm, bool kDropout>
class Backward {
    static constexpr bool kLayer = kNorm == Norm::kLayer;

  public:
    explicit Backward(const NormBackward& args)
        : args_(args),
          dim_(args.dim),
          dropout_(args.dropout_p, args.seed),
          affine_(dim_),
          weight_(as_float(args.weight, dim_, 1.0f, affine_.get())),
          streams_(worth_streaming(args.grad_residual, dim_) && (!kDropout || worth_streaming(args.grad_x, dim_))) {}

    void run() const {
        const ColumnSums sums(args_.rows, kLayer ? 2 * dim_ : dim_, dim_);  // for weight, for bias
        const int64_t group = dim_ * 4 <= kBlockElements ? kMostRows : dim_ * 2 <= kBlockElements ? 2 : 1;
        sums.add_row_groups(group, [&](int64_t row, int64_t count, int, float* to) { add_rows(row, count, to); });
        sums.write(args_.grad_weight);
        if (kLayer) sums.write(args_.grad_bias, dim_);
    }

  private:
    // A row's mean, rstd, mean(g) and mean(g * normed).
    struct Statistics {
        float mean, rstd, mean_g, mean_g_normed;
    };

    template <class Lanes>
    static FASTATTN_INLINE Vec normed(const T* source, const Statistics& row, Lanes lanes) {
        const Vec value = load(source, lanes);
        return kLayer ? inside((value - row.mean) * row.rstd, lanes) : value * row.rstd;
    }

    void add_rows(int64_t first, int64_t count, float* weight_sum) const {
        Statistics rows[kMostRows];
        for (int64_t r = 0; r < count; ++r) rows[r] = sums_of_row(first + r);
        for (int64_t r = 0; r < count; ++r) {
            rows[r].mean_g /= static_cast<float>(dim_);
            rows[r].mean_g_normed /= static_cast<float>(dim_);
        }
        if (streams_) {
            for (int64_t r = 0; r < count; ++r) write_row(first + r, rows[r], weight_sum, std::true_type{});
            finish_streams();
        } else {
            for (int64_t r = 0; r < count; ++r) write_row(first + r, rows[r], weight_sum, std::false_type{});
        }
    }

    // Its means yet to be divided.
    Statistics sums_of_row(int64_t r) const {
        const T *grad_out = args_.grad_out.as<T>() + r * dim_, *source = args_.sum.as<T>() + r * dim_;
        const float* weight = weight_;
        Statistics row = {kLayer ? args_.mean.as<float>()[r] : 0.0f, args_.rstd.as<float>()[r], 0.0f, 0.0f};
        const auto sums = row_sums<2>(dim_, [=](int64_t i, auto lanes, Vec* sums) FASTATTN_BODY {
            const Vec g = multiply_alone(load(grad_out + i, lanes), load(weight + i, lanes));
            if (kLayer) sums[0] += g;
            sums[1] += g * normed(source + i, row, lanes);
        });
        row.mean_g = sums.value[0], row.mean_g_normed = sums.value[1];
        return row;
    }

    template <class Streams>
    void write_row(int64_t r, const Statistics& row, float* weight_sum, Streams streams) const {
        const int64_t start = r * dim_;
        const T *grad_out = args_.grad_out.as<T>() + start, *source = args_.sum.as<T>() + start;
        const T* grad_sum = args_.grad_sum.present() ? args_.grad_sum.as<T>() + start : nullptr;
        T* grad_residual = args_.grad_residual.as<T>() + start;
        T* grad_x = kDropout ? args_.grad_x.as<T>() + start : nullptr;
        const float* weight = weight_;
        float* bias_sum = weight_sum + dim_;
        const RowKey key = kDropout ? dropout_.row(static_cast<uint64_t>(r)) : RowKey{};
        each_vector(0, dim_, [=](int64_t i, int, auto lanes) FASTATTN_BODY {
            const Vec grad = load(grad_out + i, lanes), value = normed(source + i, row, lanes);
            const Vec g = multiply_alone(grad, load(weight + i, lanes));
            store(weight_sum + i, load(weight_sum + i, lanes) + grad * value, lanes);
            if (kLayer) store(bias_sum + i, load(bias_sum + i, lanes) + grad, lanes);
            // Rounded alone, so that it has the same bits whichever way the rest is compiled.
            Vec result = multiply_alone(g - row.mean_g - value * row.mean_g_normed, splat(row.rstd));
            if (grad_sum) result += load(grad_sum + i, lanes);
            put(grad_residual + i, result, streams, lanes);
            if (kDropout) {
                const KeepVec keep = dropout_.keep_columns(key, static_cast<uint32_t>(i));
                put(grad_x + i, select(keep, result * dropout_.scale(), Vec{}), streams, lanes);
            }
        });
    }

    const NormBackward& args_;
    const int64_t dim_;
    const Dropout dropout_;
    const Scratch<float> affine_;
    const float* const weight_;
    const bool streams_;
};

}  // namespace
}  // namespace norm

void norm_backward(const NormBackward& args) {
    norm::dispatch(args.sum.dtype, args.norm, [&](auto* element, auto tag) {
        using T = std::remove_pointer_t<decltype(element)>;
        if (args.dropout_p > 0.0) {
            norm::Backward<T, tag.value, true>(args).run();
        } else {
            norm::Backward<T, tag.value, false>(args).run();
        }
    });
}

}  // namespace fastattn::FASTATTN_ISA
