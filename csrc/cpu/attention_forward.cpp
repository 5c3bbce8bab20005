// Attention (Vaswani et al., 2017) with the softmax taken along the way (Milakov and Gimelshein, 2018; Dao et al.,
// 2022):
//
//     s = score(query . key^T)                      score.h; nothing of size (q, k) is kept
//     for each block of keys:   m' = max(m, max of s);   p = exp(s - m');   a = exp(m - m')
//                               l = a l + sum of p;      o = a o + dropout(p) . value;      m = m'
//     out = o / l;   lse = m + log l                exponentials in base 2, log2 e folded into the scale
//
//              key blocks, packed       A task is a block of kQueryRows queries of one (batch, head). Its scores against
//             +-------+-------+-----+   one block of keys, `o`, and the packed block of keys and values stay in the
//     queries |  s p  |  ──►  |     |   second-level cache; a panel of keys, or of values, in the first. s and o are
//       (96)  |       |       |     |   computed in register tiles (tile.h).
//             +-------+-------+-----+
//
// Keys and values are packed once per (batch, kv head) into panels: keys as columns of the first product, values as
// rows of the second; 16-bit types are converted to float32 on the way, or paired where the machine multiplies bfloat16
// pairs. Blocks that the window (causal too) or a bool mask excludes as a whole are skipped, along the diagonal tile by
// tile. Every sum has one order, whatever the number of threads.
//
// Work: 2 q k (head_dim + value_dim) flops a head (half of it if causal) and q k exponentials. Memory that must move:
// query, key, value and out once; and the packed keys and values, 4 k (head_dim + value_dim) bytes a kv head, written
// once and read once per block of queries, from the cache where they fit: 48 flops a byte.
#include "attention_forward.h"

#include "attention_operands.h"
#include "attention_prefetch.h"
#include "matrix.h"
#include "padding_mask.h"
#include "parallel.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kQueryRows = 96;       // a multiple of every kStripRows
constexpr int64_t kPairsPerThread = 16;  // (batch, kv head) pairs; from there on, each thread packs what it reads

// T: elements of the tensors; P: of the packed operands. A `Weight` is one step of an operand's row.
template <class T, class P>
class Forward {
    typedef typename Operand<P>::Weight Weight;
    static constexpr int64_t kSteps = Operand<P>::kSteps;
    static constexpr int64_t kRows = kStripRows<P>;
    static constexpr int64_t kKeys = 128 * kSteps;  // of a block

  public:
    Forward(const AttentionForward& args, const NewTokens& tokens)
        : args_(args),
          tokens_(tokens),
          score_(args),
          head_dim_(args.query.size[3]),
          value_dim_(args.value.size[3]),
          depth_(round_up(ceil_div(head_dim_, kSteps), kWholeSteps<P>)),
          value_columns_(round_up(value_dim_, kTileColumns)),
          block_size_(kKeys * depth_ + kKeys / kSteps * value_columns_) {}

    int64_t key_blocks() const { return ceil_div(args_.max_k, kKeys); }
    int64_t query_blocks() const { return ceil_div(args_.max_q, kQueryRows); }
    int64_t packed_size() const { return key_blocks() * block_size_; }  // of a (batch, kv head)
    int64_t workspace_size() const { return workspace(nullptr).used; }  // in floats, a thread

    // One block of keys and values of a (batch, kv head), into its `packed`.
    void pack(int64_t b, int64_t kv_head, int64_t block, P* packed) const {
        const Sequence seq = sequence_of(args_, b);
        const int64_t j0 = block * kKeys, count = smaller(kKeys, seq.k_len - j0);
        const Tensor &key = args_.key, &value = args_.value;
        P *keys = packed + block * block_size_, *values = keys + kKeys * depth_;
        for (int64_t c = 0; c < count; c += kTileColumns) {
            const T* from = key.as<T>() + offset_of(key, b, kv_head, seq.k_begin + j0 + c);
            Operand<P>::pack(from, key.stride[3], key.stride[2], head_dim_, smaller(kTileColumns, count - c),
                             keys + c * depth_);
        }
        for (int64_t c = 0; count > 0 && c < value_dim_; c += kTileColumns) {
            const T* from = value.as<T>() + offset_of(value, b, kv_head, seq.k_begin + j0) + c * value.stride[3];
            Operand<P>::pack(from, value.stride[2], value.stride[3], count, smaller(kTileColumns, value_dim_ - c),
                             values + c * (kKeys / kSteps));
        }
    }

