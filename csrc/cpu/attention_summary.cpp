// How attention spreads its weights: entropy, largest weight, its key, and mean distance, for each query.
//
//     s = score(query . key^T)          score.h; nothing of size (q, k) is kept
//     for each block of keys:   m' = max(m, max of s);   a = exp(m - m');   x = s - m';   p = exp(x)
//                               t = a (t + (m - m') l) + sum of p x;   d = a d + sum of p |i - j|;   l = a l + sum of p
//     entropy = log l - t / l;   max_weight = 1 / l, of the first key at m;   distance = d / l
//
// All terms of t have one sign, and so have d's: nothing cancels. For an entropy near zero to keep its last places, scores are
// subtracted before anything multiplies them (log 2 e, too, so they are not in base two, as attention's are), and l is kept
// as l - 1, without the weight 1 of the key at m.
//
// As in attention_forward.cpp, a task is a block of queries of one (batch, head); keys are packed once per (batch, kv head)
// into panels; scores are computed in register tiles, a strip of rows at a time, and stay in the first-level cache; what
// the window or a bool mask excludes as a whole is skipped. Every sum has one order, whatever the number of threads.
//
// Work: 2 q k head_dim flops a head (half of it if causal) and q k exponentials: less than attention, which weighs the values,
// too. Memory that must move: query and key, and 20 bytes a query and head; and the packed keys, as there.
#include "attention_operands.h"
#include "math.h"
#include "padding_mask.h"
#include "parallel.h"
#include "score.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kQueryRows = 96;  // a multiple of every kStripRows
constexpr int64_t kKeys = 128;      // of a block; a multiple of kTileColumns

// What a query has gathered, relative to the greatest score so far.
struct Gathered {
    float top;       // m, the greatest score
    float rest;      // the sum of weights but that of the key at `place`
    float weighted;  // t, the sum of weights times scores less m
    float distance;  // d, of weights times distances
    int64_t place;   // of the first key with the greatest score, whose weight is 1; -1: none

    float total() const { return place < 0 ? rest : rest + 1.0f; }
};

// T: elements of the tensors; P: of the packed operands (attention_operands.h).
template <class T, class P>
class Summary {
    typedef typename Operand<P>::Weight Step;
    static constexpr int64_t kSteps = Operand<P>::kSteps;
    static constexpr int64_t kRows = kStripRows<P>;

  public:
    explicit Summary(const AttentionSummary& args)
        : args_(args),
          score_(args),
          head_dim_(args.query.size[3]),
          depth_(round_up(ceil_div(head_dim_, kSteps), kWholeSteps<P>)) {}

    int64_t key_blocks() const { return ceil_div(args_.max_k, kKeys); }
    int64_t query_blocks() const { return ceil_div(args_.max_q, kQueryRows); }
    int64_t packed_size() const { return key_blocks() * kKeys * depth_; }               // of a (batch, kv head)
    int64_t query_size() const { return round_up(kQueryRows * depth_, kTileColumns); }  // in floats, a thread
    int64_t workspace_size() const { return query_size() + kRows * kKeys; }

    // One block of keys of a (batch, kv head), into its `packed`.
    void pack(int64_t b, int64_t kv_head, int64_t block, P* packed) const {
        const Sequence seq = sequence_of(args_, b);
        const int64_t j0 = block * kKeys, count = smaller(kKeys, seq.k_len - j0);
        for (int64_t c = 0; c < count; c += kTileColumns) {
            const T* from = args_.key.as<T>() + offset_of(args_.key, b, kv_head, seq.k_begin + j0 + c);
            Operand<P>::pack(from, args_.key.stride[3], args_.key.stride[2], head_dim_,
                             smaller(kTileColumns, count - c), packed + (j0 + c) * depth_);
        }
    }

