// attention_forward, attention_varlen_forward, attention_with_kvcache_forward: one kernel. A packed tensor (total,
// heads, dim) goes to it as (batch, heads, total, dim) with a batch stride of 0.
#include <algorithm>

#include "bindings.h"

namespace fastattn {
namespace {

// Positions are added up in 64 bits; a window or diagonal beyond this is no limit anyway, whatever the lengths.
constexpr int64_t kFar = int64_t{1} << 40;

int64_t clamped(int64_t x) { return std::min(std::max(x, -kFar), kFar); }
int64_t clamped_window(int64_t x) { return x < 0 ? -1 : std::min(x, kFar); }

void set_settings(AttentionForward& args, double scale, int64_t window_left, int64_t window_right, int64_t diagonal,
                  double softcap, const Tensor& seed, double dropout_p) {
    args.scale = static_cast<float>(scale);
    args.window_left = clamped_window(window_left);
    args.window_right = clamped_window(window_right);
    args.diagonal = clamped(diagonal);
    args.softcap = softcap > 0.0 ? static_cast<float>(softcap) : 0.0f;
    args.dropout_p = dropout_p;
    args.seed = read_seed(seed, dropout_p);
}

void check_dtypes(const AttentionForward& args) {
    check_floating(args.query, "query");
    check_dtype(args.key, "key", {args.query.dtype});
    check_dtype(args.value, "value", {args.query.dtype});
    check_dtype(args.out, "out", {args.query.dtype});
    check_dtype(args.lse, "lse", {DType::kFloat32});
    check_writable(args.out, "out");
    check_writable(args.lse, "lse");
}

// Of the sizes that args.batch … args.max_k give.
void check_heads_and_bias(const AttentionForward& args) {
    if (args.kv_heads > 0 ? args.heads % args.kv_heads != 0 : args.heads > 0) {
        value_error("query has " + std::to_string(args.heads) + " heads, which is no multiple of key's " +
                    std::to_string(args.kv_heads));
    }
    if (args.mask.present()) {
        check_dtype(args.mask, "attn_mask", {DType::kBool, DType::kFloat32, args.query.dtype});
        check_rank(args.mask, "attn_mask", 4);
        const int64_t full[] = {args.batch, args.heads, args.max_q, args.max_k};
        for (int i = 0; i < 4; ++i) {
            if (args.mask.size[i] != 1 && args.mask.size[i] != full[i]) {
                value_error("each dimension of attn_mask must be 1 or that of (batch, heads, q, k) = (" +
                            std::to_string(full[0]) + ", " + std::to_string(full[1]) + ", " + std::to_string(full[2]) +
                            ", " + std::to_string(full[3]) + "), got a " + shape_text(args.mask));
            }
        }
    }
    if (args.alibi_slopes.present()) {
        check_dtype(args.alibi_slopes, "alibi_slopes", {DType::kFloat32});
        if (args.alibi_slopes.rank == 1) {
            check_shape(args.alibi_slopes, "alibi_slopes", {args.heads});
        } else {
            check_shape(args.alibi_slopes, "alibi_slopes", {args.batch, args.heads});
        }
    }
}

// `cu_seqlens` as (batch + 1,) running sums from 0 to total, of sequences no longer than `most`. Returns the longest.
int64_t check_cu_seqlens(const Tensor& cu_seqlens, const char* name, int64_t batch, int64_t total, int64_t most) {
    check_dtype(cu_seqlens, name, {DType::kInt32});
    check_shape(cu_seqlens, name, {batch + 1});
    check_contiguous(cu_seqlens, name);
    const int32_t* values = cu_seqlens.as<int32_t>();
    bool rising = values[0] == 0 && values[batch] == total;
    int64_t longest = 0;
    for (int64_t b = 0; rising && b < batch; ++b) {
        const int64_t length = int64_t{values[b + 1]} - values[b];
        rising = length >= 0;
        longest = std::max(longest, length);
    }
    if (!rising || longest > most) {
        value_error(std::string(name) + " must run from 0 to " + std::to_string(total) +
                    " without decreasing, in steps of at most max_seqlen = " + std::to_string(most));
    }
    return longest;
}

// (total, heads, dim) as (batch, heads, total, dim); (heads, total), of rank 2, as (batch, heads, total).
Tensor batched(const Tensor& packed, int64_t batch) {
    const bool rows = packed.rank == 2;
    const int head = rows ? 0 : 1, token = rows ? 1 : 0;
    Tensor t = packed;
    t.rank = packed.rank + 1;
    t.size[0] = batch, t.size[1] = packed.size[head], t.size[2] = packed.size[token];
    t.stride[0] = 0, t.stride[1] = packed.stride[head], t.stride[2] = packed.stride[token];
    if (!rows) t.size[3] = packed.size[2], t.stride[3] = packed.stride[2];
    return t;
}

void attention_forward(Tensor query, Tensor key, Tensor value, Tensor attn_mask, Tensor alibi_slopes, Tensor seed,
                       Tensor out, Tensor lse, double scale, int64_t window_left, int64_t window_right,
                       int64_t diagonal, double softcap, double dropout_p) {
    AttentionForward args = {};
    args.query = query, args.key = key, args.value = value, args.out = out, args.lse = lse;
    args.mask = attn_mask, args.alibi_slopes = alibi_slopes;
    check_dtypes(args);
    check_rank(query, "query", 4);
    check_rank(key, "key", 4);
    args.batch = query.size[0], args.heads = query.size[1], args.kv_heads = key.size[1];
    args.max_q = query.size[2], args.max_k = key.size[2];
    check_shape(key, "key", {args.batch, -1, -1, query.size[3]});
    check_shape(value, "value", {args.batch, args.kv_heads, args.max_k, -1});
    check_shape(out, "out", {args.batch, args.heads, args.max_q, value.size[3]});
    check_shape(lse, "lse", {args.batch, args.heads, args.max_q});
    check_heads_and_bias(args);
    set_settings(args, scale, window_left, window_right, diagonal, softcap, seed, dropout_p);
    run(&Kernels::attention_forward, args);
}

void attention_varlen_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                              Tensor attn_mask, Tensor alibi_slopes, Tensor seed, Tensor out, Tensor lse,
                              int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, int64_t window_left,
                              int64_t window_right, double softcap, double dropout_p) {
    AttentionForward args = {};
    args.query = query, args.key = key, args.value = value, args.out = out, args.lse = lse;
    args.mask = attn_mask, args.alibi_slopes = alibi_slopes;
    check_dtypes(args);
    check_rank(query, "query", 3);
    check_rank(key, "key", 3);
    check_rank(cu_seqlens_q, "cu_seqlens_q", 1);
    check(cu_seqlens_q.size[0] > 0, "cu_seqlens_q must have at least one element, 0");
    check_shape(key, "key", {-1, -1, query.size[2]});
    check_shape(value, "value", {key.size[0], key.size[1], -1});
    check_shape(out, "out", {query.size[0], query.size[1], value.size[2]});
    check_shape(lse, "lse", {query.size[1], query.size[0]});
    args.batch = cu_seqlens_q.size[0] - 1, args.heads = query.size[1], args.kv_heads = key.size[1];
    const int64_t longest_q = check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", args.batch, query.size[0], max_seqlen_q);
    const int64_t longest_k = check_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", args.batch, key.size[0], max_seqlen_k);
    args.cu_seqlens_q = cu_seqlens_q, args.cu_seqlens_k = cu_seqlens_k;
    args.max_q = max_seqlen_q, args.max_k = max_seqlen_k;
    check_heads_and_bias(args);
    args.max_q = longest_q, args.max_k = longest_k;
    for (Tensor* t : {&args.query, &args.key, &args.value, &args.out, &args.lse}) *t = batched(*t, args.batch);
    set_settings(args, scale, window_left, window_right, 0, softcap, seed, dropout_p);
    run(&Kernels::attention_forward, args);
}

void attention_with_kvcache_forward(Tensor query, Tensor k_cache, Tensor v_cache, Tensor k, Tensor v,
                                    Tensor cache_seqlens, Tensor block_table, Tensor alibi_slopes, Tensor out,
                                    Tensor lse, double scale, int64_t window_left, int64_t window_right,
                                    double softcap) {
    AttentionForward args = {};
    args.query = query, args.key = k_cache, args.value = v_cache, args.out = out, args.lse = lse;
    args.alibi_slopes = alibi_slopes, args.cache_seqlens = cache_seqlens;
    check(!block_table.present(), "block_table must be None: this kernel has no paged caches");
    check_dtypes(args);
    check_rank(query, "query", 4);
    check_rank(k_cache, "k_cache", 4);
    args.batch = query.size[0], args.heads = query.size[1], args.kv_heads = k_cache.size[1];
    args.max_q = query.size[2];
    const int64_t capacity = k_cache.size[2];
    check_shape(k_cache, "k_cache", {args.batch, -1, -1, query.size[3]});
    check_shape(v_cache, "v_cache", {args.batch, args.kv_heads, capacity, -1});
    check_shape(out, "out", {args.batch, args.heads, args.max_q, v_cache.size[3]});
    check_shape(lse, "lse", {args.batch, args.heads, args.max_q});
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
    check_dtype(cache_seqlens, "cache_seqlens", {DType::kInt32});
    check_shape(cache_seqlens, "cache_seqlens", {args.batch});
    check_contiguous(cache_seqlens, "cache_seqlens");
    for (int64_t b = 0; b < args.batch; ++b) {
        const int64_t length = cache_seqlens.as<int32_t>()[b], total = length + args.new_keys;
        if (length < 0 || total > capacity) {
            value_error("cache_seqlens[" + std::to_string(b) + "] is " + std::to_string(length) + "; with " +
                        std::to_string(args.new_keys) + " new keys it must lie between 0 and the cache's capacity, " +
                        std::to_string(capacity));
        }
        args.max_k = std::max(args.max_k, total);
    }
    check_heads_and_bias(args);
    set_settings(args, scale, window_left, window_right, 0, softcap, {}, 0.0);
    run(&Kernels::attention_forward, args);
}

Binding binding([](py::module_& m) {
    using py::arg;
    m.def("attention_forward", &attention_forward, arg("query"), arg("key"), arg("value"), arg("attn_mask"),
          arg("alibi_slopes"), arg("seed"), arg("out"), arg("lse"), arg("scale"), arg("window_left"),
          arg("window_right"), arg("diagonal"), arg("softcap"), arg("dropout_p"));
    m.def("attention_varlen_forward", &attention_varlen_forward, arg("query"), arg("key"), arg("value"),
          arg("cu_seqlens_q"), arg("cu_seqlens_k"), arg("attn_mask"), arg("alibi_slopes"), arg("seed"), arg("out"),
          arg("lse"), arg("max_seqlen_q"), arg("max_seqlen_k"), arg("scale"), arg("window_left"), arg("window_right"),
          arg("softcap"), arg("dropout_p"));
    m.def("attention_with_kvcache_forward", &attention_with_kvcache_forward, arg("query"), arg("k_cache"),
          arg("v_cache"), arg("k"), arg("v"), arg("cache_seqlens"), arg("block_table"), arg("alibi_slopes"), arg("out"),
          arg("lse"), arg("scale"), arg("window_left"), arg("window_right"), arg("softcap"));
});

}  // namespace
}  // namespace fastattn