    // One block of queries, against the packed keys and values of its kv head. `ahead` may be null.
    void attend(int64_t b, int64_t h, int64_t query_block, const P* packed, float* memory, Prefetch* ahead) const {
        const Sequence seq = sequence_of(args_, b);
        Block block = {b, h, query_block * kQueryRows, 0, 0, 0};
        block.rows = smaller(kQueryRows, seq.q_len - block.i0);
        if (block.rows <= 0) return;
        const MatrixUnit<P> unit;
        const Workspace w = workspace(memory);
        load_query(seq, block, w);
        for (int64_t r = 0; r < kQueryRows; ++r) w.top[r] = -kInfinity, w.total[r] = 0.0f;
        bool begun[kQueryRows / kRows] = {};

        const KeyRange range = visible_keys(args_, seq, block.i0, block.i0 + block.rows - 1);
        for (int64_t first = range.begin / kKeys * kKeys; first < range.end; first += kKeys) {
            block.j0 = larger(first, range.begin / kTileColumns * kTileColumns);
            block.count = smaller(first + kKeys, range.end) - block.j0;
            if (args_.mask.present() && score_.all_off(b, h, block.i0, block.rows, block.j0, block.count)) continue;
            const P* keys = packed + first / kKeys * block_size_ + (block.j0 - first) * depth_;
            const P* values =
                packed + first / kKeys * block_size_ + kKeys * depth_ + (block.j0 - first) / kSteps * kTileColumns;
            for (int64_t r = 0; r < block.rows; r += kRows) {
                const Strip strip = strip_at(seq, block, r);
                if (ahead) ahead->step();
                if (strip.visible == 0) continue;
                score(strip, keys, w);
                softmax(seq, block, strip, w);
                weigh_values(strip, values, begun[r / kRows], w);
                begun[r / kRows] = true;
            }
        }
        for (int64_t r = 0; r < block.rows; ++r) {
            finish_row<T>(args_, score_, seq, b, h, block.i0 + r, w.weighted + r * value_columns_, w.top[r],
                          w.total[r]);
        }
    }

  private:
    // Queries i0 … i0 + rows - 1 against keys j0 … j0 + count - 1.
    struct Block {
        int64_t b, h, i0, rows, j0, count;
    };

    // A row of tiles: the block's queries first … first + rows - 1, and how many of its keys, from the first on, they
    // may see. It goes from scores to weighted values before the next, so that its scores stay in the first-level cache.
    struct Strip {
        int64_t first, rows, visible;
    };

    // One thread's memory: matrices, row by row.
    struct Workspace {
        Weight* query;       // (kQueryRows, head_dim, filled up with zeros to whole steps)
        float* scores;       // (kRows, kKeys)
        Weight* weights;     // (kRows, kKeys); `scores` itself in float32
        float* weighted;     // (kQueryRows, value_columns)
        float *top, *total;  // (kQueryRows)
        int64_t used;
    };

    Workspace workspace(float* memory) const {
        Workspace w;
        w.used = 0;
        auto take = [&](int64_t floats) {
            float* place = memory + w.used;
            w.used += round_up(floats, 16);
            return place;
        };
        w.query = reinterpret_cast<Weight*>(take(kQueryRows * depth_));
        w.scores = take(kRows * kKeys);
        w.weights = reinterpret_cast<Weight*>(kSteps == 1 ? w.scores : take(kRows * kKeys / kSteps));
        w.weighted = take(kQueryRows * value_columns_);
        w.top = take(kQueryRows);
        w.total = take(kQueryRows);
        return w;
    }

    static P* as_steps(Weight* row) { return reinterpret_cast<P*>(row); }

    void load_query(const Sequence& seq, const Block& block, const Workspace& w) const {
        const Tensor& query = args_.query;
        const T* from = query.as<T>() + offset_of(query, block.b, block.h, seq.q_begin + block.i0);
        copy_rows(from, query.stride[2], query.stride[3], block.rows, head_dim_, kSteps * kWholeSteps<P>, kRows,
                  w.query);
        for (int64_t r = 0; r < block.rows; ++r) tokens_.turn(block.b, block.i0 + r, w.query + r * depth_ * kSteps);
    }

    Strip strip_at(const Sequence& seq, const Block& block, int64_t first) const {
        const int64_t rows = smaller(kRows, block.rows - first);
        const KeyRange range = visible_keys(args_, seq, block.i0 + first, block.i0 + first + rows - 1);
        const int64_t end = smaller(block.count, range.end - block.j0);
        return {first, rows, range.begin - block.j0 < end ? larger(end, 0) : 0};
    }

