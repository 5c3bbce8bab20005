// A language model's last layer and its cross entropy, with the gradients in the same sweep.
//
//     l     = softcap(x . weight^T + bias),   lse = log of the sum over classes of exp(l),   y = target
//     loss  = (1 - e) w_y (lse - l_y) + e / classes * sum of w_c (lse - l_c) + z_loss lse^2        e: label smoothing
//     g_c   = f exp(l_c - lse) - scale (e / classes * w_c + [c = y] (1 - e) w_y)
//             f = scale ((1 - e) w_y + e / classes * sum of w + 2 z_loss lse)     scale: what the row's loss counts for
//     u     = g (1 - (l / softcap)^2)
//     grad_x = u . weight,   grad_weight = u^T . x,   grad_bias = the sum of u over the rows
//
//                  rows of x (256)        The (rows, classes) logits never exist: rows are taken kLogits / classes at a
//                 +-------------+         time, and these logits lie transposed, a class a row. So weight is read as
//                 |             |         it lies in the first product, and u in the last; x, which is small, is what
//        classes  |  l ──► u    |         the products pack. Blocks of classes find each row's maximum and sum of
//                 |             |         exponentials, which are put together in order; then u takes the place of l.
//                 +-------------+
//
// Rows whose target is ignored take no part: the others are gathered, and everything below is about those alone.
//
// Work: 6 rows classes dim flops with gradients, 2 without; and 2 rows classes exponentials. Must move x and weight
// once, their gradients once; weight's gradient once more for every kLogits / classes rows, which is why these are
// many.
#include <string.h>

#include <type_traits>

#include "kernels.h"
#include "math.h"
#include "product.h"
#include "row.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kLogits = int64_t{8} << 20;  // at a time
constexpr int64_t kFewestRows = 128, kMostRows = 1024;
constexpr int64_t kClasses = 256;  // of a block

// The rows of x whose target is a class, next to each other.
template <class T>
class CountedRows {
  public:
    explicit CountedRows(const LinearCrossEntropy& args)
        : all_(args.x.size[0]), place_(all_), count_(find(args)), space_(count_ < all_ ? count_ * args.x.size[1] : 0) {
        x_ = matrix_of<T>(args.x);
        if (count_ == all_) return;
        const int64_t dim = args.x.size[1];
        for (int64_t r = 0; r < count_; ++r) memcpy(space_.get() + r * dim, x_.from(place(r), 0).data, dim * sizeof(T));
        x_ = {space_.get(), dim, 1};
    }

    int64_t count() const { return count_; }
    int64_t place(int64_t r) const { return place_.get()[r]; }  // in the tensors of the call
    Matrix<T> x() const { return x_; }

  private:
    int64_t find(const LinearCrossEntropy& args) const {
        int64_t count = 0;
        for (int64_t row = 0; row < all_; ++row) {
            if (args.target.as<const int64_t>()[row] != args.ignore_index) place_.get()[count++] = row;
        }
        return count;
    }

    const int64_t all_;
    const Scratch<int64_t> place_;
    const int64_t count_;
    const Scratch<T> space_;
    Matrix<T> x_;
};

template <class T>
class CrossEntropy {
  public:
    explicit CrossEntropy(const LinearCrossEntropy& args)
        : args_(args),
          counted_(args),
          rows_(counted_.count()),
          classes_(args.weight.size[0]),
          dim_(args.x.size[1]),
          at_once_(smaller(rows_, smaller(kMostRows, larger(kFewestRows, kLogits / classes_ / kLanes * kLanes)))),
          stride_(round_up(at_once_, kLanes)),
          blocks_(ceil_div(classes_, kClasses)),
          wanted_(args.grad_x.present() || args.grad_weight.present() || args.grad_bias.present()),
          // A weight's gradient that several chunks add to is added up in float32.
          added_up_(at_once_ < rows_ && !std::is_same_v<T, float> && args.grad_weight.present()),
          class_weight_(args.class_weight.as<float>()),
          bias_space_(args.bias.present() ? classes_ : 0),
          bias_(args.bias.present() ? as_float(args.bias, classes_, 0.0f, bias_space_.get()) : nullptr),
          all_weights_(sum_of_weights()),
          logits_(classes_ * stride_),
          partial_(blocks_ * kTerms * stride_),
          terms_(kTerms * stride_),
          losses_(rows_),
          bias_sums_(args.grad_bias.present() ? classes_ : 0),
          weight_sums_(added_up_ ? classes_ * dim_ : 0) {}

