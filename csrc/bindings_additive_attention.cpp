// additive_attention, forward and backward.
#include "bindings_attention.h"
#include "bindings_linear.h"

namespace fastattn {
namespace {

struct AdditiveInputs {
    Tensor query, key, value, w_query, w_key, v, attn_mask, seed;
};

// (batch or 1, q or 1, k or 1) as attention's masks lie, with one head.
Tensor with_a_head(const Tensor& mask) {
    if (!mask.present()) return mask;
    check_rank(mask, "attn_mask", 3);
    Tensor result = mask;
    result.rank = 4;
    result.size[1] = 1, result.stride[1] = 0;
    for (int i = 1; i < 3; ++i) result.size[i + 1] = mask.size[i], result.stride[i + 1] = mask.stride[i];
    return result;
}

// Fills in what forward and backward have in common. Arguments is one of their structs.
template <class Arguments>
void set_additive_inputs(Arguments& args, const AdditiveInputs& in, double dropout_p) {
    check_dtypes(in.query, in.key, in.value);
    check_rank(in.query, "query", 3);
    check_rank(in.key, "key", 3);
    check_rank(in.w_query, "w_query", 2);
    args.batch = in.query.size[0], args.max_q = in.query.size[1], args.max_k = in.key.size[1];
    args.heads = args.kv_heads = 1;
    check_shape(in.key, "key", {args.batch, -1, -1});
    check_shape(in.value, "value", {args.batch, args.max_k, -1});
    const int64_t hidden = in.w_query.size[0];
    args.query = as_matrix(in.query, "query");
    args.key = as_matrix(in.key, "key");
    args.value = in.value;
    args.w_query = matrix_like(in.w_query, "w_query", in.query, hidden, in.query.size[2]);
    args.w_key = matrix_like(in.w_key, "w_key", in.query, hidden, in.key.size[2]);
    check_present(in.v, "v");
    check_bias(in.v, "v", in.query, hidden);
    args.v = in.v;
    if (in.attn_mask.present()) check_dtype(in.attn_mask, "attn_mask", {DType::kBool, DType::kFloat32});
    args.mask = with_a_head(in.attn_mask);
    check_heads_and_bias(args, in.query.dtype);
    set_settings(args, {1.0, -1, -1, 0, 0.0, in.seed, dropout_p});
}

void check_projected(const Tensor& projected, const char* name, int64_t rows, int64_t hidden) {
    check_dtype(projected, name, {DType::kFloat32});
    check_shape(projected, name, {rows, hidden});
    check_contiguous(projected, name);
}

// A contiguous gradient of this dtype and shape, or None.
void check_contiguous_gradient(const Tensor& gradient, const char* name, DType dtype,
                               std::initializer_list<int64_t> shape) {
    if (!gradient.present()) return;
    check_output(gradient, name, dtype, shape);
    check_contiguous(gradient, name);
}

void additive_attention_forward(Tensor query, Tensor key, Tensor value, Tensor w_query, Tensor w_key, Tensor v,
                                Tensor attn_mask, Tensor seed, Tensor out, Tensor projected_query, Tensor projected_key,
                                double dropout_p) {
    AdditiveAttentionForward args = {};
    set_additive_inputs(args, {query, key, value, w_query, w_key, v, attn_mask, seed}, dropout_p);
    check_output(out, "out", query.dtype, {args.batch, args.max_q, value.size[2]});
    check_contiguous(out, "out");
    args.out = out;
    check(projected_query.present() == projected_key.present(),
          "projected_query and projected_key must be both there, or neither");
    if (projected_query.present()) {
        check_projected(projected_query, "projected_query", args.query.size[0], w_query.size[0]);
        check_projected(projected_key, "projected_key", args.key.size[0], w_query.size[0]);
        check_output(projected_query, "projected_query");
        check_output(projected_key, "projected_key");
    }
    args.projected_query = projected_query, args.projected_key = projected_key;
    run(&Kernels::additive_attention_forward, args);
}

void additive_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor w_query, Tensor w_key,
                                 Tensor v, Tensor attn_mask, Tensor seed, Tensor projected_query, Tensor projected_key,
                                 Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_w_query,
                                 Tensor grad_w_key, Tensor grad_v, Tensor grad_mask, double dropout_p) {
    AdditiveAttentionBackward args = {};
    set_additive_inputs(args, {query, key, value, w_query, w_key, v, attn_mask, seed}, dropout_p);
    const int64_t hidden = w_query.size[0], dim = value.size[2];
    check_dtype(grad_out, "grad_out", {query.dtype});
    check_shape(grad_out, "grad_out", {args.batch, args.max_q, dim});
    args.grad_out = grad_out;
    check_projected(projected_query, "projected_query", args.query.size[0], hidden);
    check_projected(projected_key, "projected_key", args.key.size[0], hidden);
    args.projected_query = projected_query, args.projected_key = projected_key;
    args.grad_query = written_rows_or_absent(grad_query, "grad_query", query, args.query.size[0], args.query.size[1]);
    args.grad_key = written_rows_or_absent(grad_key, "grad_key", query, args.key.size[0], args.key.size[1]);
    args.grad_w_query = weight_gradient(grad_w_query, "grad_w_query", query, hidden, args.query.size[1]);
    args.grad_w_key = weight_gradient(grad_w_key, "grad_w_key", query, hidden, args.key.size[1]);
    check_contiguous_gradient(grad_value, "grad_value", query.dtype, {args.batch, args.max_k, dim});
    check_contiguous_gradient(grad_v, "grad_v", query.dtype, {hidden});
    args.grad_value = grad_value, args.grad_v = grad_v;
    if (grad_mask.present()) {
        check(attn_mask.present() && attn_mask.dtype != DType::kBool,
              "grad_mask must be None without a floating attn_mask");
        check_contiguous_gradient(grad_mask, "grad_mask", DType::kFloat32,
                                  {attn_mask.size[0], attn_mask.size[1], attn_mask.size[2]});
    }
    args.grad_mask = with_a_head(grad_mask);
    run(&Kernels::additive_attention_backward, args);
}

Binding additive_attention_binding([](py::module_& m) {
    using py::arg;
    m.def("additive_attention_forward", &additive_attention_forward, arg("query"), arg("key"), arg("value"),
          arg("w_query"), arg("w_key"), arg("v"), arg("attn_mask"), arg("seed"), arg("out"), arg("projected_query"),
          arg("projected_key"), arg("dropout_p"));
    m.def("additive_attention_backward", &additive_attention_backward, arg("grad_out"), arg("query"), arg("key"),
          arg("value"), arg("w_query"), arg("w_key"), arg("v"), arg("attn_mask"), arg("seed"), arg("projected_query"),
          arg("projected_key"), arg("grad_query"), arg("grad_key"), arg("grad_value"), arg("grad_w_query"),
          arg("grad_w_key"), arg("grad_v"), arg("grad_mask"), arg("dropout_p"));
});

}  // namespace
}  // namespace fastattn