    // A tile of a strip's rows. The last strip of a short sequence may have few: four of its 64 queries.
    static FASTATTN_INLINE void multiply(int64_t rows, int64_t depth, const P* a, int64_t a_row, const P* b, float* c,
                                         int64_t c_row, bool accumulate) {
        if (rows == kRows) {
            tile_product(depth, a, a_row, 1, b, kTileColumns, c, c_row, accumulate);
        } else {
            tile_rows<P>(static_cast<int>(rows), depth, a, a_row, 1, b, kTileColumns, c, c_row, accumulate);
        }
    }

    void score(const Strip& strip, const P* keys, const Workspace& w) const {
        const P* query = as_steps(w.query + strip.first * depth_ * kSteps);
        for (int64_t c = 0; c < strip.visible; c += kTileColumns) {
            multiply(strip.rows, depth_, query, depth_, keys + c * depth_, w.scores + c, kKeys, false);
        }
    }

    // Products become weights, and what the rows have gathered is brought to the new maxima. Each loop is over rows that
    // do not wait for one another: a row's sums and maxima take longer to find than its exponentials.
    void softmax(const Sequence& seq, const Block& block, const Strip& strip, const Workspace& w) const {
        const int64_t columns = round_up(strip.visible, kTileColumns);
        const float factor = score_.plain() ? score_.factor() : 1.0f;
        float tops[kRows];
        for (int64_t r = 0; r < strip.rows; ++r) {
            const int64_t i = block.i0 + strip.first + r;
            float* row = w.scores + r * kKeys;
            if (!score_.plain()) score_.score_row(seq, block.b, block.h, i, block.j0, strip.visible, row);
            score_.exclude(visible_keys(args_, seq, i, i), block.j0, columns, row);
            tops[r] = greatest(row, columns) * factor;
        }
        for (int64_t r = 0; r < strip.rows; ++r) raise_top(tops[r], strip.first + r, w);
        for (int64_t r = 0; r < strip.rows; ++r) {
            const int64_t row = strip.first + r;
            w.total[row] += exponentials(factor, w.top[row], columns, w.scores + r * kKeys);
        }
        for (int64_t r = 0; score_.drops() && r < strip.rows; ++r) {
            score_.drop_row(seq, args_.query.size[2], block.b, block.h, block.i0 + strip.first + r, block.j0, columns,
                            w.scores + r * kKeys);
        }
        for (int64_t r = 0; kSteps > 1 && r < strip.rows; ++r) {
            for (int64_t c = 0; c < columns; c += kLanes) {
                store_operand(w.weights + r * kKeys + c, load(w.scores + r * kKeys + c));
            }
        }
    }

    void raise_top(float top, int64_t r, const Workspace& w) const {
        const float old_top = w.top[r];
        if (!(top > old_top)) return;
        w.top[r] = top;
        if (old_top == -kInfinity) return;
        const float factor = exp2_bounded(splat(old_top - top))[0];
        w.total[r] *= factor;
        float* row = w.weighted + r * value_columns_;
        for (int64_t c = 0; c < value_columns_; c += kLanes) store(row + c, load(row + c) * factor);
    }

    void weigh_values(const Strip& strip, const P* values, bool begun, const Workspace& w) const {
        const int64_t steps = round_up(ceil_div(strip.visible, kSteps), kWholeSteps<P>);
        for (int64_t c = 0; c < value_columns_; c += kTileColumns) {
            multiply(strip.rows, steps, as_steps(w.weights), kKeys / kSteps, values + c * (kKeys / kSteps),
                     w.weighted + strip.first * value_columns_ + c, value_columns_, begun);
        }
    }

    const AttentionForward& args_;
    const NewTokens& tokens_;
    const Score score_;
    const int64_t head_dim_, value_dim_;
    const int64_t depth_;          // steps of the first product
    const int64_t value_columns_;  // value_dim in whole tiles
    const int64_t block_size_;     // of P: a packed block of keys and values
};

