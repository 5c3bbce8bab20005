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
#include "softmax.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kQueryRows = 96;                       // of a block; a multiple of every kStripRows
constexpr int64_t kKeys = 192;                           // of a block; a multiple of kStripRows and kTileColumns
constexpr int64_t kStride = kKeys + 16;                  // of a block's rows: an odd number of cache lines
constexpr int64_t kMostStrips = kQueryRows / kTileRows;  // rows of register tiles

// Queries i0 … i0 + rows - 1 of head h against keys j0 … j0 + count - 1.
struct Block {
    int64_t b, h, i0, rows, j0, count;
    Sequence seq;
    KeyRange visible[kMostStrips];   // the keys, from j0 on, that a row of tiles may see between its queries
    KeyRange computed[kMostStrips];  // the same in whole tiles
};

// What a block's rows need beside x and y. The weights are p = exp2(s - base) * scale.
//
//     kFromLse     base = lse, scale = 1, delta = sum of grad_out * out, given beforehand
//     kHere        found in the block itself, which holds all the row's keys
//     kGathered    found by a pass over all blocks of keys that comes first
//
// The last two are as exact as a softmax of the whole row. The first leaves the roundings of lse and out in every
// weight and gradient of the row. That is too much where one key has almost all the weight, and its gradient cancels to
// almost nothing (a row of one key: to nothing), and where lse is large.
struct RowTerms {
    enum Source { kFromLse, kHere, kGathered } source;
    float *base, *scale, *delta;  // beyond the last row: zeros
    const float* grad_lse;
};

// A block's scratch. For float, `weights` and `grads` are x and y themselves.
template <class P>
struct BlockMemory {
    typedef typename Operand<P>::Weight Weight;
    float *x, *y;             // (kQueryRows, kStride)
    P *weights, *grads;       // (kQueryRows / steps, kStride): an element is `steps` queries of a key
    Weight* grad_rows;        // (kQueryRows, kStride): rows of keys
    float *slopes, *dropped;  // (steps, kStride)
};

template <class P>
class ScoreGradient {
    static constexpr int64_t kSteps = Operand<P>::kSteps;
    static constexpr int64_t kRows = kStripRows<P>;

  public:
    explicit ScoreGradient(const AttentionBackward& args)
        : args_(args), score_(args), plain_(score_.plain() && !score_.drops() && !args.grad_mask.present()) {}

    // Whether a bool mask or the window leaves nothing of the block.
    bool nothing_visible(const Block& block) const {
        bool any = false;
        for (int64_t t = 0; t * kRows < block.rows; ++t) any |= block.visible[t].begin < block.visible[t].end;
        return !any ||
               (args_.mask.present() && score_.all_off(block.b, block.h, block.i0, block.rows, block.j0, block.count));
    }

    // Rows with kGathered terms: adds a block's keys to the terms' sums, which begin at -inf, 0 and 0.
    void gather(const Block& block, const RowTerms& terms, const BlockMemory<P>& m) const {
        for (int64_t r = 0; r < block.rows; ++r) {
            const KeyRange computed = block.computed[r / kRows];
            if (computed.begin >= computed.end) continue;
            prepare_row(block, r, computed, m);
            gather_row(block, r, computed, terms, m);
        }
    }

    // And after the last of them.
    static void finish_row(const RowTerms& terms, int64_t r) {
        const float total = terms.scale[r];
        terms.scale[r] = total == 0.0f ? 0.0f : 1.0f / total;
        terms.delta[r] = total == 0.0f ? 0.0f : terms.delta[r] * terms.scale[r] - terms.grad_lse[r];
    }

