// Attention of few queries to many keys, as in decoding: the formula of attention_forward.cpp, cut along the keys.
//
//     part c of the keys:   s = score(query . key^T);   m_c = max of s;   p = exp(s - m_c);   l_c = sum of p;
//                           o_c = p . value
//     merged, in order:     m = max of m_c;   l = sum of l_c exp(m_c - m);   out = sum of o_c exp(m_c - m) / l
//
//               part 0  part 1  part 2    A task is one part of the keys of a (batch, kv head), for all queries of all
//             +-------+-------+-------+   heads that share them: keys and values come from memory once, as they lie.
//     queries |  o_0  |  o_1  |  o_2  |   Its length follows from the shape, so that no result depends on the number of
//    (rows)   +-------+-------+-------+   threads.
//
//     a part's keys, in streams of `stretch`:   | 0 4 8 …   | 1 5 9 …   | 2 6 10 …   | 3 7 11 …   | the last three
//
// Four keys are multiplied side by side, to load a query's elements once for all of them. They come from four places of
// the part, since a page must be read in order: four neighbours side by side come from memory at less than half the
// rate, as the machine's prefetching does not see a stream in them. Scores and weights stay in the order in which keys
// are read, the numbers in the drawing, but for what depends on a key's place (masks, slopes, dropout).
//
//     scores:  kRows queries x kLanes / kRows keys at a time, dot products along head_dim in kLanes accumulators, whose
//              lanes' sums make one vector
//     values:  a turn of keys x all columns, two queries at a time; the others find the values in the first-level cache
//
// Bfloat16 is multiplied in pairs where the machine does that: for the scores as it lies along head_dim; a pair of
// values is one column of two keys, the even columns of two rows and then the odd ones.
//
// Must move: keys and values once, (head_dim + value_dim) elements a key and kv head; 2 flops for each of their
// elements and query: memory bounds it, at the rate of a copy where a head has keys of its own, up to two queries a key
// about; with four the products take as long as the reading, two thirds of the multiply-add units' rate, and the two
// overlap in part.
#include "attention_forward.h"
#include "matrix.h"
#include "parallel.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kMostPart = 1024, kLeastPart = 256;  // keys: a long stream is read faster
constexpr int64_t kManyTasks = 32;
constexpr int64_t kMostScores = 1 << 15;    // of a part, to stay in the second-level cache
constexpr int64_t kWorthThreads = 1 << 16;  // elements: read while a thread wakes
constexpr int64_t kStreams = 4;
constexpr int64_t kTurn = 8;                         // keys of each stream
constexpr int kMostRows = kLanes / kStreams;         // queries of a tile of scores
constexpr int kValueVectors = kLanes == 16 ? 8 : 4;  // of a tile of values, for each of two queries

// The keys of a part, or their values: stream s holds keys s * stretch … (s + 1) * stretch - 1, and the `rest` (fewer
// than kStreams) follow. Position p, the p-th key read, is the (p / kStreams)-th of stream p % kStreams.
struct Streams {
    explicit Streams(int64_t count) : stretch(count / kStreams), rest(count % kStreams) {}
    int64_t position_of(int64_t key) const {
        return key < kStreams * stretch ? key % stretch * kStreams + key / stretch : key;
    }
    int64_t stretch, rest;
};

template <class T>
class FewQueries {
    typedef typename Multiplied<T>::Step Step;
    typedef typename Multiplied<T>::Element Element;
    static constexpr bool kPairs = Multiplied<T>::kPairs;
    static constexpr int64_t kSteps = Multiplied<T>::kSteps;
    static constexpr int64_t kUnit = kLanes * kSteps;  // elements of a vector in memory

  public:
    FewQueries(const AttentionForward& args, const NewTokens& tokens)
        : args_(args),
          tokens_(tokens),
          score_(args),
          head_dim_(args.query.size[3]),
          value_dim_(args.value.size[3]),
          query_size_(round_up(head_dim_, kUnit)),
          value_size_(round_up(value_dim_, kUnit)),
          group_(args.heads / args.kv_heads),
          tile_rows_(smaller(group_ * args.max_q > 2 ? 4 : group_ * args.max_q, kMostRows)),
          task_rows_(round_up(group_ * args.max_q, tile_rows_)),
          part_(part_length(args)),
          parts_(larger(ceil_div(args.max_k, part_), 1)) {}

