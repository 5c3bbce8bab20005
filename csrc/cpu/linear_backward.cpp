// A linear layer with its activation, backward.
//
//     grad_pre    = grad_out * activation'(pre)           grad_out itself without an activation
//     grad_x      = grad_pre . weight
//     grad_weight = grad_pre^T . x
//     grad_bias   = the sum of grad_pre's rows
//
// Tile: one pass over the rows makes grad_pre, in the inputs' dtype, and adds up the bias's gradient (column_sums.h);
// then two products by blocks (gemm.h), which read grad_pre as it lies and transposed.
//
// Work: 4 rows in out flops. Must move grad_out, pre, x and grad_x once, and grad_pre three times.
#include "activation.h"
#include "column_sums.h"
#include "product.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// grad_pre (if there is an activation) and the sums of its rows (if bias has a gradient).
template <class T, Activation kActivation>
void through_activation(const LinearBackward& args, const Matrix<T>& grad_out, T* grad_pre) {
    const int64_t rows = args.grad_out.size[0], columns = args.grad_out.size[1];
    const bool summed = args.grad_bias.present();
    const ColumnSums sums(rows, summed ? columns : 0, columns);
    sums.add_rows([&](int64_t row, int, float* sum) {
        const T* from = grad_out.from(row, 0).data;
        const T* pre = args.pre.present() ? args.pre.as<T>() + row * args.pre.stride[0] : nullptr;
        each_vector_in_turn(columns, [&](int64_t i, auto lanes) FASTATTN_BODY {
            Vec grad = load(from + i, lanes);
            if constexpr (kActivation != Activation::kNone) {
                grad = activate<kActivation>(load(pre + i, lanes), grad).grad;
                store(grad_pre + row * columns + i, grad, lanes);
            }
            if (summed) store(sum + i, load(sum + i, lanes) + grad, lanes);
        });
    });
    sums.write(args.grad_bias);
}

template <class T, Activation kActivation>
void backward(const LinearBackward& args) {
    constexpr bool kActivated = kActivation != Activation::kNone;
    const int64_t rows = args.grad_out.size[0], columns = args.grad_out.size[1], depth = args.x.size[1];
    const Scratch<T> space(kActivated ? rows * columns : 0);
    if (kActivated || args.grad_bias.present()) {
        through_activation<T, kActivation>(args, matrix_of<T>(args.grad_out), space.get());
    }
    const Matrix<T> grad_pre = kActivated ? Matrix<T>{space.get(), columns, 1} : matrix_of<T>(args.grad_out);
    if (args.grad_x.present()) {
        product_into<T>(rows, depth, columns, grad_pre, matrix_of<T>(args.weight), args.grad_x);
    }
    if (args.grad_weight.present()) {
        product_into<T>(columns, depth, rows, grad_pre.transposed(), matrix_of<T>(args.x), args.grad_weight);
    }
}

}  // namespace

void linear_backward(const LinearBackward& args) {
    with_dtype(args.x.dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        with_activation(args.activation, [&](auto tag) { backward<T, tag.value>(args); });
    });
}

}  // namespace fastattn::FASTATTN_ISA
