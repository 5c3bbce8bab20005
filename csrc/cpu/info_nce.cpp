// The contrastive loss InfoNCE and its gradients; of many (queries, candidates) scores few exist at a time.
//
//     s     = query . [positive; negatives]^T / temperature        i: a query, c: a candidate, c = i its positive
//     loss  = mean over i of lse_i - s_ii                          lse_i = log of the sum over c of exp(s_ic)
//             symmetric: half of that, and half of the mean over positives c of lse'_c - s_cc, lse' the sum over i
//     u_ic  = (exp(s_ic - lse_i) + exp(s_ic - lse'_c) - 2 [c = i]) / (2 n temperature)         one-sided: its first half
//     grad_query = u . [positive; negatives],   grad_candidates = u^T . query,   grad_temperature = -sum of u s
//
//                    queries (at_once_)        Queries are taken kScores / candidates at a time, and their scores lie
//                   +------------------+       transposed, a candidate a row: so candidates are read as they lie in the
//                   |                  |       first product, u in the last, and the few queries are what these pack.
//      candidates   |     s ──► u      |       Blocks of candidates find the greatest score and the sum of exponentials
//                   |                  |       of each query, which are put together in order; those of a candidate are
//                   +------------------+       carried on from one chunk of queries to the next. u takes s's place.
//
// One-sided, a chunk is finished at once. Symmetric, its gradients wait for all chunks, and the scores are computed
// again, but for those of the last chunk, which is taken first. So there is one chunk alone, if its scores fit.
//
// Work, for p = queries candidates dim: 2 p flops without gradients, 6 p with, 8 p symmetric in several chunks; one or two
// exponentials a score (symmetric), twice that with gradients. Must move queries and candidates once, their gradients once;
// those of candidates once more a chunk.
#include <type_traits>

#include "kernels.h"
#include "math.h"
#include "product.h"
#include "row.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kScores = int64_t{1} << 20;  // at a time; symmetric, all of them if there are kAllScores at most
constexpr int64_t kAllScores = int64_t{4} << 20;
constexpr int64_t kFewestQueries = 256, kMostQueries = 1024;
constexpr int64_t kFewQueries = 4;   // whose scores are made by dot products
constexpr int64_t kBlock = 64;       // candidates
constexpr int64_t kTogether = 4;     // vectors of queries whose sums stay in registers
constexpr int64_t kAlone = 1 << 14;  // scores that are not worth waking threads for

template <class T>
class Contrast {
  public:
    explicit Contrast(const InfoNce& args)
        : args_(args),
          queries_(args.query.size[0]),
          extra_(args.negatives.present() ? args.negatives.size[0] : 0),
          candidates_(queries_ + extra_),
          dim_(args.query.size[1]),
          wanted_(args.grad_query.present() || args.grad_positive.present() || args.grad_negatives.present() ||
                  args.grad_temperature.present()),
          at_once_(chunk_size()),
          // An odd number of cache lines: rows of scores lie in different sets.
          stride_((ceil_div(at_once_, 16) | 1) * 16),
          blocks_(ceil_div(candidates_, kBlock)),
          parallel_(candidates_ * at_once_ > kAlone),
          // What a score or exponential counts for in the loss' gradient.
          share_(args.grad_loss / static_cast<double>(queries_ * (args.symmetric ? 2 : 1))),
          scores_(candidates_ * stride_),
          partial_(blocks_ * 2 * stride_),
          query_terms_(3 * (queries_ + stride_)),
          candidate_terms_(args.symmetric ? 3 * queries_ : 0),
          own_(queries_),
          slope_sums_(blocks_),
          query_sums_(kSummedApart && extra_ > 0 && args.grad_query.present() ? at_once_ * dim_ : 0),
          candidate_sums_(kSummedApart && at_once_ < queries_ ? candidates_ * dim_ : 0) {}

    void run() const {
        for (int64_t block = 0; block < blocks_; ++block) slope_sums_.get()[block] = 0.0;
        for (int64_t c = 0; args_.symmetric && c < queries_; ++c) {
            candidate_top()[c] = -kInfinity;
            candidate_sum()[c] = 0.0f;
        }
        const int64_t last = (ceil_div(queries_, at_once_) - 1) * at_once_;
        for (int64_t first = 0; first < queries_; first += at_once_) {
            find_scores(first);
            find_terms(first);
            if (wanted_ && !args_.symmetric) add_gradients(first, first == 0, first == last);
        }
        const double loss = finish_loss();
        *args_.loss.as<float>() = static_cast<float>(loss);
        if (wanted_ && args_.symmetric) {
            for (int64_t first = last; first >= 0; first -= at_once_) {
                if (first != last) find_scores(first);
                add_gradients(first, first == last, first == 0);
            }
        }
        if (args_.grad_temperature.present()) write_temperature_gradient();
    }

