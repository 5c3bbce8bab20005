// The position-wise feed-forward network, backward.
//
//     grad_hidden = grad_out . w2                  through dropout:  g = mask * grad_hidden
//     grad_pre    = g * activation'(pre)                             gated: g * activation(pre_gate)
//                                                  gated also: grad_pre_gate = g * pre * activation'(pre_gate)
//     grad_x      = grad_pre . w1 + grad_pre_gate . w_gate
//     grad_w1     = grad_pre^T . x,   grad_w_gate = grad_pre_gate^T . x,   grad_b1 = the sum of grad_pre's rows
//     grad_w2     = grad_out^T . hidden,   grad_b2 = the sum of grad_out's rows
//                                                  hidden = dropout(activation(pre))
//                                                  gated:   dropout(activation(pre_gate) * pre)
//
//                 features       Tile: a block of hidden features, in all rows. The epilogue of the block's first
//             +----------+-----  product computes hidden again, from pre and the same mask, beside grad_pre and
//      rows   | hidden   |next   grad_pre_gate, since activation and derivative share their terms. These wait in x's
//             | grad_pre |block  dtype, of a size that caches hold, for the products over the tokens, which make the
//             +----------+-----  block's gradients of weights and bias whole; grad_x is added up over the blocks, in
//                  |             float32. So nothing of pre's size is formed, and the blocks follow from the shape
//     grad_w1, grad_b1, grad_w2  alone.
//     grad_x +=
//
// Work: twice the forward's products. Must move pre, pre_gate and the weights with their gradients once, and in each
// block grad_out, x and the sums of grad_x: little beside the block's products, which have kLeastFeatures flops and more
// for each element of these.
#include "activation.h"
#include "column_sums.h"
#include "dropout.h"
#include "product.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kBlockBytes = int64_t{3} << 19;  // of hidden; as much again of grad_pre
constexpr int64_t kLeastFeatures = 384;            // narrower blocks cost more in packing x and grad_out than they save
constexpr int64_t kFeatureStep = 64;               // whole tiles and cache lines

// to = the sum of the matrix's rows; nothing if `to` is absent.
template <class T>
void sum_rows(int64_t rows, int64_t columns, Matrix<T> from, const Tensor& to) {
    if (!to.present()) return;
    const ColumnSums sums(rows, columns, columns);
    sums.add_rows([&](int64_t row, int, float* sum) {
        const T* values = from.from(row, 0).data;
        each_vector(0, columns, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
            store(sum + i, load(sum + i, lanes) + load(values + i, lanes), lanes);
        });
    });
    sums.write(to);
}

// The features of a block: equal parts of about kBlockBytes in all rows.
template <class T>
int64_t block_features(int64_t rows, int64_t width) {
    const int64_t row_features = kBlockBytes / (larger(rows, 1) * static_cast<int64_t>(sizeof(T)));
    const int64_t blocks = ceil_div(width, larger(row_features, kLeastFeatures));
    return round_up(ceil_div(larger(width, 1), larger(blocks, 1)), kFeatureStep);
}

// Indices first … first + count - 1 along a dimension.
inline Tensor part_of(Tensor tensor, int dimension, int64_t first, int64_t count) {
    if (!tensor.present()) return tensor;
    const int64_t offset = first * tensor.stride[dimension] * element_size(tensor.dtype);
    tensor.data = static_cast<char*>(tensor.data) + offset;
    tensor.size[dimension] = count;
    return tensor;
}

