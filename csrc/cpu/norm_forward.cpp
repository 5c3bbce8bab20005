// Layer norm (Ba, Kiros and Hinton, 2016) and RMS norm (Zhang and Sennrich, 2019) of residual + dropout(x), forward.
//
//     sum  = residual + dropout(x)                         rounded to x's dtype: what the backward will read
//     out  = (sum - mean) * rstd * weight + bias           rstd = 1 / sqrt(mean of (sum - mean)^2 + eps)
//     out  = sum * rstd * weight                           rstd = 1 / sqrt(mean of sum^2 + eps)             (RMS norm)
//
// Tile: one row, or a few short ones, read from memory once. The first pass leaves it in float32 in a buffer that stays
// in the first-level cache (a float32 row is its own buffer, or its sum is); dim above 6144 spills into the second one.
//
//     row ──► sum, Σ sum ──► Σ (sum - mean), Σ (sum - mean)² ──► out           layer norm: the mean is corrected by the
//     row ──► sum, Σ sum² ─────────────────────────────────────► out           second pass's first sum
//
// Sums and outputs beyond the caches are streamed past them (row.h).
//
// Must move, in elements a row: x, residual, sum, out = 4 dim (2 dim without residual and dropout), and 2 floats of
// statistics. About 8 dim flops. So memory bounds it wherever the rows do not lie in cache, and there it runs at nine
// tenths of a copy's rate or more. In cache the passes bound it, five or six loads a vector where a copy has one: three
// quarters of a copy's rate in float32, a third in bfloat16, which is also converted. Beside the passes, a row of a few
// hundred elements would wait as long again for its sums, its root and its next row: so short rows go through a pass in
// blocks, and the last pass asks for the next rows. Larger blocks keep memory idle while they are computed.
#include <type_traits>

#include "integers.h"
#include "norm.h"

namespace fastattn::FASTATTN_ISA {
namespace norm {
namespace {

// Rounded once: every element of the row carries its error.
inline float reciprocal_root(float x) { return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(x))); }

// Rows of a block.
constexpr int64_t kMostRows = 8;
constexpr int64_t kBlockElements = 1024;  // a pass over more leaves memory idle too long

template <class T, Norm kNorm, bool kDropout>
class Forward {
  public:
    explicit Forward(const NormForward& args)
        : args_(args),
          dim_(args.dim),
          block_rows_(larger(smaller(kBlockElements / larger(dim_, 1), kMostRows), 1)),
          dropout_(args.dropout_p, args.seed),
          affine_(2 * dim_),
          weight_(as_float(args.weight, dim_, 1.0f, affine_.get())),
          bias_(kNorm == Norm::kLayer ? as_float(args.bias, dim_, 0.0f, affine_.get() + dim_) : nullptr),
          streams_(worth_streaming(args.out, dim_) && (!args.sum.present() || worth_streaming(args.sum, dim_))) {}

    void run() const {
        constexpr int64_t kTaskElements = 1 << 15;  // some microseconds of work
        const int64_t task_rows = larger(kTaskElements / larger(dim_, 1), 1);
        const int64_t tasks = ceil_div(args_.rows, task_rows);
        const Scratch<float> buffers(buffered() ? block_rows_ * dim_ : 0, thread_count(tasks));
        parallel_for(tasks, [&](int64_t task, int thread) {
            const int64_t end = smaller((task + 1) * task_rows, args_.rows);
            for (int64_t row = task * task_rows; row < end; row += block_rows_) {
                normalise(row, smaller(block_rows_, end - row), buffers.of(thread));
            }
            if (streams_) finish_streams();
        });
    }

  private:
    // Whether a row's sum needs a place of its own in the first-level cache.
    bool buffered() const { return sizeof(T) < sizeof(float) || (streams_ && args_.sum.present()); }

    void normalise(int64_t first, int64_t rows, float* buffer) const {
        const float count = static_cast<float>(dim_);
        float *mean = args_.mean.as<float>() + first, *rstd = args_.rstd.as<float>() + first;
        const float* source[kMostRows];
        float sums[kMostRows], squares[kMostRows];
        for (int64_t r = 0; r < rows; ++r) sums[r] = read(first + r, buffer + r * dim_, source[r]);
        if (kNorm == Norm::kLayer) {
            for (int64_t r = 0; r < rows; ++r) {
                const float* from = source[r];
                const float rough = mean[r] = sums[r] / count;
                const auto centred = row_sums<2>(dim_, [&](int64_t i, auto lanes, Vec* sums) FASTATTN_BODY {
                    const Vec value = inside(load(from + i, lanes) - rough, lanes);
                    sums[0] += value;
                    sums[1] += value * value;
                });
                sums[r] = centred.value[0], squares[r] = centred.value[1];
            }
            for (int64_t r = 0; r < rows; ++r) {
                const float correction = sums[r] / count, variance = squares[r] / count - correction * correction;
                mean[r] += correction;
                // A negative variance is rounding; NaN passes.
                rstd[r] = reciprocal_root((variance < 0.0f ? 0.0f : variance) + args_.eps);
            }
        } else {
            for (int64_t r = 0; r < rows; ++r) rstd[r] = reciprocal_root(sums[r] / count + args_.eps);
        }
        if (streams_) {
            write(first, rows, source, std::true_type{});
        } else {
            write(first, rows, source, std::false_type{});
        }
    }

