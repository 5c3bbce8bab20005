// Attention, backward (Dao et al., 2022): what the scores were is computed again from query, key and lse.
//
//     x = query . key^T,   y = grad_out . value^T
//     w, u = weights and the gradients of scale * x                                       attention_backward.h
//     grad_value = w^T . grad_out;   grad_key = scale * u^T . query;   grad_query = scale * u . key
//
//                keys (192)            A task is a (batch, kv head), or a part of its queries. It walks chunks of
//             +-------+-------+----+   queries (all heads of the kv head); within a chunk, blocks of keys; within
//    queries  | x, y  |       |    |   those, blocks of queries. So a block of packed keys and values with its sums,
//     (96)    | w, u  |       |    |   grad_key and grad_value, stays in the second-level cache while the chunk's
//             +-------+-------+----+   queries, packed once, and grad_query's sums pass by. All five products are
//             |       |       |    |   register tiles (tile.h), added up in float32.
//             +-------+-------+----+
//
// Blocks that the window (causal too) or a bool mask excludes as a whole are skipped, along the diagonal tile by tile.
// The split into tasks depends on the shape alone. Where a pair's queries are split, each part has sums of grad_key and
// grad_value of its own, which are added in order: memory grows with the lengths, never with their product.
//
// Work: 2 q k (3 head_dim + 2 value_dim) flops a head (half of it if causal) and q k exponentials. Memory that must
// move: query, key, value, out, grad_out and the three gradients once. A block of queries and keys moves, through the
// second-level cache, 96 (3 head_dim + 2 value_dim) elements of the queries' side for 2 * 96 * 192 flops each: hundreds
// of flops a byte, so the multiply-add units are the bound.
#include "attention_backward.h"

#include "padding_mask.h"
#include "parallel.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kChunkBlocks = 8;   // blocks of queries in a chunk: with a block of keys, half of the L2 cache
constexpr int64_t kEnoughTasks = 16;  // (batch, kv head) pairs that need not be split
constexpr int64_t kLeastBlocks = 4;   // of queries, in a part
constexpr float kLargeLse = 16.0f;    // beyond, lse's rounding is more than a few units in the last place of a weight

// T: elements of the tensors; P: of the products' operands.
template <class T, class P>
class Backward {
    typedef typename Operand<P>::Weight Weight;
    static constexpr int64_t kSteps = Operand<P>::kSteps;
    static constexpr int64_t kRows = kStripRows<P>;

  public:
    explicit Backward(const AttentionBackward& args)
        : args_(args),
          gradient_(args),
          group_(args.kv_heads > 0 ? args.heads / args.kv_heads : 0),
          blocks_(group_ * ceil_div(args.max_q, kQueryRows)),
          // Heads that share a mask's rows stay together.
          unit_(args.grad_mask.present() && args.grad_mask.size[1] == 1 ? larger(group_, 1) : 1),
          parts_(count_parts(args, blocks_, unit_)),
          mask_gradient_(args, parts_),
          head_dim_(args.query.size[3]),
          value_dim_(args.value.size[3]),
          head_steps_(round_up(ceil_div(head_dim_, kSteps), kWholeSteps<P>)),
          value_steps_(round_up(ceil_div(value_dim_, kSteps), kWholeSteps<P>)),
          head_columns_(round_up(head_dim_, kTileColumns)),
          value_columns_(round_up(value_dim_, kTileColumns)) {}

