// attention_backward, attention_varlen_backward: one kernel.
#include "bindings_attention.h"

namespace fastattn {
namespace {

void check_input(const Tensor& tensor, const char* name, DType dtype, std::initializer_list<int64_t> shape) {
    check_dtype(tensor, name, {dtype});
    check_shape(tensor, name, shape);
}

// Like a floating mask, or None.
void check_grad_mask(const Tensor& grad_mask, const Tensor& mask) {
    if (!grad_mask.present()) return;
    check(mask.present() && mask.dtype != DType::kBool, "grad_mask must be None without a floating attn_mask");
    check_output(grad_mask, "grad_mask", mask.dtype, {mask.size[0], mask.size[1], mask.size[2], mask.size[3]});
}

void attention_backward(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor attn_mask,
                        Tensor alibi_slopes, Tensor seed, Tensor out, Tensor lse, Tensor grad_query, Tensor grad_key,
                        Tensor grad_value, Tensor grad_mask, double scale, int64_t window_left, int64_t window_right,
                        int64_t diagonal, double softcap, double dropout_p) {
    AttentionBackward args = {};
    args.query = query, args.key = key, args.value = value, args.out = out, args.lse = lse;
    args.grad_out = grad_out, args.grad_lse = grad_lse;
    args.grad_query = grad_query, args.grad_key = grad_key, args.grad_value = grad_value, args.grad_mask = grad_mask;
    args.mask = attn_mask, args.alibi_slopes = alibi_slopes;
    set_dense(args, query, key, value);
    const int64_t batch = args.batch, heads = args.heads, q = args.max_q;
    for (const auto& [tensor, name] : {std::pair{&out, "out"}, std::pair{&grad_out, "grad_out"}}) {
        check_input(*tensor, name, query.dtype, {batch, heads, q, value.size[3]});
    }
    check_input(lse, "lse", DType::kFloat32, {batch, heads, q});
    if (grad_lse.present()) check_input(grad_lse, "grad_lse", DType::kFloat32, {batch, heads, q});
    check_output(grad_query, "grad_query", query.dtype, {batch, heads, q, query.size[3]});
    check_output(grad_key, "grad_key", query.dtype, {batch, args.kv_heads, args.max_k, query.size[3]});
    check_output(grad_value, "grad_value", query.dtype, {batch, args.kv_heads, args.max_k, value.size[3]});
    check_grad_mask(grad_mask, attn_mask);
    set_settings(args, {scale, window_left, window_right, diagonal, softcap, seed, dropout_p});
    run(&Kernels::attention_backward, args);
}

void attention_varlen_backward(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key, Tensor value,
                               Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor attn_mask, Tensor alibi_slopes,
                               Tensor seed, Tensor out, Tensor lse, Tensor grad_query, Tensor grad_key,
                               Tensor grad_value, Tensor grad_mask, int64_t max_seqlen_q, int64_t max_seqlen_k,
                               double scale, int64_t window_left, int64_t window_right, double softcap,
                               double dropout_p) {
    AttentionBackward args = {};
    args.query = query, args.key = key, args.value = value, args.out = out, args.lse = lse;
    args.grad_out = grad_out, args.grad_lse = grad_lse;
    args.grad_query = grad_query, args.grad_key = grad_key, args.grad_value = grad_value, args.grad_mask = grad_mask;
    args.mask = attn_mask, args.alibi_slopes = alibi_slopes;
    set_packed(args, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
    const int64_t total_q = query.size[0], total_k = key.size[0], heads = args.heads;
    for (const auto& [tensor, name] : {std::pair{&out, "out"}, std::pair{&grad_out, "grad_out"}}) {
        check_input(*tensor, name, query.dtype, {total_q, heads, value.size[2]});
    }
    check_input(lse, "lse", DType::kFloat32, {heads, total_q});
    if (grad_lse.present()) check_input(grad_lse, "grad_lse", DType::kFloat32, {heads, total_q});
    check_output(grad_query, "grad_query", query.dtype, {total_q, heads, query.size[2]});
    check_output(grad_key, "grad_key", query.dtype, {total_k, args.kv_heads, query.size[2]});
    check_output(grad_value, "grad_value", query.dtype, {total_k, args.kv_heads, value.size[2]});
    check_grad_mask(grad_mask, attn_mask);
    for (Tensor* t : {&args.query, &args.key, &args.value, &args.out, &args.lse, &args.grad_out, &args.grad_lse,
                      &args.grad_query, &args.grad_key, &args.grad_value}) {
        *t = batched(*t, args.batch);
    }
    set_settings(args, {scale, window_left, window_right, 0, softcap, seed, dropout_p});
    run(&Kernels::attention_backward, args);
}

Binding attention_backward_binding([](py::module_& m) {
    using py::arg;
    m.def("attention_backward", &attention_backward, arg("grad_out"), arg("grad_lse"), arg("query"), arg("key"),
          arg("value"), arg("attn_mask"), arg("alibi_slopes"), arg("seed"), arg("out"), arg("lse"), arg("grad_query"),
          arg("grad_key"), arg("grad_value"), arg("grad_mask"), arg("scale"), arg("window_left"), arg("window_right"),
          arg("diagonal"), arg("softcap"), arg("dropout_p"));
    m.def("attention_varlen_backward", &attention_varlen_backward, arg("grad_out"), arg("grad_lse"), arg("query"),
          arg("key"), arg("value"), arg("cu_seqlens_q"), arg("cu_seqlens_k"), arg("attn_mask"), arg("alibi_slopes"),
          arg("seed"), arg("out"), arg("lse"), arg("grad_query"), arg("grad_key"), arg("grad_value"), arg("grad_mask"),
          arg("max_seqlen_q"), arg("max_seqlen_k"), arg("scale"), arg("window_left"), arg("window_right"),
          arg("softcap"), arg("dropout_p"));
});

}  // namespace
}  // namespace fastattn
