// Attention of few queries to many keys, as in decoding: the formula of attention_forward.cpp, cut along the keys.
//
//     part c of the keys:   s = score(query . key^T);   m_c = max of s;   p = exp(s - m_c);   l_c = sum of p;
//                           o_c = p . value
//     merged, in order:     m = max of m_c;   l = sum of l_c exp(m_c - m);   out = sum of o_c exp(m_c - m) / l
//
//               part 0  part 1  part 2    A task is one part of the keys of a (batch, kv head), for all queries of all
//             +-------+-------+-------+   heads that share them: keys and values come from memory once, and are not
//     queries |  o_0  |  o_1  |  o_2  |   packed. Scores are dot products along head_dim, kLanes keys at a time, whose
//    (rows)   +-------+-------+-------+   sums a transposition brings into one vector.
//
// Parts have a fixed length, so that the result does not depend on the number of threads.
// Must move: keys and values once, (head_dim + value_dim) elements a key and kv head; 2 flops for each of their
// elements and query: memory bounds it.
#include "attention_forward.h"
#include "parallel.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kPart = 256;  // keys

template <class T>
class FewQueries {
  public:
    explicit FewQueries(const AttentionForward& args)
        : args_(args),
          score_(args),
          head_dim_(args.query.size[3]),
          value_dim_(args.value.size[3]),
          padded_head_dim_(round_up(head_dim_, kLanes)),
          group_(args.heads / args.kv_heads),
          parts_(larger(ceil_div(args.max_k, kPart), 1)) {}

    void run() const {
        const int64_t rows = args_.batch * args_.heads * args_.max_q, tasks = args_.batch * args_.kv_heads * parts_;
        const int threads = thread_count(larger(tasks, rows));
        const int64_t task_rows = group_ * args_.max_q;
        const Scratch<float> workspace(task_rows * (padded_head_dim_ + kPart) + result_size(), threads);
        const Scratch<float> results(rows * parts_ * result_size());
        parallel_for(tasks, [&](int64_t task, int thread) {
            const int64_t pair = task / parts_;
            float* query = workspace.of(thread);
            attend(pair / args_.kv_heads, pair % args_.kv_heads, task % parts_, query,
                   query + task_rows * padded_head_dim_, results.get());
        });
        parallel_for(rows, [&](int64_t row, int thread) {
            merge(row, results.get() + row * parts_ * result_size(), workspace.of(thread));
        });
    }

  private:
    // What a part leaves for a query: o, then m and l.
    int64_t result_size() const { return value_dim_ + 2; }