    void run() const {
        const int64_t pairs = args_.batch * args_.kv_heads;
        // A mask's broadcast dimensions run one after the other.
        const Tensor& mask = args_.grad_mask;
        const int64_t batch_phases = mask.present() && mask.size[0] == 1 ? args_.batch : 1;
        const int64_t head_phases = mask.present() && mask.size[1] == 1 ? args_.kv_heads : 1;
        const int64_t phases = batch_phases * head_phases;
        const int64_t at_once = phases > 0 ? pairs / phases : 0;

        const int threads = thread_count(at_once * parts_);
        const Scratch<float> memory(workspace(nullptr).used, threads);
        const int64_t sums = round_up(args_.max_k, kKeys) * (head_columns_ + value_columns_);
        const Scratch<float> key_sums(sums, parts_ == 1 ? threads : static_cast<int>(at_once * parts_));
        for (int64_t phase = 0; phase < phases; ++phase) {
            auto pair_of = [&](int64_t task) {
                const int64_t heads = args_.kv_heads / head_phases;
                return (task / heads + phase / head_phases) * args_.kv_heads + task % heads + phase % head_phases;
            };
            // The last queries first: under a causal mask they have the most keys.
            parallel_for(at_once * parts_, [&](int64_t task, int thread) {
                const int64_t part = parts_ - 1 - task / at_once, pair = task % at_once;
                float* to = key_sums.of(parts_ == 1 ? thread : static_cast<int>(pair * parts_ + part));
                run_part(pair_of(pair), part, to, memory.of(thread));
                if (parts_ == 1) write_keys(pair_of(pair), 0, args_.max_k, to, to, 1);
            });
            if (parts_ == 1) continue;
            const int64_t slices = ceil_div(args_.max_k, kKeys);
            parallel_for(at_once * slices, [&](int64_t task, int) {
                const int64_t pair = task / slices, begin = task % slices * kKeys;
                float* first = key_sums.of(static_cast<int>(pair * parts_));
                write_keys(pair_of(pair), begin, begin + kKeys, first, key_sums.of(static_cast<int>(pair * parts_ + 1)),
                           parts_);
            });
        }
        mask_gradient_.finish();
    }

  private:
    // A block of queries of the chunk, where its packed form lies (`slot`), and its rows' terms.
    struct Queries {
        int64_t h, i0, rows;
        const Weight *query_rows, *out_rows;  // of query and grad_out: left operands
        const P *query_panels, *out_panels;   // right operands; with a matrix unit rows of query^T and grad_out^T
        RowTerms terms;
        float* sums;  // of grad_query
    };

    // One thread's memory.
    struct Workspace {
        Weight *query_rows, *out_rows;
        P *query_panels, *out_panels;
        float *base, *scale, *delta, *grad_lse, *query_sums;
        P *keys_across, *values_across, *keys;  // key^T, value^T and key: right operands
        P* columns;                             // grad_out^T and out^T of kTileColumns queries (out^T with a unit)
        BlockMemory<P> block;
        float* mask_columns;
        int64_t used;
    };

    static int64_t count_parts(const AttentionBackward& args, int64_t blocks, int64_t unit) {
        int64_t tasks = args.batch * args.kv_heads;
        if (args.grad_mask.present() && args.grad_mask.size[0] == 1) tasks = args.kv_heads;
        if (args.grad_mask.present() && args.grad_mask.size[1] == 1) tasks = tasks / larger(args.kv_heads, 1);
        const int64_t wanted = ceil_div(kEnoughTasks, larger(tasks, 1));
        return larger(1, smaller(wanted, smaller(blocks / kLeastBlocks, blocks / unit)));
    }

    // A pair's blocks of queries are numbered query by query, and within a query head by head; a part begins at:
    int64_t first_block(int64_t part) const { return blocks_ / unit_ * part / parts_ * unit_; }

    Workspace workspace(float* memory) const {
        Workspace w;
        w.used = 0;
        auto take = [&](int64_t floats) {
            float* place = memory + w.used;
            w.used += round_up(floats, 16);
            return place;
        };
        auto take_elements = [&](int64_t count) { return reinterpret_cast<P*>(take(count)); };
        const int64_t blocks = smaller(kChunkBlocks, ceil_div(blocks_ / unit_, parts_) * unit_);
        const int64_t rows = blocks * kQueryRows;
        w.query_rows = reinterpret_cast<Weight*>(take(rows * head_steps_));
        w.out_rows = reinterpret_cast<Weight*>(take(rows * value_steps_));
        w.query_panels = take_elements(rows / kSteps * head_columns_);
        w.out_panels = take_elements(rows / kSteps * value_columns_);
        w.base = take(rows);
        w.scale = take(rows);
        w.delta = take(rows);
        w.grad_lse = take(rows);
        w.query_sums = take(rows * head_columns_);
        w.keys_across = take_elements(kKeys * head_steps_);
        w.values_across = take_elements(kKeys * value_steps_);
        w.keys = take_elements(kKeys / kSteps * head_columns_);
        w.columns = take_elements(2 * value_steps_ * kTileColumns);
        BlockMemory<P>& m = w.block;
        m.x = take(kQueryRows * kStride);
        m.y = take(kQueryRows * kStride);
        if constexpr (kSteps == 1) {
            m.weights = m.x, m.grads = m.y, m.grad_rows = m.y;
        } else {
            m.weights = take_elements(kQueryRows / kSteps * kStride);
            m.grads = take_elements(kQueryRows / kSteps * kStride);
            m.grad_rows = reinterpret_cast<Weight*>(take(kQueryRows * kStride / kSteps));
        }
        m.slopes = take(kSteps * kStride);
        m.dropped = take(kSteps * kStride);
        w.mask_columns = take(kStride);
        return w;
    }