    void run() const {
        const Denominators below = denominators();
        for (int64_t c = 0; args_.grad_bias.present() && c < classes_; ++c) bias_sums_.get()[c] = 0.0;
        clear_what_nothing_adds_to();
        for (int64_t first = 0; first < rows_; first += at_once_) {
            const int64_t count = smaller(at_once_, rows_ - first);
            find_logits(first, count);
            find_partial_terms(count);
            finish_terms(first, count, below);
            if (!wanted_) continue;
            find_gradients(count);
            for (int64_t r = 0; r < count; ++r) add_target(first, r);
            add_products(first, count);
        }
        if (args_.grad_bias.present()) write_bias_gradient();
        write_loss(below);
    }

  private:
    // What a row of x needs, each term for all rows of a chunk, `stride_` apart.
    //     top, sum     the greatest logit, and the sum of exp(l - top)
    //     weighted     the sum of w_c l_c
    //     factor       f / sum;   smooth: scale e / classes;   share: scale (1 - e) w_y;   at: the target's logit
    enum Term { kTop, kSum, kWeighted, kFactor, kSmooth, kShare, kAt, kTerms };

    float* term(Term which) const { return terms_.get() + which * stride_; }
    float* partial(int64_t block, Term which) const { return partial_.get() + (block * kTerms + which) * stride_; }
    float* logits(int64_t c) const { return logits_.get() + c * stride_; }
    T* gradients(int64_t c) const { return reinterpret_cast<T*>(logits(c)); }  // u, in the logits' place
    int64_t target(int64_t row) const { return args_.target.as<const int64_t>()[counted_.place(row)]; }
    float class_weight(int64_t c) const { return class_weight_ ? class_weight_[c] : 1.0f; }

    // What the mean divides by: the cross entropies by the targets' weights, the z-losses by the rows that count.
    struct Denominators {
        double weights, rows;
    };

    Denominators denominators() const {
        if (args_.reduction != Reduction::kMean) return {1.0, 1.0};
        Denominators below{0.0, 0.0};
        for (int64_t row = 0; row < rows_; ++row) below.weights += class_weight(target(row));
        below.rows = static_cast<double>(rows_);
        return below;
    }

    // The gradients of ignored rows, and the weight's if there are no others.
    void clear_what_nothing_adds_to() const {
        const auto clear = [this](const Tensor& grad, int64_t row) {
            memset(grad.as<T>() + row * grad.stride[0], 0, dim_ * sizeof(T));
        };
        for (int64_t row = 0, r = 0; args_.grad_x.present() && row < args_.x.size[0]; ++row) {
            if (r < rows_ && counted_.place(r) == row) {
                ++r;
            } else {
                clear(args_.grad_x, row);
            }
        }
        for (int64_t c = 0; args_.grad_weight.present() && rows_ == 0 && c < classes_; ++c) clear(args_.grad_weight, c);
    }