template <class T, class P>
void run_blocks(const AttentionForward& args, const NewTokens& tokens) {
    const Forward<T, P> forward(args, tokens);
    const int64_t pairs = args.batch * args.kv_heads, group = args.heads / args.kv_heads;
    const int64_t key_blocks = forward.key_blocks(), query_blocks = forward.query_blocks();
    const int64_t size = forward.packed_size();
    const int threads = thread_count(args.batch * args.heads * query_blocks);
    const Scratch<float> workspace(forward.workspace_size(), threads);

    if (pairs >= kPairsPerThread * threads) {
        const Scratch<P> packed(size, threads);
        const int64_t query_strips = ceil_div(args.max_q, kStripRows<P>);
        parallel_for(pairs, [&](int64_t pair, int thread) {
            const int64_t b = pair / args.kv_heads, kv_head = pair % args.kv_heads;
            for (int64_t block = 0; block < key_blocks; ++block) forward.pack(b, kv_head, block, packed.of(thread));
            Prefetch ahead(args, pair + threads, group * query_strips * key_blocks);
            for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
                for (int64_t block = 0; block < query_blocks; ++block) {
                    forward.attend(b, h, block, packed.of(thread), workspace.of(thread), &ahead);
                }
            }
        });
        return;
    }
    const Scratch<P> packed(pairs * size);
    parallel_for(pairs * key_blocks, [&](int64_t task, int) {
        const int64_t pair = task / key_blocks;
        forward.pack(pair / args.kv_heads, pair % args.kv_heads, task % key_blocks, packed.get() + pair * size);
    });
    // The last queries first: under a causal mask they have the most keys.
    const int64_t matrices = args.batch * args.heads;
    parallel_for(matrices * query_blocks, [&](int64_t task, int thread) {
        const int64_t b = task % matrices / args.heads, h = task % matrices % args.heads;
        const P* pair = packed.get() + (b * args.kv_heads + h / group) * size;
        forward.attend(b, h, query_blocks - 1 - task / matrices, pair, workspace.of(thread), nullptr);
    });
}

// Writes the new keys, turned, and values to the caches.
template <class T>
void append(const AttentionForward& args, const NewTokens& tokens) {
    const int64_t pairs = args.batch * args.kv_heads, head_dim = args.key.size[3];
    constexpr int64_t kWorthThreads = 1 << 15;  // elements
    const bool parallel = pairs * args.new_keys * (head_dim + args.value.size[3]) > kWorthThreads;
    const Scratch<T> rows(head_dim, thread_count(pairs));
    gemm_detail::for_tasks(parallel, pairs, [&](int64_t pair, int thread) {
        const int64_t b = pair / args.kv_heads, h = pair % args.kv_heads;
        const int64_t position = args.cache_seqlens.as<int32_t>()[b];
        auto copy = [](const T* from, int64_t stride, int64_t count, T* to, int64_t to_stride) {
            if (stride == 1 && to_stride == 1) {
                memcpy(to, from, count * sizeof(T));
            } else {
                for (int64_t c = 0; c < count; ++c) to[c * to_stride] = from[c * stride];
            }
        };
        auto each = [&](const Tensor& from, const Tensor& to, auto write) {
            if (from.numel() == 0) return;  // memory may be null then
            for (int64_t t = 0; t < args.new_keys; ++t) {
                write(t, from.as<T>() + offset_of(from, b, h, t), to.as<T>() + offset_of(to, b, h, position + t));
            }
        };
        const int64_t stride = args.key.stride[3];
        each(args.new_key, args.key, [&](int64_t t, const T* from, T* to) {
            T* row = stride == 1 ? to : rows.of(thread);  // where a row lies that can be turned
            copy(from, args.new_key.stride[3], head_dim, row, 1);
            tokens.turn(b, t, row);
            if (row != to) copy(row, 1, head_dim, to, stride);
        });
        each(args.new_value, args.value, [&](int64_t, const T* from, T* to) {
            copy(from, args.new_value.stride[3], args.value.size[3], to, args.value.stride[3]);
        });
    });
}

template <class T, class P>
void forward_as(const AttentionForward& args) {
    const NewTokens tokens(args.cos, args.sin, args.interleaved);
    if (args.new_keys > 0) append<T>(args, tokens);
    if (args.batch * args.heads * args.max_q == 0) return;
    if (args.max_q <= kFewQueries && args.key.unit_last_stride() && args.value.unit_last_stride()) {
        attention_few_queries(args, tokens);
    } else {
        run_blocks<T, P>(args, tokens);
    }
}

}  // namespace

void attention_forward(const AttentionForward& given) {
    with_padding_as_ranges(given, false, [](const AttentionForward& args) {
        if (args.query.dtype == DType::kFloat32) {
            forward_as<float, float>(args);
        } else if (args.query.dtype == DType::kFloat16) {
            forward_as<Half, float>(args);
        } else if constexpr (kBFloat16Pairs) {
            forward_as<BFloat16, BFloat16Pair>(args);
        } else {
            forward_as<BFloat16, float>(args);
        }
    });
}

}  // namespace fastattn::FASTATTN_ISA