    // Gradients of one part of a pair's queries; adds up those of its keys and values in `key_sums`.
    void run_part(int64_t pair, int64_t part, float* key_sums, float* memory) const {
        const int64_t b = pair / args_.kv_heads, kv_head = pair % args_.kv_heads;
        const Sequence seq = sequence_of(args_, b);
        const MatrixUnit<P> unit;
        const Workspace w = workspace(memory);
        const int64_t first = first_block(part), last = first_block(part + 1);
        for (int64_t x = 0; x < round_up(seq.k_len, kKeys) * (head_columns_ + value_columns_); ++x) key_sums[x] = 0.0f;
        for (int64_t c = 0; c < kStride; ++c) w.mask_columns[c] = 0.0f;
        MaskSums mask_sums = mask_gradient_.of_part(part, w.mask_columns);
        MaskSums* mask_sums_or_null = mask_gradient_.wanted() ? &mask_sums : nullptr;

        for (int64_t from = first; from < last; from += kChunkBlocks) {
            Queries chunk[kChunkBlocks];
            int64_t count = 0;
            for (int64_t x = from; x < smaller(from + kChunkBlocks, last); ++x) {
                const int64_t h = kv_head * group_ + x % group_, i0 = x / group_ * kQueryRows;
                if (i0 < seq.q_len) chunk[count] = load_queries(seq, b, h, i0, count, w), ++count;
            }
            bool any_gathered = false;
            for (int64_t x = 0; x < count; ++x) any_gathered |= chunk[x].terms.source == RowTerms::kGathered;
            if (any_gathered) {
                for_blocks(seq, b, kv_head, chunk, count, w, [&](const Block& block, const Queries& queries) {
                    if (queries.terms.source != RowTerms::kGathered) return;
                    find_products(block, queries, w);
                    gradient_.gather(block, queries.terms, w.block);
                });
                for (int64_t x = 0; x < count; ++x) {
                    if (chunk[x].terms.source != RowTerms::kGathered) continue;
                    for (int64_t r = 0; r < chunk[x].rows; ++r) gradient_.finish_row(chunk[x].terms, r);
                }
            }
            for_blocks(seq, b, kv_head, chunk, count, w, [&](const Block& block, const Queries& queries) {
                find_products(block, queries, w);
                gradient_.weigh(block, queries.terms, mask_sums_or_null, w.block);
                add_gradients(block, queries, key_sums + block.j0 * (head_columns_ + value_columns_), w);
            });
            for (int64_t x = 0; x < count; ++x) write_queries(seq, b, chunk[x], mask_sums_or_null);
        }
    }

    // body(block, queries) for each block of keys and, within, each block of a chunk's queries that sees any of them.
    template <class Body>
    void for_blocks(const Sequence& seq, int64_t b, int64_t kv_head, const Queries* chunk, int64_t count,
                    const Workspace& w, const Body& body) const {
        for (int64_t j0 = 0; j0 < seq.k_len; j0 += kKeys) {
            const int64_t keys = smaller(kKeys, seq.k_len - j0);
            bool packed = false;
            for (int64_t x = 0; x < count; ++x) {
                Block block = {b, chunk[x].h, chunk[x].i0, chunk[x].rows, j0, keys, seq, {}, {}};
                find_visible(block);
                if (gradient_.nothing_visible(block)) continue;
                if (!packed) pack_keys(seq, b, kv_head, j0, keys, w);
                packed = true;
                body(block, chunk[x]);
            }
        }
    }

    // ---- Queries ----------------------------------------------------------------------------------------------------

