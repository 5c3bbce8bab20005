// Additive attention (Bahdanau, Cho and Bengio, 2015), backward.
//
//     t_ijh = tanh(a_ih + b_jh)                                        a, b: the projections that the forward kept
//     y = grad_out . value^T,   w = dropout(p),   g = dropout(y)        p: the softmax of the scores, made again
//     u_ij = p_ij (g_ij - sum over j of p g)                            the scores' gradient, and the mask's
//     grad_a_ih = v_h sum over j of u_ij (1 - t_ijh^2)                  grad_b_jh: the same, over i
//     grad_v_h  = sum over i, j of u_ij t_ijh
//     grad_query = grad_a . w_query,   grad_w_query = grad_a^T . query,   likewise key's;   grad_value = w^T . grad_out
//
// A chunk of queries at a time (additive_attention.h). Strips of them, in parallel, become w and u, a row at a time; then
// a task has one batch element and a few vectors of hidden units, which it alone adds to:
//
//                     F, F - 1 and grad_b, a vector of each key        For a few queries (kTileQueries) at a time, whose
//                    +--+--+--+--+--+--+--                            E - 1 and sums of grad_a stay in registers, all
//     E - 1    ====  |  |  |  |  |  |  |  …  ──► grad_a               keys pass by; what they add to a key's grad_b is
//                    +--+--+--+--+--+--+--                            added up first. Sums over keys are made in blocks.
//                       │  │  │  ▼
//                        grad_b            grad_v: of a batch element, added up at the end
//
// Work: about nine instructions for each of the queries keys hidden elements, the forward's for the scores again, and the
// products: 4 queries keys value_dim flops, and twice those of the projections. Must move: all tensors once, a chunk's u
// once for each task, and the exponentials as often as there are strips of queries, from the caches.
#include <string.h>

#include "additive_attention.h"
#include "column_sums.h"

namespace fastattn::FASTATTN_ISA {
namespace {

using namespace additive;

template <class T>
class Backward {
    static constexpr bool kExact = std::is_same_v<T, float>;
    static constexpr int64_t kInFloat = sizeof(float) / sizeof(T);
    static constexpr int64_t kMaskRun = 32;            // rows whose mask gradients are added up before
    static constexpr int64_t kTaskElements = 1 << 17;  // of (query, key, hidden), at least, in a task

  public:
    explicit Backward(const AdditiveAttentionBackward& args)
        : args_(args),
          batch_(args.batch),
          queries_(args.max_q),
          keys_(args.max_k),
          hidden_(args.v.size[0]),
          dim_(args.value.size[2]),
          through_tanh_(args.grad_query.present() || args.grad_key.present() || args.grad_w_query.present() ||
                        args.grad_w_key.present() || args.grad_v.present()),
          a_(batch_ * queries_, hidden_),
          b_(batch_ * keys_, hidden_),
          scores_(args, args.v, a_, b_),
          score_stride_(row_stride(keys_)),
          columns_(round_up(keys_, kLanes)),
          chunks_(batch_, queries_, score_stride_),
          parallel_(batch_ * queries_ * keys_ * larger(hidden_, 1) > kWorthThreads),
          x_(chunks_.most_rows() * score_stride_),
          y_(chunks_.most_rows() * score_stride_),
          dropped_(scores_.score().drops() ? columns_ : 0, thread_count(int64_t{1} << 30)),
          value_sums_(chunks_.most_rows() < queries_ ? keys_ * dim_ : 0),
          a_grads_(through_tanh_ ? batch_ * queries_ * a_.stride() : 0),
          b_grads_(through_tanh_ ? batch_ * keys_ * a_.stride() : 0),
          v_grads_(through_tanh_ ? batch_ * a_.stride() : 0) {}

    void run() {
        a_.find(args_.projected_query.as<const float>());
        b_.find(args_.projected_key.as<const float>());
        if (through_tanh_) {
            fill_zeros(b_grads_.get(), batch_ * keys_, a_.stride());
            fill_zeros(v_grads_.get(), batch_, a_.stride());
        }
        if (args_.grad_mask.present()) fill_zeros(args_.grad_mask.as<float>(), 1, args_.grad_mask.numel());
        if (queries_ == 0 && args_.grad_value.present() && args_.grad_value.numel() > 0) {
            memset(args_.grad_value.data, 0, static_cast<size_t>(args_.grad_value.numel()) * sizeof(T));
        }
        chunks_.each([&](const Chunk& chunk) {
            find_score_gradients(chunk);
            if (args_.grad_value.present()) add_value_gradient(chunk);
            if (args_.grad_mask.present()) add_mask_gradient(chunk);
            if (through_tanh_) add_projection_gradients(chunk);
        });
        if (through_tanh_) finish();
    }

