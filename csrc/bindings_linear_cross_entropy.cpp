// linear_cross_entropy: the loss, and the gradients that are asked for.
#include "bindings_linear.h"

namespace fastattn {
namespace {

Reduction read_reduction(const std::string& name) {
    if (name == "none") return Reduction::kNone;
    if (name == "sum") return Reduction::kSum;
    if (name == "mean") return Reduction::kMean;
    value_error("reduction must be none, sum or mean, got " + name);
}

void check_targets(const Tensor& target, int64_t classes, int64_t ignore_index) {
    for (int64_t row = 0; row < target.size[0]; ++row) {
        const int64_t y = target.as<const int64_t>()[row];
        if (y != ignore_index && (y < 0 || y >= classes)) {
            value_error("target holds " + std::to_string(y) + ", which is no class and not ignore_index");
        }
    }
}

void check_vector(const Tensor& tensor, const char* name, DType dtype, int64_t size) {
    check_dtype(tensor, name, {dtype});
    check_shape(tensor, name, {size});
    check_contiguous(tensor, name);
}

void linear_cross_entropy(Tensor x, Tensor weight, Tensor target, Tensor bias, Tensor class_weight, Tensor grad_loss,
                          Tensor loss, Tensor grad_x, Tensor grad_weight, Tensor grad_bias, int64_t ignore_index,
                          double label_smoothing, double z_loss, double softcap, const std::string& reduction) {
    LinearCrossEntropy args{};
    args.reduction = read_reduction(reduction);
    check_floating(x, "x");
    check_rank(x, "x", 2);
    const int64_t rows = x.size[0], dim = x.size[1];
    args.x = row_matrix_like(x, "x", x, rows, dim);
    check_rank(weight, "weight", 2);
    const int64_t classes = weight.size[0];
    args.weight = row_matrix_like(weight, "weight", x, classes, dim);
    check(rows > 0 && classes > 0 && dim > 0, "x and weight must not be empty");
    check_vector(target, "target", DType::kInt64, rows);
    check_targets(target, classes, ignore_index);
    args.target = target;
    check_bias(bias, "bias", x, classes);
    args.bias = bias;
    if (class_weight.present()) check_vector(class_weight, "class_weight", DType::kFloat32, classes);
    args.class_weight = class_weight;
    const int64_t losses = args.reduction == Reduction::kNone ? rows : 1;
    if (grad_loss.present()) check_vector(grad_loss, "grad_loss", DType::kFloat32, losses);
    args.grad_loss = grad_loss;
    check_vector(loss, "loss", DType::kFloat32, losses);
    check_writable(loss, "loss");
    args.loss = loss;
    args.grad_x = written_rows_or_absent(grad_x, "grad_x", x, rows, dim);
    args.grad_weight = written_rows_or_absent(grad_weight, "grad_weight", x, classes, dim);
    check_bias(grad_bias, "grad_bias", x, classes);
    check_writable(grad_bias, "grad_bias");
    args.grad_bias = grad_bias;
    args.ignore_index = ignore_index;
    args.label_smoothing = static_cast<float>(label_smoothing);
    args.z_loss = static_cast<float>(z_loss);
    args.softcap = static_cast<float>(softcap);
    run(&Kernels::linear_cross_entropy, args);
}

Binding linear_cross_entropy_binding([](py::module_& m) {
    using py::arg;
    m.def("linear_cross_entropy", &linear_cross_entropy, arg("x"), arg("weight"), arg("target"), arg("bias"),
          arg("class_weight"), arg("grad_loss"), arg("loss"), arg("grad_x"), arg("grad_weight"), arg("grad_bias"),
          arg("ignore_index"), arg("label_smoothing"), arg("z_loss"), arg("softcap"), arg("reduction"));
});

}  // namespace
}  // namespace fastattn