    Queries load_queries(const Sequence& seq, int64_t b, int64_t h, int64_t i0, int64_t slot,
                         const Workspace& w) const {
        const int64_t rows = smaller(kQueryRows, seq.q_len - i0), token = seq.q_begin + i0, place = slot * kQueryRows;
        Weight* query_rows = w.query_rows + place * head_steps_ * kSteps;
        Weight* out_rows = w.out_rows + place * value_steps_ * kSteps;
        P* query_panels = w.query_panels + place / kSteps * head_columns_;
        P* out_panels = w.out_panels + place / kSteps * value_columns_;
        load_both(args_.query, b, h, token, rows, query_rows, query_panels);
        load_both(args_.grad_out, b, h, token, rows, out_rows, out_panels);
        const RowTerms terms = {find_source(seq, b, h, i0, rows), w.base + place, w.scale + place, w.delta + place,
                                w.grad_lse + place};
        load_terms(b, h, token, rows, out_rows, terms, w.grad_lse + place, w);
        float* sums = w.query_sums + place * head_columns_;
        for (int64_t x = 0; x < kQueryRows * head_columns_; ++x) sums[x] = 0.0f;
        return {h, i0, rows, query_rows, out_rows, query_panels, out_panels, terms, sums};
    }

    RowTerms::Source find_source(const Sequence& seq, int64_t b, int64_t h, int64_t i0, int64_t rows) const {
        const KeyRange range = visible_keys(args_, seq, i0, i0 + rows - 1);
        if (range.begin >= range.end || range.begin / kKeys == (range.end - 1) / kKeys) return RowTerms::kHere;
        for (int64_t r = 0; r < rows; ++r) {
            const float lse = args_.lse.as<float>()[offset_of(args_.lse, b, h, seq.q_begin + i0 + r)];
            if (lse != -kInfinity && (lse > kLargeLse || lse < -kLargeLse)) return RowTerms::kGathered;
        }
        return RowTerms::kFromLse;
    }

    void load_terms(int64_t b, int64_t h, int64_t token, int64_t rows, const Weight* out_rows, const RowTerms& terms,
                    float* grad_lse, const Workspace& w) const {
        const bool from_lse = terms.source == RowTerms::kFromLse;
        for (int64_t r = 0; r < kQueryRows; ++r) {
            terms.base[r] = from_lse ? 0.0f : -kInfinity;
            terms.scale[r] = from_lse ? 1.0f : 0.0f;
            terms.delta[r] = grad_lse[r] = 0.0f;
        }
        for (int64_t r = 0; from_lse && r < rows; r += kTileColumns) {
            find_delta(b, h, token + r, smaller(kTileColumns, rows - r), left(out_rows, r * value_steps_),
                       terms.delta + r, w);
        }
        for (int64_t r = 0; r < rows; ++r) {
            const float lse = args_.lse.as<float>()[offset_of(args_.lse, b, h, token + r)];
            if (lse == -kInfinity) {
                terms.delta[r] = 0.0f;
                continue;
            }
            if (args_.grad_lse.present()) {
                grad_lse[r] = args_.grad_lse.as<float>()[offset_of(args_.grad_lse, b, h, token + r)];
            }
            if (!from_lse) continue;
            terms.base[r] = lse == kInfinity ? __builtin_nanf("") : static_cast<float>(lse * 1.4426950408889634);
            terms.delta[r] -= grad_lse[r];
        }
    }

    // Rows of a (batch, heads, token, dim) tensor as left and as right operands.
    void load_both(const Tensor& t, int64_t b, int64_t h, int64_t token, int64_t rows, Weight* left, P* right) const {
        const int64_t dim = t.size[3];
        const T* from = t.as<T>() + offset_of(t, b, h, token);
        copy_rows(from, t.stride[2], t.stride[3], rows, dim, kSteps * kWholeSteps<P>, kRows, left);
        if constexpr (kOnUnit<P>) {
            return pack_rows(from, t.stride[2], t.stride[3], rows, dim, kQueryRows / kSteps, right);
        }
        for (int64_t c = 0; c < dim; c += kTileColumns) {
            Operand<P>::pack(from + c * t.stride[3], t.stride[2], t.stride[3], rows, smaller(kTileColumns, dim - c),
                             right + c * (kQueryRows / kSteps));
        }
    }

