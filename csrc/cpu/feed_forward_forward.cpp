// The position-wise feed-forward network (Vaswani et al., 2017; gated Shazeer, 2020), forward.
//
//     pre    = x . w1^T + b1                                    pre_gate = x . w_gate^T            (gated)
//     hidden = dropout(activation(pre))                         dropout(activation(pre_gate) * pre)
//     out    = hidden . w2^T + b2 + residual
//
// Tile: kChunkRows rows at a time, so that their hidden values, in x's dtype, are read by the second product from the
// cache that the first one wrote them to; within a chunk, blocks of each product (gemm.h). The epilogue of the first
// product does all that lies between the two. Gated, the activated gate stands in hidden's place until its own product
// is done.
//
// Work: 2 rows hidden (in + out) flops, 2 rows hidden in more if gated, 20 to 60 for an activation and 12 for dropout's
// hash a hidden value. Must move x and out, and pre and pre_gate if the backward needs them, once.
#include "activation.h"
#include "dropout.h"
#include "product.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kChunkRows = 1152;

template <class T>
inline T* row_of(const Tensor& matrix, int64_t row, int64_t column) {
    return matrix.present() ? matrix.as<T>() + row * matrix.stride[0] + column : nullptr;
}

// dropout(hidden) of rows first … first + count - 1, and what the backward needs.
template <class T, Activation kActivation>
void find_hidden(const FeedForwardForward& args, const float* b1, int64_t first, int64_t count, T* hidden) {
    const int64_t inner = args.x.size[1], width = args.w1.size[0];
    const bool gated = args.w_gate.present(), dropped = args.dropout_p > 0.0;
    const Dropout dropout(args.dropout_p, args.seed);
    const Matrix<T> x = matrix_of<T>(args.x).from(first, 0);
    if (gated) {
        auto gate = [&](int64_t row, int64_t column, int64_t columns, const float* sums) {
            T* pre_gate = row_of<T>(args.pre_gate, first + row, column);
            T* to = hidden + row * width + column;
            each_vector_in_turn(columns, [&](int64_t i, auto lanes) FASTATTN_BODY {
                const Vec value = load(sums + i);
                if (pre_gate) store(pre_gate + i, value, lanes);
                store(to + i, activate<kActivation>(value), lanes);
            });
        };
        gemm(count, width, inner, x, matrix_of<T>(args.w_gate).transposed(), gate, written(hidden, width),
             written<T>(args.pre_gate, first));
    }
    auto activated = [&](int64_t row, int64_t column, int64_t columns, const float* sums) {
        T* pre = row_of<T>(args.pre, first + row, column);
        T* to = hidden + row * width + column;
        const RowKey key = dropout.row(static_cast<uint64_t>(first + row));
        each_vector_in_turn(columns, [&](int64_t i, auto lanes) FASTATTN_BODY {
            Vec value = load(sums + i);
            if (b1) value += load(b1 + column + i, lanes);
            if (pre) store(pre + i, value, lanes);
            value = gated ? load(to + i, lanes) * value : activate<kActivation>(value);
            if (dropped) {
                const KeepVec keep = dropout.keep_columns(key, static_cast<uint32_t>(column + i));
                value = select(keep, value * dropout.scale(), Vec{});
            }
            store(to + i, value, lanes);
        });
    };
    gemm(count, width, inner, x, matrix_of<T>(args.w1).transposed(), activated, written(hidden, width),
         written<T>(args.pre, first));
}

template <class T>
void forward(const FeedForwardForward& args) {
    const int64_t rows = args.x.size[0], width = args.w1.size[0], outer = args.w2.size[0];
    const Scratch<float> b1_space(width), b2_space(outer);
    const float* b1 = args.b1.present() ? as_float(args.b1, width, 0.0f, b1_space.get()) : nullptr;
    const float* b2 = args.b2.present() ? as_float(args.b2, outer, 0.0f, b2_space.get()) : nullptr;
    const int64_t chunk_rows = ceil_div(rows, larger(ceil_div(rows, kChunkRows), 1));
    const Scratch<T> hidden(chunk_rows * width);

    for (int64_t first = 0; first < rows; first += chunk_rows) {
        const int64_t count = smaller(chunk_rows, rows - first);
        with_activation(args.activation,
                        [&](auto tag) { find_hidden<T, tag.value>(args, b1, first, count, hidden.get()); });
        auto finish = [&](int64_t row, int64_t column, int64_t columns, const float* sums) {
            T* out = row_of<T>(args.out, first + row, column);
            const T* residual = row_of<const T>(args.residual, first + row, column);
            each_vector(0, columns, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
                Vec value = load(sums + i);
                if (b2) value += load(b2 + column + i, lanes);
                if (residual) value += load(residual + i, lanes);
                store(out + i, value, lanes);
            });
        };
        gemm(count, outer, width, Matrix<T>{hidden.get(), width, 1}, matrix_of<T>(args.w2).transposed(), finish,
             written<T>(args.out, first));
    }
}

}  // namespace

void feed_forward_forward(const FeedForwardForward& args) {
    with_dtype(args.x.dtype, [&](auto* element) { forward<std::remove_pointer_t<decltype(element)>>(args); });
}

}  // namespace fastattn::FASTATTN_ISA
