// layer_norm_forward, layer_norm_backward, rms_norm_forward, rms_norm_backward.
#include "bindings.h"

namespace fastattn {
namespace {

struct Rows {
    int64_t rows, dim;
};

// The matrix that a contiguous tensor is: its last dimension, and all the others together.
Rows rows_of(const Tensor& tensor, const char* name) {
    check_present(tensor, name);
    if (tensor.rank == 0) value_error(std::string(name) + " must have at least one dimension");
    Rows result{1, tensor.size[tensor.rank - 1]};
    for (int i = 0; i + 1 < tensor.rank; ++i) result.rows *= tensor.size[i];
    return result;
}

// A contiguous tensor of the shape and dtype of another.
void check_like(const Tensor& tensor, const char* name, const Tensor& other) {
    check_dtype(tensor, name, {other.dtype});
    bool equal = tensor.rank == other.rank;
    for (int i = 0; equal && i < tensor.rank; ++i) equal = tensor.size[i] == other.size[i];
    if (!equal) value_error(std::string(name) + " is a " + shape_text(tensor) + "; expected a " + shape_text(other));
    check_contiguous(tensor, name);
}

void check_output_like(const Tensor& tensor, const char* name, const Tensor& other) {
    check_like(tensor, name, other);
    check_output(tensor, name);
}

void check_like_or_absent(const Tensor& tensor, const char* name, const Tensor& other) {
    if (tensor.present()) check_like(tensor, name, other);
}

void check_absent(const Tensor& tensor, const char* name, const char* why) {
    if (tensor.present()) value_error(std::string(name) + " must be None " + why);
}

// (dim,) in the matrix's dtype or float32.
void check_vector(const Tensor& vector, const char* name, const Tensor& matrix, int64_t dim) {
    if (!vector.present()) return;
    check_dtype(vector, name, {matrix.dtype, DType::kFloat32});
    check_shape(vector, name, {dim});
    check_contiguous(vector, name);
}

void check_statistic(const Tensor& statistic, const char* name, int64_t rows) {
    check_dtype(statistic, name, {DType::kFloat32});
    check_shape(statistic, name, {rows});
    check_contiguous(statistic, name);
}

void forward(Norm norm, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& residual,
             const Tensor& seed, const Tensor& out, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
             double eps, double dropout_p) {
    check_floating(x, "x");
    check_contiguous(x, "x");
    const auto [rows, dim] = rows_of(x, "x");
    check_vector(weight, "weight", x, dim);
    check_vector(bias, "bias", x, dim);
    check_like_or_absent(residual, "residual", x);
    check_output_like(out, "out", x);
    if (residual.present() || dropout_p > 0.0) {
        check_output_like(sum, "sum", x);
    } else {
        check_absent(sum, "sum", "without residual and dropout");
    }
    if (norm == Norm::kLayer) check_statistic(mean, "mean", rows);
    check_statistic(rstd, "rstd", rows);
    run(&Kernels::norm_forward, NormForward{norm, rows, dim, x, weight, bias, residual, out, sum, mean, rstd,
                                            static_cast<float>(eps), dropout_p, read_seed(seed, dropout_p)});
}

void backward(Norm norm, const Tensor& grad_out, const Tensor& grad_sum, const Tensor& sum, const Tensor& weight,
              const Tensor& mean, const Tensor& rstd, const Tensor& seed, const Tensor& grad_residual,
              const Tensor& grad_x, const Tensor& grad_weight, const Tensor& grad_bias, double dropout_p) {
    check_floating(sum, "sum");
    check_contiguous(sum, "sum");
    const auto [rows, dim] = rows_of(sum, "sum");
    check_like(grad_out, "grad_out", sum);
    check_like_or_absent(grad_sum, "grad_sum", sum);
    check_vector(weight, "weight", sum, dim);
    if (norm == Norm::kLayer) check_statistic(mean, "mean", rows);
    check_statistic(rstd, "rstd", rows);
    check_output_like(grad_residual, "grad_residual", sum);
    if (dropout_p > 0.0) {
        check_output_like(grad_x, "grad_x", sum);
    } else {
        check_absent(grad_x, "grad_x", "without dropout");
    }
    check_vector(grad_weight, "grad_weight", sum, dim);
    check_vector(grad_bias, "grad_bias", sum, dim);
    run(&Kernels::norm_backward,
        NormBackward{norm, rows, dim, grad_out, grad_sum, sum, weight, mean, rstd, grad_residual, grad_x, grad_weight,
                     grad_bias, dropout_p, read_seed(seed, dropout_p)});
}

void layer_norm_forward(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor seed, Tensor out, Tensor sum,
                        Tensor mean, Tensor rstd, double eps, double dropout_p) {
    forward(Norm::kLayer, x, weight, bias, residual, seed, out, sum, mean, rstd, eps, dropout_p);
}

void layer_norm_backward(Tensor grad_out, Tensor grad_sum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd,
                         Tensor seed, Tensor grad_residual, Tensor grad_x, Tensor grad_weight, Tensor grad_bias,
                         double dropout_p) {
    backward(Norm::kLayer, grad_out, grad_sum, sum, weight, mean, rstd, seed, grad_residual, grad_x, grad_weight,
             grad_bias, dropout_p);
}

void rms_norm_forward(Tensor x, Tensor weight, Tensor residual, Tensor seed, Tensor out, Tensor sum, Tensor rstd,
                      double eps, double dropout_p) {
    forward(Norm::kRms, x, weight, {}, residual, seed, out, sum, {}, rstd, eps, dropout_p);
}

void rms_norm_backward(Tensor grad_out, Tensor grad_sum, Tensor sum, Tensor weight, Tensor rstd, Tensor seed,
                       Tensor grad_residual, Tensor grad_x, Tensor grad_weight, double dropout_p) {
    backward(Norm::kRms, grad_out, grad_sum, sum, weight, {}, rstd, seed, grad_residual, grad_x, grad_weight, {},
             dropout_p);
}

Binding norm_binding([](py::module_& m) {
    using py::arg;
    m.def("layer_norm_forward", &layer_norm_forward, arg("x"), arg("weight"), arg("bias"), arg("residual"), arg("seed"),
          arg("out"), arg("sum"), arg("mean"), arg("rstd"), arg("eps"), arg("dropout_p"));
    m.def("layer_norm_backward", &layer_norm_backward, arg("grad_out"), arg("grad_sum"), arg("sum"), arg("weight"),
          arg("mean"), arg("rstd"), arg("seed"), arg("grad_residual"), arg("grad_x"), arg("grad_weight"),
          arg("grad_bias"), arg("dropout_p"));
    m.def("rms_norm_forward", &rms_norm_forward, arg("x"), arg("weight"), arg("residual"), arg("seed"), arg("out"),
          arg("sum"), arg("rstd"), arg("eps"), arg("dropout_p"));
    m.def("rms_norm_backward", &rms_norm_backward, arg("grad_out"), arg("grad_sum"), arg("sum"), arg("weight"),
          arg("rstd"), arg("seed"), arg("grad_residual"), arg("grad_x"), arg("grad_weight"), arg("dropout_p"));
});

}  // namespace
}  // namespace fastattn