    // The sums of grad_out * out, in the order in which y is summed: a query with one key has y = delta, exactly.
    void find_delta(int64_t b, int64_t h, int64_t token, int64_t rows, const P* out_rows, float* delta,
                    const Workspace& w) const {
        P *left = w.columns, *right = w.columns + value_steps_ * kTileColumns;
        auto pack = [&](const Tensor& t, P* panel) {
            Operand<P>::pack(t.as<T>() + offset_of(t, b, h, token), t.stride[3], t.stride[2], value_dim_, rows, panel);
        };
        pack(args_.out, right);
        if constexpr (kOnUnit<P>) {  // of a whole tile the diagonal
            float* tile = w.block.x;
            tile_product(value_steps_, out_rows, value_steps_, 1, right, kTileColumns, tile, kTileColumns, false);
            for (int64_t r = 0; r < rows; ++r) delta[r] = tile[r * kTileColumns + r];
            return;
        }
        pack(args_.grad_out, left);
        for (int64_t r = 0; r < kTileColumns; r += kLanes) {
            store(delta + r, column_products(value_steps_, left + r, right + r, kTileColumns));
        }
    }

    void write_queries(const Sequence& seq, int64_t b, const Queries& queries, MaskSums* mask_sums) const {
        write_rows(args_.grad_query, b, queries.h, seq.q_begin + queries.i0, queries.rows, queries.sums, head_columns_,
                   args_.scale);
        for (int64_t r = 0; mask_sums && r < queries.rows; ++r) {
            const float delta = queries.terms.delta[r], nan_or_zero = delta - delta;
            mask_sums->add_constant(b, queries.h, queries.i0 + r, queries.terms.grad_lse[r] + nan_or_zero);
        }
    }

    static void write_rows(const Tensor& to, int64_t b, int64_t h, int64_t token, int64_t rows, const float* from,
                           int64_t from_row, float factor) {
        const int64_t dim = to.size[3], stride = to.stride[3];
        for (int64_t r = 0; r < rows; ++r, from += from_row) {
            T* row = to.as<T>() + offset_of(to, b, h, token + r);
            int64_t c = 0;
            if (stride == 1) {
                for (; c + kLanes <= dim; c += kLanes) store(row + c, load(from + c) * factor);
            }
            for (; c < dim; ++c) from_float(from[c] * factor, row[c * stride]);
        }
    }

    // The same from (dim, kKeys) sums.
    static void write_columns(const Tensor& to, int64_t b, int64_t h, int64_t token, int64_t rows, const float* from,
                              float factor) {
        Tensor part = to;
        for (int64_t r = 0; r < rows; r += kLanes) {
            for (int64_t c = 0; c < to.size[3]; c += kLanes) {
                Vec square[kLanes];
                for (int i = 0; i < kLanes; ++i) square[i] = load(from + (c + i) * kKeys + r);
                transpose(square);
                part.data = to.as<T>() + c * to.stride[3];
                part.size[3] = smaller(kLanes, to.size[3] - c);
                write_rows(part, b, h, token + r, smaller(kLanes, rows - r), reinterpret_cast<const float*>(square),
                           kLanes, factor);
            }
        }
    }

    // ---- Keys -------------------------------------------------------------------------------------------------------

    void pack_keys(const Sequence& seq, int64_t b, int64_t kv_head, int64_t j0, int64_t count,
                   const Workspace& w) const {
        const Tensor &key = args_.key, &value = args_.value;
        const T* keys = key.as<T>() + offset_of(key, b, kv_head, seq.k_begin + j0);
        const T* values = value.as<T>() + offset_of(value, b, kv_head, seq.k_begin + j0);
        for (int64_t c = 0; c < count; c += kTileColumns) {
            const int64_t columns = smaller(kTileColumns, count - c);
            Operand<P>::pack(keys + c * key.stride[2], key.stride[3], key.stride[2], head_dim_, columns,
                             w.keys_across + c * head_steps_);
            Operand<P>::pack(values + c * value.stride[2], value.stride[3], value.stride[2], value_dim_, columns,
                             w.values_across + c * value_steps_);
        }
        for (int64_t c = 0; c < head_dim_; c += kTileColumns) {
            Operand<P>::pack(keys + c * key.stride[3], key.stride[2], key.stride[3], count,
                             smaller(kTileColumns, head_dim_ - c), w.keys + c * (kKeys / kSteps));
        }
    }

