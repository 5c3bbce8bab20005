// linear_forward, linear_backward, and what they share with feed_forward.
#include "bindings_linear.h"

namespace fastattn {

Activation read_activation(const std::string& name) {
    if (name == "none") return Activation::kNone;
    if (name == "relu") return Activation::kRelu;
    if (name == "gelu") return Activation::kGelu;
    if (name == "gelu_tanh") return Activation::kGeluTanh;
    if (name == "silu") return Activation::kSilu;
    value_error("activation must be none, relu, gelu, gelu_tanh or silu, got " + name);
}

Tensor matrix_like(const Tensor& tensor, const char* name, const Tensor& x, int64_t rows, int64_t columns) {
    check_dtype(tensor, name, {x.dtype});
    const Tensor matrix = as_matrix(tensor, name);
    check_shape(matrix, name, {rows, columns});
    return matrix;
}

Tensor row_matrix_like(const Tensor& tensor, const char* name, const Tensor& x, int64_t rows, int64_t columns) {
    const Tensor matrix = matrix_like(tensor, name, x, rows, columns);
    if (!matrix.unit_last_stride()) value_error(std::string(name) + " must lie along its last dimension in memory");
    return matrix;
}

Tensor written_rows(const Tensor& tensor, const char* name, const Tensor& x, int64_t rows, int64_t columns) {
    const Tensor matrix = row_matrix_like(tensor, name, x, rows, columns);
    check_output(matrix, name);
    return matrix;
}

Tensor written_rows_or_absent(const Tensor& tensor, const char* name, const Tensor& x, int64_t rows, int64_t columns) {
    return tensor.present() ? written_rows(tensor, name, x, rows, columns) : tensor;
}

void check_size(const Tensor& bias, const char* name, const Tensor& x, int64_t size) {
    if (!bias.present()) return;
    check_dtype(bias, name, {x.dtype});
    check_shape(bias, name, {size});
}

void check_bias(const Tensor& bias, const char* name, const Tensor& x, int64_t size) {
    check_size(bias, name, x, size);
    if (bias.present()) check_contiguous(bias, name);
}

Tensor weight_gradient(const Tensor& gradient, const char* name, const Tensor& x, int64_t rows, int64_t columns) {
    if (!gradient.present()) return gradient;
    check_dtype(gradient, name, {x.dtype});
    check_shape(gradient, name, {rows, columns});
    check_output(gradient, name);
    if (!gradient.unit_last_stride() && gradient.size[0] > 1 && gradient.stride[0] != 1) {
        value_error(std::string(name) + " must lie along one of its dimensions in memory");
    }
    return gradient;
}

namespace {

void linear_forward(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor out, Tensor pre,
                    const std::string& activation) {
    LinearForward args{};
    args.activation = read_activation(activation);
    check_floating(x, "x");
    args.x = as_matrix(x, "x");
    const int64_t rows = args.x.size[0];
    check_dtype(weight, "weight", {x.dtype});
    check_shape(weight, "weight", {-1, args.x.size[1]});
    const int64_t columns = weight.size[0];
    args.weight = weight;
    check_bias(bias, "bias", x, columns);
    args.bias = bias;
    if (residual.present()) args.residual = row_matrix_like(residual, "residual", x, rows, columns);
    args.out = written_rows(out, "out", x, rows, columns);
    args.pre = written_rows_or_absent(pre, "pre", x, rows, columns);
    run(&Kernels::linear_forward, args);
}

void linear_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor pre, Tensor grad_x, Tensor grad_weight,
                     Tensor grad_bias, const std::string& activation) {
    LinearBackward args{};
    args.activation = read_activation(activation);
    check_floating(x, "x");
    args.x = as_matrix(x, "x");
    const int64_t rows = args.x.size[0], depth = args.x.size[1];
    check_dtype(weight, "weight", {x.dtype});
    check_shape(weight, "weight", {-1, depth});
    args.weight = weight;
    const int64_t columns = weight.size[0];
    args.grad_out = row_matrix_like(grad_out, "grad_out", x, rows, columns);
    if (args.activation != Activation::kNone) args.pre = row_matrix_like(pre, "pre", x, rows, columns);
    args.grad_x = written_rows_or_absent(grad_x, "grad_x", x, rows, depth);
    args.grad_weight = weight_gradient(grad_weight, "grad_weight", x, columns, depth);
    check_bias(grad_bias, "grad_bias", x, columns);
    check_output(grad_bias, "grad_bias");
    args.grad_bias = grad_bias;
    run(&Kernels::linear_backward, args);
}

Binding linear_binding([](py::module_& m) {
    using py::arg;
    m.def("linear_forward", &linear_forward, arg("x"), arg("weight"), arg("bias"), arg("residual"), arg("out"),
          arg("pre"), arg("activation"));
    m.def("linear_backward", &linear_backward, arg("grad_out"), arg("x"), arg("weight"), arg("pre"), arg("grad_x"),
          arg("grad_weight"), arg("grad_bias"), arg("activation"));
});

}  // namespace
}  // namespace fastattn
