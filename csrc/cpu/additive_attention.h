// What the two directions of additive attention share: the projected rows, tanh of their sums, and the scores.
//
//     a = w_query . query,   b = w_key . key                           rows of `hidden` numbers
//     score_ij = sum over h of v_h tanh(a_ih + b_jh)
//
// The (query, key, hidden) tensor of tanhs is what makes additive attention slow, so it never exists, and an element of
// it costs no exponential: with E = e^2a and F = e^2b, found once a row,
//
//     tanh(a + b) = (E F - 1) / (E F + 1) = m / (m + 2)
//
//     kWide      m = E F - 1                          off by a unit in the last place of 1, at most
//     kSmall     m = (E - 1) F + (F - 1)              exact to its own last places, if |a| <= kSmallReach: E - 1 and F - 1
//                                                     are found as such
//     kDirect    tanh of a + b                        where E, F or E F might leave float32's range: |a| + |b| > kReach
//
// So a tile of scores asks for the largest |a| and |b| of its rows. Infinity and NaN are large; they come out as they do
// from the formula.
//
// Scores are made in tiles, hidden units in lanes:
//
//                         kKeys rows of F, F - 1        A tile has as many sums as a vector has lanes, so that one
//                         +----+----+----+----+         reduction gives all of them. kQueries * kKeys multiply-adds and
//     kQueries rows  ===  |    |    |    |    |         quotients are made for each vector of its kQueries + 2 kKeys
//     of E - 1       ===  |    |    |    |    |         rows, which lie in the first- and second-level caches.
//                         +----+----+----+----+
//
// Work: 2 (queries query_dim + keys key_dim) hidden flops for the projections, and about seven instructions for each of
// the queries keys hidden elements: those bind. Memory is linear in queries and keys, for one block of scores at a time
// (Chunks).
#pragma once

#include <type_traits>

#include "math.h"
#include "product.h"
#include "score.h"

namespace fastattn::FASTATTN_ISA {

namespace additive {

enum Form { kSmall, kWide, kDirect };
constexpr float kSmallReach = 1.0f, kReach = 40.0f;
constexpr int64_t kKeyBlock = 64;              // keys that are skipped, or found to be within reach, together
constexpr int64_t kScores = int64_t{1} << 20;  // at a time, for all queries of a chunk
constexpr int64_t kWorthThreads = 1 << 16;     // elements of (query, key, hidden)
constexpr int kTileQueries = kLanes == 16 ? 4 : 2;

// Rows lie an odd number of cache lines apart, so that a column of them is spread over a cache's sets.
constexpr int64_t kLine = 16;
inline int64_t row_stride(int64_t columns) { return (ceil_div(columns, kLine) | 1) * kLine; }

// The projected rows of queries or keys, and the exponentials of twice their elements.
class Projected {
  public:
    Projected(int64_t rows, int64_t hidden)
        : rows_(rows),
          hidden_(hidden),
          stride_(row_stride(hidden)),
          less_one_(rows * stride_),
          value_(rows * stride_),
          reach_(rows) {}

    // Of `plain`, (rows, hidden) contiguous, which is to outlive this.
    void find(const float* plain) {
        plain_ = plain;
        constexpr int64_t kRows = 8;
        gemm_detail::for_tasks(rows_ * hidden_ > int64_t{1} << 14, ceil_div(rows_, kRows), [&](int64_t task, int) {
            for (int64_t row = task * kRows; row < smaller((task + 1) * kRows, rows_); ++row) find_row(row);
        });
    }

    int64_t stride() const { return stride_; }
    const float* plain(int64_t row) const { return plain_ + row * hidden_; }
    const float* value(int64_t row) const { return value_.get() + row * stride_; }        // e^2x
    const float* less_one(int64_t row) const { return less_one_.get() + row * stride_; }  // e^2x - 1

    // What tanh_of_sum takes of a query.
    template <Form kForm>
    const float* factor(int64_t row) const {
        return kForm == kSmall ? less_one(row) : value(row);
    }

    // The largest magnitude in some rows; infinity if there is NaN.
    float reach(int64_t row, int64_t count) const {
        Vec most{};
        each_vector_in_turn(
            count, [&](int64_t i, auto lanes) FASTATTN_BODY { most = max(most, load(reach_.get() + row + i, lanes)); });
        return reduce_max(most);
    }

  private:
    void find_row(int64_t row) const {
        const float* from = plain(row);
        float *value = value_.get() + row * stride_, *less_one = less_one_.get() + row * stride_;
        Vec most{};
        each_vector_in_turn(hidden_, [&](int64_t i, auto lanes) FASTATTN_BODY {
            const Vec x = load(from + i, lanes);
            const Exponential exponential = exp_and_less_one(x + x);
            // Whole vectors: beyond the row, where x is zero, tanh of all sums is.
            store(less_one + i, exponential.less_one);
            store(value + i, exponential.value);
            most = max(most, select(x == x, abs(x), splat(kInfinity)));
        });
        reach_.get()[row] = reduce_max(most);
    }