    // Adds up the parts' sums of keys begin … end - 1, in the first part's place, and writes the gradients.
    void write_keys(int64_t pair, int64_t begin, int64_t end, float* sums, const float* others, int64_t parts) const {
        const int64_t b = pair / args_.kv_heads, kv_head = pair % args_.kv_heads;
        const Sequence seq = sequence_of(args_, b);
        const int64_t columns = head_columns_ + value_columns_, stride = others - sums;
        end = smaller(end, seq.k_len);
        for (int64_t part = 1; part < parts; ++part) {
            for (int64_t x = begin * columns; x < round_up(larger(end, begin), kKeys) * columns; x += kLanes) {
                store(sums + x, load(sums + x) + load(sums + part * stride + x));
            }
        }
        for (int64_t j0 = begin; j0 < end; j0 += kKeys) {
            const float *grad_key = sums + j0 * columns, *grad_value = grad_key + kKeys * head_columns_;
            const int64_t count = smaller(kKeys, end - j0), token = seq.k_begin + j0;
            if constexpr (kOnUnit<P>) {
                write_columns(args_.grad_key, b, kv_head, token, count, grad_key, args_.scale);
                write_columns(args_.grad_value, b, kv_head, token, count, grad_value, 1.0f);
            } else {
                write_rows(args_.grad_key, b, kv_head, token, count, grad_key, head_columns_, args_.scale);
                write_rows(args_.grad_value, b, kv_head, token, count, grad_value, value_columns_, 1.0f);
            }
        }
        if (begin == 0 && seq.padded_before + seq.padded_after > 0) clear_padding(seq, b, kv_head);
    }

    void clear_padding(const Sequence& seq, int64_t b, int64_t kv_head) const {
        const auto clear = [&](const Tensor& grad, int64_t first, int64_t count) {
            for (int64_t token = first; token < first + count; ++token) {
                T* row = grad.as<T>() + offset_of(grad, b, kv_head, token);
                for (int64_t c = 0; c < grad.size[3]; ++c) row[c * grad.stride[3]] = T{};
            }
        };
        const int64_t before = seq.k_begin - seq.padded_before, after = seq.k_begin + seq.k_len;
        clear(args_.grad_key, before, seq.padded_before);
        clear(args_.grad_key, after, seq.padded_after);
        clear(args_.grad_value, before, seq.padded_before);
        clear(args_.grad_value, after, seq.padded_after);
    }

    // ---- A block ----------------------------------------------------------------------------------------------------

    void find_visible(Block& block) const {
        for (int64_t r = 0; r < block.rows; r += kRows) {
            const int64_t last = smaller(block.i0 + r + kRows, block.i0 + block.rows) - 1;
            const KeyRange range = visible_keys(args_, block.seq, block.i0 + r, last);
            const int64_t begin = larger(range.begin - block.j0, 0), end = smaller(range.end - block.j0, block.count);
            KeyRange &visible = block.visible[r / kRows], &computed = block.computed[r / kRows];
            visible = begin < end ? KeyRange{begin / kSteps * kSteps, end} : KeyRange{0, 0};
            computed = {visible.begin / kTileColumns * kTileColumns, round_up(visible.end, kTileColumns)};
        }
    }

    // x and y.
    void find_products(const Block& block, const Queries& queries, const Workspace& w) const {
        const BlockMemory<P>& m = w.block;
        for (int64_t c = 0; c < block.count; c += kTileColumns) {
            for (int64_t r = 0; r < block.rows; r += kRows) {
                const KeyRange computed = block.computed[r / kRows];
                if (c < computed.begin || c >= computed.end) continue;
                tile_product(head_steps_, left(queries.query_rows, r * head_steps_), head_steps_, 1,
                             w.keys_across + c * head_steps_, kTileColumns, m.x + r * kStride + c, kStride, false);
                tile_product(value_steps_, left(queries.out_rows, r * value_steps_), value_steps_, 1,
                             w.values_across + c * value_steps_, kTileColumns, m.y + r * kStride + c, kStride, false);
            }
        }
    }