    // One block of queries, against the packed keys of its kv head.
    void summarise(int64_t b, int64_t h, int64_t query_block, const P* packed, float* memory) const {
        const Sequence seq = sequence_of(args_, b);
        const int64_t i0 = query_block * kQueryRows, rows = smaller(kQueryRows, seq.q_len - i0);
        if (rows <= 0) return;
        const MatrixUnit<P> unit;
        Step* query = reinterpret_cast<Step*>(memory);
        float* scores = memory + query_size();
        const T* from = args_.query.as<T>() + offset_of(args_.query, b, h, seq.q_begin + i0);
        copy_rows(from, args_.query.stride[2], args_.query.stride[3], rows, head_dim_, kSteps * kWholeSteps<P>, kRows,
                  query);
        Gathered gathered[kQueryRows];
        for (int64_t r = 0; r < rows; ++r) gathered[r] = {-kInfinity, 0.0f, 0.0f, 0.0f, -1};

        const KeyRange range = visible_keys(args_, seq, i0, i0 + rows - 1);
        for (int64_t first = range.begin / kKeys * kKeys; first < range.end; first += kKeys) {
            const int64_t j0 = larger(first, range.begin / kTileColumns * kTileColumns);
            const int64_t count = smaller(first + kKeys, range.end) - j0;
            if (args_.mask.present() && score_.all_off(b, h, i0, rows, j0, count)) continue;
            for (int64_t r = 0; r < rows; r += kRows) {
                const int64_t strip = smaller(kRows, rows - r);
                const KeyRange seen = visible_keys(args_, seq, i0 + r, i0 + r + strip - 1);
                const int64_t visible = smaller(count, seen.end - j0);
                if (visible <= 0 || seen.begin - j0 >= visible) continue;
                const P* left = reinterpret_cast<const P*>(query + r * depth_ * kSteps);
                for (int64_t c = 0; c < visible; c += kTileColumns) {
                    multiply(strip, left, packed + (j0 + c) * depth_, scores + c);
                }
                for (int64_t s = 0; s < strip; ++s) {
                    const int64_t i = i0 + r + s, columns = round_up(visible, kTileColumns);
                    float* row = scores + s * kKeys;
                    if (!score_.plain()) score_.template score_row<true>(seq, b, h, i, j0, visible, row);
                    score_.exclude(visible_keys(args_, seq, i, i), j0, columns, row);
                    gather(i + seq.diagonal, j0, columns, row, gathered[r + s]);
                }
            }
        }
        for (int64_t r = 0; r < rows; ++r) finish(seq, b, h, i0 + r, gathered[r]);
    }

  private:
    void multiply(int64_t rows, const P* query, const P* keys, float* scores) const {
        if (rows == kRows) {
            tile_product(depth_, query, depth_, 1, keys, kTileColumns, scores, kKeys, false);
        } else {
            tile_rows<P>(static_cast<int>(rows), depth_, query, depth_, 1, keys, kTileColumns, scores, kKeys, false);
        }
    }

    // A row of scores of keys j0 … joins what its query, at this position among the keys, has gathered. Where nothing but the
    // scale makes a score of a product, the row holds products, and their differences are scaled.
    void gather(int64_t position, int64_t j0, int64_t columns, float* row, Gathered& gathered) const {
        const float scale = score_.plain() ? args_.scale : 1.0f;
        const float top = greatest(row, columns);
        if (top > gathered.top) {
            int64_t c = 0;
            while (row[c] != top) ++c;
            raise_top(top, j0 + c, scale, gathered);
            gathered.distance += abs(splat(static_cast<float>(j0 + c - position)))[0];
            if (top < kInfinity) row[c] = -kInfinity;  // its weight is counted; infinity less infinity is to be NaN
        }
        const Vec base = splat(gathered.top == -kInfinity ? 0.0f : gathered.top);
        const Vec start = __builtin_convertvector(lane_numbers(0), Vec) + static_cast<float>(j0 - position);
        Vec rest{}, weighted{}, distance{};
        for (int64_t c = 0; c < columns; c += kLanes) {
            const Vec x = (load(row + c) - base) * scale;
            const Vec weight = exp2_bounded(x * kLog2E);
            rest += weight;
            weighted += weight * max(x, splat(-100.0f));  // below, the weight is 0; a NaN is in it, too
            distance += weight * abs(start + static_cast<float>(c));
        }
        gathered.rest += reduce_add(rest);
        gathered.weighted += reduce_add(weighted);
        gathered.distance += reduce_add(distance);
    }