  private:
    float* x(const Chunk& chunk, int64_t b, int64_t i) const { return x_.get() + chunk.row(b, i) * score_stride_; }
    float* y(const Chunk& chunk, int64_t b, int64_t i) const { return y_.get() + chunk.row(b, i) * score_stride_; }

    void fill_zeros(float* to, int64_t rows, int64_t columns) const {
        gemm_detail::for_tasks(parallel_, rows, [&](int64_t row, int) {
            for (int64_t c = 0; c < columns; ++c) to[row * columns + c] = 0.0f;
        });
    }

    // ---- Weights and gradients of scores ----------------------------------------------------------------------------

    void find_score_gradients(const Chunk& chunk) const {
        for (int64_t b = chunk.batch; b < chunk.batch + chunk.batches; ++b) {
            gemm(chunk.queries, keys_, dim_, matrix_at<T>(args_.grad_out, b, chunk.first),
                 matrix_at<T>(args_.value, b, 0).transposed(),
                 [&, b](int64_t row, int64_t column, int64_t count, const float* sums) {
                     float* to = y(chunk, b, chunk.first + row) + column;
                     each_vector(0, count, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
                         store(to + i, load(sums + i), lanes);
                     });
                 });
        }
        Chunks::each_strip(chunk, parallel_, [&](int64_t b, int64_t i, int64_t count, int thread) {
            scores_.find(b, i, count, x(chunk, b, i), score_stride_);
            for (int64_t r = i; r < i + count; ++r) weigh(b, r, x(chunk, b, r), y(chunk, b, r), dropped_.of(thread));
        });
    }

    // From scores and y to w, in T, and u.
    void weigh(int64_t b, int64_t i, float* x, float* y, float* dropped) const {
        const Score& score = scores_.score();
        for (int64_t c = keys_; c < columns_; ++c) y[c] = 0.0f;
        const float total = scores_.find_exponentials(x);
        const float* left = x;  // what dropout leaves of them
        if (score.drops()) {
            for (int64_t c = 0; c < columns_; c += kLanes) store(dropped + c, load(x + c));
            score.drop_row(sequence_of(args_, b), queries_, b, 0, i, 0, keys_, dropped);
            for (int64_t c = 0; c < columns_; c += kLanes) {
                store(y + c, select(has_no_weight(load(dropped + c)), Vec{}, load(y + c) * score.drop_scale()));
            }
            left = dropped;
        }
        const Vec scale = splat(total == 0.0f ? 0.0f : 1.0f / total);
        const Vec mean = splat(product_of(x, y)) * scale;
        T* weights = reinterpret_cast<T*>(x);  // in the scores' place, which narrower weights trail behind
        for (int64_t c = 0; c < columns_; c += kLanes) {
            const Vec exponential = load(x + c), kept = load(left + c);
            const Vec grad = exponential * scale * (load(y + c) - mean);
            store(y + c, select(has_no_weight(exponential), Vec{}, grad));
            store(weights + c, select(has_no_weight(kept), Vec{}, kept * scale));
        }
    }

    // The sum of x y over the keys that take part, made in parts.
    float product_of(const float* x, const float* y) const {
        constexpr int64_t kPart = 1024;
        float total = 0.0f;
        for (int64_t begin = 0; begin < columns_; begin += kPart) {
            Vec sums[4] = {};
            each_vector(begin, smaller(begin + kPart, columns_), [&](int64_t c, int k, auto) FASTATTN_BODY {
                sums[k] += select(has_no_weight(load(x + c)), Vec{}, load(x + c) * load(y + c));
            });
            total += reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
        }
        return total;
    }

    void add_value_gradient(const Chunk& chunk) const {
        const bool begins = chunk.first == 0, ends = chunk.first + chunk.queries == queries_;
        for (int64_t b = chunk.batch; b < chunk.batch + chunk.batches; ++b) {
            const Matrix<T> weights{reinterpret_cast<const T*>(x(chunk, b, chunk.first)), score_stride_ * kInFloat, 1};
            gemm(keys_, dim_, chunk.queries, weights.transposed(), matrix_at<T>(args_.grad_out, b, chunk.first),
                 [&, b](int64_t row, int64_t column, int64_t count, const float* sums) {
                     T* to = args_.grad_value.as<T>() + (b * keys_ + row) * dim_ + column;
                     float* apart = value_sums_.get() + row * dim_ + column;
                     each_vector(0, count, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
                         const Vec value = begins ? load(sums + i) : load(sums + i) + load(apart + i, lanes);
                         if (ends) {
                             store(to + i, value, lanes);
                         } else {
                             store(apart + i, value, lanes);
                         }
                     });
                 });
        }
    }

