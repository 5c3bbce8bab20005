// What happens between the products of attention's backward: from the products of a block of queries and keys,
// x = query . key^T and y = grad_out . value^T, to what the other three products take.
//
//     s = score(x);   p = exp(s - lse);   w = dropout(p)                     w: weights, for value's gradient
//     g = w * y - p * delta                                                  g: gradient of s, and of a floating mask
//     u = g * (1 - tanh^2)  with a soft cap, else g                          u: gradient of scale * x
//
// delta = (sum over value_dim of grad_out * out) - grad_lse: with it the row's sum of g is what lse contributes. x and
// y are float32 and become w and u in place; where the products take pairs of bfloat16, w and u are rounded to those, u
// twice: pairs of queries (keys' and values' gradients add over queries) and pairs of keys (queries' gradients).
#pragma once

#include "attention_mask_gradient.h"
#include "attention_operands.h"
#include "score.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kQueryRows = 96;                   // of a block; a multiple of every kTileRows
constexpr int64_t kKeys = 192;                       // of a block; a multiple of every kTileRows and kTileColumns
constexpr int64_t kStride = kKeys + 16;              // of a block's rows: an odd number of cache lines
constexpr int64_t kStrips = kQueryRows / kTileRows;  // rows of register tiles

// Queries i0 … i0 + rows - 1 of head h against keys j0 … j0 + count - 1.
struct Block {
    int64_t b, h, i0, rows, j0, count;
    Sequence seq;
    KeyRange visible[kStrips];   // the keys, from j0 on, that a row of tiles may see between its queries
    KeyRange computed[kStrips];  // the same in whole tiles
};

// A block's scratch. For float, `weights` and `grads` are x and y themselves.
template <class P>
struct BlockMemory {
    typedef typename Operand<P>::Weight Weight;
    float *x, *y;             // (kQueryRows, kStride)
    P *weights, *grads;       // (kQueryRows / steps, kStride): an element is `steps` queries of a key
    Weight* grad_rows;        // (kQueryRows, kStride): rows of keys
    float *slopes, *dropped;  // kStride
};

template <class P>
class ScoreGradient {
    static constexpr int64_t kSteps = Operand<P>::kSteps;

  public:
    explicit ScoreGradient(const AttentionBackward& args)
        : args_(args), score_(args), plain_(score_.plain() && !score_.drops() && !args.grad_mask.present()) {}

    // Whether a bool mask or the window leaves nothing of the block.
    bool nothing_visible(const Block& block) const {
        bool any = false;
        for (int64_t t = 0; t * kTileRows < block.rows; ++t) any |= block.visible[t].begin < block.visible[t].end;
        return !any ||
               (args_.mask.present() && score_.all_off(block.b, block.h, block.i0, block.rows, block.j0, block.count));
    }

    // `base` is lse in units of log 2; it and `delta` hold zeros beyond the last row.
    void run(const Block& block, const float* base, const float* delta, MaskSums* mask_sums,
             const BlockMemory<P>& m) const {
        for (int64_t r = 0; r < round_up(block.rows, kSteps); r += kSteps) {
            const KeyRange computed = block.computed[r / kTileRows];
            if (computed.begin >= computed.end) continue;
            if (!plain_) {
                for (int64_t i = r; i < r + kSteps; ++i) weigh_row(block, i, computed, base[i], delta[i], mask_sums, m);
                narrow_rows(r, computed, m);
                continue;
            }
            bool whole = true;
            for (int64_t i = r; i < r + kSteps; ++i) whole &= prepare_row(block, i, computed, m);
            if (whole) {
                weigh_rows<false>(r, computed, base, delta, m);
            } else {
                weigh_rows<true>(r, computed, base, delta, m);
            }
        }
        if (mask_sums) mask_sums->finish_block(block.b, block.h, block.j0, block.count);
        for (int64_t r = 0; r < block.rows; r += kTileRows) zero_around(block, r, m);
    }

  private:
    // Scores in place of products, where the score is more than a factor. Keys that do not take part get -inf. Returns
    // whether all keys take part.
    bool prepare_row(const Block& block, int64_t r, KeyRange computed, const BlockMemory<P>& m) const {
        float *x = m.x + r * kStride + computed.begin, *y = m.y + r * kStride + computed.begin;
        const int64_t columns = computed.end - computed.begin, first = block.j0 + computed.begin;
        if (r >= block.rows) {
            for (int64_t c = 0; c < columns; ++c) x[c] = -kInfinity, y[c] = 0.0f;
            return false;
        }
        const int64_t i = block.i0 + r;
        if (!score_.plain()) {
            const int64_t count = smaller(columns, block.count - computed.begin);
            score_.score_row(block.seq, block.b, block.h, i, first, count, x,
                             args_.softcap > 0.0f ? slopes_of(r, m) : nullptr);
        }
        const KeyRange range = visible_keys(args_, block.seq, i, i);
        if (range.begin <= first && range.end >= first + columns) return true;
        Score::exclude(range, first, columns, x);
        return false;
    }

    static float* slopes_of(int64_t r, const BlockMemory<P>& m) { return m.slopes + r % kSteps * kStride; }

    template <bool kExcluded>
    static FASTATTN_INLINE void weigh(Vec factor, Vec base, Vec delta, Vec& x, Vec& y) {
        const Vec weight = exp2_bounded(x * factor - base), grad = weight * (y - delta);
        y = kExcluded ? select(x == splat(-kInfinity), Vec{}, grad) : grad;
        x = weight;
    }