    const int64_t rows_, hidden_, stride_;
    const Scratch<float> less_one_, value_, reach_;
    const float* plain_ = nullptr;
};

// tanh(a + b), from e^2b, e^2b - 1 and, as `a`, e^2a or (kSmall) e^2a - 1; kDirect from a and b. Where only 16 bits of the
// result are kept, the quotient may be a rough one.
template <Form kForm, bool kExact>
FASTATTN_INLINE Vec tanh_of_sum(Vec a, Vec b, Vec b_less_one) {
    if constexpr (kForm == kDirect) return tanh(a + b);
    const Vec m = multiply_add(a, b, kForm == kSmall ? b_less_one : splat(-1.0f));
    return quotient<kExact>(m, m + splat(2.0f));
}

// rows' projection, sums of `weight` (hidden, depth) with each row, in float32, contiguous.
template <class T>
inline void project(const Tensor& rows, const Tensor& weight, float* to) {
    const int64_t hidden = weight.size[0];
    gemm(rows.size[0], hidden, rows.size[1], matrix_of<T>(rows), matrix_of<T>(weight).transposed(),
         [=](int64_t row, int64_t column, int64_t count, const float* sums) {
             float* out = to + row * hidden + column;
             each_vector(0, count,
                         [&](int64_t i, int, auto lanes) FASTATTN_BODY { store(out + i, load(sums + i), lanes); });
         });
}

// The rows of one batch element of a (batch, rows, columns) tensor, from `first` on.
template <class T>
inline Matrix<T> matrix_at(const Tensor& t, int64_t b, int64_t first) {
    return Matrix<T>{t.as<T>() + b * t.stride[0], t.stride[1], t.stride[2]}.from(first, 0);
}

// A part of the queries, whose scores exist at the same time: all queries of some batch elements, or some of one.
struct Chunk {
    int64_t batch, batches, first, queries;

    int64_t row(int64_t b, int64_t i) const { return (b - batch) * queries + i - first; }
};

// The cut depends on the shape alone.
class Chunks {
  public:
    Chunks(int64_t batch, int64_t queries, int64_t score_stride)
        : batch_(batch), queries_(queries), rows_(larger(kScores / larger(score_stride, 1) / kLine, 1) * kLine) {}

    int64_t most_rows() const { return smaller(rows_, batch_ * queries_); }

    template <class Body>
    void each(const Body& body) const {
        if (queries_ == 0) return;
        const int64_t batches = larger(rows_ / queries_, 1);
        for (int64_t b = 0; b < batch_; b += batches) {
            for (int64_t i = 0; i < queries_; i += rows_) {
                body(Chunk{b, smaller(batches, batch_ - b), i, smaller(rows_, queries_ - i)});
            }
        }
    }

    // body(b, i, count, thread) for strips of at most kTileQueries queries of a chunk, in parallel.
    template <class Body>
    static void each_strip(const Chunk& chunk, bool parallel, const Body& body) {
        const int64_t strips = ceil_div(chunk.queries, kTileQueries);
        gemm_detail::for_tasks(parallel, chunk.batches * strips, [&](int64_t task, int thread) {
            const int64_t r = task % strips * kTileQueries;
            body(chunk.batch + task / strips, chunk.first + r, smaller(kTileQueries, chunk.queries - r), thread);
        });
    }

  private:
    const int64_t batch_, queries_, rows_;
};

// Rows of scores, one after the other from the chunk's first query on.
template <class T>
class Scores {
    static constexpr bool kExact = std::is_same_v<T, float>;

  public:
    // `v` in the tensors' dtype.
    Scores(const AttentionScore& args, const Tensor& v, const Projected& a, const Projected& b)
        : args_(args), score_(args), a_(a), b_(b), hidden_(v.size[0]), v_(a.stride()) {
        each_vector_in_turn(
            hidden_, [&](int64_t i, auto lanes) FASTATTN_BODY { store(v_.get() + i, load(v.as<T>() + i, lanes)); });
    }

    const Score& score() const { return score_; }
    const float* v() const { return v_.get(); }

    // Whether a bool mask leaves some of these queries some of these keys.
    bool visible(int64_t b, int64_t i, int64_t queries, int64_t j, int64_t keys) const {
        return !args_.mask.present() || !score_.all_off(b, 0, i, queries, j, keys);
    }

    // How the tanhs of these queries and keys are made.
    Form form(int64_t b, int64_t i, int64_t queries, int64_t j, int64_t keys) const {
        const float reach = a_.reach(b * args_.max_q + i, queries);
        if (!(reach + b_.reach(b * args_.max_k + j, keys) <= kReach)) return kDirect;
        return reach <= kSmallReach ? kSmall : kWide;
    }

