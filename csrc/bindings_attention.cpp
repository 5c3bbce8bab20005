#include "bindings_attention.h"

#include <algorithm>

namespace fastattn {
namespace {

// Positions are added up in 64 bits; a window or diagonal beyond this is no limit anyway, whatever the lengths.
constexpr int64_t kFar = int64_t{1} << 40;

int64_t clamped(int64_t x) { return std::min(std::max(x, -kFar), kFar); }
int64_t clamped_window(int64_t x) { return x < 0 ? -1 : std::min(x, kFar); }

}  // namespace

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

void set_settings(AttentionScore& args, const AttentionSettings& settings) {
    args.scale = static_cast<float>(settings.scale);
    args.window_left = clamped_window(settings.window_left);
    args.window_right = clamped_window(settings.window_right);
    args.diagonal = clamped(settings.diagonal);
    args.softcap = settings.softcap > 0.0 ? static_cast<float>(settings.softcap) : 0.0f;
    args.dropout_p = settings.dropout_p;
    args.seed = read_seed(settings.seed, settings.dropout_p);
}

void set_dense(AttentionScore& args, const Tensor& query, const Tensor& key, const Tensor& value) {
    check_dtypes(query, key, value);
    check_rank(query, "query", 4);
    check_rank(key, "key", 4);
    args.batch = query.size[0], args.heads = query.size[1], args.kv_heads = key.size[1];
    args.max_q = query.size[2], args.max_k = key.size[2];
    check_shape(key, "key", {args.batch, -1, -1, query.size[3]});
    check_shape(value, "value", {args.batch, args.kv_heads, args.max_k, -1});
    check_heads_and_bias(args, query.dtype);
}

void set_packed(AttentionScore& args, const Tensor& query, const Tensor& key, const Tensor& value,
                const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k) {
    check_dtypes(query, key, value);
    check_rank(query, "query", 3);
    check_rank(key, "key", 3);
    check_rank(cu_seqlens_q, "cu_seqlens_q", 1);
    check(cu_seqlens_q.size[0] > 0, "cu_seqlens_q must have at least one element, 0");
    check_shape(key, "key", {-1, -1, query.size[2]});
    check_shape(value, "value", {key.size[0], key.size[1], -1});
    args.batch = cu_seqlens_q.size[0] - 1, args.heads = query.size[1], args.kv_heads = key.size[1];
    const int64_t longest_q = check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", args.batch, query.size[0], max_seqlen_q);
    const int64_t longest_k = check_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", args.batch, key.size[0], max_seqlen_k);
    args.cu_seqlens_q = cu_seqlens_q, args.cu_seqlens_k = cu_seqlens_k;
    args.max_q = max_seqlen_q, args.max_k = max_seqlen_k;
    check_heads_and_bias(args, query.dtype);
    args.max_q = longest_q, args.max_k = longest_k;
}

void check_dtypes(const Tensor& query, const Tensor& key, const Tensor& value) {
    check_floating(query, "query");
    check_dtype(key, "key", {query.dtype});
    check_dtype(value, "value", {query.dtype});
}

void check_heads_and_bias(const AttentionScore& args, DType dtype) {
    if (args.kv_heads > 0 ? args.heads % args.kv_heads != 0 : args.heads > 0) {
        value_error("query has " + std::to_string(args.heads) + " heads, which is no multiple of key's " +
                    std::to_string(args.kv_heads));
    }
    if (args.mask.present()) {
        check_dtype(args.mask, "attn_mask", {DType::kBool, DType::kFloat32, dtype});
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

void check_output(const Tensor& tensor, const char* name, DType dtype, std::initializer_list<int64_t> shape) {
    check_dtype(tensor, name, {dtype});
    check_shape(tensor, name, shape);
    check_output(tensor, name);
}

Tensor batched(const Tensor& packed, int64_t batch) {
    if (!packed.present()) return packed;
    const bool rows = packed.rank == 2;
    const int head = rows ? 0 : 1, token = rows ? 1 : 0;
    Tensor t = packed;
    t.rank = packed.rank + 1;
    t.size[0] = batch, t.size[1] = packed.size[head], t.size[2] = packed.size[token];
    t.stride[0] = 0, t.stride[1] = packed.stride[head], t.stride[2] = packed.stride[token];
    if (!rows) t.size[3] = packed.size[2], t.stride[3] = packed.stride[2];
    return t;
}

}  // namespace fastattn