template <class T, Activation kActivation>
void backward(const FeedForwardBackward& args) {
    const int64_t rows = args.x.size[0], inner = args.x.size[1], width = args.w1.size[0], outer = args.w2.size[0];
    const bool gated = args.w_gate.present(), dropped = args.dropout_p > 0.0;
    const bool needs_x = args.grad_x.present(), needs_hidden = args.grad_w2.present();
    const bool needs_pre = needs_x || args.grad_w1.present() || args.grad_b1.present();
    const bool needs_gate = gated && (needs_x || args.grad_w_gate.present());
    const int64_t features = block_features<T>(rows, width);
    const int64_t stride = features + 64 / static_cast<int64_t>(sizeof(T));  // an odd number of cache lines
    const bool in_parts = gated || features < width;                         // grad_x
    const Scratch<T> hidden_space(needs_hidden ? rows * stride : 0), pre_space(needs_pre ? rows * stride : 0);
    const Scratch<T> gate_space(needs_gate ? rows * stride : 0);
    const Scratch<float> sum_space(needs_x && in_parts && !std::is_same_v<T, float> ? rows * inner : 0);
    const Matrix<T> hidden{hidden_space.get(), stride, 1};
    const Matrix<T> grad_pre{pre_space.get(), stride, 1}, grad_gate{gate_space.get(), stride, 1};
    const Matrix<T> grad_out = matrix_of<T>(args.grad_out), x = matrix_of<T>(args.x), w2 = matrix_of<T>(args.w2);
    const Dropout dropout(args.dropout_p, args.seed);

    // hidden, grad_pre and grad_gate of features first … first + count - 1.
    auto find_block = [&](int64_t first, int64_t count) {
        auto through_hidden = [&](int64_t row, int64_t column, int64_t columns, const float* sums) {
            const int64_t feature = first + column, start = row * stride + column;
            const T* pre = args.pre.as<T>() + row * args.pre.stride[0] + feature;
            const T* pre_gate = gated ? args.pre_gate.as<T>() + row * args.pre_gate.stride[0] + feature : nullptr;
            T *to_hidden = hidden_space.get() + start, *to_pre = pre_space.get() + start,
              *to_gate = gate_space.get() + start;
            const RowKey key = dropout.row(static_cast<uint64_t>(row));
            each_vector_in_turn(columns, [&](int64_t i, auto lanes) FASTATTN_BODY {
                Vec grad = load(sums + i);
                const Vec value = load(pre + i, lanes);
                KeepVec keep{};
                if (dropped) {
                    keep = dropout.keep_columns(key, static_cast<uint32_t>(feature + i));
                    grad = select(keep, grad * dropout.scale(), Vec{});
                }
                auto through_dropout = [&](Vec hidden_value) FASTATTN_BODY {
                    return dropped ? select(keep, hidden_value * dropout.scale(), Vec{}) : hidden_value;
                };
                if (gated) {
                    const Activated gate = activate<kActivation>(load(pre_gate + i, lanes), grad * value);
                    if (needs_hidden) store(to_hidden + i, through_dropout(gate.value * value), lanes);
                    if (needs_pre) store(to_pre + i, grad * gate.value, lanes);
                    if (needs_gate) store(to_gate + i, gate.grad, lanes);
                } else {
                    const Activated activated = activate<kActivation>(value, grad);
                    if (needs_hidden) store(to_hidden + i, through_dropout(activated.value), lanes);
                    if (needs_pre) store(to_pre + i, activated.grad, lanes);
                }
            });
        };
        gemm(rows, count, outer, grad_out, w2.from(0, first), through_hidden,
             needs_pre ? written(pre_space.get(), stride) : Written{},
             needs_hidden ? written(hidden_space.get(), stride) : Written{});
    };
    // grad_x = [the sum so far +] grad . weight; rounded where it is the `last` part.
    auto add_to_x = [&](int64_t count, const Matrix<T>& grad, const Matrix<T>& weight, bool adds, bool last) {
        auto epilogue = [&](int64_t row, int64_t column, int64_t columns, const float* sums) {
            T* to = args.grad_x.as<T>() + row * args.grad_x.stride[0] + column;
            float* sum;
            if constexpr (std::is_same_v<T, float>) {
                sum = to;
            } else {
                sum = sum_space.get() + row * inner + column;
            }
            each_vector(0, columns, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
                const Vec value = adds ? load(sum + i, lanes) + load(sums + i) : load(sums + i);
                if (last) {
                    store(to + i, value, lanes);
                } else {
                    store(sum + i, value, lanes);
                }
            });
        };
        const bool apart = in_parts && !std::is_same_v<T, float>;
        gemm(rows, inner, count, grad, weight, epilogue,
             apart ? written(sum_space.get(), inner) : written<T>(args.grad_x));
    };

    const bool needs_block = needs_hidden || needs_pre || needs_gate;
    for (int64_t first = 0; needs_block && (first == 0 || first < width); first += features) {
        const int64_t count = smaller(features, width - first);
        find_block(first, count);
        if (needs_x) {
            const bool last = first + count == width;
            add_to_x(count, grad_pre, matrix_of<T>(args.w1).from(first, 0), first > 0, last && !gated);
            if (gated) add_to_x(count, grad_gate, matrix_of<T>(args.w_gate).from(first, 0), true, last);
        }
        if (args.grad_w1.present()) {
            product_into<T>(count, inner, rows, grad_pre.transposed(), x, part_of(args.grad_w1, 0, first, count));
        }
        if (args.grad_w_gate.present()) {
            product_into<T>(count, inner, rows, grad_gate.transposed(), x, part_of(args.grad_w_gate, 0, first, count));
        }
        if (needs_hidden) {
            product_into<T>(outer, count, rows, grad_out.transposed(), hidden, part_of(args.grad_w2, 1, first, count));
        }
        sum_rows(rows, count, grad_pre, part_of(args.grad_b1, 0, first, count));
    }
    sum_rows(rows, outer, grad_out, args.grad_b2);
}

}  // namespace

void feed_forward_backward(const FeedForwardBackward& args) {
    with_dtype(args.x.dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        with_activation(args.activation, [&](auto tag) { backward<T, tag.value>(args); });
    });
}

}  // namespace fastattn::FASTATTN_ISA
