// A linear layer with its activation and residual, forward.
//
//     pre = x . weight^T + bias,    out = activation(pre) + residual
//
// Tile: a block of the product (gemm.h). The epilogue takes the float32 sums of a row's stretch from the first-level
// cache and writes pre, if the backward needs it, and out; the activation sees the unrounded sum.
//
// Work: 2 rows in out flops, and an activation's 20 to 60 an output. Must move x, weight, residual, out and pre once.
#include "activation.h"
#include "product.h"
#include "row.h"

namespace fastattn::FASTATTN_ISA {
namespace {

template <class T, Activation kActivation>
void forward(const LinearForward& args) {
    const int64_t columns = args.out.size[1];
    const Scratch<float> space(args.bias.present() ? columns : 0);
    const float* bias = args.bias.present() ? as_float(args.bias, columns, 0.0f, space.get()) : nullptr;
    auto epilogue = [&](int64_t row, int64_t column, int64_t count, const float* sums) {
        T* out = args.out.as<T>() + row * args.out.stride[0] + column;
        T* pre = args.pre.present() ? args.pre.as<T>() + row * args.pre.stride[0] + column : nullptr;
        const T* residual =
            args.residual.present() ? args.residual.as<T>() + row * args.residual.stride[0] + column : nullptr;
        each_vector_in_turn(count, [&](int64_t i, auto lanes) FASTATTN_BODY {
            Vec value = load(sums + i);
            if (bias) value += load(bias + column + i, lanes);
            if (kActivation != Activation::kNone && pre) store(pre + i, value, lanes);
            value = activate<kActivation>(value);
            if (residual) value += load(residual + i, lanes);
            store(out + i, value, lanes);
        });
    };
    gemm(args.out.size[0], columns, args.x.size[1], matrix_of<T>(args.x), matrix_of<T>(args.weight).transposed(),
         epilogue, written<T>(args.out), written<T>(args.pre));
}

}  // namespace

void linear_forward(const LinearForward& args) {
    with_dtype(args.x.dtype, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        with_activation(args.activation, [&](auto tag) { forward<T, tag.value>(args); });
    });
}

}  // namespace fastattn::FASTATTN_ISA
