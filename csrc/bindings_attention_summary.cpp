#include "bindings_attention.h"

namespace fastattn {
namespace {

void attention_summary_forward(Tensor query, Tensor key, Tensor attn_mask, Tensor alibi_slopes, Tensor entropy,
                               Tensor max_weight, Tensor argmax, Tensor distance, double scale, int64_t window_left,
                               int64_t window_right, int64_t diagonal, double softcap) {
    AttentionSummary args = {};
    args.query = query, args.key = key, args.mask = attn_mask, args.alibi_slopes = alibi_slopes;
    args.entropy = entropy, args.max_weight = max_weight, args.argmax = argmax, args.distance = distance;
    set_dense(args, query, key, key);
    check_output(entropy, "entropy", DType::kFloat32, {args.batch, args.heads, args.max_q});
    check_output(max_weight, "max_weight", DType::kFloat32, {args.batch, args.heads, args.max_q});
    check_output(argmax, "argmax", DType::kInt64, {args.batch, args.heads, args.max_q});
    check_output(distance, "distance", DType::kFloat32, {args.batch, args.heads, args.max_q});
    set_settings(args, {scale, window_left, window_right, diagonal, softcap, {}, 0.0});
    run(&Kernels::attention_summary, args);
}

Binding attention_summary_binding([](py::module_& m) {
    using py::arg;
    m.def("attention_summary_forward", &attention_summary_forward, arg("query"), arg("key"), arg("attn_mask"),
          arg("alibi_slopes"), arg("entropy"), arg("max_weight"), arg("argmax"), arg("distance"), arg("scale"),
          arg("window_left"), arg("window_right"), arg("diagonal"), arg("softcap"));
});

}  // namespace
}  // namespace fastattn