    // kSteps rows to the operands at once.
    template <bool kExcluded>
    void weigh_rows(int64_t r, KeyRange computed, const float* base, const float* delta,
                    const BlockMemory<P>& m) const {
        const Vec factor = splat(score_.factor());
        float *x = m.x + r * kStride, *y = m.y + r * kStride;
        const Vec base0 = splat(base[r]), delta0 = splat(delta[r]);
        if constexpr (kSteps == 1) {
            for (int64_t c = computed.begin; c < computed.end; c += kLanes) {
                Vec x0 = load(x + c), y0 = load(y + c);
                weigh<kExcluded>(factor, base0, delta0, x0, y0);
                store(x + c, x0);
                store(y + c, y0);
            }
        } else {
            const Vec base1 = splat(base[r + 1]), delta1 = splat(delta[r + 1]);
            for (int64_t c = computed.begin; c < computed.end; c += kLanes) {
                Vec x0 = load(x + c), y0 = load(y + c), x1 = load(x + kStride + c), y1 = load(y + kStride + c);
                weigh<kExcluded>(factor, base0, delta0, x0, y0);
                weigh<kExcluded>(factor, base1, delta1, x1, y1);
                store_rows(r, c, x0, x1, y0, y1, m);
            }
        }
    }

    static FASTATTN_INLINE void store_rows(int64_t r, int64_t c, Vec x0, Vec x1, Vec y0, Vec y1,
                                           const BlockMemory<P>& m) {
        store_operand(m.weights + r / kSteps * kStride + c, x0, x1);
        store_operand(m.grads + r / kSteps * kStride + c, y0, y1);
        store_operand(m.grad_rows + r * kStride + c, y0);
        store_operand(m.grad_rows + (r + 1) * kStride + c, y1);
    }

    void narrow_rows(int64_t r, KeyRange computed, const BlockMemory<P>& m) const {
        if constexpr (kSteps > 1) {
            const float *x = m.x + r * kStride, *y = m.y + r * kStride;
            for (int64_t c = computed.begin; c < computed.end; c += kLanes) {
                store_rows(r, c, load(x + c), load(x + kStride + c), load(y + c), load(y + kStride + c), m);
            }
        }
    }

    // One row in place, with all that a score may have.
    void weigh_row(const Block& block, int64_t r, KeyRange computed, float base, float delta, MaskSums* mask_sums,
                   const BlockMemory<P>& m) const {
        const bool whole = prepare_row(block, r, computed, m) && args_.mask.dtype != DType::kBool;
        const Vec factor = splat(score_.plain() ? score_.factor() : 1.0f);
        // A key that takes part, at -inf too, hands on a NaN of its row; one that does not, does not.
        const Vec excluded = splat(whole ? __builtin_nanf("") : -kInfinity);
        float *x = m.x + r * kStride + computed.begin, *y = m.y + r * kStride + computed.begin;
        const int64_t columns = computed.end - computed.begin, i = block.i0 + r;
        if (score_.drops()) {
            for (int64_t c = 0; c < columns; c += kLanes) {
                store(m.dropped + c, exp2_bounded(load(x + c) * factor - base));
            }
            score_.drop_row(block.seq, args_.query.size[2], block.b, block.h, i, block.j0 + computed.begin, columns,
                            m.dropped);
        }
        for (int64_t c = 0; c < columns; c += kLanes) {
            const Vec score = load(x + c), weight = exp2_bounded(score * factor - base);
            const Vec grad =
                score_.drops() ? load(m.dropped + c) * load(y + c) - weight * delta : weight * (load(y + c) - delta);
            store(y + c, select(score == excluded, Vec{}, grad));
            store(x + c, score_.drops() ? load(m.dropped + c) : weight);
        }
        if (mask_sums && r < block.rows) {
            const KeyRange range = visible_keys(args_, block.seq, i, i);
            const int64_t begin = larger(range.begin, block.j0 + computed.begin);
            const int64_t end = smaller(range.end, block.j0 + computed.end);
            mask_sums->add_row(block.b, block.h, i, block.j0, begin, end, m.y + r * kStride + (begin - block.j0));
        }
        if (args_.softcap > 0.0f && r < block.rows) {
            const float* slopes = slopes_of(r, m);
            for (int64_t c = 0; c < columns; c += kLanes) store(y + c, load(y + c) * load(slopes + c));
        }
    }

    // A row of tiles has nothing for the keys' sums outside of what it computed.
    static void zero_around(const Block& block, int64_t r, const BlockMemory<P>& m) {
        const KeyRange computed = block.computed[r / kTileRows];
        const int64_t end = round_up(block.count, kTileRows);
        if (computed.begin == 0 && computed.end >= end) return;
        for (int64_t s = r / kSteps; s < (r + kTileRows) / kSteps; ++s) {
            P *weights = m.weights + s * kStride, *grads = m.grads + s * kStride;
            for (int64_t c = 0; c < smaller(computed.begin, end); ++c) weights[c] = grads[c] = P{};
            for (int64_t c = computed.end; c < end; ++c) weights[c] = grads[c] = P{};
        }
    }

    const AttentionBackward& args_;
    const Score score_;
    const bool plain_;
};

}  // namespace fastattn::FASTATTN_ISA