    void run() const {
        const int64_t rows = args_.batch * args_.heads * args_.max_q, tasks = args_.batch * args_.kv_heads * parts_;
        const int64_t elements = args_.batch * args_.kv_heads * args_.max_k * (head_dim_ + value_dim_);
        const int threads = thread_count(larger(tasks, rows));
        const Scratch<float> workspace(workspace_size(), threads);
        const Scratch<float> results(tasks * task_rows_ * result_size());
        gemm_detail::for_tasks(elements > kWorthThreads, tasks, [&](int64_t task, int thread) {
            attend(task / parts_ / args_.kv_heads, task / parts_ % args_.kv_heads, task % parts_, workspace.of(thread),
                   results.get() + task * task_rows_ * result_size());
        });
        gemm_detail::for_tasks(rows * parts_ * value_dim_ > kWorthThreads, rows,
                               [&](int64_t row, int thread) { merge(row, results.get(), workspace.of(thread)); });
    }

  private:
    static int64_t part_length(const AttentionForward& args) {
        const int64_t rows = args.heads / args.kv_heads * args.max_q, pairs = args.batch * args.kv_heads;
        int64_t length = kMostPart;
        while (length > kLeastPart &&
               (pairs * ceil_div(args.max_k, length) < kManyTasks || rows * length > kMostScores)) {
            length /= 2;
        }
        return length;
    }

    // What a part leaves for a query: o (in the order of its accumulators), then m and l.
    int64_t result_size() const { return value_size_ + 2; }
    int64_t workspace_size() const { return task_rows_ * (query_size_ + 2 * part_) + 2 * value_size_; }

