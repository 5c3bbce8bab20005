// attention_forward, attention_varlen_forward, attention_with_kvcache_forward: one kernel.
#include <algorithm>

#include "bindings_attention.h"
#include "bindings_rotary_embedding.h"

namespace fastattn {

int64_t check_cache_seqlens(const Tensor& cache_seqlens, int64_t batch, int64_t added, int64_t capacity) {
    check_dtype(cache_seqlens, "cache_seqlens", {DType::kInt32});
    check_shape(cache_seqlens, "cache_seqlens", {batch});
    check_contiguous(cache_seqlens, "cache_seqlens");
    int64_t longest = 0;
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t length = cache_seqlens.as<int32_t>()[b], total = length + added;
        if (length < 0 || total > capacity) {
            value_error("cache_seqlens[" + std::to_string(b) + "] is " + std::to_string(length) + "; with " +
                        std::to_string(added) + " new keys it must lie between 0 and the cache's capacity, " +
                        std::to_string(capacity));
        }
        longest = std::max(longest, total);
    }
    return longest;
}

namespace {

void attention_forward(Tensor query, Tensor key, Tensor value, Tensor attn_mask, Tensor alibi_slopes, Tensor seed,
                       Tensor out, Tensor lse, double scale, int64_t window_left, int64_t window_right,
                       int64_t diagonal, double softcap, double dropout_p) {
    AttentionForward args = {};
    args.query = query, args.key = key, args.value = value, args.out = out, args.lse = lse;
    args.mask = attn_mask, args.alibi_slopes = alibi_slopes;
    set_dense(args, query, key, value);
    check_output(out, "out", query.dtype, {args.batch, args.heads, args.max_q, value.size[3]});
    check_output(lse, "lse", DType::kFloat32, {args.batch, args.heads, args.max_q});
    set_settings(args, {scale, window_left, window_right, diagonal, softcap, seed, dropout_p});
    run(&Kernels::attention_forward, args);
}

void attention_varlen_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                              Tensor attn_mask, Tensor alibi_slopes, Tensor seed, Tensor out, Tensor lse,
                              int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, int64_t window_left,
                              int64_t window_right, double softcap, double dropout_p) {
    AttentionForward args = {};
    args.query = query, args.key = key, args.value = value, args.out = out, args.lse = lse;
    args.mask = attn_mask, args.alibi_slopes = alibi_slopes;
    set_packed(args, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
    check_output(out, "out", query.dtype, {query.size[0], query.size[1], value.size[2]});
    check_output(lse, "lse", DType::kFloat32, {query.size[1], query.size[0]});
    for (Tensor* t : {&args.query, &args.key, &args.value, &args.out, &args.lse}) *t = batched(*t, args.batch);
    set_settings(args, {scale, window_left, window_right, 0, softcap, seed, dropout_p});
    run(&Kernels::attention_forward, args);
}

// Sizes and dtypes of a contiguous cache's call, and its lengths.
void set_cached(AttentionForward& args, const Tensor& query, const Tensor& k_cache, const Tensor& v_cache,
                const Tensor& k, const Tensor& v, const Tensor& cache_seqlens, const Tensor& cos, const Tensor& sin) {
    args.query = query, args.key = k_cache, args.value = v_cache, args.cache_seqlens = cache_seqlens;
    check_dtypes(query, k_cache, v_cache);
    check_rank(query, "query", 4);
    check_rank(k_cache, "k_cache", 4);
    args.batch = query.size[0], args.heads = query.size[1], args.kv_heads = k_cache.size[1];
    args.max_q = query.size[2];
    const int64_t capacity = k_cache.size[2];
    check_shape(k_cache, "k_cache", {args.batch, -1, -1, query.size[3]});
    check_shape(v_cache, "v_cache", {args.batch, args.kv_heads, capacity, -1});
    if (k.present() || v.present()) {
        check_dtype(k, "k", {query.dtype});
        check_dtype(v, "v", {query.dtype});
        check_rank(k, "k", 4);
        args.new_key = k, args.new_value = v, args.new_keys = k.size[2];
        check_shape(k, "k", {args.batch, args.kv_heads, args.new_keys, query.size[3]});
        check_shape(v, "v", {args.batch, args.kv_heads, args.new_keys, v_cache.size[3]});
        check_writable(k_cache, "k_cache");
        check_writable(v_cache, "v_cache");
    }
    if (cos.present() || sin.present()) {
        check(k.present() && args.max_q == args.new_keys, "with cos and sin there are as many queries as new keys");
        const Angles angles = read_angles(cos, sin, query);
        args.cos = angles.cos, args.sin = angles.sin;
    }
    args.max_k = check_cache_seqlens(cache_seqlens, args.batch, args.new_keys, capacity);
    check_heads_and_bias(args, query.dtype);
}

void attention_with_kvcache_forward(Tensor query, Tensor k_cache, Tensor v_cache, Tensor k, Tensor v,
                                    Tensor cache_seqlens, Tensor block_table, Tensor alibi_slopes, Tensor cos,
                                    Tensor sin, Tensor out, Tensor lse, double scale, int64_t window_left,
                                    int64_t window_right, double softcap, bool interleaved) {
    AttentionForward args = {};
    check(!block_table.present(), "block_table must be None: this kernel has no paged caches");
    args.alibi_slopes = alibi_slopes, args.interleaved = interleaved;
    set_cached(args, query, k_cache, v_cache, k, v, cache_seqlens, cos, sin);
    if (args.cos.present()) check_unit_last_stride({args.cos, args.sin});
    args.out = out, args.lse = lse;
    check_output(out, "out", query.dtype, {args.batch, args.heads, args.max_q, v_cache.size[3]});
    check_output(lse, "lse", DType::kFloat32, {args.batch, args.heads, args.max_q});
    set_settings(args, {scale, window_left, window_right, 0, softcap, {}, 0.0});
    run(&Kernels::attention_forward, args);
}

// ---- Whether a call's tensors pass these checks, asked before it is made. head_dim is at least 1 there. -------------

void check_head_dim(const Tensor& query) { check(query.size[query.rank - 1] > 0, "head_dim must be at least 1"); }

bool attention_fits(Tensor query, Tensor key, Tensor value) {
    AttentionForward args = {};
    return passes([&] {
        set_dense(args, query, key, value);
        check_head_dim(query);
    });
}

bool attention_varlen_fits(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                           int64_t max_seqlen_q, int64_t max_seqlen_k) {
    AttentionForward args = {};
    return passes([&] {
        set_packed(args, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
        check_head_dim(query);
    });
}

bool attention_with_kvcache_fits(Tensor query, Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor cache_seqlens,
                                 Tensor cos, Tensor sin) {
    AttentionForward args = {};
    return passes([&] {
        set_cached(args, query, k_cache, v_cache, k, v, cache_seqlens, cos, sin);
        check_head_dim(query);
    });
}

Binding attention_forward_binding([](py::module_& m) {
    using py::arg;
    m.def("attention_forward", &attention_forward, arg("query"), arg("key"), arg("value"), arg("attn_mask"),
          arg("alibi_slopes"), arg("seed"), arg("out"), arg("lse"), arg("scale"), arg("window_left"),
          arg("window_right"), arg("diagonal"), arg("softcap"), arg("dropout_p"));
    m.def("attention_varlen_forward", &attention_varlen_forward, arg("query"), arg("key"), arg("value"),
          arg("cu_seqlens_q"), arg("cu_seqlens_k"), arg("attn_mask"), arg("alibi_slopes"), arg("seed"), arg("out"),
          arg("lse"), arg("max_seqlen_q"), arg("max_seqlen_k"), arg("scale"), arg("window_left"), arg("window_right"),
          arg("softcap"), arg("dropout_p"));
    m.def("attention_with_kvcache_forward", &attention_with_kvcache_forward, arg("query"), arg("k_cache"),
          arg("v_cache"), arg("k"), arg("v"), arg("cache_seqlens"), arg("block_table"), arg("alibi_slopes"), arg("cos"),
          arg("sin"), arg("out"), arg("lse"), arg("scale"), arg("window_left"), arg("window_right"), arg("softcap"),
          arg("interleaved"));
    m.def("attention_fits", &attention_fits, arg("query"), arg("key"), arg("value"));
    m.def("attention_varlen_fits", &attention_varlen_fits, arg("query"), arg("key"), arg("value"), arg("cu_seqlens_q"),
          arg("cu_seqlens_k"), arg("max_seqlen_q"), arg("max_seqlen_k"));
    m.def("attention_with_kvcache_fits", &attention_with_kvcache_fits, arg("query"), arg("k_cache"), arg("v_cache"),
          arg("k"), arg("v"), arg("cache_seqlens"), arg("cos"), arg("sin"));
});

}  // namespace
}  // namespace fastattn