    // From x and y to the operands of the other products.
    void weigh(const Block& block, const RowTerms& terms, MaskSums* mask_sums, const BlockMemory<P>& m) const {
        for (int64_t r = 0; r < round_up(block.rows, kSteps); r += kSteps) {
            const KeyRange computed = block.computed[r / kRows];
            if (computed.begin >= computed.end) continue;
            bool whole = true;
            for (int64_t i = r; i < r + kSteps; ++i) whole &= prepare_row(block, i, computed, m);
            if (plain_ && terms.source == RowTerms::kFromLse) {
                weigh_rows<true>(whole, r, computed, terms, m);
                continue;
            }
            for (int64_t i = r; i < r + kSteps; ++i) {
                if (terms.source == RowTerms::kHere) {
                    gather_row(block, i, computed, terms, m);
                    finish_row(terms, i);
                } else {
                    exponentiate(block, i, computed, terms.base[i], m);
                }
            }
            if (plain_) {
                weigh_rows<false>(whole, r, computed, terms, m);
            } else {
                for (int64_t i = r; i < r + kSteps; ++i) weigh_row(block, i, computed, terms, mask_sums, m);
                narrow_rows(r, computed, m);
            }
        }
        if (mask_sums) mask_sums->finish_block(block.b, block.h, block.j0, block.count);
        for (int64_t r = 0; r < block.rows; r += kRows) zero_around(block, r, m);
        if constexpr (kOnUnit<P>) {  // the keys' sums go over whole strips of queries
            const int64_t rows = round_up(block.rows, kSteps), strips = round_up(block.rows, kRows);
            for (int64_t s = rows / kSteps; s < strips / kSteps; ++s)
                zero(s, 0, round_up(block.count, kTileColumns), m);
        }
    }

  private:
    // Scores in place of products, where the score is more than a factor. Keys that do not take part get -inf. Returns
    // whether the window leaves all keys.
    bool prepare_row(const Block& block, int64_t r, KeyRange computed, const BlockMemory<P>& m) const {
        float *x = m.x + r * kStride + computed.begin, *y = m.y + r * kStride + computed.begin;
        const int64_t columns = computed.end - computed.begin, first = block.j0 + computed.begin;
        const int64_t count = smaller(columns, block.count - computed.begin);
        if (r >= block.rows) {
            for (int64_t c = 0; c < columns; ++c) x[c] = -kInfinity, y[c] = 0.0f;
            return true;
        }
        const int64_t i = block.i0 + r;
        if (!score_.plain()) {
            score_.score_row(block.seq, block.b, block.h, i, first, count, x,
                             args_.softcap > 0.0f ? m.slopes + r % kSteps * kStride : nullptr);
        }
        const KeyRange range = visible_keys(args_, block.seq, i, i);
        if (range.begin > first || range.end < first + columns) Score::exclude(range, first, columns, x);
        return range.begin <= first && range.end >= first + count;
    }

    // Scores become exp2(s - base); returns their sum. With dropout, `dropped` becomes what it leaves of them, and y
    // the gradient of the weights before it.
    float exponentiate(const Block& block, int64_t r, KeyRange computed, float base, const BlockMemory<P>& m) const {
        float *x = m.x + r * kStride + computed.begin, *y = m.y + r * kStride + computed.begin;
        const int64_t columns = computed.end - computed.begin;
        const float total = exponentials<true>(score_.plain() ? score_.factor() : 1.0f, base, columns, x);
        if (score_.drops()) {
            float* dropped = m.dropped + r % kSteps * kStride;
            for (int64_t c = 0; c < columns; c += kLanes) store(dropped + c, load(x + c));
            score_.drop_row(block.seq, args_.query.size[2], block.b, block.h, block.i0 + r, block.j0 + computed.begin,
                            columns, dropped);
            for (int64_t c = 0; c < columns; c += kLanes) {
                store(y + c, select(has_no_weight(load(dropped + c)), Vec{}, load(y + c) * score_.drop_scale()));
            }
        }
        return total;
    }

    void gather_row(const Block& block, int64_t r, KeyRange computed, const RowTerms& terms,
                    const BlockMemory<P>& m) const {
        float *x = m.x + r * kStride + computed.begin, *y = m.y + r * kStride + computed.begin;
        const int64_t columns = computed.end - computed.begin;
        const float before = terms.base[r];
        const float here = greatest(x, columns) * (score_.plain() ? score_.factor() : 1.0f);
        const float top = here > before ? here : before;
        const float total = exponentiate(block, r, computed, top, m);
        Vec weighted{};
        for (int64_t c = 0; c < columns; c += kLanes) weighted += load(x + c) * load(y + c);
        const float fade = before == -kInfinity ? 0.0f : exp2_bounded(splat(before - top))[0];
        terms.base[r] = top;
        terms.scale[r] = terms.scale[r] * fade + total;
        terms.delta[r] = terms.delta[r] * fade + reduce_add(weighted);
    }