    // The other three products.
    void add_gradients(const Block& block, const Queries& queries, float* grad_key, const Workspace& w) const {
        const BlockMemory<P>& m = w.block;
        constexpr int64_t kKeyRows = kOnUnit<P> ? kTileColumns : kRows;
        for (int64_t r = 0; r < block.count; r += kKeyRows) add_to_keys(block, r, kKeyRows, queries, grad_key, m);
        for (int64_t c = 0; c < head_columns_; c += kTileColumns) {
            for (int64_t r = 0; r < block.rows; r += kRows) {
                const KeyRange visible = kOnUnit<P> ? block.computed[r / kRows] : block.visible[r / kRows];
                if (visible.begin >= visible.end) continue;
                tile_product(ceil_div(visible.end - visible.begin, kSteps),
                             left(m.grad_rows, (r * kStride + visible.begin) / kSteps), kStride / kSteps, 1,
                             w.keys + c * (kKeys / kSteps) + visible.begin / kSteps * kTileColumns, kTileColumns,
                             queries.sums + r * head_columns_ + c, head_columns_, true);
            }
        }
    }

    // Keys r … r + count - 1 of the block, from the queries that may see any of them.
    void add_to_keys(const Block& block, int64_t r, int64_t count, const Queries& queries, float* grad_key,
                     const BlockMemory<P>& m) const {
        int64_t first = block.rows, last = 0;
        for (int64_t t = 0; t * kRows < block.rows; ++t) {
            if (block.visible[t].begin >= r + count || block.visible[t].end <= r) continue;
            first = smaller(first, t * kRows);
            last = smaller(block.rows, (t + 1) * kRows);
        }
        if (first >= last) return;
        const int64_t steps = round_up(ceil_div(last - first, kSteps), kWholeSteps<P>), from = first / kSteps;
        float* grad_value = grad_key + kKeys * head_columns_;
        if constexpr (kOnUnit<P>) {  // transposed, since weights and gradients lie as right operands do
            const auto add = [&](int64_t dim, const P* rows, const P* block_rows, float* sums) {
                for (int64_t c = 0; c < dim; c += kRows) {
                    tile_rows<P>(static_cast<int>(smaller(kRows, dim - c)), steps,
                                 rows + c * (kQueryRows / kSteps) + from, kQueryRows / kSteps, 1,
                                 block_rows + from * kStride + r, kStride, sums + c * kKeys + r, kKeys, true);
                }
            };
            add(value_dim_, queries.out_panels, m.weights, grad_value);
            add(head_dim_, queries.query_panels, m.grads, grad_key);
            return;
        }
        for (int64_t c = 0; c < value_columns_; c += kTileColumns) {
            tile_product(steps, m.weights + from * kStride + r, 1, kStride,
                         queries.out_panels + c * (kQueryRows / kSteps) + from * kTileColumns, kTileColumns,
                         grad_value + r * value_columns_ + c, value_columns_, true);
        }
        for (int64_t c = 0; c < head_columns_; c += kTileColumns) {
            tile_product(steps, m.grads + from * kStride + r, 1, kStride,
                         queries.query_panels + c * (kQueryRows / kSteps) + from * kTileColumns, kTileColumns,
                         grad_key + r * head_columns_ + c, head_columns_, true);
        }
    }

    static const P* left(const Weight* rows, int64_t element) { return reinterpret_cast<const P*>(rows) + element; }

    const AttentionBackward& args_;
    const ScoreGradient<P> gradient_;
    const int64_t group_, blocks_, unit_, parts_;
    const MaskGradient mask_gradient_;
    const int64_t head_dim_, value_dim_;
    const int64_t head_steps_, value_steps_;      // of a product over head_dim or value_dim
    const int64_t head_columns_, value_columns_;  // head_dim and value_dim in whole tiles
};

}  // namespace

void attention_backward(const AttentionBackward& given) {
    with_padding_as_ranges(given, given.grad_mask.present(), [](const AttentionBackward& args) {
        if (args.query.dtype == DType::kFloat32) {
            Backward<float, float>(args).run();
        } else if (args.query.dtype == DType::kFloat16) {
            Backward<Half, float>(args).run();
        } else if constexpr (kBFloat16Pairs) {
            Backward<BFloat16, BFloat16Pair>(args).run();
        } else {
            Backward<BFloat16, float>(args).run();
        }
    });
}

}  // namespace fastattn::FASTATTN_ISA
