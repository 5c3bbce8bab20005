// info_nce: the loss, and the gradients that are asked for.
#include "bindings_linear.h"

namespace fastattn {
namespace {

void check_one(const Tensor& tensor, const char* name, DType dtype) {
    check_dtype(tensor, name, {dtype});
    if (tensor.numel() != 1) value_error(std::string(name) + " must have one element, got a " + shape_text(tensor));
}

void info_nce(Tensor query, Tensor positive, Tensor negatives, Tensor temperature, Tensor grad_loss, Tensor loss,
              Tensor grad_query, Tensor grad_positive, Tensor grad_negatives, Tensor grad_temperature, bool symmetric) {
    InfoNce args{};
    args.symmetric = symmetric;
    check_floating(query, "query");
    check_rank(query, "query", 2);
    const int64_t queries = query.size[0], dim = query.size[1];
    check(queries > 0 && dim > 0, "query must not be empty");
    args.query = row_matrix_like(query, "query", query, queries, dim);
    args.positive = row_matrix_like(positive, "positive", query, queries, dim);
    int64_t extra = 0;
    if (negatives.present()) {
        check_rank(negatives, "negatives", 2);
        extra = negatives.size[0];
        args.negatives = row_matrix_like(negatives, "negatives", query, extra, dim);
    }
    check_one(temperature, "temperature", DType::kFloat64);
    args.temperature = static_cast<float>(*temperature.as<const double>());
    if (grad_loss.present()) check_one(grad_loss, "grad_loss", DType::kFloat32);
    args.grad_loss = grad_loss.present() ? *grad_loss.as<const float>() : 1.0f;
    check_one(loss, "loss", DType::kFloat32);
    args.loss = loss;
    args.grad_query = written_rows_or_absent(grad_query, "grad_query", query, queries, dim);
    args.grad_positive = written_rows_or_absent(grad_positive, "grad_positive", query, queries, dim);
    if (grad_negatives.present() && !negatives.present()) value_error("grad_negatives needs negatives");
    args.grad_negatives = written_rows_or_absent(grad_negatives, "grad_negatives", query, extra, dim);
    if (grad_temperature.present()) check_one(grad_temperature, "grad_temperature", DType::kFloat32);
    args.grad_temperature = grad_temperature;
    run(&Kernels::info_nce, args);
}

Binding info_nce_binding([](py::module_& m) {
    using py::arg;
    m.def("info_nce", &info_nce, arg("query"), arg("positive"), arg("negatives"), arg("temperature"), arg("grad_loss"),
          arg("loss"), arg("grad_query"), arg("grad_positive"), arg("grad_negatives"), arg("grad_temperature"),
          arg("symmetric"));
});

}  // namespace
}  // namespace fastattn