    // kSteps rows to the operands at once, from scores (kFromLse) or exponentials.
    template <bool kScores>
    void weigh_rows(bool whole, int64_t r, KeyRange computed, const RowTerms& terms, const BlockMemory<P>& m) const {
        // Zero times finite numbers is zero: keys that take no part need no look where all that meets them is finite.
        float sum = 0.0f;
        for (int64_t i = r; i < r + kSteps; ++i) sum += terms.base[i] + terms.scale[i] + terms.delta[i];
        if (whole && sum - sum == 0.0f) {
            weigh_rows<kScores, false>(r, computed, terms, m);
        } else {
            weigh_rows<kScores, true>(r, computed, terms, m);
        }
    }

    template <bool kScores, bool kExcluded>
    void weigh_rows(int64_t r, KeyRange computed, const RowTerms& terms, const BlockMemory<P>& m) const {
        float *x = m.x + r * kStride, *y = m.y + r * kStride;
        const Vec factor = splat(score_.factor());
        auto weigh = [&](int64_t row, Vec& x, Vec& y) __attribute__((always_inline)) {
            const Vec weight = kScores ? exp2_bounded(x * factor - terms.base[row]) : x * terms.scale[row];
            const Ints excluded = kScores ? x == splat(-kInfinity) : has_no_weight(x);
            const Vec grad = weight * (y - terms.delta[row]);
            y = kExcluded ? select(excluded, Vec{}, grad) : grad;
            x = kExcluded ? select(excluded, Vec{}, weight) : weight;
        };
        for (int64_t c = computed.begin; c < computed.end; c += kLanes) {
            Vec x0 = load(x + c), y0 = load(y + c);
            weigh(r, x0, y0);
            if constexpr (kSteps == 1) {
                store(x + c, x0);
                store(y + c, y0);
            } else {
                Vec x1 = load(x + kStride + c), y1 = load(y + kStride + c);
                weigh(r + 1, x1, y1);
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

    // One row of exponentials, with all that a score may have, in place.
    void weigh_row(const Block& block, int64_t r, KeyRange computed, const RowTerms& terms, MaskSums* mask_sums,
                   const BlockMemory<P>& m) const {
        float *x = m.x + r * kStride + computed.begin, *y = m.y + r * kStride + computed.begin;
        const int64_t columns = computed.end - computed.begin, i = block.i0 + r;
        const float* dropped = score_.drops() ? m.dropped + r % kSteps * kStride : x;
        const Vec scale = splat(terms.scale[r]), delta = splat(terms.delta[r]);
        for (int64_t c = 0; c < columns; c += kLanes) {
            const Vec exponential = load(x + c), left = load(dropped + c);
            const Vec grad = exponential * scale * (load(y + c) - delta);
            store(y + c, select(has_no_weight(exponential), splat(kNoWeight), grad));
            store(x + c, select(has_no_weight(left), Vec{}, left * scale));
        }
        if (r >= block.rows) return;
        if (mask_sums) {
            const KeyRange range = visible_keys(args_, block.seq, i, i);
            const int64_t begin = larger(range.begin, block.j0 + computed.begin);
            const int64_t end = smaller(range.end, block.j0 + computed.end);
            mask_sums->add_row(block.b, block.h, i, block.j0, begin, end, m.y + r * kStride + (begin - block.j0));
        }
        if (args_.softcap > 0.0f) {
            const float* slopes = m.slopes + r % kSteps * kStride;
            for (int64_t c = 0; c < columns; c += kLanes) {
                const Vec grad = load(y + c);
                store(y + c, select(has_no_weight(grad), Vec{}, grad * load(slopes + c)));
            }
        }
    }

    // A row of tiles has nothing for the keys' sums outside of what it computed.
    static void zero_around(const Block& block, int64_t r, const BlockMemory<P>& m) {
        const KeyRange computed = block.computed[r / kRows];
        const int64_t end = round_up(block.count, kOnUnit<P> ? kTileColumns : kRows);
        if (computed.begin == 0 && computed.end >= end) return;
        for (int64_t s = r / kSteps; s < (r + kRows) / kSteps; ++s) {
            zero(s, 0, smaller(computed.begin, end), m);
            zero(s, computed.end, end, m);
        }
    }

    static void zero(int64_t step, int64_t begin, int64_t end, const BlockMemory<P>& m) {
        P *weights = m.weights + step * kStride, *grads = m.grads + step * kStride;
        for (int64_t c = begin; c < end; ++c) weights[c] = grads[c] = P{};
    }

    const AttentionBackward& args_;
    const Score score_;
    const bool plain_;
};

}  // namespace fastattn::FASTATTN_ISA