    // A task has some keys, and goes through the chunk's queries in order.
    void add_mask_gradient(const Chunk& chunk) const {
        const Tensor& grad = args_.grad_mask;
        auto target = [&](int64_t b, int64_t i) {
            return grad.as<float>() +
                   ((grad.size[0] == 1 ? 0 : b) * grad.size[2] + (grad.size[2] == 1 ? 0 : i)) * grad.size[3];
        };
        const bool constant = grad.size[3] == 1;
        gemm_detail::for_tasks(parallel_, constant ? 1 : ceil_div(keys_, kKeyBlock), [&](int64_t task, int) {
            const int64_t j = task * kKeyBlock, count = constant ? keys_ : smaller(kKeyBlock, keys_ - j);
            float sums[kKeyBlock] = {}, *to = nullptr;
            int64_t run = 0;
            auto flush = [&] {
                for (int64_t c = 0; run > 0 && c < count; ++c) to[j + c] += sums[c], sums[c] = 0.0f;
                run = 0;
            };
            for (int64_t r = 0; r < chunk.batches * chunk.queries; ++r) {
                const int64_t b = chunk.batch + r / chunk.queries, i = chunk.first + r % chunk.queries;
                const float* from = y(chunk, b, i) + j;
                if (constant) {
                    // It shifts all scores of a row alike, which changes nothing: NaN or else zero.
                    float sum = 0.0f;
                    for (int64_t c = 0; c < count; ++c) sum += from[c];
                    *target(b, i) += sum - sum;
                    continue;
                }
                if (to != target(b, i) || run == kMaskRun) flush();
                to = target(b, i), ++run;
                each_vector_in_turn(count, [&](int64_t c, auto lanes) FASTATTN_BODY {
                    store(sums + c, load(sums + c, lanes) + load(from + c, lanes), lanes);
                });
            }
            if (!constant) flush();
        });
    }

    // ---- Through tanh -----------------------------------------------------------------------------------------------

    void add_projection_gradients(const Chunk& chunk) const {
        const int64_t vectors = ceil_div(hidden_, kLanes);
        const int64_t some = larger(kTaskElements / larger(chunk.queries * keys_ * kLanes, 1), 1);
        const int64_t groups = ceil_div(vectors, some);
        gemm_detail::for_tasks(parallel_, chunk.batches * groups, [&](int64_t task, int) {
            const int64_t b = chunk.batch + task / groups, first = task % groups * some;
            for (int64_t vector = first; vector < smaller(first + some, vectors); ++vector) {
                int64_t i = chunk.first;
                const int64_t end = chunk.first + chunk.queries;
                for (; i + kTileQueries <= end; i += kTileQueries) sweep<kTileQueries>(chunk, b, i, vector * kLanes);
                for (; i < end; ++i) sweep<1>(chunk, b, i, vector * kLanes);
            }
        });
    }

    template <int kQueries>
    struct Sums {
        Vec a[kQueries], v[kQueries];
    };

    // Queries i … i + kQueries - 1 and the hidden units from h on, against all keys.
    template <int kQueries>
    void sweep(const Chunk& chunk, int64_t b, int64_t i, int64_t h) const {
        const float* u = y(chunk, b, i);
        const int64_t stride = a_.stride(), row = b * queries_ + i;
        Sums<kQueries> total = {};
        for (int64_t j = 0; j < keys_; j += kKeyBlock) {
            const int64_t count = smaller(kKeyBlock, keys_ - j);
            if (!scores_.visible(b, i, kQueries, j, count)) continue;
            const Form form = scores_.form(b, i, kQueries, j, count);
            const auto add = form == kSmall  ? &Backward::add_keys<kSmall, kQueries>
                             : form == kWide ? &Backward::add_keys<kWide, kQueries>
                                             : &Backward::add_keys<kDirect, kQueries>;
            const Sums<kQueries> sums = (this->*add)(b, row, j, count, h, u + j);
            for (int q = 0; q < kQueries; ++q) total.a[q] += sums.a[q], total.v[q] += sums.v[q];
        }
        const Vec v = load(scores_.v() + h);
        Vec of_v{};
        for (int q = 0; q < kQueries; ++q) {
            store(a_grads_.get() + (row + q) * stride + h, total.a[q] * v);
            of_v += total.v[q];
        }
        float* v_grad = v_grads_.get() + b * stride + h;
        store(v_grad, load(v_grad) + of_v);
    }