    void attend(int64_t b, int64_t kv_head, int64_t part, float* workspace, float* results) const {
        Element* query = reinterpret_cast<Element*>(workspace);
        float* scores = workspace + task_rows_ * query_size_;
        Element* weights = reinterpret_cast<Element*>(kPairs ? scores + task_rows_ * part_ : scores);
        const Sequence seq = sequence_of(args_, b);
        const int64_t rows = group_ * seq.q_len;
        if (rows == 0) return;  // an empty sequence beside others
        const KeyRange seen = visible_keys(args_, seq, 0, seq.q_len - 1);
        const int64_t begin = larger(seen.begin, part * part_), end = smaller(seen.end, (part + 1) * part_);
        if (begin >= end) {
            for (int64_t row = 0; row < rows; ++row) {
                float* result = results + row * result_size();
                result[value_size_] = -kInfinity, result[value_size_ + 1] = 0.0f;
            }
            return;
        }
        const int64_t count = end - begin;
        T* zeros = reinterpret_cast<T*>(workspace + task_rows_ * (query_size_ + 2 * part_));
        for (int64_t c = 0; c < value_dim_; ++c) zeros[c] = T{};
        for (int64_t row = 0; row < task_rows_; ++row) {
            load_query(seq, b, kv_head, row < rows ? row : 0, query + row * query_size_);
        }
        find_scores(args_.key.as<T>() + offset_of(args_.key, b, kv_head, seq.k_begin + begin), count, query, scores);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t h = kv_head * group_ + row / seq.q_len, i = row % seq.q_len;
            softmax(seq, b, h, i, begin, count, scores + row * part_, weights + row * part_,
                    results + row * result_size() + value_size_);
        }
        weigh_values(args_.value.as<T>() + offset_of(args_.value, b, kv_head, seq.k_begin + begin), count, weights,
                     zeros, results);
    }

    void load_query(const Sequence& seq, int64_t b, int64_t kv_head, int64_t row, Element* query) const {
        const Tensor& t = args_.query;
        const T* from = t.as<T>() + offset_of(t, b, kv_head * group_ + row / seq.q_len, seq.q_begin + row % seq.q_len);
        for (int64_t c = head_dim_; c < query_size_; ++c) from_float(0.0f, query[c]);
        gemm_detail::copy_row(from, t.stride[3], head_dim_, query);
        tokens_.turn(b, row % seq.q_len, query);
    }

    // ---- Scores -----------------------------------------------------------------------------------------------------

    // scores[row * part_ + p] = query[row] . the key at position p
    void find_scores(const T* key, int64_t count, const Element* query, float* scores) const {
        const Streams streams(count);
        for (int64_t p = 0; p < count; p += kLanes / tile_rows_) {
            for (int64_t row = 0; row < task_rows_; row += tile_rows_) {
                const Step* q = reinterpret_cast<const Step*>(query + row * query_size_);
                dot_products(key, streams, p, q, scores + row * part_ + p);
            }
        }
    }

    void dot_products(const T* key, Streams streams, int64_t p, const Step* query, float* scores) const {
        if constexpr (kMostRows >= 4) {
            if (tile_rows_ == 4) return dot_products_of<4>(key, streams, p, query, scores);
        }
        if constexpr (kMostRows >= 2) {
            if (tile_rows_ == 2) return dot_products_of<2>(key, streams, p, query, scores);
        }
        dot_products_of<1>(key, streams, p, query, scores);
    }

    // For the positions from p on; beyond the last, its key again.
    template <int kRows>
    void dot_products_of(const T* key, Streams streams, int64_t p, const Step* query, float* scores) const {
        constexpr int kKeys = kLanes / kRows;
        const int64_t stride = args_.key.stride[2], query_row = query_size_ / kSteps;
        Vec sums[kLanes];
#pragma GCC unroll 4
        for (int group = 0; group < kKeys / kStreams; ++group) {
            const int64_t at = p / kStreams + group;
            const T* keys[kStreams];
            for (int k = 0; k < kStreams; ++k) {
                const int64_t last = kStreams * streams.stretch + smaller(k, streams.rest - 1);
                keys[k] = key + (at < streams.stretch ? k * streams.stretch + at : last) * stride;
            }
            Vec sum[kRows][kStreams] = {};
            auto add = [&](int64_t c, auto load_key) FASTATTN_BODY {
                Vec left[kStreams];
#pragma GCC unroll 4
                for (int k = 0; k < kStreams; ++k) left[k] = load_key(keys[k] + c);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) {
                    const Vec right = detail::load_step(query + r * query_row + c / kSteps);
#pragma GCC unroll 4
                    for (int k = 0; k < kStreams; ++k)
                        sum[r][k] = detail::add_product(sum[r][k], query, left[k], right);
                }
            };
            int64_t c = 0;
            for (; c + kUnit <= head_dim_; c += kUnit) {
                add(c, [](const T* from) FASTATTN_BODY { return gemm_detail::load_steps(from); });
            }
            if (c < head_dim_) {
                const int64_t rest = head_dim_ - c;
                add(c, [rest](const T* from) FASTATTN_BODY { return gemm_detail::load_last_steps(from, rest); });
            }
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
                for (int k = 0; k < kStreams; ++k) sums[r * kKeys + group * kStreams + k] = sum[r][k];
            }
        }
        const Vec found = sums_of(sums);
        for (int r = 0; r < kRows; ++r) {
            memcpy(scores + r * part_, reinterpret_cast<const float*>(&found) + r * kKeys, kKeys * sizeof(float));
        }
    }

    // The scores of a row become weights, zeros beyond the last key; m and l go to `statistics`.
    void softmax(const Sequence& seq, int64_t b, int64_t h, int64_t i, int64_t begin, int64_t count, float* row,
                 Element* weights, float* statistics) const {
        const int64_t columns = round_up(count, kLanes);
        const Streams streams(count);
        if (!score_.plain()) {
            in_order(streams, row, [&](float* scores) { score_.score_row(seq, b, h, i, begin, count, scores); });
        }
        // Nearly all of them, or, of a part that only other queries see, none.
        const KeyRange range = visible_keys(args_, seq, i, i);
        const int64_t before = smaller(range.begin - begin, count), behind = larger(range.end - begin, 0);
        for (int64_t j = 0; j < before; ++j) row[streams.position_of(j)] = -kInfinity;
        for (int64_t j = behind; j < count; ++j) row[streams.position_of(j)] = -kInfinity;
        for (int64_t p = count; p < columns; ++p) row[p] = -kInfinity;
        const float factor = score_.plain() ? score_.factor() : 1.0f;
        const float top = greatest(row, columns) * factor;
        statistics[0] = top;
        statistics[1] = exponentials(factor, top, columns, row);
        if (score_.drops()) {
            in_order(streams, row,
                     [&](float* scores) { score_.drop_row(seq, args_.query.size[2], b, h, i, begin, count, scores); });
        }
        if constexpr (kPairs) {
            for (int64_t c = 0; c < columns; c += kLanes) store_operand(weights + c, load(row + c));
        }
    }

    // change(scores) on the scores of a row in the order of their keys.
    template <class Change>
    static void in_order(Streams streams, float* row, const Change& change) {
        float scores[kMostPart];
        const int64_t whole = kStreams * streams.stretch;
        for (int64_t at = 0; at < streams.stretch; ++at) {
            for (int64_t s = 0; s < kStreams; ++s) scores[s * streams.stretch + at] = row[at * kStreams + s];
        }
        for (int64_t p = whole; p < whole + streams.rest; ++p) scores[p] = row[p];
        change(scores);
        for (int64_t at = 0; at < streams.stretch; ++at) {
            for (int64_t s = 0; s < kStreams; ++s) row[at * kStreams + s] = scores[s * streams.stretch + at];
        }
        for (int64_t p = whole; p < whole + streams.rest; ++p) row[p] = scores[p];
    }

    // ---- Values -----------------------------------------------------------------------------------------------------

    // results[row] = sum of weights[row][p] * the value at position p. `zeros` stands for those beyond the last.
    void weigh_values(const T* value, int64_t count, const Element* weights, const T* zeros, float* results) const {
        for (int64_t row = 0; row < task_rows_; ++row) {
            for (int64_t c = 0; c < value_size_; c += kLanes) store(results + row * result_size() + c, Vec{});
        }
        const Streams streams(count);
        const int64_t stride = args_.value.stride[2];
        const T* rows[kStreams];
        for (int64_t s = 0; s < kStreams; ++s) rows[s] = value + s * streams.stretch * stride;
        for (int64_t at = 0; at < streams.stretch; at += kTurn) {
            add_values(rows, smaller(kTurn, streams.stretch - at), weights + at * kStreams, results);
            for (const T*& row : rows) row += kTurn * stride;
        }
        if (streams.rest == 0) return;
        value += kStreams * streams.stretch * stride;
        for (int64_t s = 0; s < kStreams; ++s) rows[s] = s < streams.rest ? value + s * stride : zeros;
        add_values(rows, 1, weights + kStreams * streams.stretch, results);
    }

    // `turn` values of each stream.
    void add_values(const T* const* rows, int64_t turn, const Element* weights, float* results) const {
        int64_t row = 0;
        auto next = [&](auto add, int count) {
            const Step* w = reinterpret_cast<const Step*>(weights + row * part_);
            add(w, results + row * result_size());
            row += count;
        };
        while (row + 2 <= task_rows_) {
            next([&](const Step* w, float* to) { add_columns<2, kValueVectors>(rows, 0, turn, w, to); }, 2);
        }
        if (row < task_rows_) next([&](const Step* w, float* to) { add_columns<1, 8>(rows, 0, turn, w, to); }, 1);
    }

    // Columns c … value_dim - 1, kVectors accumulators of each row at a time while there are as many.
    template <int kRows, int kVectors>
    void add_columns(const T* const* rows, int64_t c, int64_t turn, const Step* weights, float* results) const {
        for (; c + kVectors * kLanes <= value_dim_; c += kVectors * kLanes) {
            add_columns_of<kRows, kVectors>(rows, c, turn, weights, results,
                                            [](const T* from) FASTATTN_BODY { return gemm_detail::load_steps(from); });
        }
        if (c == value_dim_) return;
        if constexpr (kVectors > kSteps) {
            add_columns<kRows, kVectors / 2>(rows, c, turn, weights, results);
        } else {
            const int64_t rest = value_dim_ - c;
            add_columns_of<kRows, kVectors>(rows, c, turn, weights, results, [rest](const T* from) FASTATTN_BODY {
                return gemm_detail::load_last_steps(from, rest);
            });
        }
    }

    template <int kRows, int kVectors, class Load>
    void add_columns_of(const T* const* rows, int64_t c, int64_t turn, const Step* weights, float* results,
                        const Load& load_value) const {
        const int64_t stride = args_.value.stride[2];
        const T* from[kStreams];
        for (int s = 0; s < kStreams; ++s) from[s] = rows[s] + c;
        Vec sum[kRows][kVectors] = {};
        for (int64_t at = 0; at < turn; ++at) {
#pragma GCC unroll 4
            for (int s = 0; s < kStreams; s += kSteps) {
                Vec right[kVectors];
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; v += kSteps) {
                    const Vec one = load_value(from[s] + v * kLanes);
                    if constexpr (kPairs) {
                        const Bits low = Bits(one), high = Bits(load_value(from[s + 1] + v * kLanes));
                        right[v] = Vec((low & 0xffffu) | (high << 16));
                        right[v + 1] = Vec((low >> 16) | (high & 0xffff0000u));
                    } else {
                        right[v] = one;
                    }
                }
#pragma GCC unroll 2
                for (int r = 0; r < kRows; ++r) {
                    const Step* weight = weights + (r * part_ + at * kStreams + s) / kSteps;
                    const Vec left = detail::splat_step(weight);
#pragma GCC unroll 8
                    for (int v = 0; v < kVectors; ++v)
                        sum[r][v] = detail::add_product(sum[r][v], weight, left, right[v]);
                }
            }
            for (const T*& row : from) row += stride;
        }
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
                float* place = results + r * result_size() + c + v * kLanes;
                store(place, load(place) + sum[r][v]);
            }
        }
    }

    // ---- All parts of a row -----------------------------------------------------------------------------------------

    void merge(int64_t row, const float* results, float* sum) const {
        const int64_t i = row % args_.max_q, h = row / args_.max_q % args_.heads, b = row / args_.max_q / args_.heads;
        const Sequence seq = sequence_of(args_, b);
        if (i >= seq.q_len) return;
        const int64_t step = task_rows_ * result_size();
        results += (b * args_.kv_heads + h / group_) * parts_ * step + (h % group_ * seq.q_len + i) * result_size();
        float top = -kInfinity, total = 0.0f;
        for (int64_t part = 0; part < parts_; ++part) {
            const float m = results[part * step + value_size_];
            if (m > top) top = m;
        }
        for (int64_t c = 0; c < value_size_; ++c) sum[c] = 0.0f;
        for (int64_t part = 0; part < parts_; ++part) {
            const float *result = results + part * step, m = result[value_size_], l = result[value_size_ + 1];
            if (l == 0.0f) continue;  // no key; a part of NaN alone has m = -inf and l = NaN
            const float factor = m == top ? 1.0f : exp2_bounded(splat(m - top))[0];
            total += l * factor;
            for (int64_t c = 0; c < value_size_; c += kLanes) store(sum + c, load(sum + c) + load(result + c) * factor);
        }
        if constexpr (kPairs) {
            float* in_order = sum + value_size_;
            for (int64_t c = 0; c < value_dim_; ++c) {
                const int64_t within = c % kUnit;
                in_order[c] = sum[c - within + within % 2 * kLanes + within / 2];
            }
            sum = in_order;
        }
        finish_row<T>(args_, score_, seq, b, h, i, sum, top, total);
    }

    const AttentionForward& args_;
    const NewTokens& tokens_;
    const Score score_;
    const int64_t head_dim_, value_dim_;
    const int64_t query_size_, value_size_;  // in whole vectors
    const int64_t group_, tile_rows_;
    const int64_t task_rows_;     // queries of a task, in whole tiles
    const int64_t part_, parts_;  // keys of a part; parts of a (batch, kv head)
};

}  // namespace

void attention_few_queries(const AttentionForward& args, const NewTokens& tokens) {
    with_dtype(args.query.dtype,
               [&](auto* element) { FewQueries<std::remove_pointer_t<decltype(element)>>(args, tokens).run(); });
}

}  // namespace fastattn::FASTATTN_ISA