    void find_logits(int64_t first, int64_t count) const {
        const float cap = args_.softcap;
        gemm(
            classes_, count, dim_, matrix_of<T>(args_.weight), counted_.x().from(first, 0).transposed(),
            [&](int64_t c, int64_t row, int64_t n, const float* sums) {
                float* to = logits(c) + row;
                const Vec bias = splat(bias_ ? bias_[c] : 0.0f);
                each_vector(0, n, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
                    Vec value = load(sums + i) + bias;
                    if (cap > 0.0f) value = cap * tanh(value / cap);
                    store(to + i, value, lanes);
                });
            },
            written(logits(0), stride_));
        for (int64_t c = 0; count % kLanes && c < classes_; ++c) {  // whole vectors are read
            for (int64_t r = count; r < round_up(count, kLanes); ++r) logits(c)[r] = 0.0f;
        }
    }

    // exp(l - top).
    static FASTATTN_INLINE Vec exponential(Vec logit, Vec top) { return exp2_bounded((logit - top) * kLog2E); }

    void find_partial_terms(int64_t count) const {
        parallel_for(blocks_, [&](int64_t block, int) {
            const int64_t begin = block * kClasses, end = smaller(begin + kClasses, classes_);
            float *top = partial(block, kTop), *sum = partial(block, kSum), *weighted = partial(block, kWeighted);
            for (int64_t r = 0; r < count; r += kLanes) {
                store(top + r, splat(-kInfinity));
                store(sum + r, Vec{});
                store(weighted + r, Vec{});
            }
            for (int64_t c = begin; c < end; ++c) {
                for (int64_t r = 0; r < count; r += kLanes) store(top + r, max(load(logits(c) + r), load(top + r)));
            }
            for (int64_t c = begin; c < end; ++c) {
                const Vec weight = splat(class_weight(c));
                for (int64_t r = 0; r < count; r += kLanes) {
                    const Vec above = load(top + r), base = select(above == splat(-kInfinity), Vec{}, above);
                    const Vec logit = load(logits(c) + r);
                    store(sum + r, load(sum + r) + exponential(logit, base));
                    if (args_.label_smoothing > 0.0f) store(weighted + r, load(weighted + r) + weight * logit);
                }
            }
        });
    }

    // The blocks' terms in order; then each row's loss, and what its gradient takes.
    void finish_terms(int64_t first, int64_t count, const Denominators& below) const {
        for (int64_t r = 0; r < count; r += kLanes) {
            Vec top = splat(-kInfinity), sum{}, weighted{};
            for (int64_t block = 0; block < blocks_; ++block) top = max(load(partial(block, kTop) + r), top);
            const Vec base = select(top == splat(-kInfinity), Vec{}, top);
            for (int64_t block = 0; block < blocks_; ++block) {
                sum += load(partial(block, kSum) + r) * exponential(load(partial(block, kTop) + r), base);
                weighted += load(partial(block, kWeighted) + r);
            }
            store(term(kTop) + r, top);
            store(term(kSum) + r, sum);
            store(term(kWeighted) + r, weighted);
        }
        for (int64_t r = 0; r < count; ++r) finish_row(first + r, r, below);
        for (int64_t r = count; r < round_up(count, kLanes); ++r) term(kFactor)[r] = term(kSmooth)[r] = 0.0f;
    }

    void finish_row(int64_t row, int64_t r, const Denominators& below) const {
        const int64_t y = target(row);
        const double smoothing = args_.label_smoothing, each = smoothing / static_cast<double>(classes_);
        const double z_loss = args_.z_loss * below.weights / below.rows;  // so that one division serves both
        const double lse = term(kTop)[r] + log(static_cast<double>(term(kSum)[r]));
        const double weight = (1.0 - smoothing) * class_weight(y);
        double loss = weight * (lse - logits(y)[r]), rise = weight;
        if (smoothing > 0.0) {
            loss += each * (all_weights_ * lse - term(kWeighted)[r]);
            rise += each * all_weights_;
        }
        if (z_loss > 0.0) {
            loss += z_loss * lse * lse;
            rise += 2.0 * z_loss * lse;
        }
        const Tensor& grad_loss = args_.grad_loss;
        const double received =
            grad_loss.present() ? grad_loss.as<const float>()[grad_loss.size[0] == 1 ? 0 : counted_.place(row)] : 1;
        const double scale = received / below.weights;
        losses_.get()[row] = static_cast<float>(loss);
        term(kFactor)[r] = static_cast<float>(scale * rise / term(kSum)[r]);
        term(kSmooth)[r] = static_cast<float>(scale * each);
        term(kShare)[r] = static_cast<float>(scale * weight);
        term(kAt)[r] = logits(y)[r];
    }

    FASTATTN_INLINE Vec slope(Vec logit) const {
        const Vec capped = logit / args_.softcap;
        return 1.0f - capped * capped;
    }

    // u without the target's share.
    void find_gradients(int64_t count) const {
        constexpr int64_t kPart = 16 * kLanes;  // rows; a bias's gradient is what is left of sums that nearly cancel
        const bool capped = args_.softcap > 0.0f;
        parallel_for(blocks_, [&](int64_t block, int) {
            for (int64_t c = block * kClasses; c < smaller((block + 1) * kClasses, classes_); ++c) {
                const Vec weight = splat(class_weight(c));
                const float* from = logits(c);
                T* to = gradients(c);
                double total = 0.0;
                for (int64_t part = 0; part < count; part += kPart) {
                    Vec sum{};
                    for (int64_t r = part; r < smaller(part + kPart, count); r += kLanes) {
                        const Vec logit = load(from + r);
                        Vec grad = exponential(logit, load(term(kTop) + r)) * load(term(kFactor) + r);
                        grad -= load(term(kSmooth) + r) * weight;
                        if (capped) grad *= slope(logit);
                        store(to + r, grad);
                        sum += grad;
                    }
                    total += reduce_add(sum);
                }
                if (args_.grad_bias.present()) bias_sums_.get()[c] += total;
            }
        });
    }

    // The target's share of row r's u.
    void add_target(int64_t first, int64_t r) const {
        const int64_t y = target(first + r);
        const Vec logit = splat(term(kAt)[r]);
        const Vec down = args_.softcap > 0.0f ? slope(logit) : splat(1.0f);
        const Vec others =
            exponential(logit, splat(term(kTop)[r])) * term(kFactor)[r] - term(kSmooth)[r] * class_weight(y);
        from_float(((others - term(kShare)[r]) * down)[0], gradients(y)[r]);
        if (args_.grad_bias.present()) bias_sums_.get()[y] -= double{term(kShare)[r]} * down[0];
    }

    void add_products(int64_t first, int64_t count) const {
        const int64_t row = stride_ * static_cast<int64_t>(sizeof(float) / sizeof(T));
        const Matrix<T> u{gradients(0), row, 1};
        if (args_.grad_x.present()) {
            gemm(count, dim_, classes_, u.transposed(), matrix_of<T>(args_.weight),
                 [&](int64_t r, int64_t column, int64_t n, const float* sums) {
                     T* to = args_.grad_x.as<T>() + counted_.place(first + r) * args_.grad_x.stride[0] + column;
                     each_vector(
                         0, n, [&](int64_t i, int, auto lanes) FASTATTN_BODY { store(to + i, load(sums + i), lanes); });
                 });
        }
        if (args_.grad_weight.present()) {
            const bool begun = first > 0, ends = first + count >= rows_;
            const Written out = added_up_ ? written(weight_sums_.get(), dim_) : written<T>(args_.grad_weight);
            gemm(
                classes_, dim_, count, u, counted_.x().from(first, 0),
                [&](int64_t c, int64_t column, int64_t n, const float* sums) {
                    T* gradient = args_.grad_weight.as<T>() + c * args_.grad_weight.stride[0] + column;
                    float* total = added_up_ ? weight_sums_.get() + c * dim_ + column : nullptr;
                    each_vector(0, n, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
                        Vec value = load(sums + i);
                        if (begun) value += added_up_ ? load(total + i, lanes) : load(gradient + i, lanes);
                        if (added_up_ && !ends) {
                            store(total + i, value, lanes);
                        } else {
                            store(gradient + i, value, lanes);
                        }
                    });
                },
                out);
        }
    }

    void write_bias_gradient() const {
        T* to = args_.grad_bias.as<T>();
        for (int64_t c = 0; c < classes_; ++c) from_float(static_cast<float>(bias_sums_.get()[c]), to[c]);
    }

    void write_loss(const Denominators& below) const {
        float* to = args_.loss.as<float>();
        double sum = 0.0;
        for (int64_t row = 0; row < rows_; ++row) sum += losses_.get()[row];
        if (args_.reduction != Reduction::kNone) {
            *to = static_cast<float>(sum / below.weights);
            return;
        }
        for (int64_t row = 0; row < args_.x.size[0]; ++row) to[row] = 0.0f;
        for (int64_t row = 0; row < rows_; ++row) to[counted_.place(row)] = losses_.get()[row];
    }

    double sum_of_weights() const {
        double sum = 0.0;
        for (int64_t c = 0; c < classes_; ++c) sum += class_weight(c);
        return sum;
    }

    const LinearCrossEntropy& args_;
    const CountedRows<T> counted_;
    const int64_t rows_, classes_, dim_;
    const int64_t at_once_, stride_;  // rows of a chunk; floats from one class's logits to the next
    const int64_t blocks_;
    const bool wanted_, added_up_;
    const float* const class_weight_;
    const Scratch<float> bias_space_;
    const float* const bias_;
    const double all_weights_;
    const Scratch<float> logits_, partial_, terms_, losses_;
    const Scratch<double> bias_sums_;
    const Scratch<float> weight_sums_;
};

}  // namespace

void linear_cross_entropy(const LinearCrossEntropy& args) {
    with_dtype(args.x.dtype,
               [&](auto* element) { CrossEntropy<std::remove_pointer_t<decltype(element)>>(args).run(); });
}

}  // namespace fastattn::FASTATTN_ISA