    template <class Streams>
    void write(int64_t first, int64_t rows, const float* const* source, Streams streams) const {
        const float *const weight = weight_, *const bias = bias_;
        for (int64_t r = 0; r < rows; ++r) {
            T* out = args_.out.as<T>() + (first + r) * dim_;
            const float* from = source[r];
            const float centre = kNorm == Norm::kLayer ? args_.mean.as<float>()[first + r] : 0.0f;
            const float scale = args_.rstd.as<float>()[first + r];
            // The next rows come while these are computed.
            const T* next = args_.x.as<T>() + (first + rows + r) * dim_;
            const T* also = args_.residual.present() ? args_.residual.as<T>() + (first + rows + r) * dim_ : next;
            each_vector(0, dim_, [=](int64_t i, int k, auto lanes) FASTATTN_BODY {
                if (k * kLanes * sizeof(T) % 64 == 0) {
                    __builtin_prefetch(next + i);
                    __builtin_prefetch(also + i);
                }
                const Vec value = load(from + i, lanes), w = load(weight + i, lanes);
                if (kNorm == Norm::kLayer) {
                    put(out + i, (value - centre) * scale * w + load(bias + i, lanes), streams, lanes);
                } else {
                    put(out + i, value * scale * w, streams, lanes);
                }
            });
        }
    }

    // Writes the row's sum, leaves it in float32 at `source`, and returns the sum of its values or, for RMS norm, of
    // their squares.
    float read(int64_t row, float* buffer, const float*& source) const {
        const T* x = args_.x.as<T>() + row * dim_;
        const T* residual = args_.residual.present() ? args_.residual.as<T>() + row * dim_ : nullptr;
        T* sum = args_.sum.present() ? args_.sum.as<T>() + row * dim_ : nullptr;
        const RowKey key = kDropout ? dropout_.row(static_cast<uint64_t>(row)) : RowKey{};
        source = buffer;
        if constexpr (std::is_same_v<T, float>) {
            if (!buffered()) source = sum ? sum : x;
        }
        const bool keep_row = source == buffer;
        auto pass = [&](auto add, auto write, auto streams) {
            return row_sums<1>(dim_,
                               [&](int64_t i, auto lanes, Vec* sums) FASTATTN_BODY {
                                   Vec value = load(x + i, lanes);
                                   if (kDropout) {
                                       const KeepVec keep = dropout_.keep_columns(key, static_cast<uint32_t>(i));
                                       value = select(keep, value * dropout_.scale(), Vec{});
                                   }
                                   if (add) value += load(residual + i, lanes);
                                   if constexpr (write.value) {
                                       value = rounded<T>(value);
                                       put(sum + i, value, streams, lanes);
                                   }
                                   if (keep_row) store(buffer + i, value, lanes);
                                   sums[0] += kNorm == Norm::kLayer ? value : value * value;
                               })
                .value[0];
        };
        using Yes = std::true_type;
        using No = std::false_type;
        if (!sum) return pass(No{}, No{}, No{});
        if (streams_) return residual ? pass(Yes{}, Yes{}, Yes{}) : pass(No{}, Yes{}, Yes{});
        return residual ? pass(Yes{}, Yes{}, No{}) : pass(No{}, Yes{}, No{});
    }

    const NormForward& args_;
    const int64_t dim_, block_rows_;
    const Dropout dropout_;
    const Scratch<float> affine_;
    const float *const weight_, *const bias_;
    const bool streams_;
};

}  // namespace
}  // namespace norm

void norm_forward(const NormForward& args) {
    norm::dispatch(args.x.dtype, args.norm, [&](auto* element, auto tag) {
        using T = std::remove_pointer_t<decltype(element)>;
        if (args.dropout_p > 0.0) {
            norm::Forward<T, tag.value, true>(args).run();
        } else {
            norm::Forward<T, tag.value, false>(args).run();
        }
    });
}

}  // namespace fastattn::FASTATTN_ISA