  private:
    // Sums of gradients over several products are made in float32: in the gradient itself, or else in scratch.
    static constexpr bool kSummedApart = !std::is_same_v<T, float>;

    int64_t chunk_size() const {
        if (args_.symmetric && wanted_ && queries_ * candidates_ <= kAllScores) return queries_;
        const int64_t most = smaller(kMostQueries, larger(kFewestQueries, kScores / candidates_));
        return smaller(queries_, round_up(ceil_div(queries_, ceil_div(queries_, most)), kLanes));
    }

    // Of each query, or positive: the greatest score; the sum of exp(s - top); and share / (temperature * sum).
    float* query_top() const { return query_terms_.get(); }
    float* query_sum() const { return query_top() + queries_ + stride_; }
    float* query_factor() const { return query_sum() + queries_ + stride_; }
    float* candidate_top() const { return candidate_terms_.get(); }
    float* candidate_sum() const { return candidate_top() + queries_; }
    float* candidate_factor() const { return candidate_sum() + queries_; }

    float* partial_top(int64_t block) const { return partial_.get() + block * 2 * stride_; }
    float* partial_sum(int64_t block) const { return partial_top(block) + stride_; }

    int64_t count(int64_t first) const { return smaller(at_once_, queries_ - first); }
    float* scores(int64_t c) const { return scores_.get() + c * stride_; }
    T* gradients(int64_t c) const { return reinterpret_cast<T*>(scores(c)); }  // u, in the scores' place

    static FASTATTN_INLINE Vec exponential(Vec score, Vec top) { return exp2_bounded((score - top) * kLog2E); }
    static FASTATTN_INLINE Vec finite_base(Vec top) { return select(top == splat(-kInfinity), Vec{}, top); }

    // ---- Scores -----------------------------------------------------------------------------------------------------

    void find_scores(int64_t first) const {
        find_scores_of(args_.positive, queries_, 0, first);
        if (extra_ > 0) find_scores_of(args_.negatives, extra_, queries_, first);
    }