    // What has been gathered, in weights relative to a greater score; but the weight and distance of its key.
    static void raise_top(float top, int64_t place, float scale, Gathered& gathered) {
        const float step = (gathered.top - top) * scale, total = gathered.total();
        const float factor = exp2_bounded(splat(step * kLog2E))[0];
        gathered.top = top;
        gathered.place = place;
        if (factor == 0.0f && total == total) {  // step may be infinite
            gathered.rest = gathered.weighted = gathered.distance = 0.0f;
            return;
        }
        gathered.weighted = factor * (gathered.weighted + step * total);
        gathered.rest = factor * total;
        gathered.distance *= factor;
    }

    void finish(const Sequence& seq, int64_t b, int64_t h, int64_t i, const Gathered& gathered) const {
        const double total = gathered.place < 0 ? double{gathered.rest} : 1.0 + gathered.rest;
        const bool none = total == 0.0;
        const auto put = [&](const Tensor& to, double value) {
            to.as<float>()[offset_of(to, b, h, i)] = none ? 0.0f : static_cast<float>(value);
        };
        put(args_.entropy, log(total) - gathered.weighted / total);
        put(args_.max_weight, 1.0 / total);
        put(args_.distance, gathered.distance / total);
        const bool found = total > 0.0;  // not if it is NaN
        args_.argmax.as<int64_t>()[offset_of(args_.argmax, b, h, i)] = found ? seq.padded_before + gathered.place : -1;
    }

    const AttentionSummary& args_;
    const Score score_;
    const int64_t head_dim_;
    const int64_t depth_;  // steps of the product
};

template <class T, class P>
void summary_as(const AttentionSummary& args) {
    const Summary<T, P> summary(args);
    const int64_t pairs = args.batch * args.kv_heads, matrices = args.batch * args.heads;
    const int64_t key_blocks = summary.key_blocks(), query_blocks = summary.query_blocks();
    if (matrices * query_blocks == 0) return;
    const int64_t size = summary.packed_size(), group = args.heads / args.kv_heads;
    const Scratch<float> workspace(summary.workspace_size(), thread_count(matrices * query_blocks));
    const Scratch<P> packed(pairs * size);
    parallel_for(pairs * key_blocks, [&](int64_t task, int) {
        const int64_t pair = task / key_blocks;
        summary.pack(pair / args.kv_heads, pair % args.kv_heads, task % key_blocks, packed.get() + pair * size);
    });
    // The last queries first: under a causal mask they have the most keys.
    parallel_for(matrices * query_blocks, [&](int64_t task, int thread) {
        const int64_t b = task % matrices / args.heads, h = task % matrices % args.heads;
        summary.summarise(b, h, query_blocks - 1 - task / matrices,
                          packed.get() + (b * args.kv_heads + h / group) * size, workspace.of(thread));
    });
}

}  // namespace

void attention_summary(const AttentionSummary& given) {
    with_padding_as_ranges(given, false, [](const AttentionSummary& args) {
        if (args.query.dtype == DType::kFloat32) {
            summary_as<float, float>(args);
        } else if (args.query.dtype == DType::kFloat16) {
            summary_as<Half, float>(args);
        } else if constexpr (kBFloat16Pairs) {
            summary_as<BFloat16, BFloat16Pair>(args);
        } else {
            summary_as<BFloat16, float>(args);
        }
    });
}

}  // namespace fastattn::FASTATTN_ISA
