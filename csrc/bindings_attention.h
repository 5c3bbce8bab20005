// What the bindings of attention check alike, forward and backward. Packed tensors (total, heads, dim) go to the
// kernels as (batch, heads, total, dim) with a batch stride of 0.
#pragma once

#include "bindings.h"

namespace fastattn {

struct AttentionSettings {
    double scale;
    int64_t window_left, window_right, diagonal;
    double softcap;
    Tensor seed;
    double dropout_p;
};
void set_settings(AttentionScore& args, const AttentionSettings& settings);

// Dtypes and shapes of query (batch, heads, q, dim), key and value (batch, kv_heads, k, …), which give args' sizes, and
// of the mask and the slopes by those.
void set_dense(AttentionScore& args, const Tensor& query, const Tensor& key, const Tensor& value);

// The same of (total, heads, dim) tensors. The longest sequences become args.max_q and args.max_k.
void set_packed(AttentionScore& args, const Tensor& query, const Tensor& key, const Tensor& value,
                const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k);

// `cu_seqlens` as (batch + 1,) running sums from 0 to total, of sequences no longer than `most`. Returns the longest.
int64_t check_cu_seqlens(const Tensor& cu_seqlens, const char* name, int64_t batch, int64_t total, int64_t most);

// `cache_seqlens` as (batch,) lengths that leave room for `added` keys in a cache. Returns the longest, those with it.
int64_t check_cache_seqlens(const Tensor& cache_seqlens, int64_t batch, int64_t added, int64_t capacity);

// That key and value have query's floating dtype.
void check_dtypes(const Tensor& query, const Tensor& key, const Tensor& value);

// That heads are a multiple of kv_heads, and mask and slopes fit args.batch … args.max_k.
void check_heads_and_bias(const AttentionScore& args, DType dtype);

// A tensor that is written to, of this dtype and shape.
void check_output(const Tensor& tensor, const char* name, DType dtype, std::initializer_list<int64_t> shape);

// (total, heads, dim) as (batch, heads, total, dim); (heads, total), of rank 2, as (batch, heads, total). An absent
// tensor stays absent.
Tensor batched(const Tensor& packed, int64_t batch);

}  // namespace fastattn