    void attend(int64_t b, int64_t kv_head, int64_t part, float* query, float* scores, float* results) const {
        const Sequence seq = sequence_of(args_, b);
        const int64_t rows = group_ * seq.q_len;
        const KeyRange seen = visible_keys(args_, seq, 0, seq.q_len - 1);
        const int64_t begin = larger(seen.begin, part * kPart), end = smaller(seen.end, (part + 1) * kPart);
        const int64_t count = larger(end - begin, 0);
        if (count > 0) {
            for (int64_t row = 0; row < rows; ++row) load_query(seq, b, kv_head, row, query + row * padded_head_dim_);
            dot_products(b, kv_head, seq.k_begin + begin, count, rows, query, scores);
        }
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t h = kv_head * group_ + row / seq.q_len, i = row % seq.q_len;
            float* result = results + (((b * args_.heads + h) * args_.max_q + i) * parts_ + part) * result_size();
            finish_part(seq, b, kv_head, h, i, begin, count, scores + row * kPart, result);
        }
    }

    void load_query(const Sequence& seq, int64_t b, int64_t kv_head, int64_t row, float* query) const {
        const Tensor& t = args_.query;
        const T* from = t.as<T>() + offset_of(t, b, kv_head * group_ + row / seq.q_len, seq.q_begin + row % seq.q_len);
        for (int64_t c = 0; c < padded_head_dim_; ++c)
            query[c] = c < head_dim_ ? to_float(from[c * t.stride[3]]) : 0.0f;
    }

    // scores[row * kPart + j] = query[row] . key[token + j]
    void dot_products(int64_t b, int64_t kv_head, int64_t token, int64_t count, int64_t rows, const float* query,
                      float* scores) const {
        const Tensor& t = args_.key;
        const T* first = t.as<T>() + offset_of(t, b, kv_head, token);
        for (int64_t j = 0; j < count; j += kLanes) {
            const T* keys[kLanes];  // beyond the last key, that one again
            for (int k = 0; k < kLanes; ++k) keys[k] = first + smaller(j + k, count - 1) * t.stride[2];
            for (int64_t row = 0; row < rows; ++row) {
                const float* q = query + row * padded_head_dim_;
                Vec sums[kLanes] = {};
                int64_t c = 0;
                for (; c + kLanes <= head_dim_; c += kLanes) {
                    const Vec right = load(q + c);
#pragma GCC unroll 16
                    for (int k = 0; k < kLanes; ++k) sums[k] += load(keys[k] + c) * right;
                }
                if (c < head_dim_) {
                    const Vec right = load(q + c);
#pragma GCC unroll 16
                    for (int k = 0; k < kLanes; ++k) sums[k] += load_partial(keys[k] + c, head_dim_ - c) * right;
                }
                transpose(sums);
#pragma GCC unroll 4
                for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
                    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
                }
                store(scores + row * kPart + j, sums[0]);
            }
        }
    }

    void finish_part(const Sequence& seq, int64_t b, int64_t kv_head, int64_t h, int64_t i, int64_t begin,
                     int64_t count, float* row, float* result) const {
        const int64_t columns = round_up(count, kLanes);
        const KeyRange range = visible_keys(args_, seq, i, i);
        if (count > 0 && !score_.plain()) score_.score_row(seq, b, h, i, begin, count, row);
        score_.exclude(range, begin, columns, row);
        const float factor = score_.plain() ? score_.factor() : 1.0f;
        const float top = greatest(row, columns) * factor;
        result[value_dim_] = top;
        result[value_dim_ + 1] = exponentials(factor, top, columns, row);
        if (score_.drops()) score_.drop_row(seq, args_.query.size[2], b, h, i, begin, columns, row);
        const int64_t first = larger(range.begin - begin, 0), last = smaller(range.end - begin, count);
        weigh_values(b, kv_head, seq.k_begin + begin + first, last - first, row + first, result);
    }

    // result = sum of weights[j] * value[token + j]
    void weigh_values(int64_t b, int64_t kv_head, int64_t token, int64_t count, const float* weights,
                      float* result) const {
        const Tensor& t = args_.value;
        const T* first = t.as<T>() + offset_of(t, b, kv_head, token);
        int64_t c = 0;
        for (; c + 8 * kLanes <= value_dim_; c += 8 * kLanes) {
            Vec sums[8] = {};
            for (int64_t j = 0; j < count; ++j) {
                const T* value = first + j * t.stride[2] + c;
                const Vec weight = splat(weights[j]);
#pragma GCC unroll 8
                for (int v = 0; v < 8; ++v) sums[v] += weight * load(value + v * kLanes);
            }
            for (int v = 0; v < 8; ++v) store(result + c + v * kLanes, sums[v]);
        }
        for (; c < value_dim_; c += kLanes) {
            const int64_t n = smaller(kLanes, value_dim_ - c);
            Vec sums[4] = {};
            int64_t j = 0;
            for (; j + 4 <= count; j += 4) {
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k)
                    sums[k] += weights[j + k] * part_of_row(first + (j + k) * t.stride[2] + c, n);
            }
            for (; j < count; ++j) sums[0] += weights[j] * part_of_row(first + j * t.stride[2] + c, n);
            store_partial(result + c, (sums[0] + sums[1]) + (sums[2] + sums[3]), n);
        }
    }

    static Vec part_of_row(const T* from, int64_t n) { return n == kLanes ? load(from) : load_partial(from, n); }

    void merge(int64_t row, const float* results, float* sum) const {
        const int64_t i = row % args_.max_q, h = row / args_.max_q % args_.heads, b = row / args_.max_q / args_.heads;
        const Sequence seq = sequence_of(args_, b);
        if (i >= seq.q_len) return;
        const int64_t size = result_size();
        float top = -kInfinity, total = 0.0f;
        for (int64_t part = 0; part < parts_; ++part) {
            const float m = results[part * size + value_dim_];
            if (m > top) top = m;
        }
        for (int64_t c = 0; c < value_dim_; ++c) sum[c] = 0.0f;
        for (int64_t part = 0; part < parts_; ++part) {
            const float *result = results + part * size, m = result[value_dim_], l = result[value_dim_ + 1];
            if (l == 0.0f) continue;  // no key; a part of NaN alone has m = -inf and l = NaN
            const float factor = m == top ? 1.0f : exp2_bounded(splat(m - top))[0];
            total += l * factor;
            for (int64_t c = 0; c < value_dim_; ++c) sum[c] += result[c] * factor;
        }
        finish_row<T>(args_, seq, b, h, i, sum, top, total);
    }

    const AttentionForward& args_;
    const Score score_;
    const int64_t head_dim_, value_dim_, padded_head_dim_, group_, parts_;
};

}  // namespace

void attention_few_queries(const AttentionForward& args) {
    if (args.query.dtype == DType::kFloat32) {
        FewQueries<float>(args).run();
    } else if (args.query.dtype == DType::kFloat16) {
        FewQueries<Half>(args).run();
    } else {
        FewQueries<BFloat16>(args).run();
    }
}

}  // namespace fastattn::FASTATTN_ISA