    // The masked scores of queries i … i + count - 1, `stride` apart, in whole vectors with -inf beyond the last key.
    void find(int64_t b, int64_t i, int64_t count, float* rows, int64_t stride) const {
        const int64_t keys = args_.max_k;
        for (int64_t j = 0; j < keys; j += kKeyBlock) {
            const int64_t some = smaller(kKeyBlock, keys - j);
            if (!visible(b, i, count, j, some)) continue;  // the mask will say so
            const Form form = this->form(b, i, count, j, some);
            const int together = count == kTileQueries ? kTileQueries : 1;
            for (int64_t r = 0; r < count; r += together)
                find_block(form, together, b, i + r, j, some, rows + r * stride + j, stride);
        }
        for (int64_t r = 0; r < count; ++r) {
            float* row = rows + r * stride;
            if (!score_.plain()) score_.score_row(sequence_of(args_, b), b, 0, i + r, 0, keys, row);
            for (int64_t c = keys; c < round_up(keys, kLanes); ++c) row[c] = -kInfinity;
        }
    }

    // They become exponentials (softmax.h), kNoWeight where a key takes no part; returns their sum, which is made in parts.
    float find_exponentials(float* row) const {
        constexpr int64_t kPart = 256;
        const float factor = score_.plain() ? score_.factor() : 1.0f;
        const int64_t columns = round_up(args_.max_k, kLanes);
        const float top = greatest(row, columns) * factor;
        float total = 0.0f;
        for (int64_t c = 0; c < columns; c += kPart) {
            total += exponentials<true>(factor, top, smaller(kPart, columns - c), row + c);
        }
        return total;
    }

  private:
    void find_block(Form form, int queries, int64_t b, int64_t i, int64_t j, int64_t keys, float* rows,
                    int64_t stride) const {
        const int64_t a_row = b * args_.max_q + i, b_row = b * args_.max_k + j;
        if (form == kDirect) {
            for (int q = 0; q < queries; ++q) find_directly(a_row + q, b_row, keys, rows + q * stride);
        } else if (queries == 1) {
            form == kSmall ? find_tiles<kSmall, 1>(a_row, b_row, keys, rows, stride)
                           : find_tiles<kWide, 1>(a_row, b_row, keys, rows, stride);
        } else {
            form == kSmall ? find_tiles<kSmall, kTileQueries>(a_row, b_row, keys, rows, stride)
                           : find_tiles<kWide, kTileQueries>(a_row, b_row, keys, rows, stride);
        }
    }

    template <Form kForm, int kQueries>
    __attribute__((noinline)) void find_tiles(int64_t a_row, int64_t b_row, int64_t keys, float* rows,
                                              int64_t stride) const {
        constexpr int kKeys = kLanes / kQueries;
        for (int64_t c = 0; c < keys; c += kKeys) {
            const int64_t some = smaller(kKeys, keys - c);
            float sums[kLanes];
            store(sums, tile<kForm, kQueries>(a_row, b_row + c, some));
            for (int q = 0; q < kQueries; ++q) {
                for (int64_t k = 0; k < some; ++k) rows[q * stride + c + k] = sums[q * kKeys + k];
            }
        }
    }

    // Lane q * kKeys + k: the score of query q and key k, counted from these rows on. Keys beyond `keys` are the first
    // one again.
    template <Form kForm, int kQueries>
    FASTATTN_INLINE Vec tile(int64_t a_row, int64_t b_row, int64_t keys) const {
        constexpr int kKeys = kLanes / kQueries;
        const float *a = a_.factor<kForm>(a_row), *b[kKeys], *b_less_one[kKeys];
        for (int k = 0; k < kKeys; ++k) {
            b[k] = b_.value(b_row + (k < keys ? k : 0));
            b_less_one[k] = b_.less_one(b_row + (k < keys ? k : 0));
        }
        const int64_t stride = a_.stride();
        Vec sum[kLanes] = {};
        for (int64_t h = 0; h < hidden_; h += kLanes) {
            Vec left[kQueries];
            for (int q = 0; q < kQueries; ++q) left[q] = load(a + q * stride + h);
            const Vec v = load(v_.get() + h);
#pragma GCC unroll 16
            for (int k = 0; k < kKeys; ++k) {
                const Vec value = load(b[k] + h), less_one = load(b_less_one[k] + h);
#pragma GCC unroll 4
                for (int q = 0; q < kQueries; ++q) {
                    const Vec tanh = tanh_of_sum<kForm, kExact>(left[q], value, less_one);
                    sum[q * kKeys + k] = multiply_add(v, tanh, sum[q * kKeys + k]);
                }
            }
        }
        return sums_of(sum);
    }

    __attribute__((noinline)) void find_directly(int64_t a_row, int64_t b_row, int64_t keys, float* row) const {
        const float* left = a_.plain(a_row);
        for (int64_t k = 0; k < keys; ++k) {
            const float* right = b_.plain(b_row + k);
            Vec sum{};
            each_vector_in_turn(hidden_, [&](int64_t h, auto lanes) FASTATTN_BODY {
                const Vec x = load(left + h, lanes) + load(right + h, lanes);
                sum += inside(load(v_.get() + h) * tanh(x), lanes);
            });
            row[k] = reduce_add(sum);
        }
    }

    const AttentionScore& args_;
    const Score score_;
    const Projected &a_, &b_;
    const int64_t hidden_;
    const Scratch<float> v_;  // in float32, zeros up to whole vectors
};

}  // namespace additive
}  // namespace fastattn::FASTATTN_ISA
