// Rotary position embedding (Su et al., 2021) of queries and keys.
//
//     out = x * cos + rotate(x) * sin        rotate = (-x2, x1) of the halves x1, x2, or of neighbours where interleaved
//
// The backward turns the other way: with angles that stand twice, as they do, the same with -sin; in general
//
//     grad1 = out1 * cos1 + out2 * sin2        grad2 = out2 * cos2 - out1 * sin1
//
// Tile: a few tokens. Their angles go into a table of the first-level cache, in float32 and with rotate's signs, and all
// heads of queries and keys pass by it:
//
//     cos, sin (tokens, rotary_dim) ──► table ──► heads (dim) … ──► out
//
// Must move: queries and keys in and out, 2 (heads + kv_heads) dim elements a token, with 3 operations an element: memory
// bounds it.
#include <string.h>

#include "kernels.h"
#include "matrix.h"
#include "rotary.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kTokens = 16;             // of a tile
constexpr int64_t kWorthThreads = 1 << 15;  // elements

template <class T, bool kInterleaved>
class Rotary {
  public:
    explicit Rotary(const RotaryEmbedding& args)
        : args_(args), rotary_(args.cos.size[2]), half_(rotary_ / 2), dim_(args.q.size[3]) {}

    void run() const {
        const int64_t batch = args_.q.size[0], seq = args_.q.size[2], blocks = ceil_div(seq, kTokens);
        const int64_t tasks = batch * blocks;
        const int64_t elements = args_.q.numel() + args_.k.numel();
        const Scratch<float> tables(3 * kTokens * rotary_, thread_count(tasks));
        gemm_detail::for_tasks(elements > kWorthThreads, tasks, [&](int64_t task, int thread) {
            const int64_t b = task / blocks, first = task % blocks * kTokens;
            const int64_t count = smaller(kTokens, seq - first);
            const float* cos[kTokens];
            float *space = tables.of(thread), *sin = space + 2 * kTokens * rotary_;
            for (int64_t t = 0; t < count; ++t) {
                cos[t] = as_float(angles_of(args_.cos, b, first + t), rotary_, 0.0f, space + t * rotary_);
                const Tensor sines = angles_of(args_.sin, b, first + t);
                const float* converted = as_float(sines, rotary_, 0.0f, space + (kTokens + t) * rotary_);
                sign_sines<kInterleaved>(converted, rotary_, args_.inverse, sin + t * rotary_);
            }
            const auto turn_in = [&](const Tensor& x, const Tensor& out) {
                if (streams(out)) {
                    turn(x, out, b, first, count, cos, sin, std::true_type{});
                } else {
                    turn(x, out, b, first, count, cos, sin, std::false_type{});
                }
            };
            turn_in(args_.q, args_.out_q);
            turn_in(args_.k, args_.out_k);
            finish_streams();
        });
    }

  private:
    // Whether the rows are beyond the caches (row.h), and all their vectors whole ones.
    bool streams(const Tensor& out) const {
        bool whole = dim_ == rotary_ && half_ % kLanes == 0;
        for (int i = 0; i < 3; ++i) whole &= out.stride[i] % dim_ == 0;
        return whole && worth_streaming(out, dim_);
    }

    // In the order in which the rows lie in memory.
    template <class Streams>
    void turn(const Tensor& x, const Tensor& out, int64_t b, int64_t first, int64_t count, const float* const* cos,
              const float* sin, Streams streams) const {
        const int64_t heads = x.size[1];
        const bool tokens_apart = x.stride[2] >= x.stride[1];
        for (int64_t i = 0; i < heads * count; ++i) {
            const int64_t h = tokens_apart ? i % heads : i / count, t = tokens_apart ? i / heads : i % count;
            const T* from = x.as<T>() + b * x.stride[0] + h * x.stride[1] + (first + t) * x.stride[2];
            T* to = out.as<T>() + b * out.stride[0] + h * out.stride[1] + (first + t) * out.stride[2];
            turn_row<kInterleaved>(from, cos[t], sin + t * rotary_, rotary_, to, streams);
            if (dim_ > rotary_) memcpy(to + rotary_, from + rotary_, static_cast<size_t>(dim_ - rotary_) * sizeof(T));
        }
    }

    const RotaryEmbedding& args_;
    const int64_t rotary_, half_, dim_;
};

}  // namespace

void rotary_embedding(const RotaryEmbedding& args) {
    if (args.q.numel() + args.k.numel() == 0) return;
    with_dtype(args.q.dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        if (args.interleaved) {
            Rotary<T, true>(args).run();
        } else {
            Rotary<T, false>(args).run();
        }
    });
}

}  // namespace fastattn::FASTATTN_ISA