    template <Form kForm, int kQueries>
    __attribute__((noinline)) Sums<kQueries> add_keys(int64_t b, int64_t row, int64_t j, int64_t count, int64_t h,
                                                      const float* u) const {
        const int64_t lanes = smaller(kLanes, hidden_ - h);
        Vec left[kQueries];
        for (int q = 0; q < kQueries; ++q) {
            left[q] = kForm == kDirect ? load(a_.plain(row + q) + h, Tail{lanes})
                                       : load(a_.template factor<kForm>(row + q) + h);
        }
        Sums<kQueries> sums = {};
        float* b_grad = b_grads_.get() + (b * keys_ + j) * a_.stride() + h;
        for (int64_t k = 0; k < count; ++k, b_grad += a_.stride()) {
            const int64_t key = b * keys_ + j + k;
            Vec right, less_one{}, of_key{};
            if constexpr (kForm == kDirect) {
                right = load(b_.plain(key) + h, Tail{lanes});
            } else {
                right = load(b_.value(key) + h), less_one = load(b_.less_one(key) + h);
            }
#pragma GCC unroll 4
            for (int q = 0; q < kQueries; ++q) {
                const Vec grad = splat(u[q * score_stride_ + k]);
                const Vec t = tanh_of_sum<kForm, kExact>(left[q], right, less_one);
                const Vec inner = grad * multiply_add(-t, t, splat(1.0f));
                sums.a[q] += inner;
                sums.v[q] = multiply_add(grad, t, sums.v[q]);
                of_key += inner;
            }
            store(b_grad, load(b_grad) + of_key);
        }
        return sums;
    }

    // ---- Through the projections ------------------------------------------------------------------------------------

    void finish() const {
        const Matrix<T> a_grads{a_grads_.get(), a_.stride(), 1};
        const Matrix<T> b_grads = narrow_key_gradients();
        find_products(a_grads, batch_ * queries_, args_.query, args_.w_query, args_.grad_query, args_.grad_w_query);
        find_products(b_grads, batch_ * keys_, args_.key, args_.w_key, args_.grad_key, args_.grad_w_key);
        if (!args_.grad_v.present()) return;
        const ColumnSums sums(batch_, hidden_, hidden_);
        sums.add_rows([&](int64_t b, int, float* sum) {
            const float* from = v_grads_.get() + b * a_.stride();
            each_vector_in_turn(hidden_, [&](int64_t h, auto lanes) FASTATTN_BODY {
                store(sum + h, load(sum + h, lanes) + load(from + h, lanes), lanes);
            });
        });
        sums.write(args_.grad_v);
    }

    // The sums of grad_b, times v, in T: in their own place.
    Matrix<T> narrow_key_gradients() const {
        const int64_t stride = a_.stride();
        gemm_detail::for_tasks(parallel_, batch_ * keys_, [&](int64_t row, int) {
            float* from = b_grads_.get() + row * stride;
            T* to = reinterpret_cast<T*>(from);
            for (int64_t h = 0; h < round_up(hidden_, kLanes); h += kLanes) {
                store(to + h, load(from + h) * load(scores_.v() + h));
            }
        });
        return {reinterpret_cast<const T*>(b_grads_.get()), stride * kInFloat, 1};
    }

    void find_products(Matrix<T> grads, int64_t rows, const Tensor& x, const Tensor& weight, const Tensor& grad_x,
                       const Tensor& grad_weight) const {
        const int64_t depth = x.size[1];
        if (grad_x.present()) product_into<T>(rows, depth, hidden_, grads, matrix_of<T>(weight), grad_x);
        if (grad_weight.present()) {
            product_into<T>(hidden_, depth, rows, grads.transposed(), matrix_of<T>(x), grad_weight);
        }
    }

    const AdditiveAttentionBackward& args_;
    const int64_t batch_, queries_, keys_, hidden_, dim_;
    const bool through_tanh_;
    Projected a_, b_;
    const Scores<T> scores_;
    const int64_t score_stride_, columns_;
    const Chunks chunks_;
    const bool parallel_;
    const Scratch<float> x_, y_;       // a chunk's scores, then weights; its y, then u
    const Scratch<float> dropped_;     // of each thread
    const Scratch<float> value_sums_;  // of grad_value, where a batch element has more queries than a chunk
    const Scratch<T> a_grads_;
    const Scratch<float> b_grads_, v_grads_;  // v_grads_: of each batch element
};

}  // namespace

void additive_attention_backward(const AdditiveAttentionBackward& args) {
    with_dtype(args.query.dtype,
               [&](auto* element) { Backward<std::remove_pointer_t<decltype(element)>>(args).run(); });
}

}  // namespace fastattn::FASTATTN_ISA
