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
// Tile: blocks of the products (gemm.h). The epilogue of the first computes hidden again, from pre and the same mask,
// beside grad_pre and grad_pre_gate, since activation and derivative share their terms; these wait, in x's dtype, for
// the products over the tokens that read them.
//
// Work: twice the forward's products. Must move grad_out, x, pre, pre_gate and grad_x once, and hidden, grad_pre and
// grad_pre_gate two or three times each.
#include "activation.h"
#include "column_sums.h"
#include "dropout.h"
#include "product.h"

namespace fastattn::FASTATTN_ISA {
namespace {

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

template <class T, Activation kActivation>
void backward(const FeedForwardBackward& args) {
    const int64_t rows = args.x.size[0], inner = args.x.size[1], width = args.w1.size[0], outer = args.w2.size[0];
    const bool gated = args.w_gate.present(), dropped = args.dropout_p > 0.0;
    const bool needs_hidden = args.grad_w2.present();
    const bool needs_pre = args.grad_x.present() || args.grad_w1.present() || args.grad_b1.present();
    const bool needs_gate = gated && (args.grad_x.present() || args.grad_w_gate.present());
    const Scratch<T> hidden_space(needs_hidden ? rows * width : 0), pre_space(needs_pre ? rows * width : 0);
    const Scratch<T> gate_space(needs_gate ? rows * width : 0);
    const Matrix<T> hidden{hidden_space.get(), width, 1};
    const Matrix<T> grad_pre{pre_space.get(), width, 1}, grad_gate{gate_space.get(), width, 1};
    const Matrix<T> grad_out = matrix_of<T>(args.grad_out), x = matrix_of<T>(args.x);
    const Dropout dropout(args.dropout_p, args.seed);

    auto through_hidden = [&](int64_t row, int64_t column, int64_t columns, const float* sums) {
        const T* pre = args.pre.as<T>() + row * args.pre.stride[0] + column;
        const T* pre_gate = gated ? args.pre_gate.as<T>() + row * args.pre_gate.stride[0] + column : nullptr;
        const int64_t start = row * width + column;
        T *to_hidden = hidden_space.get() + start, *to_pre = pre_space.get() + start,
          *to_gate = gate_space.get() + start;
        const RowKey key = dropout.row(static_cast<uint64_t>(row));
        each_vector_in_turn(columns, [&](int64_t i, auto lanes) FASTATTN_BODY {
            Vec grad = load(sums + i);
            const Vec value = load(pre + i, lanes);
            KeepVec keep{};
            if (dropped) {
                keep = dropout.keep_columns(key, static_cast<uint32_t>(column + i));
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
    if (needs_hidden || needs_pre || needs_gate) {
        gemm(rows, width, outer, grad_out, matrix_of<T>(args.w2), through_hidden);
    }
    if (args.grad_x.present()) {
        product_into<T>(rows, inner, width, grad_pre, matrix_of<T>(args.w1), args.grad_x);
        if (gated) product_into<T>(rows, inner, width, grad_gate, matrix_of<T>(args.w_gate), args.grad_x, true);
    }
    if (args.grad_w1.present()) product_into<T>(width, inner, rows, grad_pre.transposed(), x, args.grad_w1);
    if (args.grad_w_gate.present()) product_into<T>(width, inner, rows, grad_gate.transposed(), x, args.grad_w_gate);
    if (needs_hidden) product_into<T>(outer, width, rows, grad_out.transposed(), hidden, args.grad_w2);
    sum_rows(rows, width, grad_pre, args.grad_b1);
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