    void find_scores_of(const Tensor& candidates, int64_t number, int64_t place, int64_t first) const {
        // A quotient to within a unit in the last place, without division: the inverse in two parts.
        const double inverse = 1.0 / static_cast<double>(args_.temperature);
        const float high = static_cast<float>(inverse);
        const double rest = inverse - static_cast<double>(high);
        const float low = static_cast<float>(rest);
        auto divided = [&](Vec sum) FASTATTN_BODY {
            const Vec near = sum * splat(high), quotient = multiply_add(sum, splat(low), near);
            return select(abs(near) < splat(kInfinity), quotient, near);
        };
        const int64_t queries = count(first), padded = round_up(queries, kLanes);
        // Whole vectors are read: those of no query take no part.
        auto fill_up = [&](int64_t c) {
            for (int64_t r = queries; r < padded; ++r) scores(place + c)[r] = -kInfinity;
        };
        const Matrix<T> query = matrix_of<T>(args_.query).from(first, 0), candidate = matrix_of<T>(candidates);
        if (queries <= kFewQueries) {
            gemm(queries, number, dim_, query, candidate.transposed(),
                 [&](int64_t r, int64_t c, int64_t n, const float* sums) {
                     for (int64_t i = 0; i < n; i += kLanes) {
                         const Vec score = divided(load(sums + i));
                         for (int64_t j = 0; j < smaller(kLanes, n - i); ++j) {
                             scores(place + c + i + j)[r] = score[j];
                             if (r == 0) fill_up(c + i + j);
                         }
                     }
                 });
            return;
        }
        gemm(number, queries, dim_, candidate, query.transposed(),
             [&](int64_t c, int64_t r, int64_t n, const float* sums) {
                 float* to = scores(place + c) + r;
                 each_vector(0, n, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
                     store(to + i, divided(load(sums + i)), lanes);
                 });
                 if (r + n == queries) fill_up(c);
             });
    }

    // ---- Greatest scores and sums of exponentials -------------------------------------------------------------------

    void find_terms(int64_t first) const {
        const int64_t queries = count(first), padded = round_up(queries, kLanes);
        gemm_detail::for_tasks(parallel_, blocks_, [&](int64_t block, int) {
            const int64_t begin = block * kBlock, end = smaller(begin + kBlock, candidates_);
            int64_t r = 0;
            for (; r + kTogether * kLanes <= padded; r += kTogether * kLanes) find_partial<kTogether>(block, r);
            for (; r < padded; r += kLanes) find_partial<1>(block, r);
            for (int64_t c = begin; args_.symmetric && c < smaller(end, queries_); ++c) add_to_candidate(c, padded);
        });
        for (int64_t r = 0; r < queries; ++r) own_.get()[first + r] = scores(first + r)[r];
        gemm_detail::for_tasks(parallel_, padded / kLanes, [&](int64_t vector, int) {
            const int64_t r = vector * kLanes;
            Vec top = splat(-kInfinity), sum{};
            for (int64_t block = 0; block < blocks_; ++block) top = max(load(partial_top(block) + r), top);
            const Vec base = finite_base(top);
            for (int64_t block = 0; block < blocks_; ++block) {
                sum += load(partial_sum(block) + r) * exponential(load(partial_top(block) + r), base);
            }
            store(query_top() + first + r, top);
            store(query_sum() + first + r, sum);
            store(query_factor() + first + r, splat(static_cast<float>(share_ / args_.temperature)) / sum);
        });
    }

    // Of kVectors vectors of queries, over the candidates of a block.
    template <int kVectors>
    FASTATTN_INLINE void find_partial(int64_t block, int64_t r) const {
        const int64_t begin = block * kBlock, end = smaller(begin + kBlock, candidates_);
        Vec top[kVectors], base[kVectors], sum[kVectors] = {};
        for (int v = 0; v < kVectors; ++v) top[v] = splat(-kInfinity);
        for (int64_t c = begin; c < end; ++c) {
            for (int v = 0; v < kVectors; ++v) top[v] = max(load(scores(c) + r + v * kLanes), top[v]);
        }
        for (int v = 0; v < kVectors; ++v) base[v] = finite_base(top[v]);
        for (int64_t c = begin; c < end; ++c) {
            for (int v = 0; v < kVectors; ++v) sum[v] += exponential(load(scores(c) + r + v * kLanes), base[v]);
        }
        for (int v = 0; v < kVectors; ++v) {
            store(partial_top(block) + r + v * kLanes, top[v]);
            store(partial_sum(block) + r + v * kLanes, sum[v]);
        }
    }

    // What the chunk's queries add to the terms of a positive.
    FASTATTN_INLINE void add_to_candidate(int64_t c, int64_t padded) const {
        const float* row = scores(c);
        Vec tops[4], sums[4] = {};
        for (Vec& top : tops) top = splat(-kInfinity);
        each_vector(0, padded, [&](int64_t i, int k, auto) FASTATTN_BODY { tops[k] = max(load(row + i), tops[k]); });
        const Vec before = splat(candidate_top()[c]);
        const float top = reduce_max(max(max(max(tops[0], tops[1]), max(tops[2], tops[3])), before));
        const Vec base = finite_base(splat(top));
        each_vector(0, padded,
                    [&](int64_t i, int k, auto) FASTATTN_BODY { sums[k] += exponential(load(row + i), base); });
        const float sum = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
        candidate_top()[c] = top;
        candidate_sum()[c] = candidate_sum()[c] * exponential(before, base)[0] + sum;
    }

    double finish_loss() const {
        double loss = sum_of_losses(query_top(), query_sum());
        if (!args_.symmetric) return loss / static_cast<double>(queries_);
        for (int64_t c = 0; c < queries_; ++c) {
            candidate_factor()[c] = static_cast<float>(share_ / args_.temperature / candidate_sum()[c]);
        }
        loss += sum_of_losses(candidate_top(), candidate_sum());
        return loss / static_cast<double>(2 * queries_);
    }

    double sum_of_losses(const float* top, const float* sum) const {
        double loss = 0.0;
        for (int64_t i = 0; i < queries_; ++i) loss += top[i] + log(static_cast<double>(sum[i])) - own_.get()[i];
        return loss;
    }

    // ---- Gradients --------------------------------------------------------------------------------------------------

    void add_gradients(int64_t first, bool begins, bool ends) const {
        const int64_t queries = count(first);
        gemm_detail::for_tasks(parallel_, blocks_, [&](int64_t block, int) {
            double slope = 0.0;
            for (int64_t c = block * kBlock; c < smaller((block + 1) * kBlock, candidates_); ++c) {
                slope += args_.symmetric && c < queries_ ? find_gradients<true>(c, first, queries)
                                                         : find_gradients<false>(c, first, queries);
            }
            slope_sums_.get()[block] += slope;
        });
        const Matrix<T> u{gradients(0), stride_ * static_cast<int64_t>(sizeof(float) / sizeof(T)), 1};
        const Matrix<T> query = matrix_of<T>(args_.query).from(first, 0);
        if (args_.grad_query.present()) {
            const bool both = extra_ > 0;
            if (both) {
                add_product(queries, extra_, u.from(queries_, 0).transposed(), matrix_of<T>(args_.negatives),
                            args_.grad_query, first, query_sums_.get(), true, false);
            }
            add_product(queries, queries_, u.transposed(), matrix_of<T>(args_.positive), args_.grad_query, first,
                        query_sums_.get(), !both, true);
        }
        if (args_.grad_positive.present()) {
            add_product(queries_, queries, u, query, args_.grad_positive, 0, candidate_sums_.get(), begins, ends);
        }
        if (extra_ > 0 && args_.grad_negatives.present()) {
            float* sums = candidate_sums_.get() + (at_once_ < queries_ ? queries_ * dim_ : 0);
            add_product(extra_, queries, u.from(queries_, 0), query, args_.grad_negatives, 0, sums, begins, ends);
        }
    }

    // u of a candidate; returns the sum of u s.
    template <bool kBoth>
    FASTATTN_INLINE double find_gradients(int64_t c, int64_t first, int64_t queries) const {
        const float* from = scores(c);
        T* to = gradients(c);
        const Vec column_top = splat(kBoth ? candidate_top()[c] : 0.0f);
        const Vec column_factor = splat(kBoth ? candidate_factor()[c] : 0.0f);
        const bool with_own = c >= first && c < first + queries;
        const float own = with_own ? from[c - first] : 0.0f;
        auto weight = [&](Vec score, int64_t query) FASTATTN_BODY {
            Vec value = exponential(score, load(query_top() + query)) * load(query_factor() + query);
            if constexpr (kBoth) value += exponential(score, column_top) * column_factor;
            return value;
        };
        Vec slopes[4] = {};
        // In whole vectors, the last partial for the sum alone: the lanes beyond hold no query.
        each_vector(0, queries, [&](int64_t r, int k, auto lanes) FASTATTN_BODY {
            const Vec score = load(from + r);
            const Vec value = weight(score, first + r);
            slopes[k] += inside(value * score, lanes);
            store(to + r, value);
        });
        double slope = reduce_add((slopes[0] + slopes[1]) + (slopes[2] + slopes[3]));
        if (with_own) {
            const double share = share_ * (kBoth ? 2.0 : 1.0) / args_.temperature;
            Vec lane = weight(splat(own), c);  // of query c, in lane 0
            from_float(lane[0] - static_cast<float>(share), to[c - first]);
            slope -= share * own;
        }
        return slope;
    }

    // rows first … of out = [what was added before +] a . b.
    void add_product(int64_t rows, int64_t depth, Matrix<T> a, Matrix<T> b, const Tensor& out, int64_t first,
                     float* sums_apart, bool begins, bool ends) const {
        auto epilogue = [&](int64_t row, int64_t column, int64_t n, const float* sums) {
            T* to = out.as<T>() + (first + row) * out.stride[0] + column;
            float* apart = sums_apart + row * dim_ + column;
            each_vector(0, n, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
                Vec value = load(sums + i);
                if (!begins) value += kSummedApart ? load(apart + i, lanes) : load(to + i, lanes);
                if (kSummedApart && !ends) {
                    store(apart + i, value, lanes);
                } else {
                    store(to + i, value, lanes);
                }
            });
        };
        gemm(rows, dim_, depth, a, b, epilogue, kSummedApart ? written(sums_apart, dim_) : written<T>(out, first));
    }

    void write_temperature_gradient() const {
        double sum = 0.0;
        for (int64_t block = 0; block < blocks_; ++block) sum += slope_sums_.get()[block];
        *args_.grad_temperature.as<float>() = static_cast<float>(-sum);
    }

    const InfoNce& args_;
    const int64_t queries_, extra_, candidates_, dim_;
    const bool wanted_;
    const int64_t at_once_, stride_;  // queries of a chunk; floats from one candidate's scores to the next
    const int64_t blocks_;
    const bool parallel_;
    const double share_;
    const Scratch<float> scores_, partial_, query_terms_, candidate_terms_, own_;
    const Scratch<double> slope_sums_;
    const Scratch<float> query_sums_, candidate_sums_;
};

}  // namespace

void info_nce(const InfoNce& args) {
    with_dtype(args.query.dtype,
               [&](auto* element) { Contrast<std::remove_pointer_t<decltype(element)>>(args).run(); });
}

}  // namespace fastattn::FASTATTN_ISA
